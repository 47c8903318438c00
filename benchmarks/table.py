"""Tables in Markdown, and numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def table(*rows: Sequence[object]) -> str:
    """Return rows as a Markdown table, the first as its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join([lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]])


def records(rows: Iterable[Mapping[str, object]]) -> str:
    """Return rows as a Markdown table with the columns of the first; what a row lacks is empty."""
    rows = list(rows)
    if not rows:
        return "None."
    return table([*rows[0]], *([row.get(name, "") for name in rows[0]] for row in rows))


def steps_of(number: int) -> str:
    """Return a number of steps with its thousands apart."""
    return f"{number:,}".replace(",", " ")


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.0f} %"
