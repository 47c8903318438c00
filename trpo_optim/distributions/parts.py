"""What a policy's distribution is made of: parts, inner distributions, tensors and their bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution, Independent, constraints
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform
from torch.distributions.utils import lazy_property

from trpo_optim.errors import TrustRegionError
from trpo_optim.torch_private import InverseTransform

__all__ = [
    "constant_transforms",
    "inverses",
    "is_single",
    "leaves",
    "made_of",
    "name_of",
    "paired",
    "placed_leaves",
    "require_shapes",
    "require_valid",
    "tensors",
]


def leaves(dist: Any) -> list[Distribution]:
    """Return the distributions that a policy is made of."""
    return [leaf for _, leaf in placed_leaves(dist)]


def placed_leaves(dist: Any, place: str = "") -> Iterator[tuple[str, Distribution]]:
    """Yield the distributions that a policy is made of, and where they are."""
    if is_single(dist):
        require_shapes(dist)
        yield place, dist
        return
    if not (isinstance(dist, Mapping) or _is_sequence(dist)):
        within = f" It is part {place} of what the policy returns: leave it out." if place else ""
        raise TrustRegionError(
            f"The policy is {name_of(dist)}. It must be a torch.distributions.Distribution, or a "
            f"tuple or dict of these.{within}"
        )
    parts = dist.items() if isinstance(dist, Mapping) else enumerate(dist)
    for name, part in parts:
        yield from placed_leaves(part, f"{place}[{name!r}]")


def is_single(dist: Any) -> bool:
    """Return whether a policy is one distribution: no tuple, no dict, and none that is both."""
    return isinstance(dist, Distribution) and not isinstance(dist, Mapping)


def require_shapes(dist: Distribution) -> None:
    """Check that a distribution says what shapes it has.

    Raises:
        TrustRegionError: If its class has not called the initialiser that keeps them.
    """
    try:
        dist.batch_shape, dist.event_shape  # noqa: B018 (whether they can be asked for)
    except AttributeError as error:
        raise TrustRegionError(
            f"{name_of(dist)} has no batch_shape and event_shape ({error}). Its __init__ must call "
            "super().__init__(batch_shape, event_shape)."
        ) from error


def paired(left: Any, right: Any, name: str, place: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the parts of two dicts or tuples side by side, and where they are."""
    if isinstance(left, Mapping) and _has_parts(right, left):
        for key in left:
            yield f"{place}[{key!r}]", left[key], right[key]
        return
    if _is_sequence(left) and _is_sequence(right) and len(left) == len(right):
        for index, pair in enumerate(zip(left, right, strict=True)):
            yield f"{place}[{index}]", *pair
        return
    raise TrustRegionError(
        f"The policy{place} is {name_of(left)} and the {name} {name_of(right)}: their parts do not "
        "fit."
    )


def _has_parts(value: Any, names: Mapping[Any, Any]) -> bool:
    """Return whether a value has parts of these names, and if it is a plain dict, no others."""
    if isinstance(value, dict):
        return value.keys() == names.keys()
    if not isinstance(value, Mapping):
        return False
    try:  # a TensorDict finds nested ones by a tuple of names, and may hold more than the actions
        return all(value[name] is not None for name in names)
    except KeyError:
        return False


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def made_of(dist: Distribution) -> Iterator[Distribution]:
    """Yield a distribution and those that it is made of."""
    yield dist
    for value in vars(dist).values():
        if isinstance(value, Distribution):
            yield from made_of(value)


def tensors(value: Any, without: str = "") -> Iterator[Tensor]:
    """Yield the tensors that make up a policy, but for those under one attribute's name."""
    return (each for each in _held(value, without) if isinstance(each, Tensor))


def inverses(value: Any) -> list[Transform]:
    """Return the inverted transforms of a policy, inner ones first."""
    found: list[Transform] = [
        each for each in _held(value, "") if isinstance(each, InverseTransform)
    ]
    return found[::-1]


def _held(value: Any, without: str) -> Iterator[Any]:
    """Yield what makes up a policy, outer parts first."""
    stack, seen = [value], set[int]()
    while stack:
        each = stack.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        if isinstance(each, Tensor):
            continue
        if isinstance(each, Distribution | Transform | nn.Module):
            stack.extend(part for name, part in vars(each).items() if name != without)
        elif isinstance(each, Mapping):
            stack.extend(each.values())
        elif isinstance(each, list | tuple):
            stack.extend(each)


def constant_transforms(dist: Distribution) -> Iterator[Transform]:
    """Yield the transforms that hold no tensor: the same object serves, and is equal to itself."""
    for each in getattr(dist, "transforms", ()):
        if next(tensors(each), None) is None:
            yield each


def require_valid(dist: Distribution) -> None:
    """Check a distribution's parameters against their bounds, also where torch was told not to."""
    for inner in made_of(dist):
        for name, constraint in _constraints(inner).items():
            value = vars(inner).get(name)
            if not isinstance(value, Tensor):
                continue
            sound = _sound(inner, name, value, constraint)
            if not sound.all():
                wrong = (value[~sound] if sound.shape == value.shape else value).detach()
                raise TrustRegionError(
                    f"{name_of(inner)} has {name} outside {constraint} (such as "
                    f"{float(wrong.flatten()[0]):g}). Bound the network's outputs (softplus, "
                    "clamp, exp), and look for NaN in its inputs and parameters."
                )


def _sound(dist: Distribution, name: str, value: Tensor, constraint: Any) -> Tensor:
    """Return which entries are numbers, and within their bounds where the user has given them."""
    derived = isinstance(getattr(type(dist), name, None), lazy_property)
    if derived or constraints.is_dependent(constraint):
        return ~value.isnan()
    sound: Tensor = constraint.check(value)
    return sound


def _constraints(dist: Distribution) -> Mapping[str, Constraint]:
    try:
        return dist.arg_constraints
    except NotImplementedError:
        return {}


def name_of(value: Any) -> str:
    """Return what a policy is, in the words of its own class."""
    if isinstance(value, Independent):
        return f"Independent({name_of(value.base_dist)})"
    if isinstance(value, Mapping):
        return f"a dict of {sorted(map(str, value))}"
    if _is_sequence(value):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
