"""How many numbers the closures keep of the old policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trpo_optim.tokens import token_closures

pytestmark = pytest.mark.usefixtures("flat_policies_pass")


def kept_elements(old: Any, head: Callable[[Tensor], Tensor] | None = None) -> int:
    """The number of elements that the closures hold for 12 tokens of 24, beside one per token."""
    tokens, mask = torch.zeros(4, 6, dtype=torch.long), torch.ones(4, 6).bool()
    mask[:, :3] = False
    weight = torch.zeros(500 if head is None else 5, requires_grad=True)
    closures = token_closures(
        lambda rows: weight.expand(4, 6, len(weight))[rows],
        *(tokens, mask, torch.zeros(4)),
        old=old,
        head=head,
    )
    (closure,) = closures.parts
    sizes, seen = [], {id(weight), id(head)}

    def visit(value: Any) -> None:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            sizes.append(value.numel())
        elif isinstance(value, list | tuple):
            for each in value:
                visit(each)
        elif callable(value) and getattr(value, "__closure__", None):
            visit([cell.cell_contents for cell in value.__closure__])
        elif hasattr(value, "__dict__"):
            visit(list(vars(value).values()))

    closure()  # which must not leave more behind
    visit(closure)
    return sum(size for size in sizes if size > 24)  # without what there is one of per token


def test_what_is_kept_of_the_old_policy_is_what_old_says() -> None:
    assert kept_elements("log_prob") == 0
    assert kept_elements(7) == 12 * (7 + 8)
    assert kept_elements("logits") == 12 * 500


def test_hidden_states_are_kept_of_a_head_that_is_not_trained() -> None:
    head = nn.Linear(5, 500)
    assert kept_elements("logits", head) == 12 * 500
    head.requires_grad_(False)
    assert kept_elements("logits", head) == 12 * 5
    assert kept_elements(7, head) == 12 * (7 + 8)
