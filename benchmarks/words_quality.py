"""What one step of a small language model gains on its own batch and on held-out batches.

    make bench-words

Writes the table of docs/results/language-gain.md.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import page
import torch
import words
from table import table
from timing import putting_back

from trpo_optim import TrustRegionOptimizer

TASKS: tuple[words.TaskName, ...] = ("addition", "sorting")
PRODUCTS = (3, 5, 10, 20)
PROMPTS = 32
BEFORE, STEPS, HELD_OUT = 12, 4, 12
"""Batches whose gradients the preconditioner has seen, steps, and batches to judge them by."""
FOLDER = Path("runs/words")
"""Where pretrained models are kept."""


def batch(model: words.Llama, task: words.TaskName) -> words.Batch:
    """Return answers that the model wrote, as ``words.train`` makes them."""
    drawn = words.TASKS[task].draw(PROMPTS)
    prompts, answers = (each.repeat_interleave(words.COMPLETIONS, 0) for each in drawn)
    length = answers.shape[1]
    tokens = words.complete(model, prompts, length)
    groups = words.right(tokens, answers).view(PROMPTS, -1)
    with torch.no_grad():
        old = words.policy(model, tokens, length)
    return tokens, old.logits, (groups - groups.mean(1, keepdim=True)).view(-1, 1)


def rows_of(task: words.TaskName) -> list[list[str]]:
    """Return a row of gains per number of products."""
    model = words.pretrained(task, 0, 0.25, FOLDER)
    torch.manual_seed(1)
    put_back = putting_back(list(model.parameters()))
    optimizers: dict[str, Any] = {
        name: TrustRegionOptimizer(
            model.parameters(),
            max_kl=1e-5,
            cg_iterations=1,
            cg_tolerance=0.0,
            engine="Gauss-Newton",
            preconditioner=name,
        )
        for name in ("none", "diagonal")
    }
    for each in [batch(model, task) for _ in range(BEFORE)]:
        optimizers["diagonal"].step(partial(words.evaluate, model, *each))
        put_back()
    seen = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
    batches = [batch(model, task) for _ in range(HELD_OUT)]
    held_out: Any = tuple(map(torch.cat, zip(*batches, strict=True)))
    own = [batch(model, task) for _ in range(STEPS)]
    with torch.no_grad():
        before = float(words.evaluate(model, *held_out)[0])
    rows = []
    for products in PRODUCTS:
        cells = [task, str(products)]
        for name, optimizer in optimizers.items():
            gains = []
            for each in own:
                optimizer.load_state_dict(seen[name])
                optimizer.param_groups[0].update(max_kl=0.01, cg_iterations=products)
                report = optimizer.step(partial(words.evaluate, model, *each))
                with torch.no_grad():
                    loss, kl, _ = words.evaluate(model, *held_out)
                put_back()
                held = (before - float(loss)) / math.sqrt(float(kl))
                gains.append((report.improvement / math.sqrt(report.kl), held))
            cells += [f"{fmean(side):.3f}" for side in zip(*gains, strict=True)]
        rows.append(cells)
    return rows


def gains() -> str:
    """Return the table of gains."""
    head = ["task", "products", "own", "held out", "diagonal: own", "diagonal: held out"]
    return table(head, *(row for task in TASKS for row in rows_of(task)))


if __name__ == "__main__":
    page.renew(Path("docs/results/language-gain.md"), {"gains": gains})
