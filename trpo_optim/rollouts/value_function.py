"""The fit of a value function to its targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from trpo_optim.curvature.autograd_graph import calls_python, graph_leaves
from trpo_optim.distributions.arguments import require_counts, require_no_graph, require_tensor
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.arguments import values_by
from trpo_optim.rollouts.returns import explained_variance

__all__ = ["ValueFit", "fit_value"]


@dataclass(frozen=True)
class ValueFit:
    """How well a value function fits its targets.

    Attributes:
        loss: Mean squared error after the fit.
        explained_variance_before: Share of the targets' variance explained before the fit.
        explained_variance: Share of the targets' variance explained after the fit.

    Example:
        >>> from trpo_optim.rollouts import ValueFit
        >>> fit = ValueFit(loss=0.1, explained_variance_before=0.2, explained_variance=0.9)
        >>> fit.explained_variance > fit.explained_variance_before
        True
    """

    loss: float
    explained_variance_before: float
    explained_variance: float


def fit_value(
    critic: Callable[[Any], Tensor],
    observations: Any,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    *,
    epochs: int = 10,
    minibatch: int | None = None,
) -> ValueFit:
    """Fit a value function to its targets by least squares.

    Args:
        critic: A function from observations (B, …) to values, (B,) or (B, 1).
        observations: Shape (B, …), or a dict or tuple of such tensors.
        targets: Shape (B,).
        optimizer: The optimizer of the critic's parameters. Use Adam with minibatches, or
            ``torch.optim.LBFGS`` on all rows with one or two epochs.
        epochs: Passes over the data. Each has a new order, drawn by torch's global generator.
        minibatch: Rows per step. None: all rows.

    Returns:
        How well it fits.

    Raises:
        TrustRegionError: If lengths differ, there are no rows, a target is not finite or requires
            grad, the values have another shape or do not depend on the optimizer's parameters, or
            ``epochs`` or ``minibatch`` is below 1.

    Example:
        >>> import torch
        >>> from trpo_optim.rollouts import fit_value
        >>> critic, observations = torch.nn.Linear(1, 1), torch.linspace(-1, 1, 16)[:, None]
        >>> adam = torch.optim.Adam(critic.parameters(), lr=0.1)
        >>> fit = fit_value(critic, observations, 3 * observations[:, 0], adam, epochs=100)
        >>> fit.explained_variance > 0.9
        True
    """
    require_tensor("targets", targets)
    if targets.dim() != 1 or not len(targets):
        raise TrustRegionError(
            f"targets has shape {tuple(targets.shape)}; it must be (B,), with rows in it."
        )
    mapped(lambda each: _require_length(each, len(targets)), observations)
    if not targets.isfinite().all():
        raise TrustRegionError("targets holds NaN or infinity; every target must be a number.")
    require_no_graph("targets", targets)
    require_counts(epochs=epochs, minibatch=minibatch)
    targets = targets.to(torch.promote_types(targets.dtype, torch.float32))

    @torch.no_grad()
    def predictions() -> Tensor:
        return values_by(critic, observations, len(targets))

    before = explained_variance(predictions(), targets)
    for epoch in range(epochs):
        if minibatch is None:
            optimizer.step(partial(_error, critic, observations, targets, optimizer, not epoch))  # type: ignore[arg-type]  # torch says float, and takes tensors
            continue
        order = torch.randperm(len(targets), device="cpu").to(targets.device)
        shuffled, aims = mapped(itemgetter(order), observations), targets[order]
        for start in range(0, len(targets), minibatch):
            rows = slice(start, start + minibatch)
            part = mapped(itemgetter(rows), shuffled)
            first = not (epoch or start)
            optimizer.step(partial(_error, critic, part, aims[rows], optimizer, first))  # type: ignore[arg-type]  # as above
    after = predictions()
    return ValueFit(
        float((after - targets).square().mean()), before, explained_variance(after, targets)
    )


def _error(
    critic: Callable[[Any], Tensor],
    observations: Any,
    targets: Tensor,
    optimizer: torch.optim.Optimizer,
    first: bool,
) -> Tensor:
    """Return the mean squared error, its gradients in place; check the first of all."""
    optimizer.zero_grad()
    values = values_by(critic, observations, len(targets))
    common = torch.promote_types(values.dtype, targets.dtype)  # torch 2.6 needs one for both
    loss = mse_loss(values.to(common), targets.to(common))
    if first:
        _require_learning(loss, optimizer)
    loss.backward()
    return loss


def _require_learning(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Check that an error depends on a parameter of the optimizer."""
    held = {id(each) for group in optimizer.param_groups for each in group["params"]}
    if held.isdisjoint(map(id, graph_leaves(loss))) and not calls_python(loss):
        raise TrustRegionError(
            "The critic's values do not depend on any parameter of the optimizer, so that nothing "
            "would learn. Make the optimizer from the parameters of this critic, and let them "
            "require gradients."
        )


def _require_length(observations: Tensor, count: int) -> None:
    if len(observations) != count:
        raise TrustRegionError(
            f"There are {len(observations)} observations and {count} targets. Pass one target per "
            "observation."
        )
