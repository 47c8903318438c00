"""What docs/results/learning.md says around its figures: kept by hand."""

from __future__ import annotations

PAGE = """# Learning, beside the peers

Written by `make bench-learning`, whose finished runs are in [`results.jsonl.xz`](results.jsonl.xz),
one line of JSON an evaluation; runs that it holds are not made again. Final policies, not the best
of the curve, on separate environments, {episodes} episodes each, deterministic actions (sampled
ones in a column of their own). In brackets 95 % stratified bootstrap intervals over the seeds, by
rliable; such an interval never leaves the range of the runs, with three seeds it is that range,
and with three to five it covers less than 95 %. With fewer than four seeds the IQM equals the mean,
and is left out.
{machines}

What is to be reached is near the best published mean of several seeds, for classic control near
rl-zoo's single runs: three seeds (sb3-contrib), ten, at the best of the curve (Tianshou), eighty
(TRPO+, Madry et al.), after as many steps as here, on earlier versions of the tasks. For
InvertedDoublePendulum it is more than was found published. Runs end at a whole update, so that
sb3-contrib's take up to 3248 steps more than the budget, and ours up to 850 less.

![Learning curves](learning.png)

Returns by environment steps: deterministic actions, mean over the seeds and their range; dashed,
what is to be reached.

## Settings

One set for all MuJoCo tasks. With d action dimensions the initial standard deviation
is min(1, e^{mujoco.log_std}/d), and the trust-region radius, on the batch mean of the KL summed
over dimensions, is {mujoco.max_kl}·d (`examples/advanced/train.py --per-dimension`): {radii}.
{mujoco.batch_size} steps an update from {mujoco.num_envs} environments. The length of the steps is
constant for the first {whole_length} environment steps, and then falls linearly to zero. The critic
is fitted to the last {mujoco.critic_batches} batches in {mujoco.critic_epochs} passes. γ is
{mujoco.gamma} and λ {mujoco.gae_lambda}, for Swimmer {swimmer.gamma} and {swimmer.gae_lambda}, by
one rule: λ = 1 − 5(1 − γ). One set for classic control: max_kl {classic.max_kl},
{classic.batch_size} steps from {classic.num_envs} environments, log_std {classic.log_std}, γ
{classic.gamma} and λ {classic.gae_lambda} by the same rule, the critic fitted to as many batches in
{classic.critic_epochs} passes, a length that falls from the start.
Natural and vanilla have trpo's settings and were not tuned: vanilla's learning rate, {vanilla} on
all tasks, falls as the length does.

sb3-contrib's TRPO has the settings that rl-baselines3-zoo publishes for it, on the eleven tasks
with an entry of their own; its KL is a mean over action dimensions. For MuJoCo they were made for
the v4 of the tasks (Ant-v5 also observes contact forces), and for 2 million steps on Humanoid.
After each evaluation a run is reloaded and starts new episodes; seeds 0 and 1 (of Humanoid 0) also
started again from their first random seed then, but on Pendulum and MountainCarContinuous.

## MuJoCo

{mujoco_table}

## Classic control

{classic_table}

## Across tasks

Scores are 0 for uniformly random actions and 1 for what is to be reached. The
probability of improvement is that of a random run of trpo beating a random run of the other
algorithm on the same task, averaged over tasks; ties count half. MuJoCo's settings were fixed
before any of this package's runs above, when most of sb3-contrib's had been made; tasks and seeds
are those of the search. γ, λ and the critic's passes of classic control were found on its tasks,
too, but on seeds of their own, after others had missed targets with the seeds above.

{across}

![Performance profiles](profiles.png)

## Not reached

Means of final policies, deterministic actions. What was tried is told, with figures, under *How
the settings were found*.

{shortfalls}

## The whole loop

Milliseconds of an update of 2048 environment steps on one core, in parts: the simulator alone, by
random actions, which no loop can save; collecting with normalised observations, the simulator
included; the policy's step with advantages; twenty passes of the critic in
minibatches of 128, and the scaling of observations. sb3-contrib at equal settings: KL, products,
passes and minibatches.

{loop}

To reach is a ratio of 1.5. HalfCheetah with eight environments is about there (1.43 to 1.55 in four
runs of this table), and Hopper misses it (1.42 to 1.49 and 1.28 to 1.40): its simulator takes two
to three times HalfCheetah's time, the same on both sides, and with eight environments it and the
arithmetic of the critic's 320 minibatches are most of an update. Tried beyond what is used (Adam in
one kernel, distributions that do not check their arguments, fewer calls a step): dropping `info` in
a wrapper (5 % of collecting), and the critic's gradients by hand (52 ms where autograd takes 71).

{pong}
## How the settings were found

{study}
"""

MACHINES = """Torch 2.13 on two cores made the runs; torch 2.11 on sixteen made or began these:
trpo's seeds 3 and 4 of MuJoCo, seed 0 of natural and of vanilla, and sb3-contrib's seed 2 of
CartPole, Acrobot and LunarLander."""
"""What the archived runs were made on: kept by hand."""

TRIED = {
    "Hopper-v5": "less noise with a length that falls from the start (3232); γ 0.995; a fall from "
    "a quarter on",
    "Ant-v5": "less noise with a length that falls from the start (3238, but Walker2d 3693); more "
    "noise; γ 0.995; λ 0.98; the critic on one batch",
    "Swimmer-v5": "less noise with a length that falls from the start (328); γ 0.9999 with λ 0.95, "
    "0.98 and 0.9995; other radii",
    "Humanoid-v5": "less noise with a length that falls from the start (762); actions as they are "
    "(632)",
    "InvertedPendulum-v5": "a length that falls from the start (1000, but Walker2d 3693, with less "
    "noise too); four ways to slow the scaling of observations, for which other tasks pay",
    "InvertedDoublePendulum-v5": "a length that falls from the start (7594), and less noise with a "
    "radius that does (7970)",
    "Acrobot-v1": "γ 0.99 with λ 0.95 and 0.98 (−85.4, −83.3); eight other settings on seeds of "
    "their own",
    "LunarLander-v3": "γ 0.99 with λ 0.95 (122.8) and 0.98 (163.8, but Pendulum −178.1, Acrobot "
    "−83.3); eight other settings on seeds of their own",
}
"""What was tried where the target was missed, with means of final policies."""
