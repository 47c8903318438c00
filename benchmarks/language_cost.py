"""One step of a language model: its memory and time beside AdamW's update, and its exact KL.

    make bench-language

It writes docs/results/language-steps.md. It needs transformers and peft.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro
from language_kls import section
from memory import peak_bytes
from peft import LoraConfig, get_peft_model
from table import table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.tokens import chunked_log_prob, token_closures, token_log_prob, token_surrogate

LAYERS, WIDTH, HIDDEN, HEADS, RANK = 4, 256, 688, 4, 8
CHUNK = 256
"""Positions whose logits exist at once, with a head."""

PAGE = """# One step of a language model

This page was written by `make bench-language` {setting}.

## Memory and time

The model is a Llama of {layers} layers and {width} features with LoRA of rank {rank} in all linear
layers. It has random weights. The vocabulary has {vocabulary} tokens. A batch has {sequences}
sequences of {length} tokens, in micro-batches of {micro_batch}. AdamW's update is one pass over the
batch with the same loss. Memory is what is allocated at the peak beyond what was there before.
Times are CPU times, medians of {rounds} steps.

{rows}

- Rows without *head* make the logits of a micro-batch at once. With a head, they are
  made for {chunk} positions at a time, and again in the backward pass.
- *Sampled* is `old="log_prob"`, *exact* is `old="logits"`. *An eighth* is `curvature=1/8`.
- All steps take ten Fisher-vector products, by finite differences. The first step of an optimizer
  also takes an exact product, which needs more memory. With `engine="finite differences"`, it does
  not.

## The exact KL of a step

{kls}
"""


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    vocabulary: int = 50257
    """tokens of the vocabulary (GPT-2's number)"""
    sequences: int = 32
    """sequences of a batch"""
    length: int = 128
    """tokens of a sequence"""
    micro_batch: int = 8
    """sequences that are evaluated at once"""
    rounds: int = 2
    """timed steps of each row"""
    page: Path = Path("docs/results/language-steps.md")
    """what is written"""


class Problem:
    """A model, and a batch of sequences that it is trained on."""

    def __init__(self, setting: Setting) -> None:
        """Make both at random."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=WIDTH,
            intermediate_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=setting.length + 1,
        )
        whole: Any = get_peft_model(
            LlamaForCausalLM(config), LoraConfig(r=RANK, target_modules="all-linear")
        )
        for name, parameter in whole.named_parameters():
            if "lora_B" in name:  # as after some updates; peft begins with zeros
                nn.init.normal_(parameter, std=0.02)
        self.setting = setting
        self.whole, self.body = whole, whole.base_model.model.model
        self.head: nn.Module = whole.base_model.model.lm_head
        self.parameters = [each for each in whole.parameters() if each.requires_grad]
        self.start = [each.detach().clone() for each in self.parameters]
        self.text = torch.randint(setting.vocabulary, (setting.sequences, setting.length + 1))
        self.tokens = self.text[:, 1:]
        self.advantages = torch.randn(setting.sequences)

    def restart(self) -> None:
        """Go back to the first parameters."""
        with torch.no_grad():
            for each, value in zip(self.parameters, self.start, strict=True):
                each.copy_(value)

    def logits(self, rows: Any) -> Tensor:
        """Return what predicts the tokens of some sequences, (n, T, V)."""
        result: Tensor = self.whole(input_ids=self.text[rows][:, :-1], use_cache=False).logits
        return result

    def hidden(self, rows: Any) -> Tensor:
        """Return the hidden states below the head, (n, T, H)."""
        outputs = self.body(input_ids=self.text[rows][:, :-1], use_cache=False)
        result: Tensor = outputs.last_hidden_state
        return result

    def adamw(self, *, head: bool) -> Callable[[], None]:
        """Return AdamW's update, one pass over the batch in micro-batches."""
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        pieces = torch.arange(self.setting.sequences).split(self.setting.micro_batch)

        def log_prob(rows: Tensor) -> Tensor:
            tokens = self.tokens[rows]
            if head:
                return chunked_log_prob(self.hidden(rows), self.head, tokens, chunk=CHUNK)
            return token_log_prob(self.logits(rows), tokens)

        with torch.no_grad():
            old = [log_prob(rows) for rows in pieces]

        def update() -> None:
            optimizer.zero_grad()
            for rows, before in zip(pieces, old, strict=True):
                loss = token_surrogate(log_prob(rows), before, self.advantages[rows])
                (loss * len(rows) / len(self.text)).backward()
            optimizer.step()

        return update

    def trpo(self, *, head: bool, **options: Any) -> Callable[[], StepReport]:
        """Return a step, with what it takes to make its closures."""
        optimizer = TrustRegionOptimizer(self.parameters, cg_tolerance=0.0)
        outputs = self.hidden if head else self.logits
        with_head: dict[str, Any] = {"head": self.head, "chunk": CHUNK} if head else {}

        def step() -> StepReport:
            return optimizer.step(
                token_closures(
                    outputs,
                    self.tokens,
                    None,
                    self.advantages,
                    micro_batch=self.setting.micro_batch,
                    **with_head,
                    **options,
                )
            )

        return step


@dataclass
class Measured:
    """What a row measured: bytes at the peak of the first and the second run, CPU seconds."""

    peaks: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)


