"""The recipes in CleanRL's style learn, and the diffs against its files are as docs say."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cleanrl_continuous
import cleanrl_discrete
import cleanrl_lstm
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import fit_value

pytestmark = [
    pytest.mark.recipes,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
]

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "examples" / "recipes"
PAGE = ROOT / "docs" / "how-to" / "from-ppo.md"

TAGS = {
    "charts/SPS",
    "charts/episodic_return",
    "losses/approx_kl",
    "losses/entropy",
    "losses/explained_variance",
    "losses/policy_loss",
    "losses/value_loss",
}

HUNK = re.compile(r"@@ -\d+(?:,(\d+))? \+\d+(?:,(\d+))? @@")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scalars(folder: Path) -> dict[str, list[float]]:
    """Return what the only run in a folder logged, by tag."""
    (run,) = (folder / "runs").iterdir()
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [each.value for each in events.Scalars(tag)] for tag in tags}


def require_log(folder: Path, max_kl: float) -> None:
    """Require CleanRL's tags, and a KL that used the trust region without leaving it."""
    logged = scalars(folder)
    assert set(logged) == TAGS
    assert np.isfinite(np.concatenate(list(logged.values()))).all()
    assert 0.5 * max_kl < np.mean(logged["losses/approx_kl"])
    assert max(logged["losses/approx_kl"]) <= max_kl * (1 + 1e-6)


def test_the_discrete_recipe_balances_a_pole(tmp_path: Path) -> None:
    returns = cleanrl_discrete.train(cleanrl_discrete.Args(seed=0, total_timesteps=20_480))

    assert np.mean(returns[:20]) < 60
    assert np.mean(returns[-20:]) > 150
    require_log(tmp_path, 0.01)


def test_the_recurrent_recipe_balances_a_pole_without_seeing_velocities(tmp_path: Path) -> None:
    returns = cleanrl_lstm.train(cleanrl_lstm.Args(seed=0, total_timesteps=20_480))

    assert np.mean(returns[:20]) < 60
    assert np.mean(returns[-20:]) > 80
    require_log(tmp_path, 0.01)


def test_the_continuous_recipe_runs_forwards(tmp_path: Path) -> None:
    returns = cleanrl_continuous.train(cleanrl_continuous.Args(seed=0, total_timesteps=12_288))

    assert len(returns) == 12
    assert np.mean(returns[-4:]) > np.mean(returns[:4]) + 100
    require_log(tmp_path, 6 * 0.007)


def test_the_policys_step_moves_trunk_and_actor_and_the_critics_its_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameters: list[Tensor] = []
    moved: list[set[int]] = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            if isinstance(args[0], TrustRegionOptimizer):
                parameters[:] = args[0].param_groups[0]["params"]
            before = [each.detach().clone() for each in parameters]
            result = function(*args, **options)
            pairs = zip(parameters, before, strict=True)
            moved.append({n for n, pair in enumerate(pairs) if not torch.equal(*pair)})
            return result

        return call

    monkeypatch.setattr("cleanrl_lstm.improve_policy", watched(cleanrl_lstm.improve_policy))
    monkeypatch.setattr("cleanrl_lstm.fit_value", watched(fit_value))
    cleanrl_lstm.train(cleanrl_lstm.Args(num_envs=2, num_steps=32, total_timesteps=64))

    names = [name for name, _ in cleanrl_lstm.Agent(2, 2).named_parameters()]
    head = {n for n, name in enumerate(names) if name.startswith("critic.")}
    assert moved == [{*range(len(names))} - head, head]


@pytest.mark.parametrize("name", ["continuous", "discrete", "lstm"])
def test_a_recipe_is_short(name: str) -> None:
    assert len((RECIPES / f"cleanrl_{name}.py").read_text().splitlines()) <= 150


def added_and_removed(diff: list[str]) -> tuple[int, int]:
    """Return the counts of a diff without context, after checking it against its headers."""
    start = next(n for n, line in enumerate(diff) if line.startswith("--- "))
    assert diff[start + 1].startswith("+++ ")
    total = {"+": 0, "-": 0}
    left = {"+": 0, "-": 0}
    for line in diff[start + 2 :]:
        if hunk := HUNK.fullmatch(line):
            assert left == {"+": 0, "-": 0}
            left = {"-": int(hunk[1] or 1), "+": int(hunk[2] or 1)}
        else:
            left[line[0]] -= 1
            total[line[0]] += 1
    assert left == {"+": 0, "-": 0}
    return total["+"], total["-"]


@pytest.mark.parametrize("name", ["continuous", "discrete", "lstm"])
def test_a_diff_is_well_formed_and_as_long_as_its_page_says(name: str) -> None:
    diff = (RECIPES / f"cleanrl_{name}.diff").read_text().splitlines()
    added, removed = added_and_removed(diff)

    row = next(line for line in PAGE.read_text().splitlines() if f"cleanrl_{name}.diff)" in line)
    assert row.endswith(f"| {added} | {removed} |")


@pytest.mark.parametrize("name", ["continuous", "discrete", "lstm"])
def test_a_diff_and_its_page_name_one_commit(name: str) -> None:
    (commit,) = re.findall(r"\b[0-9a-f]{40}\b", (RECIPES / f"cleanrl_{name}.diff").read_text())

    assert commit in PAGE.read_text()
