"""One step of a language model: its memory and time beside AdamW's update, and its exact KL.

    make bench-language

Writes the tables of docs/results/language-steps.md. It needs transformers and peft.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any
from unittest import mock

import page
import torch
from memory import peak_bytes
from peft import LoraConfig, get_peft_model
from table import percent, table
from timing import putting_back
from torch import Tensor, nn
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.tokens import (
    chunked_log_prob,
    events,
    token_closures,
    token_log_prob,
    token_surrogate,
)
from trpo_optim.tokens.events import OldPolicy

VOCABULARY, SEQUENCES, LENGTH, MICRO_BATCH, RANK, ROUNDS = 50257, 32, 128, 8, 8, 2
PIECES = torch.arange(SEQUENCES).split(MICRO_BATCH)
CHUNK = 256
"""Positions whose logits exist at once, with a head."""
SMALL_VOCABULARY, SMALL_LENGTH, SEEDS = 256, 16, 3
SCALES = {"peaked": 40.0, "flat": 1.0}
"""Factors of the small model's head: its policy is peaked or flat."""
KEPT: tuple[OldPolicy, ...] = ("log_prob", 16, 64, "logits")


def llama(vocabulary: int, layers: int, width: int, hidden: int, heads: int, seed: int) -> Any:
    """Return a Llama with random weights."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config)


class Problem:
    """A model with adapters, and a batch of sequences that it is trained on, all random."""

    def __init__(self) -> None:
        adapters = LoraConfig(r=RANK, target_modules="all-linear")
        self.whole: Any = get_peft_model(llama(VOCABULARY, 4, 256, 688, 4, seed=0), adapters)
        for name, parameter in self.whole.named_parameters():
            if "lora_B" in name:  # as after some updates; peft begins with zeros
                nn.init.normal_(parameter, std=0.02)
        self.head: nn.Module = self.whole.base_model.model.lm_head
        self.parameters = [each for each in self.whole.parameters() if each.requires_grad]
        self.restart = putting_back(self.parameters)
        self.text = torch.randint(VOCABULARY, (SEQUENCES, LENGTH + 1))
        self.tokens, self.advantages = self.text[:, 1:], torch.randn(SEQUENCES)

    def logits(self, rows: Any) -> Tensor:
        """Return what predicts the tokens of some sequences, (n, T, V)."""
        result: Tensor = self.whole(input_ids=self.text[rows][:, :-1], use_cache=False).logits
        return result

    def hidden(self, rows: Any) -> Tensor:
        """Return the hidden states below the head, (n, T, H)."""
        body = self.whole.base_model.model.model
        outputs = body(input_ids=self.text[rows][:, :-1], use_cache=False)
        result: Tensor = outputs.last_hidden_state
        return result

    def log_prob(self, rows: Any, *, head: bool) -> Tensor:
        """Return the log-probabilities of some sequences' tokens, (n, T)."""
        tokens = self.tokens[rows]
        if head:
            return chunked_log_prob(self.hidden(rows), self.head, tokens, chunk=CHUNK)
        return token_log_prob(self.logits(rows), tokens)

    @torch.no_grad()
    def old_log_prob(self, *, head: bool) -> Tensor:
        """Return the log-probabilities of all tokens before any update, (N, T)."""
        return torch.cat([self.log_prob(rows, head=head) for rows in PIECES])

    def adamw(self, *, head: bool) -> Callable[[], None]:
        """Return AdamW's update, one pass over the batch in micro-batches."""
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        old = self.old_log_prob(head=head)

        def update() -> None:
            optimizer.zero_grad()
            for rows in PIECES:
                new = self.log_prob(rows, head=head)
                loss = token_surrogate(new, old[rows], self.advantages[rows])
                (loss * len(rows) / len(self.text)).backward()
            optimizer.step()

        return update

    def trpo(self, *, head: bool, old: OldPolicy) -> Callable[[], StepReport]:
        """Return a step with products on an eighth, with what it takes to make its closures."""
        optimizer = TrustRegionOptimizer(self.parameters, cg_tolerance=0.0)
        outputs = self.hidden if head else self.logits
        options: dict[str, Any] = {"head": self.head, "chunk": CHUNK} if head else {}
        options |= {"micro_batch": MICRO_BATCH, "curvature": 1 / 8, "old": old}
        if old == "log_prob":  # as AdamW has it
            options["old_log_prob"] = self.old_log_prob(head=head)

        def step() -> StepReport:
            return optimizer.step(
                token_closures(outputs, self.tokens, None, self.advantages, **options)
            )

        return step


