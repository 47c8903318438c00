"""What environments say beside their observations reaches the policy, the batch and the step."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import DictInfoToList
from small_environments import Env, cartpole, coin, each_mode, vector
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.rollouts import VineBatch, policy_closure, single_path, vine, vine_closure

TAXI = "Taxi-v4" if "Taxi-v4" in gym.registry else "Taxi-v3"  # the latter before Gymnasium 1.2
CITY: Any = gym.make(TAXI).unwrapped
LEGAL = torch.tensor(np.array([CITY.action_mask(state) for state in range(500)]), dtype=torch.bool)
"""Which actions move the taxi in each state, by the environment's own tables."""


class Lawful(gym.Wrapper[Any, Any, Any, Any]):
    """Raises for actions that are not legal, as board games do; says none are at an end."""

    def step(self, action: Any) -> Any:
        assert CITY.action_mask(self.unwrapped.s)[action], "an illegal action"  # type: ignore[attr-defined]  # Taxi's
        observation, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["action_mask"] = np.zeros(6, np.int8)
        return observation, reward, terminated, truncated, info


def taxi() -> Env:
    return Lawful(gym.make(TAXI, max_episode_steps=9))


class Driver(nn.Module):
    """A policy by one logit for every state and legal action."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(500, 6))

    def forward(self, states: Tensor, action_mask: Tensor) -> Categorical:
        return Categorical(logits=self.logits[states].masked_fill(action_mask == 0, -torch.inf))


class Remembering(Driver):
    """The same policy, with a recurrent state."""

    def forward(self, states: Tensor, state: Any, starts: Tensor, *, action_mask: Tensor) -> Any:  # type: ignore[override]  # as recurrent policies are called
        return super().forward(states, action_mask), state


@each_mode
@pytest.mark.parametrize("wrapper", [lambda envs: envs, DictInfoToList], ids=["dict", "list"])
def test_legal_actions_reach_the_policy_and_the_batch(
    mode: AutoresetMode, wrapper: Callable[[Any], Any]
) -> None:
    envs, policy = wrapper(vector(taxi, mode=mode)), Driver()
    first = single_path(envs, policy, steps=20, info="action_mask", seed=0)
    cursor = pickle.loads(pickle.dumps(first.end))
    batch = single_path(envs, policy, steps=30, after=cursor, info=["action_mask"])
    assert batch.info.keys() == {"action_mask"}
    legal = LEGAL[batch.observations]
    assert torch.equal(batch.info["action_mask"][batch.valid].bool(), legal[batch.valid])
    assert legal.gather(2, batch.actions[..., None])[..., 0][batch.valid].all()
    assert batch.truncated.any()
    closures = policy_closure(policy, batch, torch.randn(30, 3), curvature=0.5, micro_batch=16)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted


def test_a_step_never_moves_probability_to_illegal_actions() -> None:
    torch.manual_seed(0)
    policy = Driver()
    batch = single_path(vector(taxi), policy, steps=60, info="action_mask", seed=0)
    closures = policy_closure(policy, batch, torch.randn(60, 3))
    loss = closures()[0]
    (slope,) = torch.autograd.grad(loss, policy.logits)
    assert (slope[~LEGAL] == 0).all()
    assert (slope != 0).any()
    report = TrustRegionOptimizer(policy.parameters()).step(closures)
    assert report.accepted
    assert (policy.logits.detach()[~LEGAL] == 0).all()


def test_a_recurrent_policy_gets_them_time_first() -> None:
    policy = Remembering()
    envs = vector(taxi, mode=AutoresetMode.NEXT_STEP)
    state = torch.zeros(1, 3, 1)
    batch = single_path(envs, policy, steps=30, state=state, info="action_mask", seed=0)
    closures = policy_closure(policy, batch, torch.randn(30, 3), micro_batch=2)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted


def grown(**options: Any) -> tuple[Driver, VineBatch]:
    torch.manual_seed(0)
    policy = Driver()
    nn.init.normal_(policy.logits)
    envs = SyncVectorEnv([taxi] * 3, autoreset_mode="SameStep")
    batch = vine(
        envs,
        policy,
        steps=20,
        states=20,
        horizon=4,
        gamma=0.9,
        critic=lambda states: states.float(),
        info="action_mask",
        seed=0,
        **options,
    )
    return policy, batch


def test_vine_tries_every_action_that_is_legal_and_no_other() -> None:
    policy, batch = grown()
    legal = LEGAL[batch.observations]
    assert torch.equal(batch.info["action_mask"].bool(), legal)
    assert torch.equal(batch.q.isnan(), ~legal)
    closures = vine_closure(policy, batch, curvature=0.5)
    loss = closures()[0]
    probs = policy(batch.observations, batch.info["action_mask"]).probs
    expected = -(probs * batch.q.nan_to_num(0.0)).sum(1).mean()
    slopes = [torch.autograd.grad(each, policy.logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*slopes)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted
    with pytest.raises(
        TrustRegionError, match=r"Q holds NaN.*actions that the collecting policy ruled out"
    ):
        vine_closure(lambda states, action_mask: Categorical(torch.ones(len(states), 6)), batch)


@pytest.mark.parametrize("sampling", ["policy", "uniform"])
def test_vine_draws_legal_actions_alone(sampling: str) -> None:
    policy, batch = grown(branches=3, sampling=sampling)
    legal = LEGAL[batch.observations]
    assert legal.gather(1, batch.actions).all()
    assert batch.sampling_log_prob is not None
    if sampling == "uniform":
        alike = -legal.sum(1, keepdim=True).float().log()
        torch.testing.assert_close(batch.sampling_log_prob, alike.expand(-1, 3))
    closures = vine_closure(policy, batch)
    assert TrustRegionOptimizer(policy.parameters()).step(closures).accepted


class Saying(gym.Wrapper[Any, Any, Any, Any]):
    """Says something of its own beside every observation."""

    def __init__(self, env: Env, what: Callable[[int], Any]) -> None:
        super().__init__(env)
        self.what, self.steps = what, 0

    def reset(self, **options: Any) -> Any:
        return self.env.reset(**options)[0], {"said": self.what(0)}

    def step(self, action: Any) -> Any:
        self.steps += 1
        *rest, _ = self.env.step(action)
        return (*rest, {"said": self.what(self.steps)})


def saying(what: Callable[[int], Any]) -> SyncVectorEnv:
    return vector(lambda: Saying(cartpole(), what), 2)


def test_nested_entries_keep_their_form() -> None:
    envs = saying(lambda step: {"parts": (np.ones(2), step), "more": {"last": float(step)}})
    batch = single_path(envs, lambda seen, said: coin(seen), steps=5, info="said", seed=0)
    said = batch.info["said"]
    assert said["parts"][0].shape == (5, 2, 2)
    assert said["parts"][1].tolist() == [[step] * 2 for step in range(5)]
    assert torch.equal(said["more"]["last"], said["parts"][1].float())


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a name that is none": (
        lambda: single_path(vector(taxi), Driver(), steps=1, info="legal"),
        r"no 'legal'; it has \['prob', 'action_mask'\]. Every reset",
    ),
    "text": (
        lambda: single_path(saying(lambda step: "text"), coin, steps=1, info="said"),
        "holds array.*'text'.*Only numbers",
    ),
    "lists of different lengths": (
        lambda: single_path(
            saying(lambda step: np.arange(step + 1)),
            lambda seen, said: coin(seen),
            steps=2,
            info="said",
        ),
        r"info\['said'\] has shape \(2,\), and had \(1,\) before.*a mask over all actions",
    ),
    "other names than before": (
        lambda: single_path(
            vector(cartpole, 2), coin, steps=1, after=single_path(saying(int), said_coin, **TWO)
        ),
        r"info names \[\], and after has \['said'\]. Pass the same names",
    ),
}

TWO: dict[str, Any] = {"steps": 2, "info": "said"}


def said_coin(seen: Tensor, said: Tensor) -> Categorical:
    return coin(seen)


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()


class Telling(gym.Wrapper[Any, Any, Any, Any]):
    """An environment that says the same with every step, or only so many times."""

    def __init__(self, env: Env, said: Any, times: int = 1000) -> None:
        super().__init__(env)
        self.said, self.left = said, times

    def told(self, info: dict[str, Any]) -> dict[str, Any]:
        self.left -= 1
        return {**info, "mask": self.said, "day": 1} if self.left >= 0 else {**info, "day": 1}

    def reset(self, **options: Any) -> Any:
        seen, info = self.env.reset(**options)
        return seen, self.told(info)

    def step(self, action: Any) -> Any:
        *rest, info = self.env.step(action)
        return (*rest, self.told(info))


@pytest.mark.parametrize("said", [[1, 0], [[1, 0], [0, 1]], {"legal": [1, 0]}])
@pytest.mark.parametrize("wrapper", [lambda envs: envs, DictInfoToList], ids=["dict", "list"])
def test_a_list_of_numbers_is_an_array(said: Any, wrapper: Callable[[Any], Any]) -> None:
    def policy(seen: Tensor, mask: Any) -> Categorical:
        given = mask["legal"] if isinstance(said, dict) else mask
        wanted = torch.tensor(said["legal"] if isinstance(said, dict) else said)
        assert torch.equal(given, wanted.expand(3, *wanted.shape))
        return coin(seen)

    envs = wrapper(vector(lambda: Telling(cartpole(), said)))
    batch = single_path(envs, policy, steps=3, info="mask")
    kept = batch.info["mask"]["legal"] if isinstance(said, dict) else batch.info["mask"]
    assert kept.shape[:2] == (3, 3)


@pytest.mark.parametrize("wrapper", [lambda envs: envs, DictInfoToList], ids=["dict", "list"])
def test_the_environment_whose_info_lacks_an_entry_is_named(wrapper: Callable[[Any], Any]) -> None:
    times = iter([1000, 2])
    envs = wrapper(vector(lambda: Telling(cartpole(), np.ones(2), next(times)), 2))
    message = r"The info of environment 1 has no 'mask'; it has \['day'\]"
    with pytest.raises(TrustRegionError, match=message):
        single_path(envs, lambda seen, mask: coin(seen), steps=5, info="mask")
