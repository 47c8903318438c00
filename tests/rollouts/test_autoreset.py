"""How environments begin new episodes is read from what they say, and never guessed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorWrapper
from small_environments import cartpole, coin, each_mode, vector

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import single_path


def without_a_mode(mode: AutoresetMode, given: Any = None) -> Any:
    envs = vector(cartpole, mode=mode)
    envs.metadata = {} if given is None else {"autoreset_mode": given}
    return envs


@each_mode
def test_environments_that_do_not_say_how_they_reset_are_refused(mode: AutoresetMode) -> None:
    envs = without_a_mode(mode)
    with pytest.raises(
        TrustRegionError, match=r"'autoreset_mode'.*is missing\. It must be one of.*Set the mode"
    ):
        single_path(envs, coin, steps=1, seed=0)
    envs.metadata = {**envs.metadata, "autoreset_mode": mode}  # what the error says
    torch.manual_seed(0)
    found = single_path(envs, coin, steps=40, seed=0)
    torch.manual_seed(0)
    expected = single_path(vector(cartpole, mode=mode), coin, steps=40, seed=0)
    assert torch.equal(found.valid, expected.valid)
    assert torch.equal(found.cut_observations, expected.cut_observations)


@pytest.mark.parametrize("given", ["next_step", True, 0])
def test_an_unknown_mode_is_refused(given: Any) -> None:
    with pytest.raises(TrustRegionError, match=rf"'autoreset_mode'.*is {given!r}\. It must be"):
        single_path(without_a_mode(AutoresetMode.NEXT_STEP, given), coin, steps=1)


class Silent(VectorWrapper):
    """Drops the last observations of episodes, or those of one environment."""

    def __init__(self, envs: Any, dropped: slice) -> None:
        super().__init__(envs)
        self.dropped = dropped

    def step(self, actions: Any) -> Any:
        *rest, info = self.env.step(actions)
        if "final_obs" in info:
            info["final_obs"][self.dropped] = None
            if self.dropped == slice(None):
                info = {}
        return (*rest, info)


@pytest.mark.parametrize("dropped", [slice(None), slice(1, 2)], ids=["all", "one"])
def test_a_last_observation_that_was_not_kept_is_asked_for(dropped: slice) -> None:
    envs = Silent(vector(cartpole), dropped)
    with pytest.raises(
        TrustRegionError,
        match=r"environment \d was truncated, .* has no 'final_obs'.*NEXT_STEP or DISABLED",
    ):
        single_path(envs, lambda seen: (seen[:, 2] > 0).long(), steps=40, seed=0)


def test_a_last_observation_is_not_missed_where_the_episode_terminated() -> None:
    envs = Silent(vector(cartpole), slice(None))
    batch = single_path(
        envs, lambda seen: torch.ones(len(seen), dtype=torch.long), steps=40, seed=0
    )
    assert batch.terminated.any()
    assert not batch.truncated.any()
    assert np.isfinite(batch.end.observations).all()
