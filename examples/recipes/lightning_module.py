"""A LightningModule whose manual optimization is one trust-region step per rollout.

Run `python examples/recipes/lightning_module.py`. After 40 960 steps of CartPole-v1, the mean
return was 500, 500 and 500 with seeds 0, 1 and 2 (training episodes of the last rollout).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import lightning
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, IterableDataset

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, log_prob, mean_kl
from trpo_optim.rollouts import gae, single_path


def mlp(inputs: int, outputs: int) -> nn.Sequential:
    """Return a network of two tanh layers."""
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)
    )


class ActorCritic(lightning.LightningModule):
    """Policy and critic, each with an optimizer of its own."""

    def __init__(self, observations: int, actions: int, max_kl: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False  # which would call step() with a closure of its own
        self.logits, self.critic = mlp(observations, actions), mlp(observations, 1)
        self.max_kl = max_kl
        self.last_report: StepReport | None = None

    def forward(self, observations: Tensor) -> Categorical:
        """Return the policy's distribution."""
        return Categorical(logits=self.logits(observations))

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the policy's optimizer and the critic's; Lightning saves both."""
        return [
            TrustRegionOptimizer(self.logits.parameters(), max_kl=self.max_kl),
            torch.optim.Adam(self.critic.parameters(), lr=3e-3),
        ]

    def training_step(self, batch: dict[str, Tensor], _: int) -> None:
        """Take one trust-region step on the batch, then fit the critic to its returns."""
        trust_region, adam = self.optimizers()
        observations, actions, advantages = (
            batch[name] for name in ("observations", "actions", "advantages")
        )
        with torch.no_grad():
            old_dist = frozen(self(observations))
            old_log_prob = log_prob(old_dist, actions)

        def closure() -> tuple[Tensor, Tensor, Categorical]:
            dist = self(observations)
            ratio = (log_prob(dist, actions) - old_log_prob).exp()
            return -(ratio * advantages).mean(), mean_kl(old_dist, dist), dist

        report = trust_region.step(closure)  # Lightning's wrapper passes closure and report on
        self.last_report = report
        for _ in range(5):
            for rows in torch.randperm(len(observations)).split(256):
                values = self.critic(observations[rows]).squeeze(-1)
                adam.zero_grad()
                self.manual_backward(mse_loss(values, batch["returns"][rows]))
                adam.step()
        self.log_dict(report.as_dict() | {"episode_return": batch["episode_return"]})


class Rollouts(IterableDataset[dict[str, Tensor]]):
    """Yields one rollout of the present policy at a time."""

    def __init__(
        self, module: ActorCritic, envs: gym.vector.VectorEnv[Any, Any, Any], seed: int
    ) -> None:
        self.module, self.envs, self.seed = module, envs, seed

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Collect 2048 steps, then let the module learn from them, again and again."""
        batch = single_path(self.envs, self.module, steps=256, seed=self.seed)
        while True:
            values, next_values = batch.values(self.module.critic)
            advantages = gae(
                batch.rewards, values, next_values, batch.ends, gamma=0.99, gae_lambda=0.95
            )
            flat = batch.flat(advantages)
            yield {
                "observations": batch.flat(batch.observations),
                "actions": batch.flat(batch.actions),
                "advantages": (flat - flat.mean()) / flat.std(),
                "returns": batch.flat(advantages + values),
                "episode_return": torch.tensor(batch.episode_returns).mean(),
            }
            batch = single_path(self.envs, self.module, steps=256, after=batch)


def make_trainer(updates: int, **settings: Any) -> lightning.Trainer:
    """Return a quiet trainer of that many rollouts."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    return lightning.Trainer(
        **quiet, accelerator="cpu", max_epochs=1, limit_train_batches=updates, **settings
    )


def main(seed: int = 0, updates: int = 20) -> float:
    """Train on CartPole-v1.

    Args:
        seed: Of networks, environments and actions.
        updates: Rollouts of 2048 steps.

    Returns:
        The mean return of the training episodes that ended in the last rollout.
    """
    lightning.seed_everything(seed)
    envs = gym.make_vec("CartPole-v1", num_envs=8, vectorization_mode="sync")
    module = ActorCritic(4, 2)
    trainer = make_trainer(updates)
    trainer.fit(module, DataLoader(Rollouts(module, envs, seed), batch_size=None))
    return float(trainer.callback_metrics["episode_return"])


if __name__ == "__main__":
    print(f"Mean training return of the last rollout: {main():.1f}")
