"""Scores of learning runs: final policies, 0 for random actions and 1 for the target."""

from __future__ import annotations

from typing import Any

import numpy as np
from scores import TARGETS, Runs


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
    }


def test_the_final_policy_counts_and_not_the_best_of_the_curve() -> None:
    lines = [
        line("Hopper-v5", "trpo", seed, steps, value)
        for seed, values in enumerate([(900, 3000, 2500), (100, 200, 3600)])
        for steps, value in zip((10, 20, 30), values, strict=True)
    ]
    runs = Runs(lines)
    np.testing.assert_allclose(runs.final("Hopper-v5", "trpo"), [2500, 3600])
    np.testing.assert_allclose(runs.final("Hopper-v5", "trpo", "sampled"), [1250, 1800])
    steps, returns = runs.curves("Hopper-v5", "trpo")
    np.testing.assert_allclose(steps, [10, 20, 30])
    np.testing.assert_allclose(returns, [[900, 3000, 2500], [100, 200, 3600]])


def test_scores_go_from_random_actions_to_the_target() -> None:
    target = TARGETS["Reacher-v5"][0]
    lines = [line("Reacher-v5", "random", seed, 1, -44 + seed) for seed in (0, 2)]  # mean -43
    lines += [line("Reacher-v5", "trpo", 0, 1, -43), line("Reacher-v5", "trpo", 1, 1, target)]
    scores = Runs(lines).normalised("trpo", ["Reacher-v5"], "deterministic")
    np.testing.assert_allclose(scores, [[0], [1]])


def test_two_algorithms_are_compared_on_the_tasks_of_both() -> None:
    lines = [line(env_id, "random", 0, 1, 0) for env_id in ("Hopper-v5", "Ant-v5")]
    lines += [line(env_id, "trpo", 0, 1, 100) for env_id in ("Hopper-v5", "Ant-v5")]
    lines += [line("Ant-v5", "sb3-contrib", seed, 1, 50) for seed in range(3)]
    pairs = Runs(lines).pairs()
    assert list(pairs) == ["sb3-contrib"]
    assert pairs["sb3-contrib"]["trpo"].shape == (1, 1)
    assert pairs["sb3-contrib"]["sb3-contrib"].shape == (3, 1)


def test_of_every_task_as_many_seeds_count_as_the_one_with_the_fewest_has() -> None:
    tasks = ("Hopper-v5", "Ant-v5")
    lines = [line(env_id, "random", 0, 1, 0) for env_id in tasks]
    lines += [line("Hopper-v5", "trpo", seed, 1, 100 * seed) for seed in range(5)]
    lines += [line("Ant-v5", "trpo", seed, 1, 10 * seed) for seed in range(3)]
    scores = Runs(lines).normalised("trpo", list(tasks), "deterministic")
    wanted = [
        [100 * seed / TARGETS["Hopper-v5"][0], 10 * seed / TARGETS["Ant-v5"][0]]
        for seed in range(3)
    ]
    np.testing.assert_allclose(scores, wanted)


def test_a_task_is_missed_where_the_mean_is_below_the_target() -> None:
    target = TARGETS["Ant-v5"][0]
    lines = [line("Ant-v5", "trpo", seed, 1, target - 20 + 10 * seed) for seed in range(4)]
    lines += [line("Ant-v5", "sb3-contrib", seed, 1, 600 + 20 * seed) for seed in range(2)]
    lines += [line("Reacher-v5", "trpo", 0, 1, -7)]  # sb3-contrib has none of it
    lines += [line("Hopper-v5", "trpo", 0, 1, TARGETS["Hopper-v5"][0])]
    assert Runs(lines).missed() == {"Ant-v5": (target - 5, 610), "Reacher-v5": (-7, None)}
