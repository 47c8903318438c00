"""The optimizer: one closure in, one safe step and one report out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from trpo_optim.closure import Closure, Objective
from trpo_optim.closure_checks import require_moving_kl, require_zero_kl
from trpo_optim.curvature import LocalModel
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.line_search import Prediction, Trial
from trpo_optim.modes import MODES
from trpo_optim.parameter_vector import ParameterVector
from trpo_optim.report import Outcome, StepReport, TrustRegionError
from trpo_optim.transaction import Transaction

__all__ = ["TrustRegionOptimizer"]


class TrustRegionOptimizer(torch.optim.Optimizer):
    """Trust-region policy optimization, natural and vanilla policy gradient, as an optimizer.

    ``step(closure)`` takes one step that is safe: taken whole or not at all. The closure returns
    ``(loss, kl)``: the surrogate loss and the batch mean of KL(old ‖ new), two scalar tensors. It
    may return the new policy's distribution as a third value. It never calls ``backward()``.

    =========== ================== ==================================== =========================
    mode        direction          length                               accepted if
    =========== ================== ==================================== =========================
    ``trpo``    (F + λI)⁻¹ g       √(2δ / xᵀFx)                         KL ≤ δ and it improves
    ``natural`` (F + λI)⁻¹ g       the same; ``max_kl=None``: rate      finite
    ``vanilla`` g                  ``lr``; with ``max_norm``: L2 ball   finite
    =========== ================== ==================================== =========================

    Every hyperparameter lives in ``param_groups`` and may be changed there between steps; all
    groups must agree, since one step has one length. An optimizer step moves the parameters and
    nothing else: buffers, random state and ``.grad`` are afterwards what they were.

    Args:
        params: What torch.optim takes: tensors, ``named_parameters()`` or group dicts.
        mode: ``"trpo"``, ``"natural"`` or ``"vanilla"``.
        max_kl: δ, the trust region's radius in nats: the batch mean of the joint KL(old ‖ new).
            None, with mode ``"natural"`` alone: no radius, the fixed rate ``lr``.
        max_norm: Mode ``"vanilla"`` alone: the L2 length of the step. None: the fixed rate ``lr``.
        lr: Multiplies the step; what learning-rate schedulers move.
        damping: λ ≥ 0 in (F + λI) x = g.
        cg_iterations: Most Fisher-vector products in one solve.
        cg_tolerance: Stop the solve at ‖residual‖ ≤ ``cg_tolerance`` · ‖g‖.
        backtrack_ratio: What a trial that improves too little multiplies the step by. One beyond
            the radius is shortened by the KL that it measured.
        max_backtracks: How often a step may be shortened before it is given up.
        improvement_ratio: Least share of the predicted improvement that a trial must deliver.
        maximize: The closure's first value is an objective to be raised.

    Attributes:
        last_report: The report of the last step, or None before the first.

    Raises:
        TrustRegionError: If a hyperparameter or a parameter is not valid.

    Source:
        Schulman, Levine, Abbeel, Jordan & Moritz, "Trust Region Policy Optimization", ICML 2015
        (arXiv 1502.05477), appendix C; Kakade, "A Natural Policy Gradient", NIPS 2001.
    """

    last_report: StepReport | None = None

    def __init__(
        self,
        params: ParamsT,
        *,
        mode: str = "trpo",
        max_kl: float | None = 0.01,
        max_norm: float | None = None,
        lr: float = 1.0,
        damping: float = 0.1,
        cg_iterations: int = 10,
        cg_tolerance: float = 1e-4,
        backtrack_ratio: float = 0.5,
        max_backtracks: int = 10,
        improvement_ratio: float = 0.1,
        maximize: bool = False,
    ) -> None:
        defaults = Hyperparameters(
            mode=mode,
            max_kl=max_kl,
            max_norm=max_norm,
            lr=lr,
            damping=damping,
            cg_iterations=cg_iterations,
            cg_tolerance=cg_tolerance,
            backtrack_ratio=backtrack_ratio,
            max_backtracks=max_backtracks,
            improvement_ratio=improvement_ratio,
            maximize=maximize,
        )
        super().__init__(params, asdict(defaults))

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> StepReport:  # type: ignore[override]  # the closure returns two values and step a report, where torch has one float
        """Take one step, or none.

        Args:
            closure: Takes no argument and returns ``(loss, kl)`` or ``(loss, kl, dist)``. It is
                called once with derivatives and once per trial without.

        Returns:
            What was done, also kept as ``last_report``.

        Raises:
            TrustRegionError: If the closure or a hyperparameter is misused; nothing has moved.
        """
        settings = self._settings()
        vector = ParameterVector(self._trainable())
        figures: dict[str, Any] = {}
        with torch.inference_mode(False), torch.no_grad(), Transaction(vector) as transaction:
            transaction.begin()
            objective = Objective(closure, vector, transaction)
            outcome = _advance(objective, settings, figures)
            report = StepReport(outcome, closure_evaluations=objective.evaluations, **figures)
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
            TrustRegionError: If a parameter is not real floating point, or a hyperparameter is not
                valid or not that of the other groups.
        """
        super().add_param_group(param_group)
        try:
            _require_real(self.param_groups[-1])
            self._settings()
        except BaseException:
            del self.param_groups[-1]
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: torch's part and the last report."""
        return {**super().__getstate__(), "last_report": self.last_report}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take a state back, filling in hyperparameters that an older one did not have."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name in Hyperparameters.names():
                group.setdefault(name, self.defaults[name])

    def _trainable(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from (each for each in group["params"] if each.requires_grad)

    def _settings(self) -> Hyperparameters:
        """Return the hyperparameters that all groups agree on, checked anew."""
        names = Hyperparameters.names()
        settings = None
        for index, group in enumerate(self.param_groups):
            own = Hyperparameters(**{name: group[name] for name in names})
            group.update(asdict(own))  # plain numbers: NumPy's would not load with weights_only
            settings = own if settings is None else settings
            for name in names:
                first, here = getattr(settings, name), getattr(own, name)
                if here != first:
                    raise TrustRegionError(
                        f"{name} is {first!r} in param_groups[0] and {here!r} in "
                        f"param_groups[{index}]. One step has one radius and one length: give "
                        "every group the same value."
                    )
        assert settings is not None  # torch.optim refuses an empty list of parameters
        return settings


def _require_real(group: dict[str, Any]) -> None:
    names = group.get("param_names", range(len(group["params"])))
    for name, parameter in zip(names, group["params"], strict=True):
        if not parameter.is_floating_point():
            raise TrustRegionError(
                f"Parameter {name!r} is {parameter.dtype}; every parameter must be real floating "
                "point. Leave integers to buffers, and view complex ones as real "
                "(torch.view_as_real)."
            )


def _advance(objective: Objective, settings: Hyperparameters, figures: dict[str, Any]) -> Outcome:
    """Go through one step in the order of the paper, noting its figures on the way.

    Returns:
        How the step ended. On ``Outcome.ACCEPTED`` the parameters lie at the new point; otherwise
        anywhere.
    """
    mode = MODES[settings.mode]
    model = mode.linearize(objective)
    sign = 1.0 if settings.maximize else -1.0
    unit, norm = _normalized(sign * model.gradient)
    figures |= {"loss_before": model.loss, "loss_after": model.loss, "kl": model.kl}
    figures |= {"gradient_norm": norm, "engine": model.engine}
    if (flaw := _flaw(model, norm)) is not None:
        return flaw
    require_zero_kl(model.kl, model.kl_resolution, settings.max_kl)

    direction = mode.direction(model, unit, settings)
    figures |= {
        "curvature": norm * norm * direction.curvature,
        "cg_iterations": direction.iterations,
        "cg_residual": direction.residual,
        "fisher_products": direction.products,
    }
    if direction.flaw is not None:
        if direction.flaw is Outcome.NON_POSITIVE_CURVATURE:
            _require_moving_kl(objective, model, unit)
        return direction.flaw

    length = mode.length(settings, norm, direction.curvature)
    step = length * direction.vector
    step_norm = float(step.norm())
    if length == 0:
        return Outcome.ZERO_LEARNING_RATE
    if not math.isfinite(step_norm):
        return Outcome.NON_FINITE_TRIAL
    prediction = Prediction(
        improvement=norm * float(unit.dot(step)), kl=0.5 * length * length * direction.curvature
    )

    def attempt(scale: float) -> Trial:
        objective.move(step, scale)
        loss, kl = objective.values()
        return Trial(loss, kl, sign * (loss - model.loss))

    search = mode.search(attempt, prediction, settings)
    trial = search.trial
    figures |= {
        "predicted_improvement": search.scale * prediction.improvement,
        "predicted_kl": search.scale**2 * prediction.kl,
        "backtracks": search.backtracks,
        "trial_loss": trial.loss,
        "trial_kl": trial.kl,
    }
    if trial.finite and abs(trial.kl - model.kl) <= model.kl_resolution:
        _require_moving_kl(objective, model, step / step_norm)
    if search.outcome is Outcome.ACCEPTED:
        objective.move(step, search.scale)  # the last trial may have lain elsewhere
        figures |= {"loss_after": trial.loss, "improvement": trial.improvement, "kl": trial.kl}
        figures |= {"step_scale": search.scale, "step_norm": search.scale * step_norm}
    return search.outcome


def _normalized(vector: Tensor) -> tuple[Tensor, float]:
    """Return the unit vector and the length, of which no square under- or overflows."""
    largest = float(vector.abs().max())
    if largest == 0 or not math.isfinite(largest):
        return vector, largest
    scaled = vector / largest
    norm = scaled.norm()
    return scaled / norm, float(norm) * largest


def _flaw(model: LocalModel, gradient_norm: float) -> Outcome | None:
    """Return why no direction follows from a local model, or None."""
    if not math.isfinite(model.loss):
        return Outcome.NON_FINITE_LOSS
    if not math.isfinite(model.kl):
        return Outcome.NON_FINITE_KL
    if not math.isfinite(gradient_norm):
        return Outcome.NON_FINITE_GRADIENT
    return Outcome.ZERO_GRADIENT if gradient_norm == 0 else None


def _require_moving_kl(objective: Objective, model: LocalModel, unit: Tensor) -> None:
    """Check the KL a tenth of the parameters' length away, far beyond any rounding."""
    objective.move(unit, 0.1 * max(1.0, float(objective.origin.norm())))
    require_moving_kl((model.loss, model.kl), objective.values(), model.kl_resolution)
