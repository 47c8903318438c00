"""The example of a language model: its model, its tasks, and what every optimizer does with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import matplotlib.image
import pytest
import torch
import words
from torch import Tensor
from torch.distributions import Categorical

from trpo_optim import TrustRegionError


def text(tokens: Tensor) -> list[str]:
    return ["".join(words.CHARACTERS[token] for token in row) for row in tokens.tolist()]


@pytest.mark.parametrize("task", words.TASKS)
def test_answers_are_those_of_python(task: Any) -> None:
    torch.manual_seed(0)
    prompts, answers = words.TASKS[task].draw(64)
    for prompt, answer in zip(text(prompts), text(answers), strict=True):
        asked = prompt.removesuffix("=")
        if task == "sorting":
            wanted = "".join(sorted(asked.replace(" ", "")))
        else:
            sign = words.TASKS[task].sign
            left, right = asked.split(sign)
            wanted = f"{int(left) + int(right) if sign == '+' else int(left) * int(right):04}"
        assert answer == wanted


@pytest.mark.parametrize("task", words.TASKS)
def test_training_never_sees_a_held_out_prompt(task: Any) -> None:
    held_out, _ = words.TASKS[task].draw(512, held_out=True)
    again, _ = words.TASKS[task].draw(512, held_out=True)
    assert torch.equal(held_out, again)
    seen = {each for _ in range(40) for each in text(words.TASKS[task].draw(512)[0])}
    assert len(seen) > 5000
    assert not seen & set(text(held_out))


def test_a_character_depends_on_the_ones_before_it_and_on_their_order() -> None:
    torch.manual_seed(0)
    model = words.Llama()
    tokens = torch.arange(10)[None]
    later, swapped = tokens.clone(), tokens.clone()
    later[0, 6] = 0
    swapped[0, [1, 2]] = swapped[0, [2, 1]]
    with torch.no_grad():
        logits = model(tokens)
        torch.testing.assert_close(model(later)[0, :6], logits[0, :6])
        assert not torch.allclose(model(later)[0, 6:], logits[0, 6:], atol=1e-3)
        assert not torch.allclose(model(swapped)[0, -1], logits[0, -1], atol=1e-3)
        assert 115_000 < sum(each.numel() for each in model.parameters()) < 135_000


def test_attention_sees_distances_and_not_places() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16)
    speeds = 10_000 ** (-torch.arange(8) / 8)

    def score(first: int, second: int) -> Tensor:
        at = [torch.tensor([[place]]) * speeds for place in (first, second)]
        return (words.rotated(query, at[0]) * words.rotated(key, at[1])).sum()

    torch.testing.assert_close(score(2, 5), score(9, 12))
    assert abs(score(2, 5) - score(2, 6)) > 1e-3


def test_the_clipped_gain_stops_at_the_clip() -> None:
    torch.manual_seed(0)
    model = words.Llama()
    prompts, answers = words.TASKS["addition"].draw(16)
    tokens = torch.cat([prompts, answers], 1)
    with torch.no_grad():
        logits = words.policy(model, tokens, 4).logits
        batch = tokens, logits, torch.ones(16, 1)
        for each in model.parameters():
            each.mul_(1.5)
        new = words.policy(model, tokens, 4)
        ratio = (new.log_prob(answers) - Categorical(logits=logits).log_prob(answers)).exp()
        assert ratio.max() > 1.2 > 0.8 > ratio.min()
        loss, kl, _ = words.evaluate(model, *batch, 0.2)
        torch.testing.assert_close(loss, -ratio.clamp(max=1.2).mean())
        torch.testing.assert_close(words.evaluate(model, *batch)[0], -ratio.mean())
        old = Categorical(logits=logits)
        torch.testing.assert_close(kl, torch.distributions.kl_divergence(old, new).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the tests' models are kept, so that each is pretrained once."""
    return tmp_path_factory.mktemp("words")


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return arguments of two quick updates of a model that gets one answer in six right."""
    monkeypatch.setattr(words, "PROMPTS", 8)
    monkeypatch.setattr(words, "EVERY", 2)
    return {"task": "sorting", "updates": 2, "goal": 0.15, "folder": folder}


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", get_args(words.OptimizerName))
def test_every_optimizer_moves_the_policy_and_repeats_itself(
    small: dict[str, Any], optimizer: Any
) -> None:
    def run(**changes: Any) -> dict[str, list[float]]:
        run = words.train(optimizer=optimizer, **(small | changes))
        return {name: run[name] for name in ("reward", "kl", "entropy", "greedy")}

    first = run()
    assert [len(each) for each in first.values()] == [2, 2, 2, 1]
    assert 0 < first["reward"][0] < 0.5
    assert all(kl > 0 for kl in first["kl"])
    if optimizer == "trpo":
        assert all(0.005 < kl <= 0.0101 for kl in first["kl"])
    assert run() == first
    changed = {"max_kl": 0.001} if optimizer in ("trpo", "natural") else {"lr": 1e-6}
    assert run(**changed)["kl"][0] < 0.2 * first["kl"][0]


@pytest.mark.slow
def test_another_seed_is_another_model(small: dict[str, Any]) -> None:
    first, second = (words.train(optimizer="adamw", seed=seed, **small) for seed in (0, 1))
    assert first["entropy"] != second["entropy"]


@pytest.mark.slow
def test_a_kept_model_is_the_one_that_was_pretrained(small: dict[str, Any], tmp_path: Path) -> None:
    new, kept = (words.pretrained("sorting", 0, 0.15, each) for each in (tmp_path, small["folder"]))
    again = words.pretrained("sorting", 0, 0.15, tmp_path)
    for name, value in new.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name])
        assert torch.equal(value, again.state_dict()[name])


@pytest.mark.slow
def test_further_arguments_reach_the_optimizer(small: dict[str, Any]) -> None:
    with pytest.raises(TrustRegionError, match="cg_iterations is 0"):
        words.train(**small, cg_iterations=0)


@pytest.mark.slow
def test_the_picture_is_drawn(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = words.train(optimizer="adamw", **small)
    monkeypatch.setattr(words, "train", lambda *_: run)
    words.main(picture=str(tmp_path / "picture.png"))
    height, width, _ = matplotlib.image.imread(tmp_path / "picture.png").shape
    assert (width, height) == (720, 1080)