def measured(problem: Problem, job: Callable[[], Any]) -> Measured:
    """Run a job twice for its memory, and then for its time."""
    result = Measured()
    for _ in range(2):
        problem.restart()
        gc.collect()
        result.peaks.append(peak_bytes(job))
    for _ in range(problem.setting.rounds):
        problem.restart()
        start = time.thread_time()
        report = job()
        result.seconds.append(time.thread_time() - start)
        if report is not None and (report.fisher_products, report.accepted) != (10, True):
            raise RuntimeError(f"not the step that is to be measured: {report}")
    return result


def rows(found: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    """Return the table's rows, each beside AdamW without a head."""
    peak, seconds = found["AdamW"].peaks[1], median(found["AdamW"].seconds)
    lines: list[tuple[str, ...]] = [
        ("", "peak, MiB", "over AdamW's", "first step", "seconds", "over AdamW's")
    ]
    for name, each in found.items():
        first, later = each.peaks
        cells = f"{later / 2**20:.0f}", f"{later / peak:.2f}", f"{first / peak:.2f}"
        time_taken = median(each.seconds)
        lines.append((name, *cells, f"{time_taken:.1f}", f"{time_taken / seconds:.1f}"))
    return lines


def main(setting: Setting) -> None:
    """Measure all rows and write the page."""
    torch.set_num_threads(1)
    problem = Problem(setting)
    exact = {"old": "logits"}
    jobs: dict[str, Callable[[], Any]] = {
        "AdamW": problem.adamw(head=False),
        "AdamW, head": problem.adamw(head=True),
        "sampled, an eighth": problem.trpo(head=False, curvature=1 / 8),
        "sampled, head, an eighth": problem.trpo(head=True, curvature=1 / 8),
        "exact, an eighth": problem.trpo(head=False, curvature=1 / 8, **exact),
        "exact, head, an eighth": problem.trpo(head=True, curvature=1 / 8, **exact),
    }
    found = {}
    for name, job in jobs.items():
        found[name] = measured(problem, job)
        print(rows({"AdamW": found["AdamW"], name: found[name]})[-1], flush=True)
    sizes = {"layers": LAYERS, "width": WIDTH, "rank": RANK, "chunk": CHUNK}
    names = "vocabulary", "sequences", "length", "micro_batch", "rounds"
    sizes |= {name: getattr(setting, name) for name in names}
    machine = f"with torch {torch.__version__}, on one core"
    setting.page.write_text(
        PAGE.format(setting=machine, rows=table(*rows(found)), kls=section(), **sizes), "utf-8"
    )


if __name__ == "__main__":
    main(tyro.cli(Setting))
