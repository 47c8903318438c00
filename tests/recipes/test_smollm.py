"""The example of a real language model: its weights, its answers and its updates."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.timeout(1200),  # the weights take a minute of CPU time to read
    pytest.mark.filterwarnings("default"),  # the libraries' own are not errors here
]
smollm = pytest.importorskip("smollm")
Optimizer = pytest.importorskip("trpo_optim").TrustRegionOptimizer


@pytest.fixture(scope="module")
def loaded() -> Any:
    return smollm.load()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"QUESTIONS": 2, "ANSWERS": 3, "MICRO_BATCH": 4, "CHECKED": 2, "EVERY": 1}
    for name, size in sizes.items():
        monkeypatch.setattr(smollm, name, size)


@pytest.fixture
def adapted(loaded: Any, small: None) -> tuple[Any, Any, list[Tensor]]:
    """Return the model with adapters that are not zero, its tokenizer, and the adapters."""
    torch.manual_seed(0)
    model = deepcopy(loaded[0])
    adapters = smollm.add_adapters(model)
    for name, each in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(each, std=0.01)
    return model, loaded[1], adapters


def batch_of(model: Any, tokenizer: Any) -> Any:
    """Return three answers to each of two questions, of lengths that differ, and mixed rewards."""
    questions = [[3, 98, 5]] * 3 + [[21, 47, 36]] * 3
    batch = smollm.write(model, tokenizer, questions, do_sample=True, top_k=0)
    return batch._replace(rewards=torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]))


@torch.no_grad()
def log_probs(model: Any, batch: Any) -> Tensor:
    """Return ln π of all next tokens that count, (m, V), row by row and without padding."""
    length, found = batch.mask.shape[1], []
    for tokens, attention, mask in zip(batch.tokens, batch.attention, batch.mask, strict=True):
        logits = model(tokens[attention][None]).logits[0, -length - 1 : -1]
        found.append(logits[mask].double().log_softmax(-1))
    return torch.cat(found)


def test_the_model_knows_the_capital_of_france(loaded: Any) -> None:
    model, tokenizer = loaded
    asked = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(asked, return_tensors="pt")
    written = model.generate(**prompt, do_sample=False, max_new_tokens=16)
    text = tokenizer.decode(written[0, prompt.input_ids.shape[1] :])
    assert text == "The capital of France is Paris.<|im_end|>"


def test_english_is_likelier_than_the_same_words_in_disorder(loaded: Any) -> None:
    model, tokenizer = loaded
    sentence = (
        "Water freezes at zero degrees Celsius, and it boils at one hundred degrees Celsius at "
        "sea level."
    )
    disorder = " ".join(Random(0).sample(sentence.split(), len(sentence.split())))

    def perplexity(text: str) -> float:
        tokens = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            return float(model(tokens, labels=tokens).loss.exp())

    assert perplexity(sentence) < 25
    assert perplexity(disorder) > 10 * perplexity(sentence)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(" 98.", 1), (" indeed 98", 1), (" 98, not 5", 0), (" 9.", 0), (" 980", 0), (" Paris", 0)],
)
def test_the_reward_is_1_for_the_largest_number_alone(answer: str, expected: float) -> None:
    assert smollm.reward([3, 98, 5], answer) == expected


def test_padding_changes_no_answer(loaded: Any) -> None:
    model, tokenizer = loaded
    questions = [[1, 2, 3], [10, 20, 30], [4, 50, 6]]
    together = smollm.write(model, tokenizer, questions, do_sample=False)
    assert len(set(together.attention.sum(1).tolist())) == 3
    for row, question in enumerate(questions):
        alone = smollm.write(model, tokenizer, [question], do_sample=False)
        kept = together.tokens[row, -together.mask.shape[1] :][together.mask[row]]
        assert torch.equal(kept, alone.tokens[0, -alone.mask.shape[1] :][alone.mask[0]])
        assert together.rewards[row] == alone.rewards[0]


def test_an_answer_counts_up_to_its_end_token(adapted: Any) -> None:
    model, tokenizer, _ = adapted
    questions = [[number, 98, 5] for number in range(10, 30)]
    batch = smollm.write(model, tokenizer, questions, do_sample=True, top_k=0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    lengths = []
    for tokens, mask in zip(batch.tokens[:, -batch.mask.shape[1] :], batch.mask, strict=True):
        row = tokens.tolist()
        lengths.append(row.index(end) + 1 if end in row else len(row))
        assert mask.tolist() == [place < lengths[-1] for place in range(len(row))]
    assert len(set(lengths)) > 1


def test_loss_and_gradient_are_those_of_the_whole_model(adapted: Any) -> None:
    """They do not depend on padding, micro-batches, or the features kept of frozen layers."""
    model, tokenizer, adapters = adapted
    batch = batch_of(model, tokenizer)
    advantages = smollm.group_advantages(batch.rewards, 3)
    length, gain = batch.mask.shape[1], torch.zeros(())
    for tokens, attention, mask, advantage in zip(*batch[:3], advantages, strict=True):
        logits = model(tokens[attention][None]).logits[0, -length - 1 : -1]
        chosen = logits.log_softmax(-1).gather(-1, tokens[-length:, None])[:, 0][mask]
        gain = gain + advantage * (chosen - chosen.detach()).exp().sum()
    expected = torch.autograd.grad(-gain / batch.mask.sum(), adapters)

    before = [each.detach().clone() for each in adapters]
    smollm.improve(torch.optim.SGD(adapters, 1.0), smollm.closures_of(model, batch))

    for start, now, gradient in zip(before, adapters, expected, strict=True):
        scale = float(gradient.abs().max())
        assert scale > 0
        torch.testing.assert_close(start - now, gradient, rtol=1e-2, atol=1e-2 * scale + 1e-6)


def test_a_step_moves_all_adapters_and_nothing_else_within_the_radius(adapted: Any) -> None:
    model, tokenizer, adapters = adapted
    batch = batch_of(model, tokenizer)
    named = dict(model.named_parameters())
    before = {name: each.detach().clone() for name, each in named.items()}
    old = log_probs(model, batch)
    optimizer = Optimizer(adapters, max_kl=0.03, cg_iterations=3)

    kl = smollm.improve(optimizer, smollm.closures_of(model, batch))

    moved = {name for name, each in named.items() if not torch.equal(before[name], each)}
    assert moved == {name for name in named if "lora_" in name}
    assert len(moved) == 2 * 7 * smollm.ADAPTED
    chosen = batch.tokens[:, -batch.mask.shape[1] :][batch.mask][:, None]
    change = (log_probs(model, batch) - old).gather(-1, chosen)
    assert 0.015 < kl <= 0.03
    assert kl == pytest.approx(float((change.expm1() - change).mean()), rel=0.01)


@pytest.mark.parametrize("optimizer", ["trpo", "natural", "adamw"])
def test_every_optimizer_takes_an_update_and_its_picture_is_drawn(
    optimizer: Any, loaded: Any, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(smollm, "load", lambda: (deepcopy(loaded[0]), loaded[1]))
    monkeypatch.setattr(smollm, "reward", lambda _, answer: float(len(answer)))  # rarely all equal
    run = smollm.train(optimizer, updates=1)
    assert run.keys() == {*smollm.FIGURES, "greedy"}
    assert run["kl"][0] > 0
    assert optimizer != "trpo" or run["kl"][0] <= smollm.MAX_KL
    smollm.draw(run, None, optimizer)
    smollm.plt.savefig(tmp_path / "picture.png", dpi=120)
    assert matplotlib.image.imread(tmp_path / "picture.png").shape[:2] == (1080, 720)