def cost() -> str:
    """Return the table of memory and CPU time, beside AdamW without a head."""
    problem = Problem()
    jobs: dict[str, Callable[[], Any]] = {
        "AdamW": problem.adamw(head=False),
        "AdamW, head": problem.adamw(head=True),
        "sampled, an eighth": problem.trpo(head=False, old="log_prob"),
        "sampled, head, an eighth": problem.trpo(head=True, old="log_prob"),
        "exact, an eighth": problem.trpo(head=False, old="logits"),
        "exact, head, an eighth": problem.trpo(head=True, old="logits"),
    }
    rows = [["", "peak, MiB", "over AdamW's", "first step", "seconds", "over AdamW's"]]
    unit: tuple[int, float] | None = None
    for name, job in jobs.items():
        peaks, times = [], []
        for _ in range(2):
            problem.restart()
            gc.collect()
            peaks.append(peak_bytes(job))
        for _ in range(ROUNDS):
            problem.restart()
            start = time.thread_time()
            report = job()
            times.append(time.thread_time() - start)
            if report is not None and (report.fisher_products, report.accepted) != (10, True):
                raise RuntimeError(f"This is not the step to measure: {report}")
        (first, peak), seconds = peaks, median(times)
        unit = unit or (peak, seconds)
        memory = f"{peak / 2**20:.0f}", f"{peak / unit[0]:.2f}", f"{first / unit[0]:.2f}"
        rows.append([name, *memory, f"{seconds:.1f}", f"{seconds / unit[1]:.1f}"])
        print(rows[-1], flush=True)
    return table(*rows)


class Small:
    """A small language model, whose head's weights have a factor, and sequences that it wrote."""

    def __init__(self, scale: float, sequences: int, seed: int = 0) -> None:
        self.model = llama(SMALL_VOCABULARY, 2, 32, 64, 2, seed)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(scale)
            self.tokens = torch.randint(SMALL_VOCABULARY, (sequences, SMALL_LENGTH + 1))
            for place in range(1, SMALL_LENGTH + 1):
                logits = self.model(input_ids=self.tokens[:, :place]).logits[:, -1]
                self.tokens[:, place] = Categorical(logits=logits).sample()
        self.advantages = torch.randn(sequences)

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """Return what predicts the tokens of some sequences."""
        result: Tensor = self.model(input_ids=self.tokens[rows]).logits[:, :-1]
        return result

    def step(self, old: OldPolicy, curvature: float = 1.0) -> tuple[StepReport, float]:
        """Take a step; return its report, and its exact KL in nats per token."""
        with torch.no_grad():
            before = Categorical(logits=self.logits())
        batch = self.tokens[:, 1:], None, self.advantages
        closures = token_closures(self.logits, *batch, old=old, curvature=curvature)
        report = TrustRegionOptimizer(self.model.parameters(), max_kl=0.01).step(closures)
        with torch.no_grad():
            kl = kl_divergence(before, Categorical(logits=self.logits())).mean()
        return report, float(kl)


def likeliest() -> str:
    """Return the table of the probability of the likeliest tokens, the mean over positions."""
    rows = [["policy", "16 likeliest", "64 likeliest"]]
    for name, scale in SCALES.items():
        with torch.no_grad():
            ordered = Small(scale, 256).logits().softmax(-1).sort(descending=True).values
        rows.append([name, *(percent(float(ordered[..., :k].sum(-1).mean())) for k in (16, 64))])
    return table(*rows)


def kls() -> str:
    """Return the table of exact KLs by what is kept of the old policy."""
    rows = [["`old=`"], *([f'`"{old}"`' if isinstance(old, str) else str(old)] for old in KEPT)]
    for name, scale in SCALES.items():
        for sequences in (16, 256):
            rows[0].append(f"{name}, {sequences * SMALL_LENGTH} tokens")
            for row, old in zip(rows[1:], KEPT, strict=True):
                with mock.patch.object(events, "_LEAST_MASS", 0.0):  # also what is refused
                    row.append(f"{Small(scale, sequences).step(old)[1]:.4f}")
    return table(*rows)


def parts() -> str:
    """Return the table of gains with products on a part of the sequences."""
    shares = 1 / 2, 1 / 4, 1 / 8
    rows = [["policy", "`old=`", *(f"1/{1 / share:g}" for share in shares)]]
    for name, scale in SCALES.items():
        for old in ("log_prob", "logits"):
            ratios = []
            for seed in range(SEEDS):
                steps = [Small(scale, 256, seed).step(old, share) for share in (1.0, *shares)]
                whole, *gains = (report.improvement / math.sqrt(kl) for report, kl in steps)
                ratios.append([gain / whole for gain in gains])
            means = [percent(fmean(each)) for each in zip(*ratios, strict=True)]
            rows.append([name, f'`"{old}"`', *means])
    return table(*rows)


if __name__ == "__main__":
    tables = {each.__name__: each for each in (likeliest, kls, parts, cost)}
    setting = {"setting": partial(page.setting, ("transformers", "peft"))}
    page.renew(Path("docs/results/language-steps.md"), setting | tables)
