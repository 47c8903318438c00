"""How many random problems a property is tried on: ``--hypothesis-profile quick | thorough``."""

from __future__ import annotations

from hypothesis import settings

PROBLEMS_OF = {"quick": 10, "default": 100, "thorough": 1000}


def register() -> None:
    """Make the profiles known; pytest loads the one that its command line names."""
    for name, problems in PROBLEMS_OF.items():
        settings.register_profile(name, max_examples=problems, deadline=None, derandomize=True)


def problems(share: float = 1.0) -> int:
    """Return how many problems to try, or a share of them where each is dear; at least one."""
    return max(1, round(share * settings().max_examples))
