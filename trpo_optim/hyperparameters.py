"""The optimizer's hyperparameters: their types, their bounds and their errors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, fields
from itertools import product
from numbers import Integral, Real
from typing import Any, Literal, get_args

from trpo_optim.errors import TrustRegionError

__all__ = ["Constraint", "EngineName", "Hyperparameters", "ModeName", "PreconditionerName"]

ModeName = Literal["trpo", "natural", "vanilla"]
"""The names of the modes, the rows of the table in ``trpo_optim.algorithm.modes``."""

Constraint = Literal["mean", "max"]
"""Which KL of the batch the line search of mode ``"trpo"`` holds to ``max_kl``."""

EngineName = Literal["auto", "Gauss-Newton", "torch.func", "double backward", "finite differences"]
"""What makes Fisher-vector products; ``"auto"`` leaves the choice to the step."""

PreconditionerName = Literal["none", "diagonal"]
"""The coordinates of the solve."""


@dataclass(frozen=True)
class Hyperparameters:
    """One valid set of hyperparameters. ``TrustRegionOptimizer`` says what they mean.

    Numbers of any type become plain ``int`` and ``float``.

    Args:
        scheduled: Whether a schedule may have set the values. It may end at 0 for ``max_kl`` and
            ``max_norm``, and a number that rounding left just below 0 becomes 0.

    Raises:
        TrustRegionError: If a value has the wrong type, lies outside its bounds, or does not
            belong to the mode.
    """

    mode: ModeName = "trpo"
    max_kl: float | None = 0.01
    constraint: Constraint = "mean"
    max_norm: float | None = None
    lr: float = 1.0
    damping: float | None = None
    cg_iterations: int = 10
    cg_tolerance: float = 1e-4
    backtrack_ratio: float = 0.5
    max_backtracks: int = 10
    improvement_ratio: float = 0.1
    maximize: bool = False
    engine: EngineName = "auto"
    preconditioner: PreconditionerName = "none"
    preconditioner_decay: float = 0.9
    scheduled: InitVar[bool] = False

    def __post_init__(self, scheduled: bool) -> None:
        """Check every value, alone and together."""
        for name, type_of_names in _NAMES.items():
            choices, value = get_args(type_of_names), getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                *others, last = map(repr, choices)
                raise TrustRegionError(
                    f"{name} is {value!r}; it must be {', '.join(others)} or {last}."
                )
            object.__setattr__(self, name, choices[choices.index(value)])
        if not isinstance(self.maximize, bool):
            raise TrustRegionError(f"maximize is {self.maximize!r}; it must be True or False.")
        for name, bound in _BOUNDS.items():
            value = getattr(self, name)
            if value is None and bound.optional:
                continue
            object.__setattr__(self, name, bound.checked(name, value, scheduled=scheduled))
        if self.max_kl is None and self.mode != "natural":
            raise TrustRegionError(
                f"max_kl is None with mode={self.mode!r}; only mode='natural' works without a "
                "radius. Pass max_kl in nats, for example 0.01."
            )
        if self.max_norm is not None and self.mode != "vanilla":
            raise TrustRegionError(
                f"max_norm is {self.max_norm!r} with mode={self.mode!r}; only mode='vanilla' has "
                "max_norm. Leave it None and set max_kl."
            )

    @property
    def lr_is_the_rate(self) -> bool:
        """Whether ``lr`` is the fixed rate of the step, without a radius that gives its length."""
        return (self.max_norm if self.mode == "vanilla" else self.max_kl) is None

    def require_lr(self) -> None:
        """Raise an error if ``lr`` is the fixed rate, because it was not given.

        Raises:
            TrustRegionError: If ``lr_is_the_rate``.
        """
        if self.lr_is_the_rate:
            name, example = ("max_norm", 0.1) if self.mode == "vanilla" else ("max_kl", 0.01)
            raise TrustRegionError(
                f"lr was not given with mode={self.mode!r} and {name}=None, where it is the fixed "
                f"rate of the step. No rate fits all losses. Pass lr, for example lr=1.0, or "
                f"{name}, for example {name}={example}."
            )

    @classmethod
    def of_groups(cls, groups: Sequence[dict[str, Any]]) -> Hyperparameters:
        """Return the hyperparameters that all groups agree on.

        Args:
            groups: ``param_groups``, at least one. Their values become plain numbers, since
                NumPy's would not load with ``weights_only``.

        Raises:
            TrustRegionError: If a value is not valid, or the groups do not agree.
        """
        names = cls.names()
        found = [cls.of_group(group, scheduled=True) for group in groups]
        for group, own in zip(groups, found, strict=True):
            group.update(vars(own))
        for index, name in product(range(1, len(groups)), names):
            first, here = getattr(found[0], name), getattr(found[index], name)
            if here != first:
                raise TrustRegionError(
                    f"{name} is {first!r} in param_groups[0] and {here!r} in "
                    f"param_groups[{index}]. One step has one radius and one length. Give every "
                    "group the same value."
                )
        return found[0]

    @classmethod
    def of_group(cls, group: dict[str, Any], *, scheduled: bool = False) -> Hyperparameters:
        """Return the hyperparameters of one group.

        Args:
            group: One of ``param_groups``.
            scheduled: As for the class.

        Raises:
            TrustRegionError: If a value is not valid.
        """
        return cls(**{name: group[name] for name in cls.names()}, scheduled=scheduled)

    @classmethod
    def complete(cls, groups: Sequence[dict[str, Any]], defaults: dict[str, Any]) -> None:
        """Fill in the hyperparameters that an older version did not save.

        Args:
            groups: ``param_groups``. Missing values come from ``defaults``.
            defaults: The optimizer's defaults. Missing values come from this class.
        """
        for entry in fields(cls):
            defaults.setdefault(entry.name, entry.default)
            for group in groups:
                group.setdefault(entry.name, defaults[entry.name])

    @staticmethod
    def require_saved(optimizer: Any, state_dict: dict[str, Any]) -> None:
        """Check that a saved state holds these hyperparameters, and that they are valid.

        Args:
            optimizer: What is to load the state. Its defaults stand for what was not saved.
            state_dict: The state to load.

        Raises:
            TrustRegionError: If another kind of optimizer saved it, or a value is not valid.
        """
        if any("mode" not in group for group in state_dict["param_groups"]):
            raise TrustRegionError(
                "The state has no 'mode', so another kind of optimizer saved it. Its lr and other "
                "settings mean something else. Load the state of a TrustRegionOptimizer."
            )
        groups = [dict(group) for group in state_dict["param_groups"]]
        Hyperparameters.complete(groups, dict(optimizer.defaults))
        Hyperparameters.of_groups(groups)

    @property
    def keeps_gradients(self) -> bool:
        """Whether the optimizer keeps the running mean of squared gradients."""
        return self.preconditioner != "none" and self.mode != "vanilla"

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of all hyperparameters, as in ``param_groups``."""
        return tuple(entry.name for entry in fields(cls))


