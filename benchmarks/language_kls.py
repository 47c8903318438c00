"""The exact KL of a step on tokens, by what is kept of the old policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any
from unittest import mock

import torch
from table import table
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.tokens import events, token_closures
from trpo_optim.tokens.events import OldPolicy

VOCABULARY, LENGTH, MAX_KL, SEEDS = 256, 16, 0.01, 3
SCALES = {"peaked": 40.0, "flat": 1.0}
"""Factors of the head's first weights: the policy is peaked or flat."""
KEPT: tuple[OldPolicy, ...] = ("log_prob", 16, 64, "logits")

SECTION = """The model is a Llama of {parameters} parameters with random weights. V is {vocabulary}.
{shares}
The table shows the exact KL of one step with δ = {max_kl:g}, on the tokens of its batch.
`token_closures` refuses a k whose tokens have less than 90 % of the probability. The table shows
what it would do.

{kls}

The next table shows what a step gains on its own batch of 4096 tokens if the Fisher-vector products
are taken on a part of the sequences (`curvature=`), over the gain with all sequences at an equal
exact KL. The gain is divided by √KL. Means over {seeds} seeds.

{gains}"""


@dataclass
class Policy:
    """A small language model, and sequences that it is trained on."""

    scale: float
    sequences: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Make both at random, always the same."""
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
        )
        self.model: Any = LlamaForCausalLM(config)
        with torch.no_grad():
            self.model.lm_head.weight.mul_(self.scale)
            self.tokens = torch.randint(VOCABULARY, (self.sequences, LENGTH + 1))
            for place in range(1, LENGTH + 1):
                logits = self.model(input_ids=self.tokens[:, :place]).logits[:, -1]
                self.tokens[:, place] = Categorical(logits=logits).sample()
        self.advantages = torch.randn(self.sequences)

    def logits(self, rows: Any = slice(None)) -> Tensor:
        """Return what predicts the tokens of some sequences."""
        result: Tensor = self.model(input_ids=self.tokens[rows]).logits[:, :-1]
        return result

    def step(self, old: OldPolicy, curvature: float = 1.0) -> tuple[StepReport, float]:
        """Take a step; return its report, and its exact KL in nats per token."""
        with torch.no_grad():
            before = Categorical(logits=self.logits())
        closures = token_closures(
            self.logits,
            *(self.tokens[:, 1:], None, self.advantages),
            old=old,
            curvature=curvature,
        )
        optimizer = TrustRegionOptimizer(self.model.parameters(), max_kl=MAX_KL)
        report = optimizer.step(closures)
        with torch.no_grad():
            kl = kl_divergence(before, Categorical(logits=self.logits())).mean()
        return report, float(kl)

    def share(self, likeliest: int) -> float:
        """Return the probability of the likeliest tokens, the mean over positions."""
        with torch.no_grad():
            return float(self.logits().softmax(-1).topk(likeliest).values.sum(-1).mean())


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.0f} %"


def kls() -> str:
    """Return the table of exact KLs."""
    lines: list[list[str]] = [["`old=`"]]
    lines += [[f'`"{old}"`' if isinstance(old, str) else str(old)] for old in KEPT]
    for name, scale in SCALES.items():
        for sequences in (16, 256):
            lines[0].append(f"{name}, {sequences * LENGTH} tokens")
            for line, old in zip(lines[1:], KEPT, strict=True):
                with mock.patch.object(events, "_LEAST_MASS", 0.0):  # also what is refused
                    line.append(f"{Policy(scale, sequences).step(old)[1]:.4f}")
    return table(*lines)


def gains() -> str:
    """Return the table of gains with products on a part of the sequences."""
    shares = 1 / 2, 1 / 4, 1 / 8
    lines = [["policy", "`old=`", *(f"1/{1 / share:g}" for share in shares)]]
    for name, scale in SCALES.items():
        for old in ("log_prob", "logits"):
            ratios = []
            for seed in range(SEEDS):
                reports = [Policy(scale, 256, seed).step(old, share) for share in (1.0, *shares)]
                found = [report.improvement / math.sqrt(kl) for report, kl in reports]
                ratios.append([gain / found[0] for gain in found[1:]])
            cells = [percent(fmean(each)) for each in zip(*ratios, strict=True)]
            lines.append([name, f'`"{old}"`', *cells])
    return table(*lines)


def section() -> str:
    """Return the part of the page."""
    shares = []
    for name, scale in SCALES.items():
        policy = Policy(scale, 256)
        few, more = policy.share(16), policy.share(64)
        shares.append(
            f"In the {name} policy, the 16 likeliest tokens have {percent(few)} of the "
            f"probability, and the 64 likeliest {percent(more)}."
        )
    return SECTION.format(
        parameters=f"{sum(each.numel() for each in Policy(1.0, 1).model.parameters()):,}".replace(
            ",", " "
        ),
        vocabulary=VOCABULARY,
        shares="\n".join(shares),
        max_kl=MAX_KL,
        seeds=SEEDS,
        kls=kls(),
        gains=gains(),
    )
