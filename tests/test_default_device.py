"""All of the package works where torch's default device is not that of the policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import TrustRegionOptimizer, frozen, log_prob, mean_kl, sampled_kl
from trpo_optim.rollouts import fit_value, gae, policy_closure, single_path, vine, vine_closure
from trpo_optim.rollouts import trajectory_weights as weights_of
from trpo_optim.testing import check_closure, check_policy
from trpo_optim.theory import constrained_step, monotonic_step, random_mdp
from trpo_optim.tokens import chunked_log_prob, group_advantages, token_closures


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """Have tensors go to a device that holds no numbers, unless the call names another one."""
    torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # here torch 2.6 imports what needs numbers
    with torch.device("meta"):
        yield


class Acting(nn.Module):
    """A linear policy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2, device="cpu")

    def forward(self, observations: Tensor) -> Categorical:
        return Categorical(logits=self.linear(observations))


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    "options",
    [{}, {"micro_batch": 700}, {"curvature": 0.1, "standardise": True}, {"sampled": True}],
)
def test_steps_on_trajectories(options: Any) -> None:
    envs, policy = gym.make_vec("CartPole-v1", 4, vectorization_mode="sync"), Acting()
    critic = nn.Linear(4, 1, device="cpu")
    sgd = torch.optim.SGD(critic.parameters(), lr=1e-3)
    batch = single_path(envs, policy, steps=600, seed=0)
    values, next_values = batch.values(critic)
    advantages = gae(batch.rewards, values, next_values, batch.ends, gamma=0.9, gae_lambda=0.9)
    optimizer = TrustRegionOptimizer(policy.parameters())
    assert optimizer.step(policy_closure(policy, batch, advantages, **options)).accepted
    seen, targets = batch.flat((batch.observations, values + advantages))
    assert fit_value(critic, seen, targets, sgd, epochs=1, minibatch=64).loss > 0
    weights = weights_of(batch.log_ratios(policy), batch.starts)
    again = policy_closure(policy, [batch], [advantages], weights=[weights], max_batch_kl=0.5)
    assert optimizer.step(again).accepted


@pytest.mark.usefixtures("elsewhere")
def test_steps_on_branches() -> None:
    envs = SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 4, autoreset_mode="SameStep")
    policy = Acting()
    batch = vine(envs, policy, steps=8, states=6, horizon=5, gamma=0.9, branches=3)
    assert batch.q.shape == (6, 3)
    closure = vine_closure(policy, batch)
    assert TrustRegionOptimizer(policy.parameters()).step(closure).fisher_products > 0


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("old", ["log_prob", 7, "logits"])
def test_steps_on_tokens(old: Any) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(9, 9, device="cpu")
    whole = torch.randint(9, (6, 5), device="cpu")
    rewards = torch.arange(6.0, device="cpu")
    closures = token_closures(
        lambda rows: table(whole[rows][:, :-1]),
        whole[:, 1:],
        None,
        group_advantages(rewards, 3),
        old=old,
        curvature=0.5,
        micro_batch=2,
    )
    assert TrustRegionOptimizer(table.parameters()).step(closures).accepted
    logs = chunked_log_prob(table.weight, nn.Identity(), torch.arange(9, device="cpu"), chunk=2)
    assert float(sampled_kl(logs.detach(), logs).detach()) == 0


@pytest.mark.usefixtures("elsewhere")
def test_the_checks_of_policies_and_closures() -> None:
    policy, observations = Acting(), torch.randn(50, 4, device="cpu")
    assert check_policy(policy, observations, parameters=policy.parameters()).passed
    with torch.no_grad():
        old = frozen(policy(observations))
        actions = old.sample()
    advantages = torch.randn(50, device="cpu")

    def closure() -> Any:
        dist = policy(observations)
        ratio = (log_prob(dist, actions) - log_prob(old, actions)).exp()
        return -(ratio * advantages).mean(), mean_kl(old, dist), dist

    report = check_closure(
        closure,
        policy.parameters(),
        log_prob=lambda: log_prob(policy(observations), actions),
        advantages=advantages,
    )
    assert report.passed, str(report)


@pytest.mark.usefixtures("elsewhere")
def test_steps_of_the_theory() -> None:
    mdp = random_mdp(5, 3, gamma=0.9, seed=0)
    policy = torch.full((5, 3), 1 / 3, dtype=torch.float64, device="cpu")
    for better in (constrained_step(mdp, policy, radius=0.01), monotonic_step(mdp, policy)):
        assert float(mdp.expected_return(better)) > float(mdp.expected_return(policy))
    assert float(mdp.visitation(policy).sum()) == pytest.approx(10)
