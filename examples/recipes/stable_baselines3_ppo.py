"""Stable-Baselines3's PPO whose policy takes one trust-region step per rollout.

Run `python examples/recipes/stable_baselines3_ppo.py`. After 30 720 steps of CartPole-v1, the
mean return was 500, 500 and 456 with seeds 0, 1 and 2 (20 episodes of the final policy, most
likely actions).
"""

from __future__ import annotations

from typing import Any

import torch
from gymnasium.spaces import Discrete
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from torch import Tensor
from torch.distributions import Categorical, Independent
from torch.nn.functional import mse_loss

from trpo_optim import TrustRegionOptimizer, entropy, frozen, log_prob, mean_kl


class TrustRegionPPO(PPO):
    """PPO with another ``train``: ``learn``, ``predict``, ``save``, callbacks and logs are SB3's.

    ``target_kl`` is the trust region's radius. ``learning_rate``, ``n_epochs`` and ``batch_size``
    are those of the value network's Adam. ``clip_range``, ``vf_coef`` and ``max_grad_norm`` are not
    used.
    """

    def _setup_model(self) -> None:
        """Make the networks, then the optimizer; ``load`` calls this, too."""
        super()._setup_model()
        shared = self.policy.share_features_extractor and self.policy.features_extractor
        if shared and any(True for _ in shared.parameters()):
            raise ValueError(
                "The policy and the value network share a features extractor that has parameters. "
                "Adam's steps would move the policy out of its trust region. Pass "
                "policy_kwargs={'share_features_extractor': False}."
            )
        self.trust_region = TrustRegionOptimizer(
            self.policy.parameters(), max_kl=self.target_kl or 0.01
        )

    def _excluded_save_params(self) -> list[str]:
        """Leave the optimizer out of what SB3 pickles."""
        return [*super()._excluded_save_params(), "trust_region"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        """Save the optimizer's ``state_dict`` instead."""
        state_dicts, variables = super()._get_torch_save_params()
        return [*state_dicts, "trust_region"], variables

    def dist(self, observations: Any) -> Any:
        """Return the torch distribution that SB3's own one wraps, its dimensions one action.

        SB3 fills the same wrapper again at every call, so that the wrapper is no old policy.
        """
        inner = self.policy.get_distribution(observations).distribution
        if isinstance(inner, list):  # MultiDiscrete
            return tuple(inner)
        return inner if isinstance(inner, Categorical) else Independent(inner, 1)

    def train(self) -> None:
        """Take one trust-region step on the rollout, then fit the value network to its returns."""
        self.policy.set_training_mode(False)  # as the actions were drawn
        batch = next(self.rollout_buffer.get())  # all of it
        actions = (
            batch.actions.squeeze(-1) if isinstance(self.action_space, Discrete) else batch.actions
        )
        advantages = (batch.advantages - batch.advantages.mean()) / (batch.advantages.std() + 1e-8)
        with torch.no_grad():
            old_dist = frozen(self.dist(batch.observations))

        def closure() -> tuple[Tensor, Tensor, Any]:
            dist = self.dist(batch.observations)
            ratio = (log_prob(dist, actions) - batch.old_log_prob).exp()
            loss = -(ratio * advantages).mean() - self.ent_coef * entropy(dist).mean()
            return loss, mean_kl(old_dist, dist), dist

        report = self.trust_region.step(closure)
        self.fit_value_network()
        self._n_updates += 1
        for name, value in report.as_dict().items():
            self.logger.record(f"train/{name}", value)

    def fit_value_network(self) -> None:
        """Take Adam's steps on the value loss alone.

        SB3's Adam has all parameters, and passes over those that this loss gives no gradient.
        """
        self.policy.set_training_mode(True)
        adam = self.policy.optimizer
        self._update_learning_rate(adam)
        for _ in range(self.n_epochs):
            for rows in self.rollout_buffer.get(self.batch_size):
                values = self.policy.predict_values(rows.observations).flatten()
                adam.zero_grad()
                mse_loss(values, rows.returns).backward()
                adam.step()


def main(seed: int = 0, total_steps: int = 30_000) -> float:
    """Train on CartPole-v1.

    Args:
        seed: Of networks, environments and actions.
        total_steps: Environment steps.

    Returns:
        The mean return of 20 episodes of the final policy, its most likely actions taken.
    """
    envs = make_vec_env("CartPole-v1", n_envs=8, seed=seed)
    model = TrustRegionPPO(
        "MlpPolicy", envs, n_steps=256, batch_size=256, learning_rate=1e-3, seed=seed, device="cpu"
    )
    model.learn(total_steps)
    mean_return, _ = evaluate_policy(model, envs, n_eval_episodes=20)
    return float(mean_return)


if __name__ == "__main__":
    print(f"Mean return of 20 episodes: {main():.1f}")
