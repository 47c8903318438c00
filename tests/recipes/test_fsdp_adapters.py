"""A model of transformers with adapters of PEFT, sharded by FSDP2."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, values_of
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.tokens import token_closures

pytestmark = [pytest.mark.recipes, pytest.mark.ranks]
pytest.importorskip("peft")
pytest.importorskip("transformers")


def model_with_adapters() -> Any:
    """Return a small Llama with low-rank adapters and non-reentrant checkpoints."""
    transformers, peft = map(importlib.import_module, ("transformers", "peft"))
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    adapters = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, adapters).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def steps_of(rank: int, shard: bool) -> tuple[Tensor, Tensor, StepReport]:
    """Return the adapters before and after two steps on this rank's sequences, and the report."""
    model, size = model_with_adapters(), dist.get_world_size()
    if shard:
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = TrustRegionOptimizer(
        model.parameters(), process_group=dist.group.WORLD, engine="finite differences"
    )
    before = adapters_of(optimizer)
    torch.manual_seed(1)
    sequences, advantages = torch.randint(50, (8, 12)), torch.randn(8)
    own = slice(8 * rank // size, 8 * (rank + 1) // size)
    tokens = sequences[own]
    mask = torch.arange(11).ge(3).expand(len(tokens), 11)  # the prompts have four tokens

    def logits(rows: Any) -> Tensor:
        predicted: Tensor = model(input_ids=tokens[rows]).logits[:, :-1]
        return predicted

    for _ in range(2):
        closures = token_closures(logits, tokens[:, 1:], mask, advantages[own], micro_batch=2)
        report = optimizer.step(closures)
    return before, adapters_of(optimizer), report


def adapters_of(optimizer: TrustRegionOptimizer) -> Tensor:
    """Return a copy of the trained parameters, whole."""
    trained = [each for each in optimizer.param_groups[0]["params"] if each.requires_grad]
    pieces = [getattr(each, "full_tensor", lambda each=each: each)() for each in trained]
    return torch.cat([each.detach().reshape(-1) for each in pieces]).clone()


def test_adapters_in_fsdp_take_the_step_of_whole_ones() -> None:
    ((before, expected, alone),) = values_of(on_ranks(1, steps_of, False))
    assert alone.accepted
    for start, vector, report in values_of(on_ranks(2, steps_of, True)):
        assert torch.equal(start, before)
        assert (vector - expected).norm() < 1e-6 * (expected - before).norm()
        assert report.engine == "finite differences"
        assert report.kl == pytest.approx(alone.kl, rel=1e-6)
