"""Which engine differentiates a closure, and what earlier steps learned about it."""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from typing import Any, TypedDict

from trpo_optim.closure.evaluation import Objective

__all__ = [
    "EngineChoice",
    "learn",
    "learned",
    "nothing_learned",
    "seems_to_return_three",
    "torch_func_first",
]


class EngineChoice(TypedDict):
    """What an optimizer has learned of its closures; plain values, which ``state_dict`` saves.

    Attributes:
        third: Whether the last closure returned a third value; None until one was evaluated.
        refusal: Why ``torch.func`` does not serve, or empty.
        flaw: Why no engine but finite differences serves, or empty.
        dear: What makes exact products dear in the last closure, or empty.
        proven: Whether products have been compared with finite differences.
        smooth: Whether they agreed, where finite differences are preferred; None until compared.
        one_sided: Whether the last differences on both sides were alike, so that one side serves;
            None until both were evaluated.
        doubts: How often a step's KL was so far from the predicted one that they were compared
            once more.
    """

    third: bool | None
    refusal: str
    flaw: str
    dear: str
    proven: bool
    smooth: bool | None
    one_sided: bool | None
    doubts: int


def nothing_learned() -> EngineChoice:
    """Return what is known of closures that were never evaluated."""
    return {
        "third": None,
        "refusal": "",
        "flaw": "",
        "dear": "",
        "proven": False,
        "smooth": None,
        "one_sided": None,
        "doubts": 0,
    }


def learned(group: dict[str, Any]) -> dict[str, EngineChoice]:
    """Return what an optimizer knows of the parts of its batch and of its curvature's closure.

    Args:
        group: One of ``param_groups``, in which it is kept as ``"engines"``.
    """
    known: dict[str, EngineChoice] = group.setdefault("engines", {})
    for name in ("parts", "curvature"):
        choice = known.setdefault(name, nothing_learned())
        for key, value in nothing_learned().items():
            choice.setdefault(key, value)  # type: ignore[misc]  # an older version saved fewer
    return known


def torch_func_first(choice: EngineChoice, objective: Objective) -> bool:
    """Return whether ``torch.func`` is to evaluate a closure.

    Args:
        choice: What is known.
        objective: The closure. What it returned in this step counts before what others did.
    """
    third = choice["third"] if objective.third is None else objective.third
    if third is None:
        third = seems_to_return_three(objective.closure)
    return not (choice["refusal"] or third)


def learn(choice: EngineChoice, objective: Objective, *, third: bool, refusal: str) -> None:
    """Keep what an evaluation has shown.

    Args:
        choice: What is known; updated.
        objective: The closure that was evaluated.
        third: Whether it returned a third value.
        refusal: Why ``torch.func`` does not serve, or empty.
    """
    objective.third = choice["third"] = third
    choice["refusal"] = refusal
    choice["dear"] = objective.dear


def seems_to_return_three(closure: Callable[[], Any]) -> bool:
    """Return whether a function ends in ``return a, b, c``, judging by its code alone.

    A wrong guess costs one further evaluation, and nothing else.

    Args:
        closure: A function, a method, a ``functools.partial`` or an object that can be called.
    """
    while isinstance(closure, functools.partial):
        closure = closure.func
    function: Any = closure
    with suppress(ValueError):  # a callable that claims to wrap itself
        function = inspect.unwrap(closure)
    if not inspect.isroutine(function):
        function = type(function).__call__
    code = getattr(function, "__code__", None)
    if code is None:  # it is not written in Python
        return False
    return any(
        (first.opname, first.arg, second.opname) == ("BUILD_TUPLE", 3, "RETURN_VALUE")
        for first, second in pairwise(dis.get_instructions(code))
    )
