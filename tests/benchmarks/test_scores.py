"""Scores of learning runs: final policies, 0 for random actions and 1 for the target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("pandas", reason="only make bench installs what benchmarks stand on")

from scores import Finals, frame


def finals(lines: list[dict[str, Any]]) -> Finals:
    return Finals(frame([lines]))


def line(
    env_id: str, algorithm: str, seed: int, steps: int, value: float, spread: float = 1.0
) -> dict[str, Any]:
    return {
        "environment": env_id,
        "algorithm": algorithm,
        "seed": seed,
        "steps": steps,
        "deterministic": [value - spread, value + spread],
        "sampled": [value / 2],
        "cpu": 1.0,
    }


def test_the_final_policy_counts_and_not_the_best_of_the_curve() -> None:
    lines = [
        line("Hopper-v5", "trpo", seed, steps, value)
        for seed, values in enumerate([(900, 3000, 2500), (100, 200, 3600)])
        for steps, value in zip((10, 20, 30), values, strict=True)
    ]
    runs = finals(lines)
    np.testing.assert_allclose(runs.returns("trpo", ["Hopper-v5"]), [[2500], [3600]])
    np.testing.assert_allclose(runs.returns("trpo", ["Hopper-v5"], "sampled"), [[1250], [1800]])
    assert runs.mean("Hopper-v5", "trpo") == 3050
    assert runs.mean("Ant-v5", "trpo") is None


def test_scores_go_from_random_actions_to_the_target() -> None:
    lines = [line("Reacher-v5", "random", seed, 1, -44 + seed) for seed in (0, 2)]  # mean -43
    lines += [line("Reacher-v5", "trpo", 0, 1, -43), line("Reacher-v5", "trpo", 1, 1, -4.1)]
    lines += [line("Reacher-v5", "trpo", 2, 1, -23.55)]
    scores = finals(lines).normalised("trpo", ["Reacher-v5"])
    np.testing.assert_allclose(scores, [[0.0], [1.0], [0.5]])


def test_the_last_evaluation_is_the_one_with_the_most_steps() -> None:
    lines = [line("Hopper-v5", "trpo", 0, steps, 10 * steps) for steps in (2, 3, 1)]
    assert finals(lines).mean("Hopper-v5", "trpo") == 30


def test_a_return_that_is_not_finite_is_refused() -> None:
    lines = [line("Hopper-v5", "trpo", 0, 1, 100), line("Hopper-v5", "trpo", 0, 2, float("nan"))]
    with pytest.raises(ValueError, match="not finite"):
        finals(lines)


def test_tasks_without_a_target_have_returns_but_no_score() -> None:
    tasks = ("Pusher-v5", "Hopper-v5")
    lines = [line(env_id, "random", 0, 1, 0) for env_id in tasks]
    lines += [line(env_id, "trpo", 0, 1, 3400) for env_id in tasks]
    runs = finals(lines)
    assert runs.returns("trpo", tasks).shape == (1, 2)
    np.testing.assert_allclose(runs.normalised("trpo", tasks), [[1]])
    assert not runs.normalised("trpo", ["Pusher-v5"]).size


def test_algorithms_are_compared_on_the_tasks_that_all_have() -> None:
    lines = [line(env_id, "trpo", 0, 1, 100) for env_id in ("Hopper-v5", "Ant-v5")]
    lines += [line("Ant-v5", "sb3-contrib", 0, 1, 50)]
    runs = finals(lines)
    assert runs.common("trpo") == ["Hopper-v5", "Ant-v5"]
    assert runs.common("trpo", "sb3-contrib") == ["Ant-v5"]
    assert runs.common("trpo", among=["Hopper-v5", "Swimmer-v5"]) == ["Hopper-v5"]
    assert runs.common("natural") == []


def test_seeds_that_a_task_lacks_do_not_count() -> None:
    runs = [("Hopper-v5", 0), ("Hopper-v5", 1), ("Ant-v5", 1), ("Ant-v5", 2)]
    lines = [line(env_id, "trpo", seed, 1, 100 + seed) for env_id, seed in runs]
    returns = finals(lines).returns("trpo", ["Hopper-v5", "Ant-v5"])
    np.testing.assert_allclose(returns, [[101, 101]])


def test_of_every_task_as_many_seeds_count_as_the_one_with_the_fewest_has() -> None:
    lines = [line("Hopper-v5", "trpo", seed, 1, 100 * seed) for seed in range(5)]
    lines += [line("Ant-v5", "trpo", seed, 1, 10 * seed) for seed in range(3)]
    returns = finals(lines).returns("trpo", ["Hopper-v5", "Ant-v5"], "sampled")
    np.testing.assert_allclose(returns, [[0, 0], [50, 5], [100, 10]])
