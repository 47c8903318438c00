"""The check of a closure's Fisher-vector products."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.algorithm.direction import DirectionSolver
from trpo_optim.algorithm.modes import MODES
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.curvature.first_derivatives import gradient_of
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.testing.closure_subject import ClosureSubject, unit_of
from trpo_optim.testing.findings import Finding, Verdict, undecided

__all__ = ["check_second_order"]

_SCALES = (1.0, 1e-2, 1e-4)
"""Where the KL's gradient is taken, in moves of a tenth of each parameter's length."""


def check_second_order(subject: ClosureSubject) -> Finding:
    """The KL's products are those of its first derivatives, and it curves where the loss slopes."""
    name = "second order"
    settings = Hyperparameters(cg_iterations=1)
    batch = subject.batch
    model = batch.second_order()
    gradient = model.gradient.clone()
    solver = DirectionSolver(batch, subject.transaction, unit_of(gradient), MODES["trpo"], settings)
    if not solver.prove(solver.solve(model), model.released()).settled:
        model = batch.second_order()
    if flat := _flat(subject.vector, gradient, _kl_slope_elsewhere(subject)):
        return undecided(
            name,
            f"The loss has a slope along elements of {flat}, on which the KL does not depend: no "
            "trust region holds these.",
            "If they give a critic's values, give the critic layers of its own, and leave its loss "
            "out of the closure. A weight penalty also moves units that are dead.",
        )
    note = model.fallback and f"{model.engine}: {model.fallback}."
    return Finding(name, Verdict.PASSED, {}, note)


def _kl_slope_elsewhere(subject: ClosureSubject) -> Tensor:
    """Return the sizes of the KL's gradient, summed over places around the parameters.

    An element is zero only if the KL depends on that parameter nowhere. Far away, a unit that
    counts may be dead. Close by, the slope of a saturated policy rounds to zero. A small move or
    its opposite leaves a unit alive.
    """
    slope = torch.zeros_like(subject.transaction.origin)
    far = subject.transaction.far_away()
    for scale in _SCALES:
        for step in (scale * far, -scale * far):
            with subject.at(step):
                for part in subject.batch.parts:
                    slope += gradient_of(part.with_graph().kl, part).abs()
    return slope


def _flat(vector: ParameterVector, gradient: Tensor, other: Tensor) -> str:
    """Return the parameters of which the loss, and not the KL, depends on some elements.

    Args:
        vector: The parameters.
        gradient: That of the loss, (n,).
        other: That of the KL elsewhere, (n,).
    """
    pairs = zip(vector.names, vector.split(gradient), vector.split(other), strict=True)
    flat = [label for label, slope, kl in pairs if bool(((slope != 0) & (kl == 0)).any())]
    return f"{', '.join(flat[:4])}{vector.counting}" if flat else ""
