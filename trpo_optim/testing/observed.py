"""The distributions that a closure makes, seen from outside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributions import Distribution

from trpo_optim.distributions.parts import made_of, tensors

__all__ = ["distributions_made", "of_new_policy"]


@contextmanager
def distributions_made() -> Iterator[list[Distribution]]:
    """Collect every distribution that is made until the context ends.

    Yields:
        The distributions, in their order, some of them parts of others.
    """
    made: list[Distribution] = []
    initialiser: Any = Distribution.__init__

    def noted(self: Distribution, *args: Any, **options: Any) -> None:
        initialiser(self, *args, **options)
        made.append(self)

    Distribution.__init__ = noted  # type: ignore[method-assign]  # there is no hook
    try:
        yield made
    finally:
        Distribution.__init__ = initialiser  # type: ignore[method-assign]  # as it was


def of_new_policy(made: list[Distribution]) -> list[Distribution]:
    """Return the distributions that carry a graph and are part of no other one.

    Args:
        made: By one evaluation of a closure.
    """
    within = {id(part) for each in made for part in list(made_of(each))[1:]}
    unique = {id(each): each for each in made if id(each) not in within}
    return [each for each in unique.values() if any(t.requires_grad for t in tensors(each))]
