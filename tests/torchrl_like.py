"""Distributions as torchrl and tensordict write them, without either."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Distribution
from torch.nn.functional import one_hot

NO_SHAPE = torch.Size()


class OneHot(Categorical):
    """A Categorical whose actions are one-hot, and whose event shape says nothing of it."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__(logits=logits)
        self.num_samples = logits.shape[-1]

    def sample(self, sample_shape: Any = NO_SHAPE) -> Tensor:
        plain: Any = super()
        return one_hot(plain.sample(sample_shape), self.num_samples)

    def log_prob(self, value: Tensor) -> Tensor:
        plain: Any = super()
        result: Tensor = plain.log_prob(value.argmax(-1))
        return result


class Composite(Distribution, Mapping[Any, Any]):
    """Named distributions that are one: it keeps a batch shape, and no event shape."""

    def __init__(self, batch: int, dists: dict[Any, Distribution]) -> None:
        self._batch_shape = torch.Size([batch])
        self.dists = dists

    def __iter__(self) -> Iterator[Any]:
        """Yield the names."""
        yield from self.dists

    def __getitem__(self, name: Any) -> Any:
        """Return a part."""
        return self.dists[name]

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self.dists)

    def sample(self, sample_shape: Any = NO_SHAPE) -> Any:
        return Nested({name: each.sample(sample_shape) for name, each in self.dists.items()})

    def log_prob(self, value: Any) -> Tensor:
        total = torch.zeros(self._batch_shape)
        for name, dist in self.dists.items():
            each = dist.log_prob(value[name])
            total = total + each.reshape(len(each), -1).sum(-1)
        return total


class Nested(Mapping[Any, Any]):
    """A dict of dicts, where a tuple of names finds what lies within, as a TensorDict does."""

    def __init__(self, flat: dict[Any, Any]) -> None:
        self.whole: dict[str, Any] = {}
        for name, value in flat.items():
            if isinstance(name, tuple):
                self.whole[name[0]] = Nested({name[1]: value})
            else:
                self.whole[name] = value

    def __getitem__(self, name: Any) -> Any:
        """Return a part."""
        if isinstance(name, tuple):
            return self.whole[name[0]][name[1]]
        return self.whole[name]

    def __iter__(self) -> Iterator[Any]:
        """Yield the names."""
        yield from self.whole

    def __len__(self) -> int:
        """Return how many parts there are."""
        return len(self.whole)
