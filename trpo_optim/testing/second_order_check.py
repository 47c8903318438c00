"""The check of a closure's Fisher-vector products."""

from __future__ import annotations

import torch
from torch import Tensor

from trpo_optim.algorithm.direction import DirectionSolver
from trpo_optim.algorithm.modes import MODES
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.hyperparameters import Hyperparameters
from trpo_optim.testing.closure_subject import ClosureSubject
from trpo_optim.testing.findings import Finding, Verdict, undecided

__all__ = ["check_second_order"]


def check_second_order(subject: ClosureSubject) -> Finding:
    """The KL's products are those of its first derivatives, and it curves where the loss slopes."""
    name = "second order"
    settings = Hyperparameters(cg_iterations=1)
    batch = subject.batch
    model = batch.second_order()
    gradient = model.gradient.clone()
    uphill = gradient if gradient.any() else torch.ones_like(gradient)
    solver = DirectionSolver(
        batch, subject.transaction, uphill / uphill.norm(), MODES["trpo"], settings
    )
    if not solver.prove(solver.solve(model), model.released()).settled:
        model = batch.second_order()
    if model.engine != "finite differences":  # which have no products of their own
        model = batch.second_order()
        generator = torch.Generator("cpu").manual_seed(0)
        probe = torch.randn(len(gradient), generator=generator, device="cpu").to(gradient)
        if flat := _flat(subject.vector, gradient, model.product(probe)):
            return undecided(
                name,
                f"The loss has a slope along elements of {flat}, along which the KL has no "
                "curvature: no trust region holds these.",
                "Give the critic layers of its own, and leave its loss out of the closure.",
            )
    note = model.fallback and f"{model.engine}: {model.fallback}."
    return Finding(name, Verdict.PASSED, {}, note)


def _flat(vector: ParameterVector, gradient: Tensor, image: Tensor) -> str:
    """Return the parameters of which some elements have a slope and no curvature.

    Args:
        vector: The parameters.
        gradient: That of the loss, (n,).
        image: The product with a vector without zeros, (n,).
    """
    pairs = zip(vector.names, vector.split(gradient), vector.split(image), strict=True)
    flat = [label for label, slope, curved in pairs if bool(((slope != 0) & (curved == 0)).any())]
    return f"{', '.join(flat[:4])}{vector.counting}" if flat else ""
