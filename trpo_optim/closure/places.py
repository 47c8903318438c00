"""Which values the attributes of a module had before a step, or the items of a list or dict."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import Any

from torch import Tensor, nn

__all__ = ["CONTAINERS", "NUMBERS_AND_TEXTS", "Place", "is_content", "remembered"]

CONTAINERS = (dict, list, tuple, deque)
NUMBERS_AND_TEXTS = (int, float, bool, str)

_OF_EVERY_MODULE = {*vars(nn.Module()), "_is_full_backward_hook"} - {"training"}
"""What torch itself keeps in a module: hooks, submodules, buffers and parameters."""


def remembered(entries: Any) -> dict[Any, Any]:
    """Return attributes or items by their key, without what torch itself keeps in a module.

    Args:
        entries: A dict; or a list, tuple or deque, whose keys are the places.
    """
    pairs = entries.items() if isinstance(entries, dict) else enumerate(entries)
    return {key: value for key, value in pairs if key not in _OF_EVERY_MODULE}


def is_content(value: Any) -> bool:
    """Return whether a value is a tensor or a NumPy array.

    Args:
        value: Any.
    """
    numpy = sys.modules.get("numpy")
    return isinstance(value, Tensor) or bool(numpy and isinstance(value, numpy.ndarray))


class Place:
    """Attributes or items, and what each was.

    Args:
        entries: A dict, or a list or deque.
        before: What ``remembered`` said of them.
        contents: Keys of the tensors and arrays among them, and beside them in the same object.
        beside: Other places of the same object, which are rewound first: a module's buffers.

    Attributes:
        moves: Whether a tensor or array was written or bound anew.
    """

    def __init__(
        self,
        entries: Any,
        before: dict[Any, Any],
        contents: list[int],
        beside: Sequence[Place] = (),
    ) -> None:
        self._entries = entries
        self._before = before
        self._contents = contents
        self._count = len(entries)
        self._beside = beside
        self.moves = False

    def rewind(self, moved: set[int], *, final: bool) -> None:
        """Bind what was there again; numbers only beside moved tensors, and in shifted lists.

        Args:
            moved: Keys of the tensors and arrays that were written.
            final: Whether no evaluation follows. Then what was None, or not there, stays as it is.
        """
        now = self._entries if isinstance(self._entries, dict) else dict(enumerate(self._entries))
        changed = [key for key, value in self._before.items() if now.get(key, now) is not value]
        if changed and self._may_shift():
            self._rebuild(final=final)
            return
        self.moves = any(key in moved for key in self._contents)
        self.moves |= any(place.moves for place in self._beside)
        numbers = []
        for key in changed:
            value = self._before[key]
            if type(value) in NUMBERS_AND_TEXTS:
                numbers.append(key)
            elif not (value is None and final):
                self._entries[key] = value
                self.moves |= _carries_tensors(value)
        for key in numbers:
            if self.moves or key == "training":
                self._entries[key] = self._before[key]
        if len(now) > self._count:
            new = [key for key in now if key not in self._before and key not in _OF_EVERY_MODULE]
            (self._make_plain if final else self._drop)(new)

    def _may_shift(self) -> bool:
        """Return whether items that differ may be others in their places, of a list or deque."""
        if isinstance(self._entries, dict):
            return False
        full = getattr(self._entries, "maxlen", None) == len(self._entries)
        return full or len(self._entries) != self._count

    def _rebuild(self, *, final: bool) -> None:
        """Put all items back in their places; behind them, what the last evaluation added."""
        before, now = list(self._before.values()), list(self._entries)
        added = _added(before, now) if final else []
        limit = getattr(self._entries, "maxlen", None)
        self._entries.clear()
        self._entries.extend([*before, *added][:limit])
        self._make_plain(range(len(before), len(self._entries)))

    def _drop(self, keys: list[Any]) -> None:
        """Remove new entries: all of a list or of what was empty, else those that carry tensors."""
        kept = self._count > 0 and isinstance(self._entries, dict)
        for key in reversed(keys):
            if not kept or _carries_tensors(self._entries[key]):
                del self._entries[key]

    def _make_plain(self, keys: Iterable[Any]) -> None:
        """Take the graph off what the last evaluation added, such as a view of a parameter."""
        for key in keys:
            value = self._entries[key]
            if _carries_graph(value):
                self._entries[key] = value.detach()


def _added(before: list[Any], now: list[Any]) -> list[Any]:
    """Return the items that a list has gained; those in the place of a lost one are no gain."""
    items = SequenceMatcher(None, list(map(id, before)), list(map(id, now)), autojunk=False)
    added = []
    for kind, start, end, first, last in items.get_opcodes():
        if kind in ("insert", "replace"):
            added += now[first + end - start : last]
    return added


def _carries_tensors(value: Any) -> bool:
    if isinstance(value, CONTAINERS):
        return any(map(_carries_tensors, value.values() if isinstance(value, dict) else value))
    return is_content(value)


def _carries_graph(value: Any) -> bool:
    """Whether a tensor has a graph; asked for its node, a view of a written tensor would raise."""
    return isinstance(value, Tensor) and value.requires_grad and not isinstance(value, nn.Parameter)
