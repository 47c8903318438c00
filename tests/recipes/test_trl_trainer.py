"""The recipe for TRL learns, takes TRL's settings, and its reported KL is the policy's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("default"),  # the library's own are not errors here
]
pytest.importorskip("trl")
recipe = pytest.importorskip("trl_trainer")
runs: Any = pytest.importorskip("trained_by_trl")


def test_it_learns_to_repeat_a_word() -> None:
    assert recipe.main(seed=0) > 0.5


def test_it_trains_with_the_default_settings_of_trl(tmp_path: Path) -> None:
    trainer = runs.trained(tmp_path)
    assert trainer.args.gradient_checkpointing
    assert trainer.args.bf16
    assert (trainer.loss_type, trainer.beta, trainer.num_iterations) == ("dapo", 0.0, 1)
    assert 0.005 < trainer.steps[0]["report"].kl <= 0.01
    assert trainer.moved() == trainer.trainable()


@pytest.mark.parametrize(
    ("words", "settings"),
    [
        (runs.WORDS, {"gradient_accumulation_steps": 2}),
        (runs.WORDS, {"bf16": False}),
        (runs.GPT2, {"bf16": False}),
    ],
    ids=str,
)
def test_the_reported_kl_is_the_kl_over_the_whole_vocabulary(
    words: int, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = runs.trained(tmp_path, words=words, old="logits", temperature=0.8, **settings)
    report = trainer.steps[0]["report"]
    assert 0.005 < report.kl <= 0.01
    rounding = 0.001 if "bf16" in settings else 0.01  # autocast to bfloat16 is TRL's default
    assert report.kl == pytest.approx(runs.exact_kl(trainer), rel=rounding)


def test_the_estimate_on_the_tokens_is_not_below_the_exact_kl(tmp_path: Path) -> None:
    """The step raises the very tokens on which the KL is estimated."""
    trainer = runs.trained(tmp_path, words=runs.GPT2, bf16=False)
    found = trainer.steps[0]
    inputs = found["batches"][0][1]
    tokens = inputs["completion_ids"][inputs["completion_mask"].bool()]
    old, new = (runs.log_probs(trainer, found[when], inputs) for when in ("before", "after"))
    change = (new - old).gather(-1, tokens[:, None])
    estimate = float((change.expm1() - change).mean())
    assert found["report"].kl == pytest.approx(estimate, rel=0.001)
    assert runs.exact_kl(trainer) < estimate <= 0.01


def test_one_step_is_taken_per_accumulated_batch(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bf16": False, "max_steps": 2}
    parts = runs.trained(tmp_path, gradient_accumulation_steps=2, **settings)
    whole = runs.trained(tmp_path, per_device_train_batch_size=32, **settings)
    assert len(parts.steps) == len(whole.steps) == 2
    for step in (0, 1):
        given, at_once = parts.steps[step], whole.steps[step]
        tokens = [float(each["completion_mask"].sum()) for _, each in given["batches"]]
        assert tokens[0] != tokens[1]
        assert given["closures"].weights == tokens
        assert sum(tokens) == at_once["closures"].weights[0]
    for name, expected in whole.steps[0]["after"].items():
        step_of_whole = expected - whole.steps[0]["before"][name]
        step_of_parts = parts.steps[0]["after"][name] - parts.steps[0]["before"][name]
        torch.testing.assert_close(step_of_parts, step_of_whole, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_loss_is_that_of_trl_without_its_clip(beta: float, tmp_path: Path) -> None:
    """With LoRA, the reference policy of ``beta`` is the model without adapters."""
    trainer = runs.trained(
        tmp_path,
        beta=beta,
        lora=True,
        max_kl=0.05,
        bf16=False,
        epsilon=1e9,
        num_iterations=3,  # TRL keeps the log-probabilities of what drew the tokens
        max_steps=3,
    )
    model, inputs = trainer.steps[0]["batches"][0]
    mask = inputs["completion_mask"]
    inputs["tool_mask"] = tools = torch.randint(2, mask.shape)
    inputs["importance_sampling_ratio"] = torch.rand(mask.shape)  # of an inference server
    inputs["num_items_in_batch"] = (mask * tools).sum()
    trainer.use_vllm = True
    closure = trainer.closures(model, inputs)
    ours, theirs = [], []
    for step in trainer.steps:
        trainer.model.load_state_dict(step["after"], strict=False)
        with torch.no_grad():
            ours.append(float(closure()[0]))
            theirs.append(float(trainer.compute_loss(model, inputs)))
    assert len(set(ours)) == 3
    assert ours == pytest.approx(theirs, rel=1e-3)


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_adapters_move_over_a_frozen_base_in_bfloat16(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = runs.trained(
        tmp_path,
        lora=True,
        dtype=torch.bfloat16,
        max_steps=2,
        lr_scheduler_type="constant",
        **settings,
    )
    adapters = [name for name, trainable in trainer.trainable().items() if trainable]
    values = dict(trainer.model.named_parameters())
    assert {values[name].dtype for name in adapters} == {torch.float32}
    assert {each.dtype for name, each in values.items() if name not in adapters} == {torch.bfloat16}
    first, second = trainer.moved(0), trainer.moved(1)
    assert [name for name, moved in first.items() if moved] == [
        name
        for name in adapters
        if "lora_B" in name  # A has no gradient while B is zero
    ]
    assert [name for name, moved in second.items() if moved] == adapters
    for step in trainer.steps:
        assert 0.004 < step["report"].kl <= 0.01


def test_a_second_step_on_a_rollout_starts_at_the_present_policy(tmp_path: Path) -> None:
    trainer = runs.trained(tmp_path, num_iterations=2, max_steps=2, bf16=False, old="logits")
    first, second = (step["report"] for step in trainer.steps)
    batches = [step["batches"][0][1]["completion_ids"] for step in trainer.steps]
    assert torch.equal(*batches)
    assert second.loss_before == pytest.approx(first.loss_after, rel=1e-3)  # the ratio goes on
    assert second.loss_after < first.loss_after
    for step, report in enumerate((first, second)):  # the KL starts anew
        assert report.kl == pytest.approx(runs.exact_kl(trainer, step), rel=0.001)


def test_the_log_shows_the_report(tmp_path: Path) -> None:
    trainer = runs.trained(tmp_path, max_steps=2)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    for row, step in zip(rows, trainer.steps, strict=True):
        named = {f"trust_region/{name}": value for name, value in step["report"].as_dict().items()}
        assert named.items() <= row.items()
        assert {"entropy", "loss", "clip_ratio/region_mean"} <= row.keys()


def test_the_schedule_of_trl_scales_the_step(tmp_path: Path) -> None:
    trainer = runs.trained(tmp_path, max_steps=2, bf16=False, old="logits")
    assert trainer.args.lr_scheduler_type == "linear"
    assert trainer.steps[1]["report"].kl == pytest.approx(0.01 / 4, rel=0.2)  # half the step


def test_a_run_resumed_from_a_checkpoint_goes_on_with_its_radius(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "bf16": False,
    }
    whole = runs.trained(tmp_path, max_kl=0.004, **settings)
    resumed = runs.make_trainer(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [step["report"] for step in resumed.steps] == [
        step["report"] for step in whole.steps[2:]
    ]
    assert resumed.optimizer.state_dict() == whole.optimizer.state_dict()
    for name, value in whole.steps[-1]["after"].items():
        assert torch.equal(resumed.steps[-1]["after"][name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_of_truncated_completions_alone_moves_nothing(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    endless = {"generation_kwargs": {"suppress_tokens": [0]}}
    trainer = runs.trained(tmp_path, dtype=dtype, mask_truncated_completions=True, **endless)
    assert trainer.steps[0]["report"].outcome.value == "zero_gradient"
    assert not any(trainer.moved().values())


def test_two_processes_take_the_same_step(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(
        "import trl_trainer as recipe\n"
        "class Told(recipe.TrustRegionGRPOTrainer):\n"
        "    def log_report(self, optimizer, *_):\n"
        "        total = sum(each.double().sum().item() for each in self.model.parameters())\n"
        "        print(f'step: {total!r} {optimizer.last_report!r}\\n', end='', flush=True)\n"
        "recipe.TrustRegionGRPOTrainer = Told\n"
        "recipe.main(updates=1)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    told = subprocess.run(
        [*command, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    first, second = (line for line in told.splitlines() if line.startswith("step: "))
    assert first == second
    assert "accepted=True" in first


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "cispo"}, {"importance_sampling_level": "sequence"}, {"entropy_coef": 0.1}],
    ids=str,
)
def test_a_setting_that_asks_for_another_loss_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        runs.make_trainer(tmp_path, **settings)
