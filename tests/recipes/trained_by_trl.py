"""Small models that TRL's trainer trains by the recipe, and what their steps did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
recipe = pytest.importorskip("trl_trainer")
peft = pytest.importorskip("peft")

WORDS, GPT2 = 7, 50_257
"""Sizes of vocabularies: the recipe's own and GPT-2's."""


def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward even tokens. A completion may hold tokens that the tokenizer does not know."""
    return [sum(token % 2 == 0 for token in ids) / 8 for ids in completion_ids]


def make_trainer(
    folder: Path,
    *,
    words: int = WORDS,
    dtype: torch.dtype = torch.float32,
    lora: bool = False,
    max_kl: float = 0.01,
    old: Any = "log_prob",
    **settings: Any,
) -> Any:
    """Return a trainer of a small model. Its settings are TRL's, but for the sizes."""
    torch.manual_seed(0)
    model = recipe.make_model(words).to(dtype)
    defaults: dict[str, Any] = {"per_device_train_batch_size": 16, "max_steps": 1}
    quiet = {"report_to": "none", "disable_tqdm": True, "logging_steps": 1, "use_cpu": True}
    sizes = {"max_completion_length": 8, "save_strategy": "no"}
    return Recorded(
        model,
        even,
        recipe.GRPOConfig(output_dir=str(folder), **quiet | sizes | defaults | settings),
        recipe.Dataset.from_dict({"prompt": ["red", "green blue", "white", "black"] * 16}),
        processing_class=recipe.make_tokenizer(),
        max_kl=max_kl,
        old=old,
        peft_config=peft.LoraConfig(target_modules="all-linear") if lora else None,
    )


class Recorded(recipe.TrustRegionGRPOTrainer):  # type: ignore[misc, name-defined]  # not typed
    """Keeps every step's micro-batches, closures, report, and parameters before and after."""

    def hand_over_closures(self, optimizer: Any, *rest: Any) -> Any:
        self.__dict__.setdefault("steps", [])
        batches = list(self.micro_batches)
        handed = super().hand_over_closures(optimizer, *rest)
        self.steps.append({"batches": batches, "closures": handed[0][1], "before": self.values()})
        return handed

    def log_report(self, optimizer: Any, *rest: Any) -> None:
        super().log_report(optimizer, *rest)
        self.steps[-1] |= {"report": optimizer.last_report, "after": self.values()}

    def values(self) -> dict[str, Tensor]:
        """Return copies of the parameters by name."""
        return {name: each.detach().clone() for name, each in self.model.named_parameters()}

    def moved(self, step: int = 0) -> dict[str, bool]:
        """Return which parameters a step has moved."""
        before, after = self.steps[step]["before"], self.steps[step]["after"]
        return {name: not torch.equal(before[name], after[name]) for name in before}

    def trainable(self) -> dict[str, bool]:
        """Return which parameters are to be trained."""
        return {name: each.requires_grad for name, each in self.model.named_parameters()}


def trained(folder: Path, **settings: Any) -> Any:
    trainer = make_trainer(folder, **settings)
    trainer.train()
    return trainer


@torch.no_grad()
def log_probs(trainer: Any, values: dict[str, Tensor], inputs: dict[str, Any]) -> Tensor:
    """Return ln π of all next tokens of the completions that count, (m, V), in float64."""
    model = type(trainer.model)(trainer.model.config).double().train(False)
    model.load_state_dict(values)
    sequences = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    logits = model(sequences, attention, use_cache=False).logits
    length = inputs["completion_ids"].shape[1]
    told: Tensor = logits[:, -length - 1 : -1] / trainer.temperature
    return told.log_softmax(-1)[inputs["completion_mask"].bool()]


def exact_kl(trainer: Any, step: int = 0) -> float:
    """Return the mean over tokens of the KL over the whole vocabulary, in float64."""
    found = trainer.steps[step]
    total = tokens = 0.0
    for _, inputs in found["batches"]:
        old, new = (log_probs(trainer, found[when], inputs) for when in ("before", "after"))
        total += float((old.exp() * (old - new)).sum())
        tokens += len(old)
    return total / tokens
