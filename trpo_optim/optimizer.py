"""The optimizer: one closure in, one safe step and one report out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from trpo_optim.algorithm.preconditioner import DiagonalPreconditioner
from trpo_optim.algorithm.step import take_step
from trpo_optim.closure.closures import Closures, collected
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.parameter_memory import begin, to_remember
from trpo_optim.closure.parameters import trainable
from trpo_optim.distributed.collectives import GROUP_DESTROYED, GROUP_NOT_COPIED, require_member
from trpo_optim.distributed.consistency import Ready
from trpo_optim.distributed.ddp import require_all_parameters, unwrapped
from trpo_optim.distributed.rank_batch import prepared
from trpo_optim.errors import TrustRegionError
from trpo_optim.groups import AgreeingGroups
from trpo_optim.hyperparameters import (
    Constraint,
    EngineName,
    Hyperparameters,
    ModeName,
    PreconditionerName,
)
from trpo_optim.report import Outcome, StepReport
from trpo_optim.torch_private import never_compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TrustRegionOptimizer"]


class TrustRegionOptimizer(AgreeingGroups):
    """TRPO, natural policy gradient and vanilla policy gradient as a ``torch.optim`` optimizer.

    ``step(closure)`` takes one step, whole or not at all, and returns a ``StepReport``. A step
    moves the parameters and nothing else: buffers, random state and ``.grad`` stay as they were.
    Hooks on gradients are not called.

    The closure returns ``(loss, kl)``, two scalar tensors: the surrogate loss and the batch mean of
    KL(old ‖ new). The KL may also have shape (N,), one KL per sample; then its mean is used. The
    third value is optional: the new policy's distribution, or the tensors that parametrise it.
    Returning it does not change the result, but makes a step up to 1.8 times as fast. (Laplace
    policies require it.) The closure never calls ``backward()``.

    =========== ================== ================================== ============================
    mode        direction          length                             accepted if
    =========== ================== ================================== ============================
    ``trpo``    (F + λI)⁻¹ g       √(2δ / xᵀFx)                       KL ≤ δ, enough improvement
    ``natural`` (F + λI)⁻¹ g       the same; ``max_kl=None``: ``lr``  loss and KL are finite
    ``vanilla`` g                  ``lr``; with ``max_norm``, that    loss and KL are finite
    =========== ================== ================================== ============================

    g is the gradient of the loss, F the Hessian of the KL, λ the damping, δ the radius ``max_kl``
    and x the direction. A step does not depend on the scale of the loss, except where ``lr`` is a
    fixed rate.

    Every hyperparameter lives in ``param_groups``, and ``state_dict`` saves it. Change it in
    ``param_groups``, and the next step uses the new value. All groups must hold the same values,
    since one step has one length. A schedule may end at 0 for ``lr``, ``max_kl`` or ``max_norm``.

    Args:
        params: Tensors, ``named_parameters()`` or group dicts. All parameters are real floating
            point, lie on one device, and have memory of their own.
        mode: The row of the table: ``"trpo"``, ``"natural"`` or ``"vanilla"``.
        max_kl: δ, the radius of the trust region in nats, above 0: the limit for the batch mean of
            the joint KL(old ‖ new). None: no radius, ``lr`` is the fixed rate (mode ``"natural"``
            only). Start with 0.01 for discrete actions, and with 0.007 per dimension of a
            continuous action (found on nine MuJoCo tasks).
        constraint: Which KL the line search of mode ``"trpo"`` holds to ``max_kl``. ``"mean"``: the
            batch mean (the paper's equation 12). ``"max"``: the largest KL of a sample (equation
            11); the closure then returns ``joint_kl(old, new)``. Direction and length use the mean
            KL in both cases. The other modes hold no KL.
        max_norm: The L2 length of the step, above 0 (mode ``"vanilla"`` only). None: ``lr`` is the
            fixed rate.
        lr: Scales the step, at least 0; the KL scales with ``lr²``. Leave it at 1 unless you use a
            scheduler. Do not copy Adam's 3e-4: the policy would hardly move. Mode ``"trpo"`` scales
            the step that its line search found; a value above 1 changes nothing there. None: 1.0.
            Where ``lr`` is the fixed rate, you must give a number.
        damping: λ, at least 0. None: 4 % of the mean curvature qᵀFq over an orthonormal basis q of
            the directions that the solve goes through. This follows the scale of F.
        cg_iterations: The most Fisher-vector products in one solve, at least 1.
        cg_tolerance: The solve stops at ‖residual‖ ≤ ``cg_tolerance`` · ‖g‖; in [0, 1).
        backtrack_ratio: Multiplies a trial step that improves too little; in (0, 1). A trial beyond
            the radius is shortened by the KL that it measured.
        max_backtracks: The most further trials of the line search, from 0 to 100. An ``lr`` below 1
            takes one more than that, unless this is 0.
        improvement_ratio: The least share of the predicted improvement that a trial must deliver;
            in [0, 1).
        maximize: Whether the closure's first value is an objective to be raised.
        engine: What makes Fisher-vector products. ``"auto"``: Gauss–Newton with the third value,
            ``torch.func`` without it, and finite differences for micro-batches, recurrence,
            convolutions, attention, checkpoints and parameters in FSDP.
        preconditioner: ``"diagonal"``: the direction is (F + λD)⁻¹ g, where D is 0.1 plus the root
            of the running mean of squared gradients. ``state_dict`` saves this root. ``"none"``:
            D = I, the default, which gained more on held-out batches. Mode ``"vanilla"`` has no
            solve and ignores it.
        preconditioner_decay: The share of that mean that a step keeps, in [0, 1). With parameters
            in half precision, at most 0.99: above, rounding stops the mean.
        process_group: The processes that take every step together, each with its own samples.
            ``torch.distributed.group.WORLD`` holds all processes. Means are over the samples of all
            ranks, and all ranks return the same report. The group is not saved and not in
            ``param_groups``. None: this process alone.

    Raises:
        TrustRegionError: If a hyperparameter, a parameter or the process group is not valid.

    Example:
        >>> import torch
        >>> from torch.distributions import Categorical
        >>> from trpo_optim import TrustRegionOptimizer, frozen, mean_kl
        >>> logits = torch.zeros(1, 2, requires_grad=True)  # the policy of a two-armed bandit
        >>> optimizer = TrustRegionOptimizer([logits], max_kl=0.01)
        >>> actions, advantages = torch.tensor([0, 1]), torch.tensor([-1.0, 1.0])
        >>> old = frozen(Categorical(logits=logits))
        >>> def closure():
        ...     new = Categorical(logits=logits)
        ...     ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        ...     return -(ratio * advantages).mean(), mean_kl(old, new), new
        >>> print(optimizer.step(closure))
        accepted: KL 0.0097 of 0.01, loss change -0.14, 1 trial, 1 product, Gauss-Newton

    Source:
        Schulman et al., "Trust Region Policy Optimization", ICML 2015 (arXiv 1502.05477), appendix
        C; Kakade, "A Natural Policy Gradient", NIPS 2001.
    """

    last_report: StepReport | None = None
    """The report of the last step, or None before the first."""

    def __init__(
        self,
        params: ParamsT,
        *,
        mode: ModeName = "trpo",
        max_kl: float | None = 0.01,
        constraint: Constraint = "mean",
        max_norm: float | None = None,
        lr: float | None = None,
        damping: float | None = None,
        cg_iterations: int = 10,
        cg_tolerance: float = 1e-4,
        backtrack_ratio: float = 0.5,
        max_backtracks: int = 10,
        improvement_ratio: float = 0.1,
        maximize: bool = False,
        engine: EngineName = "auto",
        preconditioner: PreconditionerName = "none",
        preconditioner_decay: float = 0.9,
        process_group: ProcessGroup | None = None,
    ) -> None:
        require_all_parameters()
        self.process_group = process_group
        self._lr_given = lr is not None
        defaults = Hyperparameters(
            mode=mode,
            max_kl=max_kl,
            constraint=constraint,
            max_norm=max_norm,
            lr=1.0 if lr is None else lr,
            damping=damping,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
            backtrack_ratio=backtrack_ratio,
            max_backtracks=max_backtracks,
            improvement_ratio=improvement_ratio,
            maximize=maximize,
            engine=engine,
            preconditioner=preconditioner,
            preconditioner_decay=preconditioner_decay,
        )
        super().__init__(params, asdict(defaults))

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that take every step together, or None for this process alone.

        The optimizer does not keep the group alive: ``destroy_process_group()`` ends it.

        Raises:
            TrustRegionError: If the group was destroyed.
        """
        group = None if self._process_group is None else self._process_group()
        if self._process_group is not None and group is None:
            raise TrustRegionError(GROUP_DESTROYED)
        return group

    @process_group.setter
    def process_group(self, group: ProcessGroup | None) -> None:
        require_member(group)
        self._process_group = None if group is None else weakref.ref(group)

    @never_compiled
    @torch.no_grad()
    def step(  # type: ignore[override]  # the closure returns two values and step a report, where torch has one float
        self,
        closure: Closure | Closures | Iterable[Closure] | None = None,
        *,
        curvature: Closure | None = None,
        weights: Iterable[float] | float | None = None,
    ) -> StepReport:
        """Take one step, or none.

        Args:
            closure: Takes no argument and returns ``(loss, kl)`` or ``(loss, kl, dist)``. It is
                called once with derivatives, and once per trial without. The first step, and
                products by finite differences, call it more often. A list of closures, one per
                micro-batch, stands for their weighted mean and takes the memory of one. A
                ``Closures`` object is such a list with its weights and curvature.
            curvature: A closure of the same kind on a part of the batch. Its KL gives the
                Fisher-vector products, and its loss is ignored. The gradient, the trials and the
                acceptance use ``closure``. Mode ``"vanilla"`` ignores it.
            weights: One number above 0 per closure of a list, usually its number of samples. None:
                all count equally. With a process group, ``weights`` also weighs the ranks, and a
                single closure has a number. A rank without samples passes the weight 0 (its closure
                is not called) or an empty list.

        Returns:
            The report, also kept as ``last_report``.

        Raises:
            TrustRegionError: If a closure or a hyperparameter is misused. Nothing has moved.
            RankError: If another rank raised, was lost or differs. Nothing has moved, unless a rank
                was lost during the last message.
        """
        if closure is None and all(group["lr"] == 0 for group in self.param_groups):
            # torch.distributed.checkpoint calls this to have the state made before it loads one.
            if self._settings().keeps_gradients:
                begin(self.state, trainable(self.param_groups))
            return StepReport(Outcome.ZERO_LEARNING_RATE)
        group = self.process_group

        def prepare() -> Ready:
            settings = self._settings()
            closures = collected(closure, weights, curvature, shared=group is not None)
            return Ready.of(self.param_groups, settings, closures, self.state, group)

        with torch.inference_mode(False), torch.no_grad():
            ready, batch = prepared(prepare, group, self.param_groups)
            figures: dict[str, Any] = {}
            ranks = unwrapped(group, ready.vector, batch.in_step)
            with batch.sums(), ready.transaction as transaction, ranks:
                transaction.begin()
                preconditioner = None
                if ready.memory is not None:
                    decay = ready.settings.preconditioner_decay
                    preconditioner = DiagonalPreconditioner(ready.memory, decay)
                    begin(self.state, ready.vector.parameters)
                outcome = take_step(batch, transaction, ready.settings, figures, preconditioner)
                report = batch.concluded(StepReport(outcome, **figures))
                if report.accepted:
                    kept: Any = ()
                    if preconditioner is not None:
                        kept = to_remember(self.state, ready.vector, preconditioner.roots)
                    transaction.commit(*kept)
                else:
                    transaction.roll_back()
        self.last_report = report
        return report

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and the last report.

        Raises:
            TrustRegionError: If the optimizer has a process group. It belongs to this process.
        """
        if self._process_group is not None:
            raise TrustRegionError(GROUP_NOT_COPIED)
        own = {"last_report": self.last_report, "_lr_given": self._lr_given}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a state, and fill in hyperparameters that an older version did not save."""
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)  # load_state_dict comes by here, too
        self.__dict__.setdefault("_lr_given", True)
        Hyperparameters.complete(self.param_groups, self.defaults)
