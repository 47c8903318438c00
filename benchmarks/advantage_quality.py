"""What a step gains by how advantages are estimated: by λ, and by a critic that knows more.

    PYTHONPATH=examples/advanced python benchmarks/advantage_quality.py

Fills a table of docs/results/step-quality.md. A policy is frozen early in training. Every batch
gives a direction. Its gain is the slope of the expected return along it, per √KL, by the gradients
of all other batches. Those have long traces and the best critic, so that they are hardly biased.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import critic_fit
import numpy as np
import page
import torch
import train
from real_batches import trained
from scene import Scene, solved
from step_quality import PAGE
from table import records
from tasks import TASKS, adopted
from torch import Tensor
from tqdm import tqdm
from training_run import Run

from trpo_optim.rollouts import SinglePathBatch, fit_value

ENVIRONMENTS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "Ant-v5")
LAMBDAS = (0.5, 0.8, 0.9, 0.95, 0.98)
LONG, UNIT = 0.98, 0.95
"""λ of the gradients that judge, and of the direction that the others are compared with."""
UPDATES, BATCHES, SWEEPS, SEED = 60, 40, 4, 100
"""Updates before the policy is frozen, batches, and fits of the critic that knows more."""


def informed(run: Run, batches: Sequence[SinglePathBatch]) -> Run:
    """Return the run with a copy of its critic that is fitted to batches."""
    other = replace(run, critic=copy.deepcopy(run.critic))
    optimizer = torch.optim.Adam(other.critic.parameters(), lr=run.args.critic_lr)
    seen = torch.cat([run.normalise(each.flat(each.observations)) for each in batches])
    for _ in range(SWEEPS):
        taught = torch.cat([each.flat(critic_fit.targets(other, each)) for each in batches])
        fit_value(other.critic, seen, taught, optimizer, epochs=6, minibatch=256)
    return other


def scenes(run: Run, batches: Sequence[SinglePathBatch], gae_lambda: float) -> list[Scene]:
    """Return each batch with its advantages by one λ."""
    made = []
    for each in batches:
        advantages = each.flat(critic_fit.advantages(run, each, gae_lambda))
        seen = run.normalise(each.flat(each.observations))
        own = copy.deepcopy(run.policy)
        made.append(Scene(own, seen, each.flat(each.actions), advantages - advantages.mean()))
    return made


def gain(own: Sequence[Scene], judges: Tensor) -> tuple[float, float]:
    """Return the mean slope per √KL of the directions of batches, and its standard error."""
    steps, kls = [], []
    for scene in own:
        model = scene.model()
        steps.append(solved(model.product, -model.gradient).x)
        kls.append(float(steps[-1].dot(model.product(steps[-1]))))
    slopes = torch.stack(steps) @ judges.T
    others = (slopes.sum(1) - slopes.diagonal()) / (len(own) - 1)  # no batch judges itself
    unit = float(np.mean(kls)) ** 0.5
    return float(others.mean()) / unit, float(others.std()) / len(own) ** 0.5 / unit


def row(env_id: str) -> dict[str, str]:
    """Return the gains of a task, over that of λ = 0.95 with the critic of training."""
    run = trained(replace(adopted(TASKS[env_id].args), env_id=env_id, seed=SEED), UPDATES)
    batches = [train.collect(run) for _ in range(2 * BATCHES)]
    run.envs.close()
    own, knowing = batches[:BATCHES], informed(run, batches[BATCHES:])
    judges = torch.stack([-each.model().gradient for each in scenes(knowing, own, LONG)])
    gains = {f"λ = {each}": gain(scenes(run, own, each), judges) for each in LAMBDAS}
    short = run.args.gae_lambda
    gains[f"λ = {short}, better critic"] = gain(scenes(knowing, own, short), judges)
    unit, _ = gains[f"λ = {UNIT}"]
    cells = {
        name: f"{mean / unit:.2f} ± {error / unit:.2f}" for name, (mean, error) in gains.items()
    }
    return {"task": env_id, **cells}


def advantages() -> str:
    """Return the table of gains by task."""
    return records(map(row, tqdm(ENVIRONMENTS, unit="task")))


if __name__ == "__main__":
    page.renew(PAGE, {"advantages": advantages}, threads=1)