_NAMES = {
    "mode": ModeName,
    "constraint": Constraint,
    "engine": EngineName,
    "preconditioner": PreconditionerName,
}
"""The hyperparameters that are one of several names."""

_ROUNDING = 1e-12
"""How far below 0 rounding may leave a schedule that ends at 0."""


@dataclass(frozen=True)
class _Bound:
    """What a number must satisfy: a type and a test, with words for both.

    Attributes:
        holds: The test.
        words: The limit, in words.
        whole: Whether the number is an integer.
        optional: Whether None is allowed.
        may_end_at_zero: Whether a schedule may end at 0, though the test forbids 0.
    """

    holds: Callable[[float], bool]
    words: str
    whole: bool = False
    optional: bool = False
    may_end_at_zero: bool = False

    def checked(self, name: str, value: Any, *, scheduled: bool) -> float | int:
        """Return ``value`` as a plain number, or raise an error that names it."""
        kind = Integral if self.whole else Real
        plain = math.nan
        if isinstance(value, kind) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):  # an integer beyond every float
                plain = float(value)
        if scheduled and -_ROUNDING <= plain < 0:
            plain = 0.0
        ended = scheduled and self.may_end_at_zero and plain == 0
        if ended or (math.isfinite(plain) and self.holds(plain)):
            return int(plain) if self.whole else plain
        raise TrustRegionError(f"{name} is {value!r}; it must be {self.words}.")


_BOUNDS = {
    "max_kl": _Bound(
        lambda value: value > 0,
        "a finite number above 0, in nats (0.01 in the paper), or None with mode='natural'",
        optional=True,
        may_end_at_zero=True,
    ),
    "max_norm": _Bound(
        lambda value: value > 0,
        "a finite number above 0, the L2 length of a vanilla step, or None for the fixed rate lr",
        optional=True,
        may_end_at_zero=True,
    ),
    "lr": _Bound(
        lambda value: value >= 0,
        "a finite Python number of at least 0 (1.0 takes the whole step)",
    ),
    "damping": _Bound(
        lambda value: value >= 0,
        "a finite number of at least 0, or None for 4 % of the curvature that the solve meets",
        optional=True,
    ),
    "cg_iterations": _Bound(lambda value: value >= 1, "a whole number of at least 1", whole=True),
    "cg_tolerance": _Bound(
        lambda value: 0 <= value < 1,
        "a number in [0, 1), the residual relative to the gradient at which the solve stops",
    ),
    "backtrack_ratio": _Bound(
        lambda value: 0 < value < 1, "a number strictly between 0 and 1 that shortens the step"
    ),
    "max_backtracks": _Bound(
        lambda value: 0 <= value <= 100, "a whole number from 0 to 100", whole=True
    ),
    "improvement_ratio": _Bound(
        lambda value: 0 <= value < 1, "a number in [0, 1), a share of the predicted improvement"
    ),
    "preconditioner_decay": _Bound(
        lambda value: 0 <= value < 1, "a number in [0, 1), the share of the mean that a step keeps"
    ),
}
