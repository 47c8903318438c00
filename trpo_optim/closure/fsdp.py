"""Parameters that FSDP2 (``fully_shard``) has sharded: where, and which modules use them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import fsdp_states

__all__ = ["FsdpParameters", "require_sharded"]


class FsdpParameters:
    """The optimizer's parameters, all of which FSDP has sharded.

    A graph does not show the sharded parameters: FSDP gathers the whole ones from them before a
    module runs. ``backward()`` averages the gradients over the ranks, and gives every rank its part
    in ``.grad`` of the sharded parameter.

    Args:
        sharded: The parameters, in order.
        held: FSDP's own record of each, and the group of parameters that it is gathered with.
    """

    def __init__(self, sharded: Sequence[Tensor], held: Sequence[tuple[Any, Any]]) -> None:
        self._sharded = sharded
        self._held = held

    @classmethod
    def among(cls, parameters: Sequence[Tensor]) -> tuple[FsdpParameters | None, list[Tensor]]:
        """Return the parameters that FSDP has sharded, and those that it has not.

        Args:
            parameters: The optimizer's.
        """
        records = _records(state for _, state in fsdp_states())
        held = {id(each.sharded_param): (each, group) for each, group in records}
        sharded = [each for each in parameters if id(each) in held]
        others = [each for each in parameters if id(each) not in held]
        found = cls(sharded, [held[id(each)] for each in sharded]) if sharded else None
        return found, others

    @property
    def groups(self) -> list[Any]:
        """FSDP's groups of parameters, each once."""
        return list({id(group): group for _, group in self._held}.values())

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The whole parameters, which graphs show; the sharded ones before any evaluation."""
        pairs = zip(self._sharded, self._held, strict=True)
        return tuple(getattr(record, "_unsharded_param", part) for part, (record, _) in pairs)

    def summed(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return sums over ranks, given what ``backward()`` has made of them.

        Args:
            gradients: One per parameter.
        """
        pairs = zip(gradients, self._held, strict=True)
        return [None if each is None else each * _divisor(group) for each, (_, group) in pairs]

    def reshard(self) -> None:
        """Have FSDP drop the whole parameters, so that it gathers them anew before a module runs.

        FSDP keeps them after a module has run, and does not see that the sharded ones are written.
        FSDP also forgets an evaluation that an exception has ended. Modules under other roots, such
        as a critic, keep their whole parameters and their gradients.
        """
        for module, state in self._members():
            if state._is_root:
                module.reset_iter_state()
            module.reshard()

    def gathered(self) -> list[Tensor]:
        """Return the tensors into whose memory FSDP gathers parameters, and which it frees.

        Frozen parameters under the same root belong to them.
        """
        return _gathered(state for _, state in self._members())

    def _members(self) -> list[tuple[Any, Any]]:
        """Return the modules under the roots that hold the parameters, each with its state."""
        own, states, found = set(map(id, self.groups)), fsdp_states(), set[int]()
        for _, state in states:  # no state is a root before the first module runs
            under = state._state_ctx.all_states if state._is_root else [state]
            if any(id(group) in own for each in under for group in each._fsdp_param_groups):
                found.update(map(id, under))
        return [(module, state) for module, state in states if id(state) in found]


def require_sharded(parameters: Iterable[Tensor]) -> None:
    """Check that no parameter is one that FSDP has gathered, and drops again.

    Args:
        parameters: The optimizer's.

    Raises:
        TrustRegionError: If one is.
    """
    whole = set(map(id, _gathered(state for _, state in fsdp_states())))
    found = [tuple(each.shape) for each in parameters if id(each) in whole]
    if found:
        raise TrustRegionError(
            f"The optimizer got {len(found)} whole parameters that FSDP keeps for a while after "
            f"the policy has run, such as one of shape {found[0]}. Make the optimizer before the "
            "policy runs, or call reshard() on the modules that fully_shard got, and then make the "
            "optimizer from policy.parameters()."
        )


def _gathered(states: Iterable[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for record, _ in _records(states):
        whole = getattr(record, "_unsharded_param", None)
        found += [*record.all_gather_outputs, *([] if whole is None else [whole])]
    return found


def _records(states: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    for state in states:
        for group in state._fsdp_param_groups:
            for record in group.fsdp_params:
                yield record, group


def _divisor(group: Any) -> float:
    """Return by what FSDP divides the sum of the gradients."""
    factor = group.gradient_divide_factor
    ranks: int = group.mesh_info.mesh.size()
    return ranks if factor is None else float(factor)
