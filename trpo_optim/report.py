"""What a step says of itself: its figures, and how it ended."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, fields
from typing import Literal

__all__ = ["Engine", "Outcome", "StepReport"]

Engine = Literal["Gauss-Newton", "torch.func", "double backward", "finite differences", "autograd"]
"""What differentiates a closure; the earlier of two is the better."""


class Outcome(enum.Enum):
    """How a step ended; the values are short names that do not change."""

    ACCEPTED = "accepted"
    ZERO_GRADIENT = "zero_gradient"
    ZERO_LEARNING_RATE = "zero_learning_rate"
    NON_FINITE_LOSS = "non_finite_loss"
    NON_FINITE_KL = "non_finite_kl"
    NON_FINITE_GRADIENT = "non_finite_gradient"
    NON_FINITE_CURVATURE = "non_finite_curvature"
    NON_FINITE_TRIAL = "non_finite_trial"
    NON_POSITIVE_CURVATURE = "non_positive_curvature"
    KL_ABOVE_RADIUS = "kl_above_radius"
    NO_IMPROVEMENT = "no_improvement"

    @property
    def message(self) -> str:
        """What happened, and what to do about it."""
        return _MESSAGES[self]

    @classmethod
    def _missing_(cls, value: object) -> Outcome | None:
        """Find a member by the sentence that was its value in early pickles."""
        return next((each for each, start in _EARLY.items() if str(value).startswith(start)), None)


_MESSAGES = {
    Outcome.ACCEPTED: "The step was taken.",
    Outcome.ZERO_GRADIENT: (
        "The gradient of the loss is exactly zero, so there is no direction to go; the "
        "parameters are unchanged. Look for advantages that are all zero, or a policy that has "
        "saturated."
    ),
    Outcome.ZERO_LEARNING_RATE: (
        "lr is 0, or a schedule brought max_kl or max_norm to 0, so the step has no length; the "
        "parameters are unchanged. Raise the one that is 0, or stop the schedule that lowered it."
    ),
    Outcome.NON_FINITE_LOSS: (
        "The loss is NaN or infinite at the current parameters, which are unchanged. Look for "
        "NaN in the batch (observations, advantages), for overflow in exp(log_prob - "
        "old_log_prob), and for actions that are masked out or at the very end of a bounded "
        "support."
    ),
    Outcome.NON_FINITE_KL: (
        "The KL is NaN or infinite at the current parameters, which are unchanged. Look for "
        "zero probabilities or scales in the old or the new distribution, and for another "
        "action mask in one of them."
    ),
    Outcome.NON_FINITE_GRADIENT: (
        "The gradient of the loss holds NaN or infinity; the parameters are unchanged. Look for "
        "sqrt, log or division at zero, or for overflow, in the policy."
    ),
    Outcome.NON_FINITE_CURVATURE: (
        "A Fisher-vector product holds NaN or infinity; the parameters are unchanged. Look for "
        "second derivatives of the KL at a point where it is not smooth (clamp, abs, norm at "
        "zero)."
    ),
    Outcome.NON_FINITE_TRIAL: (
        "The step, or the loss or the KL after it, is NaN or infinite; the step was withdrawn. "
        "Lower max_kl (mode 'vanilla': lr or max_norm), or bound the policy's scales and "
        "logits."
    ),
    Outcome.NON_POSITIVE_CURVATURE: (
        "The KL does not curve upwards along the gradient, so no step length follows from the "
        "radius; the parameters are unchanged. Check that the second value is KL(old || new), "
        "not its negative nor a mean of log-probabilities (sampled_kl has the right "
        "derivatives), that the distribution is the third value where it is a Laplace, whose KL "
        "has a kink, and that the policy has not become deterministic; or raise damping."
    ),
    Outcome.KL_ABOVE_RADIUS: (
        "The line search ended with the KL still above max_kl; the step was withdrawn. Check "
        "that the closure evaluates the same batch each time; raise damping, cg_iterations or "
        "max_backtracks."
    ),
    Outcome.NO_IMPROVEMENT: (
        "The line search ended without enough improvement of the loss; the step was withdrawn. "
        "Lower max_kl, use a larger batch, lower improvement_ratio or raise max_backtracks; if "
        "it happens at every step, check that the loss depends on the parameters' values and "
        "that the closure evaluates the same batch each time."
    ),
}

_EARLY = {
    Outcome.ACCEPTED: "The step was taken",
    Outcome.ZERO_GRADIENT: "The gradient of the loss is exactly zero",
    Outcome.ZERO_LEARNING_RATE: "lr is 0, so the step has no length",
    Outcome.NON_FINITE_LOSS: "The loss is NaN or infinite at the current parameters",
    Outcome.NON_FINITE_KL: "The KL is NaN or infinite at the current parameters",
    Outcome.NON_FINITE_GRADIENT: "The gradient of the loss holds NaN or infinity",
    Outcome.NON_FINITE_CURVATURE: "A Fisher-vector product holds NaN or infinity",
    Outcome.NON_FINITE_TRIAL: "The step, or the loss or the KL after it, is NaN or infinite",
    Outcome.NON_POSITIVE_CURVATURE: "The KL does not curve upwards along the gradient",
    Outcome.KL_ABOVE_RADIUS: "The line search ended with the KL still above max_kl",
    Outcome.NO_IMPROVEMENT: "The line search ended without enough improvement",
}
"""How the sentence began that was a member's value in early pickles; it does not change."""


