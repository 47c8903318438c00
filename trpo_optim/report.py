"""What a step reports: its figures, and how it ended."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields
from typing import Literal

__all__ = ["Engine", "Outcome", "StepReport"]

Engine = Literal["Gauss-Newton", "torch.func", "double backward", "finite differences", "autograd"]
"""What differentiates a closure, from the best to the last resort."""


class Outcome(enum.Enum):
    """How a step ended.

    If the parameters did not move, the outcome says why. ``value`` is a short name that does not
    change, such as ``"accepted"``.

    Example:
        >>> import torch
        >>> from trpo_optim import Outcome, TrustRegionOptimizer
        >>> mean = torch.zeros(1, requires_grad=True)
        >>> optimizer = TrustRegionOptimizer([mean])
        >>> report = optimizer.step(lambda: ((mean * torch.inf).sum(), mean.square().sum()))
        >>> report.outcome is Outcome.NON_FINITE_LOSS
        True
        >>> print(report.outcome.message[:60])
        The loss is NaN or infinite at the current parameters, which
    """

    ACCEPTED = "accepted"
    """The step was taken."""
    ZERO_GRADIENT = "zero_gradient"
    """The gradient is exactly zero. Look for advantages that are all zero, a saturated policy."""
    ZERO_LEARNING_RATE = "zero_learning_rate"
    """``lr``, ``max_kl`` or ``max_norm`` is 0. Raise it, or stop the schedule that lowered it."""
    NON_FINITE_LOSS = "non_finite_loss"
    """NaN or infinity in the loss at the current parameters. Look at the batch, for overflow in the
    ratio, and for actions that are masked out or at the end of their range."""
    NON_FINITE_KL = "non_finite_kl"
    """NaN or infinity in the KL at the current parameters. Look for zero probabilities or scales,
    and for action masks that differ between old and new."""
    NON_FINITE_GRADIENT = "non_finite_gradient"
    """NaN or infinity in the gradient. Look for ``sqrt``, ``log`` or division at zero."""
    NON_FINITE_CURVATURE = "non_finite_curvature"
    """NaN or infinity in a Fisher-vector product. Look for points where the KL is not smooth."""
    NON_FINITE_TRIAL = "non_finite_trial"
    """NaN or infinity in the step, or in the loss or the KL after it. Lower ``max_kl`` (mode
    ``"vanilla"``: ``lr`` or ``max_norm``), or bound scales and logits."""
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    """The KL does not curve upwards along the gradient. Check its sign, that it is no mean of
    log-probabilities (see ``sampled_kl``), and that the policy is still random. Raise
    ``damping``."""
    KL_ABOVE_RADIUS = "kl_above_radius"
    """No trial came within ``max_kl``. Check that the closure evaluates one batch. Raise
    ``damping``, ``cg_iterations`` or ``max_backtracks``."""
    NO_IMPROVEMENT = "no_improvement"
    """No trial improved enough. Lower ``max_kl`` or use a larger batch. If it is so at every step,
    check that no part of the loss is detached and that the closure evaluates one batch."""

    @property
    def message(self) -> str:
        """What happened and what to do, in sentences."""
        return _MESSAGES[self]


_MESSAGES = {
    Outcome.ACCEPTED: "The step was taken.",
    Outcome.ZERO_GRADIENT: (
        "The gradient of the loss is exactly zero. There is no direction to go, and the parameters "
        "are unchanged. Look for advantages that are all zero and for a saturated policy."
    ),
    Outcome.ZERO_LEARNING_RATE: (
        "lr is 0, or a schedule brought max_kl or max_norm to 0. The step has no length, and the "
        "parameters are unchanged. Raise the one that is 0, or stop the schedule that lowered it."
    ),
    Outcome.NON_FINITE_LOSS: (
        "The loss is NaN or infinite at the current parameters, which are unchanged. Look for NaN "
        "in the batch (observations, advantages), for overflow in exp(log_prob - old_log_prob), "
        "and for actions that are masked out or at the very end of a bounded support."
    ),
    Outcome.NON_FINITE_KL: (
        "The KL is NaN or infinite at the current parameters, which are unchanged. Look for zero "
        "probabilities or scales in the old or the new distribution, and for action masks that "
        "differ between the two."
    ),
    Outcome.NON_FINITE_GRADIENT: (
        "The gradient of the loss holds NaN or infinity. The parameters are unchanged. Look for "
        "sqrt, log or division at zero in the policy, and for overflow."
    ),
    Outcome.NON_FINITE_CURVATURE: (
        "A Fisher-vector product holds NaN or infinity. The parameters are unchanged. Look for "
        "points where the KL is not smooth, such as clamp, abs or norm at zero."
    ),
    Outcome.NON_FINITE_TRIAL: (
        "The step, or the loss or the KL after it, is NaN or infinite. The step was withdrawn: a "
        "shorter step next to such a point is not safe. Lower max_kl (mode 'vanilla': lr or "
        "max_norm), or bound the policy's scales and logits."
    ),
    Outcome.NON_POSITIVE_CURVATURE: (
        "The KL does not curve upwards along the gradient, so the radius gives no step length. The "
        "parameters are unchanged. The second value must be KL(old || new), not its negative and "
        "not a mean of log-probabilities (sampled_kl has the right derivatives). A Laplace policy "
        "must return its distribution as the third value. Check these and that the policy is "
        "still random, or raise damping."
    ),
    Outcome.KL_ABOVE_RADIUS: (
        "The line search ended with the KL still above max_kl. The step was withdrawn. Check that "
        "the closure evaluates the same batch each time, or raise damping, cg_iterations or "
        "max_backtracks."
    ),
    Outcome.NO_IMPROVEMENT: (
        "The line search ended without enough improvement of the loss. The step was withdrawn. "
        "Lower max_kl, use a larger batch, lower improvement_ratio or raise max_backtracks. If "
        "rounded_away is near 1, keep the parameters in float32. If "
        "this happens at every step, the closure may evaluate another batch each time, or a part "
        "of its loss may be detached, as in exp(log_prob - log_prob.detach()). Check both by "
        "trpo_optim.testing.check_closure."
    ),
}


_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class StepReport:
    """The figures of one step, as plain numbers.

    ``loss_after``, ``improvement``, ``kl``, ``largest_kl``, ``step_scale`` and ``step_norm``
    describe the policy as ``step`` leaves it. After a rejected step they say that nothing moved.
    The three ``trial`` figures, the two predictions and ``rounded_away`` describe the last trial of
    the line search, accepted or not. A figure that the step did not reach, or that the mode does
    not need, is NaN. A count is then 0. Two reports are equal if all their figures are equal; NaN
    equals NaN.

    "Typically" means 90 % of TRPO's steps in training on CartPole-v1, Pendulum-v1, Hopper-v5 and
    HalfCheetah-v5 (30 steps each, 2048 samples a step). If such steps are accepted while the return
    falls, the loss has the wrong sign, or ``maximize`` is set on a loss.

    Attributes:
        outcome: How the step ended. ``outcome.message`` says what to do.
        accepted: Whether the step was taken: True for ``Outcome.ACCEPTED`` only.
        loss_before: The closure's first value at the old parameters.
        loss_after: The closure's first value at the parameters that the step leaves.
        improvement: How much better the first value became: its fall, or its rise with
            ``maximize``. Typically 0.6 to 1.1 times ``predicted_improvement``. If it is tiny beside
            a full ``kl``, shapes broadcast, or the advantages carry no signal. If it is far above
            the prediction, the closure evaluates another batch each time.
        predicted_improvement: gᵀs for the last trial, from the gradient alone.
        kl: The closure's KL at the parameters that the step leaves, in nats. Typically 0.93 to 0.99
            times ``max_kl``. If it is far below at every step, ``lr`` is small. If it is negative,
            which mode ``"vanilla"`` accepts, its sign is wrong.
        largest_kl: The largest KL of a sample there, in nats. Typically 2 to 20 times ``max_kl``
            with ``constraint="mean"``. NaN if the closure returns the mean.
        predicted_kl: ½ sᵀFs for the last trial, in nats, without damping.
        step_scale: The multiple of the full step that was taken: 1 without a line search. With one,
            ``lr`` times √0.97, unless the search shortened or lengthened the step.
        step_norm: L2 length of the move in parameter space, in the parameters' precision. 0 where a
            step is too small for bfloat16 to show.
        rounded_away: The share of the elements that the last trial was to move, and that rounding
            left where they were. About 0 in float32. Loss and KL are those of the rounded
            parameters. Above 0.5, steps gain less: keep the parameters in float32, such as float32
            adapters on a frozen base.
        gradient_norm: L2 length of the gradient of the loss.
        curvature: xᵀFx of the unscaled direction x, without damping.
        cg_iterations: Iterations of conjugate gradient.
        cg_residual: ‖g − (F + λI)x‖ / ‖g‖ at the end of the solve, typically below 0.1. With a
            preconditioner: of the scaled solve.
        damping: λ of the solve: the hyperparameter, or the number that replaced None. With a
            preconditioner: the factor of D.
        backtracks: Further trials of the line search after the first, typically 0 or 1. They
            include a longer trial, and the trial that ``lr`` below 1 takes.
        trial_loss: The closure's first value at the last trial.
        trial_kl: The closure's KL at the last trial, in nats.
        trial_largest_kl: The largest KL of a sample at the last trial, in nats, or NaN.
        closure_evaluations: Calls of all closures of the step, typically 2 or 3 after the first
            step. Finite differences add one per product and closure. With a process group: on the
            rank with the most calls.
        fisher_products: Fisher-vector products of the solve.
        engine: What differentiated the closure. ``"Gauss-Newton"``: its third value served.
            ``"torch.func"``: it returned two values. ``"double backward"``: neither was possible.
            ``"finite differences"``: exact products cost more, are wrong, or do not exist.
            ``"autograd"``: first derivatives alone (mode ``"vanilla"``). If several closures have
            different engines, this is the last of them in this order. Empty: the step ended before.
        fallback: Why this engine served and not Gauss–Newton, or that you named it. Empty if
            ``"auto"`` chose Gauss–Newton, and in mode ``"vanilla"``.
        max_kl: The radius δ, in nats. NaN without a radius, and in mode ``"vanilla"``.

    Example:
        >>> import torch
        >>> from trpo_optim import TrustRegionOptimizer
        >>> mean = torch.zeros(2, requires_grad=True)  # of a Gaussian with variance 1
        >>> optimizer = TrustRegionOptimizer([mean], max_kl=0.01)
        >>> report = optimizer.step(lambda: (-mean.sum(), mean.square().sum() / 2))
        >>> print(report)
        accepted: KL 0.0097 of 0.01, loss change -0.2, 1 trial, 1 product, torch.func
        >>> report.accepted, report.kl <= report.max_kl
        (True, True)
        >>> sorted(report.as_dict())[:3]
        ['accepted', 'backtracks', 'cg_iterations']
    """

    outcome: Outcome
    accepted: bool = field(init=False)
    loss_before: float = _NAN
    loss_after: float = _NAN
    improvement: float = 0.0
    predicted_improvement: float = _NAN
    kl: float = _NAN
    largest_kl: float = _NAN
    predicted_kl: float = _NAN
    step_scale: float = 0.0
    step_norm: float = 0.0
    rounded_away: float = _NAN
    gradient_norm: float = _NAN
    curvature: float = _NAN
    cg_iterations: int = 0
    cg_residual: float = _NAN
    damping: float = _NAN
    backtracks: int = 0
    trial_loss: float = _NAN
    trial_kl: float = _NAN
    trial_largest_kl: float = _NAN
    closure_evaluations: int = 0
    fisher_products: int = 0
    engine: Engine | Literal[""] = ""
    fallback: str = ""
    max_kl: float = _NAN

    def __post_init__(self) -> None:
        """Set ``accepted`` from the outcome, so that the two cannot disagree."""
        object.__setattr__(self, "accepted", self.outcome is Outcome.ACCEPTED)

    def __eq__(self, other: object) -> bool:
        """Return whether all figures are equal; NaN equals NaN."""
        return isinstance(other, StepReport) and repr(self) == repr(other)

    def __hash__(self) -> int:
        """Return the same number for equal reports."""
        return hash(repr(self))

    def __str__(self) -> str:
        """Return the step in one line of less than 120 characters."""
        facts = []
        if math.isfinite(self.trial_kl):
            radius = f" of {self.max_kl:.3g}" if math.isfinite(self.max_kl) else ""
            change = self.trial_loss - self.loss_before
            facts += [f"KL {self.trial_kl:.2g}{radius}", f"loss change {change:+.2g}"]
        if not math.isnan(self.trial_loss):
            facts.append(_counted(self.backtracks + 1, "trial"))
        if self.fisher_products:
            facts.append(_counted(self.fisher_products, "product"))
        if facts and self.engine:
            facts.append(self.engine)
        if self.accepted and self.rounded_away > 0.5:
            facts.append(f"{self.rounded_away:.0%} rounded away")
        return ": ".join(filter(None, [self.outcome.value.replace("_", " "), ", ".join(facts)]))

    def as_dict(self) -> dict[str, float]:
        """Return the finite figures by name, for loggers.

        Texts (``outcome``, ``engine``, ``fallback``) are left out, as are figures that are NaN or
        infinite. ``accepted`` is 1 or 0.

        Returns:
            Plain numbers, ready for TensorBoard, ``log_dict`` and ``json``.
        """
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: int(value) if isinstance(value, bool) else value
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
