"""A step with parameters sharded by FSDP2 (``fully_shard``): its limits, its ranks in step."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from trpo_optim.closure.failures import ElsewhereError, OutOfStepError, OverflowElsewhereError
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.distributed.collectives import Reduction
from trpo_optim.errors import RankError, TrustRegionError
from trpo_optim.hyperparameters import Hyperparameters

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["RanksInStep", "require_closures", "require_fine", "require_served"]

_HALF = (torch.float16, torch.bfloat16)
_COARSE = torch.finfo(torch.float16).eps
"""The unit of rounding of the finer one."""


class _Said(enum.IntEnum):
    """What a rank says of its evaluation."""

    ABOUT_TO_RUN, DONE, OVERFLOW, RAISED = range(4)


class RanksInStep:
    """Has all ranks say what they are about to do, before FSDP sends anything.

    FSDP gathers parameters whenever a module runs. If one rank runs a module and another does not,
    both would wait, or take each other's messages for their own. So every rank says what it is
    about to do, and all of them end an evaluation that is not the same everywhere.

    Args:
        reduction: The collectives.
    """

    def __init__(self, reduction: Reduction) -> None:
        self._reduction = reduction

    def about_to_run(self) -> None:
        """Say that this rank is about to run a module.

        Raises:
            OutOfStepError: If another rank is not.
        """
        self._say(_Said.ABOUT_TO_RUN)

    def done(self) -> None:
        """Say that this rank's evaluation has ended.

        Raises:
            OutOfStepError: If it has not ended on another rank, or has raised there.
        """
        self._say(_Said.DONE)

    def failed(self, *, overflow: bool) -> None:
        """Say that this rank's evaluation has raised.

        Args:
            overflow: Whether that counts as values that are no numbers.
        """
        self._reduction.each(_Said.OVERFLOW if overflow else _Said.RAISED)

    def everywhere(self, flag: bool, /) -> bool:
        """Return whether a flag is true on all ranks.

        Args:
            flag: This rank's.
        """
        return all(self._reduction.each(flag))

    def _say(self, own: _Said) -> None:
        said = self._reduction.each(own)
        if _Said.RAISED in said:
            raise ElsewhereError("The closure has raised on another rank.")
        if _Said.OVERFLOW in said:
            if own is _Said.ABOUT_TO_RUN:
                raise OverflowElsewhereError("The closure has overflown on another rank.")
        elif len(set(said)) > 1:
            running = [rank for rank, each in enumerate(said) if each == _Said.ABOUT_TO_RUN]
            names = ", ".join(map(self._reduction.name, running))
            raise OutOfStepError(
                f"The closure of {names} runs the modules of a policy in FSDP more often than the "
                "closures of the other ranks. Run them equally often on every rank, since FSDP "
                "gathers the parameters from all ranks each time."
            )


def require_closures(
    reduction: Reduction, counts: Sequence[float], weights: Sequence[float]
) -> None:
    """Check that all ranks have equally many closures, each with samples.

    Args:
        reduction: The collectives.
        counts: How many closures each rank has.
        weights: The weight of each rank.

    Raises:
        RankError: If they have not.
    """
    without = [rank for rank, weight in enumerate(weights) if not weight > 0]
    if without:
        raise RankError(
            f"The closures or weights of {', '.join(map(reduction.name, without))} are left out, "
            "and FSDP has sharded the parameters, so that every rank must evaluate the policy. "
            "Give every rank a closure with samples, and a weight above 0."
        )
    if len(set(counts)) > 1:
        each = "; ".join(f"{reduction.name(rank)}: {int(n)}" for rank, n in enumerate(counts))
        raise RankError(
            f"The ranks have different numbers of closures ({each}), and FSDP has sharded the "
            "parameters, so that all ranks must evaluate the policy equally often. Cut the samples "
            "of every rank into equally many micro-batches, and give `curvature` on every rank or "
            "on none. `weights` may differ."
        )


def require_served(
    vector: ParameterVector, group: ProcessGroup | None, settings: Hyperparameters
) -> None:
    """Check that a step serves parameters as FSDP has sharded them.

    Args:
        vector: The parameters.
        group: The optimizer's.
        settings: The hyperparameters.

    Raises:
        TrustRegionError: If it does not.
    """
    if vector.fsdp is None:
        return
    if group is None:
        raise TrustRegionError(
            "FSDP has sharded the parameters, and the optimizer has no process_group, so every "
            "rank would take its own step. Pass the group of the mesh that fully_shard got; by "
            "default, process_group=torch.distributed.group.WORLD."
        )
    for each in vector.parameters:
        _require_mesh(each, group)
    for each in vector.fsdp.groups:
        _require_plain(each)
        if settings.mode != "vanilla":
            _require_precise(each)


def require_fine(precision: float) -> None:
    """Check that differences of gradients resolve the curvature, which has no other source.

    Args:
        precision: The unit of rounding of the coarsest parameter and of what the closures compute,
            the largest of all ranks.

    Raises:
        TrustRegionError: If they do not.
    """
    if precision >= _COARSE:
        raise TrustRegionError(
            "The policy in FSDP has parameters in half precision, or the closure computes in half "
            f"precision, as under autocast (unit of rounding {precision:.1e}). With FSDP, "
            "curvature is a difference of gradients, which needs float32 or float64. Convert the "
            "parameters to float32 before fully_shard, and call the policy without autocast. Or "
            "use mode='vanilla', which needs no curvature."
        )


def _require_mesh(parameter: Any, group: ProcessGroup) -> None:
    mesh = parameter.device_mesh
    if mesh.ndim > 1:
        raise TrustRegionError(
            f"FSDP has sharded the parameters over a mesh of shape {tuple(mesh.shape)}; a step "
            "serves a mesh of one dimension, without replicas (HSDP) and without tensor "
            "parallelism. Pass fully_shard a mesh of one dimension."
        )
    ranks, own = sorted(mesh.mesh.tolist()), sorted(dist.get_process_group_ranks(group))
    if ranks != own:
        raise TrustRegionError(
            f"FSDP has sharded the parameters over the ranks {ranks}, and the process_group holds "
            f"the ranks {own}; these must be the same. Pass process_group=mesh.get_group() of the "
            "mesh that fully_shard got."
        )


def _require_plain(group: Any) -> None:
    """Check that FSDP averages the gradients over the ranks in every backward()."""
    if not group.reduce_grads:
        raise TrustRegionError(
            "set_requires_gradient_sync(False) has switched off FSDP's sum of gradients over the "
            "ranks, which a step needs. Call set_requires_gradient_sync(True) before step(), and "
            "pass micro-batches to step() as a list of closures."
        )
    if group._all_reduce_hook is not None:
        raise TrustRegionError(
            "set_all_reduce_hook() has given FSDP a hook that changes gradients, which a step does "
            "not serve. Remove the hook."
        )


def _require_precise(group: Any) -> None:
    policy = group.mp_policy
    for name in ("param_dtype", "reduce_dtype"):
        if (dtype := getattr(policy, name)) in _HALF:
            raise TrustRegionError(
                f"FSDP's MixedPrecisionPolicy has {name}={dtype}; curvature from first derivatives "
                "needs float32 or float64, since it is a difference of gradients. Leave "
                f"{name} out, or use mode='vanilla', which needs no curvature."
            )