_NAN = float("nan")


@dataclass(frozen=True, eq=False)
class StepReport:
    """The figures of one step, as plain numbers; two are equal if every figure is, NaN included.

    ``loss_after``, ``improvement``, ``kl``, ``step_scale`` and ``step_norm`` describe the policy as
    ``step`` leaves it: after a rejected step they say that nothing moved. ``trial_loss``,
    ``trial_kl`` and the two predictions describe the trial that the line search ended with, taken
    or not. A figure that the step did not reach, or that the mode does not need, is NaN (a count:
    0).

    Attributes:
        outcome: How the step ended.
        accepted: Whether the step was taken; true exactly for ``Outcome.ACCEPTED``.
        loss_before: The closure's first value at the old parameters.
        loss_after: The closure's first value at the parameters that the step leaves.
        improvement: How much better the first value became: its fall, or its rise with
            ``maximize``.
        predicted_improvement: gᵀs for the trial, from the gradient alone.
        kl: The closure's KL at the parameters that the step leaves, in nats.
        largest_kl: The largest KL of a sample there, in nats; NaN where the closure gives the mean.
        predicted_kl: ½ sᵀFs for the trial, in nats, undamped.
        step_scale: The multiple of the full step that was taken: 1 without a line search; with
            one, ``lr`` times √0.97, unless it shortened or lengthened the step.
        step_norm: L2 length of the move in parameter space, as the parameters' precision kept it:
            0 where a step is too small for bfloat16 to show.
        gradient_norm: L2 length of the gradient of the loss.
        curvature: xᵀFx, with x the (unscaled) direction and F undamped.
        cg_iterations: Iterations of conjugate gradient behind the direction.
        cg_residual: ‖g − (F + λI)x‖ / ‖g‖ at its end.
        damping: λ of the solve: the hyperparameter, or what stood in for None.
        backtracks: How many further trials the line search made after the first, including a
            longer one, and the one that ``lr`` below 1 asks for.
        trial_loss: The closure's first value at the trial.
        trial_kl: The closure's KL at the trial, in nats.
        trial_largest_kl: The largest KL of a sample at the trial, in nats, or NaN.
        closure_evaluations: How often a closure was called, all of a step's together; with a
            process group, on the rank that called most.
        fisher_products: How many Fisher-vector products the solve made.
        engine: What differentiated the closure. ``"Gauss-Newton"``: its third value served.
            ``"torch.func"``: it returned two values. ``"double backward"``: neither was possible.
            ``"finite differences"``: torch cannot differentiate it twice, or gets it wrong.
            ``"autograd"``: first derivatives alone (mode ``"vanilla"``). Of several closures with
            different engines, the last of these. Empty: the step did not come so far.
        fallback: Why the products are not Gauss–Newton, which is the fastest engine. Empty if they
            are, and in mode ``"vanilla"``.
        max_kl: The radius δ, in nats; NaN without one, and in mode ``"vanilla"``.
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
        """Derive ``accepted`` from the outcome, so that the two cannot disagree."""
        object.__setattr__(self, "accepted", self.outcome is Outcome.ACCEPTED)

    def __eq__(self, other: object) -> bool:
        """Compare figure by figure; a NaN equals a NaN."""
        return isinstance(other, StepReport) and repr(self) == repr(other)

    def __hash__(self) -> int:
        """Hash as reports compare."""
        return hash(repr(self))

    def __str__(self) -> str:
        """Return the step in one line of less than 120 characters."""
        facts = []
        if math.isfinite(self.trial_kl):
            radius = f" of {self.max_kl:.3g}" if math.isfinite(self.max_kl) else ""
            change = self.trial_loss - self.loss_before
            facts += [f"KL {self.trial_kl:.2g}{radius}", f"loss {change:+.2g}"]
        if not math.isnan(self.trial_loss):
            facts.append(_counted(self.backtracks + 1, "trial"))
        if self.fisher_products:
            facts.append(_counted(self.fisher_products, "product"))
        if facts and self.engine:
            facts.append(self.engine)
        return ": ".join(filter(None, [self.outcome.value.replace("_", " "), ", ".join(facts)]))

    def as_dict(self) -> dict[str, float]:
        """Return the figures that are finite, by name, for loggers.

        Texts are attributes alone. ``accepted`` is 1 or 0. Figures that are NaN or infinite are
        left out.

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
