"""What a step asks of the batch that it is taken on, and of the parameters that it moves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

__all__ = ["Batch", "LocalModel", "Numbers", "Parameters"]


class Numbers(Protocol):
    """The closure's values at one point."""

    @property
    def loss(self) -> float:
        """The closure's first value."""

    @property
    def kl(self) -> float:
        """The mean KL, in nats."""

    @property
    def largest_kl(self) -> float | None:
        """The largest KL of a sample, in nats; None where the closure returns the mean."""


class LocalModel(Numbers, Protocol):
    """The closure near the current parameters: its values, a gradient and a curvature."""

    @property
    def kl_resolution(self) -> float:
        """KLs closer than this cannot be told apart, in nats."""

    @property
    def precision(self) -> float:
        """The unit of rounding of the coarsest parameter and of what the closure computes."""

    @property
    def gradient(self) -> Tensor:
        """∇loss, shape (n,), in memory of its own: a step overwrites it with the unit vector."""

    @property
    def kls(self) -> Mapping[str, float]:
        """The KL of every closure behind the model, by the closure's name."""

    @property
    def engine(self) -> str:
        """The name of what differentiated the closure."""

    @property
    def fallback(self) -> str:
        """Why a better engine did not serve, or empty."""

    def product(self, vector: Tensor, /) -> Tensor:
        """Return Fv, shape (n,), F the Hessian of the KL; undamped, symmetric and fixed."""

    def released(self) -> LocalModel:
        """Return the model without its products, and so without the graph that they hold."""


class Batch(Protocol):
    """The closures of one step as one function of the parameters."""

    @property
    def curves_apart(self) -> bool:
        """Whether products are taken of another KL than the batch's, such as that of a part."""

    def first_order(self) -> LocalModel:
        """Return the local model without curvature."""

    def second_order(self) -> LocalModel:
        """Return the local model with Fisher-vector products."""

    def slope(self) -> tuple[float, Tensor]:
        """Return the KL, in nats, and its gradient where the parameters now are."""

    def is_unproven(self) -> bool:
        """Return whether products are yet to be compared with finite differences."""

    def prefers_differences(self) -> bool:
        """Return whether finite differences are to serve where the KL is smooth."""

    def prove(self, flaw: str, *, smooth: bool | None) -> None:
        """Note that products have been compared with finite differences.

        Args:
            flaw: Why finite differences are to serve in all further steps, or empty.
            smooth: Whether finite differences agreed, where they are preferred; else None.
        """

    def one_side_serves(self) -> bool:
        """Return whether finite differences may look at one side alone."""

    def learn_sides(self, *, one_serves: bool) -> None:
        """Note whether further steps may look at one side alone."""

    def doubt(self) -> None:
        """Have the next step compare products with finite differences."""

    def kl_of_curvature(self) -> float:
        """Return the KL that products are taken of, in nats, where the parameters now are."""

    def values(self) -> Numbers:
        """Return the values where the parameters now are."""

    def probe(self) -> Numbers | None:
        """Return the values where the parameters now are, or None if they have none there."""


class Parameters(Protocol):
    """The parameters as one vector, held until the step ends."""

    @property
    def rounding(self) -> float:
        """The length of what rounding adds to a move, about."""

    def move(self, step: Tensor, scale: float) -> None:
        """Put the parameters at origin + scale · step."""

    def change(self) -> Tensor:
        """Return what the parameters moved by since the origin, as their precision has it."""

    def blocks(self, vector: Tensor) -> list[Tensor]:
        """Return the pieces of a vector, one for each parameter."""

    def name(self, index: int) -> str:
        """Return what a parameter is called, for messages."""

    def elsewhere(self) -> Iterator[Tensor]:
        """Yield moves to points far from here in every parameter."""
