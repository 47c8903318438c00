"""The optimizer: one closure in, one safe step and one report out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import ParamsT

from trpo_optim.algorithm.step import take_step
from trpo_optim.closure.closures import Closures, collected
from trpo_optim.closure.evaluation import Closure
from trpo_optim.closure.parameters import ParameterVector, require_real, trainable
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.engine_choice import learned
from trpo_optim.distributed.collectives import (
    GROUP_DESTROYED,
    GROUP_NOT_COPIED,
    Reduction,
    require_member,
)
from trpo_optim.distributed.consistency import Ready, agreed
from trpo_optim.distributed.ddp import require_all_parameters, unwrapped
from trpo_optim.distributed.rank_batch import SharedBatch
from trpo_optim.errors import TrustRegionError
from trpo_optim.hyperparameters import Constraint, Hyperparameters, ModeName
from trpo_optim.report import Outcome, StepReport
from trpo_optim.torch_private import never_compiled

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["TrustRegionOptimizer"]


class TrustRegionOptimizer(torch.optim.Optimizer):
    """Trust-region policy optimization, natural and vanilla policy gradient, as an optimizer.

    ``step(closure)`` takes one step that is safe: taken whole or not at all. The closure returns
    ``(loss, kl)``: the surrogate loss and the batch mean of KL(old ‖ new), two scalar tensors; or,
    for the mean, the KL of every sample, shape (N,). It may return as a third value the new
    policy's distribution, or the tensors that parametrise it: that changes no result (but a Laplace
    policy needs it) and nearly halves the price. It never calls ``backward()``.

    =========== ================== ==================================== =========================
    mode        direction          length                               accepted if
    =========== ================== ==================================== =========================
    ``trpo``    (F + λI)⁻¹ g       √(2δ / xᵀFx)                         KL ≤ δ and it improves
    ``natural`` (F + λI)⁻¹ g       the same; ``max_kl=None``: rate      finite
    ``vanilla`` g                  ``lr``; with ``max_norm``: L2 ball   finite
    =========== ================== ==================================== =========================

    Every hyperparameter lives in ``param_groups`` and may be changed there between steps; all
    groups must agree, since one step has one length. A schedule may bring a length to 0. An
    optimizer step moves the parameters and nothing else: buffers, random state and ``.grad`` are
    afterwards what they were. Hooks on gradients are not called.

    Args:
        params: What torch.optim takes: tensors, ``named_parameters()`` or group dicts.
        mode: ``"trpo"``, ``"natural"`` or ``"vanilla"``.
        max_kl: δ, the trust region's radius in nats: the batch mean of the joint KL(old ‖ new).
            None, with mode ``"natural"`` alone: no radius, the fixed rate ``lr``. Start with 0.01
            for discrete actions, and with 0.007 per dimension of a continuous action (found on nine
            MuJoCo tasks, see docs/results.md). Both assume a KL summed over dimensions (joint).
        constraint: Mode ``"trpo"`` alone: which KL the line search holds to δ, the batch's
            ``"mean"`` or the ``"max"`` over samples, for which the closure returns one KL per
            sample. The mean gives curvature and length either way.
        max_norm: Mode ``"vanilla"`` alone: the L2 length of the step. None: the fixed rate ``lr``.
        lr: Multiplies the step; what learning-rate schedulers move. Mode ``"trpo"`` fits the step
            to ``max_kl`` first; there an ``lr`` above 1 changes nothing. None: 1.0. Mode
            ``"vanilla"`` without ``max_norm``, and mode ``"natural"`` with ``max_kl=None``, need a
            number: there ``lr`` is the rate itself.
        damping: λ ≥ 0 in (F + λI) x = g. None: 4 % of the mean curvature qᵀFq over an orthonormal
            basis q of the directions that the solve goes through.
        cg_iterations: Most Fisher-vector products in one solve.
        cg_tolerance: Stop the solve at ‖residual‖ ≤ ``cg_tolerance`` · ‖g‖.
        backtrack_ratio: What a trial that improves too little multiplies the step by. One beyond
            the radius is shortened by the KL that it measured.
        max_backtracks: How many further trials a step may take before it is given up. An ``lr``
            below 1 takes one more, unless this is 0.
        improvement_ratio: Least share of the predicted improvement that a trial must deliver.
        maximize: The closure's first value is an objective to be raised.
        process_group: The processes that take every step together, each on samples of its own
            (``torch.distributed.group.WORLD`` for all): means are over the samples of all ranks,
            and all ranks report the same. None: this process alone.

    Attributes:
        last_report: The report of the last step, or None before the first.

    Raises:
        TrustRegionError: If a hyperparameter, a parameter or the process group is not valid.

    Source:
        Schulman, Levine, Abbeel, Jordan & Moritz, "Trust Region Policy Optimization", ICML 2015
        (arXiv 1502.05477), appendix C; Kakade, "A Natural Policy Gradient", NIPS 2001.
    """

    last_report: StepReport | None = None

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
        )
        super().__init__(params, asdict(defaults))

    @property
    def process_group(self) -> ProcessGroup | None:
        """The processes that take every step together; None: this process alone.

        The optimizer does not keep the group alive, so that ``destroy_process_group()`` ends it.

        Raises:
            TrustRegionError: If the group was destroyed.
        """
        if self._process_group is None:
            return None
        group = self._process_group()
        if group is None:
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
                called once with derivatives (a few times more in the first step, and once per
                product by finite differences) and once per trial without. A list of closures, one
                per micro-batch, stands for their weighted mean and takes the memory of one: each
                is called once more for every product. ``Closures`` are such a list with its
                weights and curvature.
            curvature: A closure of the same kind, for a part of the batch: its KL gives the
                Fisher-vector products; its loss is not used. Gradient, trials and acceptance stay
                with ``closure``. Mode ``"vanilla"`` has no use for it.
            weights: One number above 0 per closure of a list, usually its number of samples.
                None: all the same. With a process group these weigh the ranks, too: a single
                closure then has a number, and a rank without samples the weight 0 (its closure is
                not called) or an empty list.

        Returns:
            What was done, also kept as ``last_report``.

        Raises:
            TrustRegionError: If a closure or a hyperparameter is misused; nothing has moved.
            RankError: With a process group: if another rank raised, was lost or has parted; nothing
                has moved.
        """
        if closure is None and all(group["lr"] == 0 for group in self.param_groups):
            return StepReport(Outcome.ZERO_LEARNING_RATE)  # torch.distributed.checkpoint does this
        with torch.inference_mode(False), torch.no_grad():
            ready, batch = self._prepared(closure, weights, curvature)
            figures: dict[str, Any] = {}
            with ready.transaction as transaction, unwrapped(self.process_group, ready.vector):
                transaction.begin()
                outcome = take_step(batch, transaction, ready.settings, figures)
                report = batch.concluded(StepReport(outcome, **figures))
                if report.accepted:
                    transaction.commit()
                else:
                    transaction.roll_back()
        self.last_report = report
        return report

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; its hyperparameters must be those of the other groups.

        Args:
            param_group: ``params``, and hyperparameters where they are given.

        Raises:
            TrustRegionError: If a parameter is not real, or a hyperparameter not valid or another.
        """
        lr_given = self._lr_given
        self._lr_given |= "lr" in param_group
        super().add_param_group(param_group)
        try:
            require_real(self.param_groups[-1])
            trainable(self.param_groups)
            Hyperparameters.of_group(self.param_groups[-1])
            self._settings()
        except BaseException:
            del self.param_groups[-1]
            self._lr_given = lr_given
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the hyperparameters of a saved state.

        Args:
            state_dict: What ``state_dict`` returned, once the pre-hooks have seen it.

        Raises:
            TrustRegionError: If it is that of another kind of optimizer.
        """
        check = self.register_load_state_dict_pre_hook(Hyperparameters.require_saved)  # the last
        try:
            super().load_state_dict(state_dict)
        finally:
            check.remove()
        self._lr_given |= Hyperparameters.of_groups(self.param_groups).lr_is_the_rate

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and the last report.

        Raises:
            TrustRegionError: If there is a process group, which belongs to this process.
        """
        if self._process_group is not None:
            raise TrustRegionError(GROUP_NOT_COPIED)
        own = {"last_report": self.last_report, "_lr_given": self._lr_given}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state back, filling in hyperparameters that an older one did not have."""
        super().__setstate__(state)
        self.__dict__.setdefault("_process_group", None)  # load_state_dict comes by here, too
        self.__dict__.setdefault("_lr_given", True)
        Hyperparameters.complete(self.param_groups, self.defaults)

    def _prepared(
        self,
        closure: Closure | Closures | Iterable[Closure] | None,
        weights: Iterable[float] | float | None,
        curvature: Closure | None,
    ) -> tuple[Ready, Batch | SharedBatch]:
        """Return what a step is taken with, checked; with a process group on all ranks alike."""
        shared = self.process_group is not None

        def prepare() -> Ready:
            settings, vector = self._settings(), ParameterVector(trainable(self.param_groups))
            transaction = Transaction(vector)
            closures = collected(closure, weights, curvature, shared=shared)
            choices = learned(self.param_groups[0])
            batch = Batch(closures, vector, transaction, choices) if closures.parts else None
            transaction.hold(closures.every)
            return Ready(settings, vector, transaction, closures, batch)

        if self.process_group is None:
            ready = prepare()
            assert ready.batch is not None  # as collected requires
            return ready, ready.batch
        reduction = Reduction(self.process_group, self.param_groups[0]["params"][0].device)
        ready, counts = agreed(reduction, prepare)
        return ready, SharedBatch(ready.batch, counts, ready.vector, reduction)

    def _settings(self) -> Hyperparameters:
        """Return the hyperparameters that all groups agree on, checked anew."""
        settings = Hyperparameters.of_groups(self.param_groups)
        self._lr_given |= settings.lr != 1.0  # it was set on the groups, by hand or a schedule
        if not self._lr_given:
            settings.require_lr()
        return settings
