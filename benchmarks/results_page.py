"""What docs/results/learning.md says around its figures: kept by hand."""

from __future__ import annotations

PAGE = """# Learning, beside the peers

`make bench-learning` wrote this page. The finished runs are in
[`results.jsonl.xz`](results.jsonl.xz), with one line of JSON per evaluation. The command does not
repeat runs that this file holds.

The returns are those of the final policies, not the best of the curve. Each policy is evaluated for
{episodes} episodes in separate environments, with deterministic actions. One column has sampled
actions. Brackets hold 95 % stratified bootstrap intervals over the seeds, computed by rliable. Such
an interval never leaves the range of the runs. With three seeds, it is that range. With three to
five seeds, it covers less than 95 %. With fewer than four seeds, the IQM equals the mean and is
left out. {machines}

Every task has a target. For MuJoCo, the target is close to the best published mean over several
seeds: three seeds (sb3-contrib), ten seeds at the best of the curve (Tianshou), or eighty seeds
(TRPO+, Madry et al.). For classic control, it is close to the single runs of rl-zoo. The published
runs took as many steps as the runs here, on earlier versions of the tasks. For
InvertedDoublePendulum, the target is higher than any published return that was found. Runs end
after a whole update. So the runs of sb3-contrib take up to 3248 steps more than the budget, and the
runs of this package take up to 850 less.

![Learning curves](learning.png)

The picture shows returns by environment steps, with deterministic actions. Lines are means over the
seeds, with the range of the seeds. Dashed lines are targets.

## Settings

All MuJoCo tasks share one set of settings. With d action dimensions, the initial standard deviation
is min(1, e^{mujoco.log_std}/d). The trust-region radius is {mujoco.max_kl}·d
(`examples/advanced/train.py --per-dimension`). It limits the batch mean of the KL summed over
dimensions. The radii are {radii}. An update takes {mujoco.batch_size} steps from {mujoco.num_envs}
environments. The step length is constant for the first {whole_length} environment steps. Then it
falls linearly to zero. The critic is fitted to the last {mujoco.critic_batches} batches in
{mujoco.critic_epochs} passes. γ is {mujoco.gamma} and λ is {mujoco.gae_lambda}. For Swimmer, they
are {swimmer.gamma} and {swimmer.gae_lambda}. Both pairs follow the rule λ = 1 − 5(1 − γ).

All tasks of classic control share another set: max_kl {classic.max_kl}, updates of
{classic.batch_size} steps from {classic.num_envs} environments, log_std {classic.log_std}, γ
{classic.gamma} and λ {classic.gae_lambda} by the same rule. The critic is fitted to as many batches
in {classic.critic_epochs} passes. The step length falls from the start.

Natural and vanilla use the settings of trpo and were not tuned. The learning rate of vanilla is
{vanilla} on all tasks. It falls as the step length does.

sb3-contrib's TRPO uses the settings that rl-baselines3-zoo publishes for it. It ran on the eleven
tasks that have an entry there. Its KL is a mean over action dimensions. Its MuJoCo settings were
made for version v4 of the tasks (Ant-v5 also observes contact forces), and its Humanoid settings
for 2 million steps. After each evaluation, a run is reloaded and starts new episodes. Seeds 0 and 1
(on Humanoid, seed 0) also restarted from their first random seed then, except on Pendulum and
MountainCarContinuous.

## MuJoCo

{mujoco_table}

## Classic control

{classic_table}

## Across tasks

A score is 0 for uniformly random actions and 1 for the target. The probability of improvement is
the probability that a random run of trpo beats a random run of the other algorithm on the same
task, averaged over tasks. Ties count half.

The MuJoCo settings were fixed before any of this package's runs above. At that time, most of
sb3-contrib's runs had been made. The tasks and the seeds are the same as in the search for the
settings. For classic control, γ, λ and the number of the critic's passes were also found on the
same tasks, but on other seeds. Before, other settings had missed targets with the seeds above.

{across}

![Performance profiles](profiles.png)

## Missed targets

The returns are means of final policies, with deterministic actions. The section [How the settings
were found](#how-the-settings-were-found) has the figures of what was tried.

{shortfalls}

## The whole loop

The table shows the milliseconds of an update of 2048 environment steps on one core, in parts.
*Simulator* is the simulator alone, with random actions. No loop can save this time. *Collect*
includes the simulator and the normalisation of observations. *Policy* is the policy's step with the
advantages. *Critic and scaling* is twenty passes of the critic in minibatches of 128, and the
scaling of observations. sb3-contrib has the same KL, products, passes and minibatches.

{loop}

The target is a ratio of 1.5. HalfCheetah with eight environments is close to it (1.43 to 1.55 in
four runs of this table). Hopper misses it (1.42 to 1.49 and 1.28 to 1.40). Its simulator takes two
to three times as long as HalfCheetah's, on both sides. With eight environments, the simulator and
the arithmetic of the critic's 320 minibatches take most of an update.

The loop uses Adam in one kernel, distributions that do not check their arguments, and fewer calls
per step. Two more changes were tried. Dropping `info` in a wrapper saves 5 % of collecting.
Computing the critic's gradients by hand takes 52 ms, where autograd takes 71 ms.

{pong}
## How the settings were found

{study}
"""

MACHINES = """Torch 2.11 on sixteen cores made or began these runs: trpo's seeds 3 and 4 of MuJoCo,
seed 0 of natural and of vanilla, and sb3-contrib's seed 2 of CartPole, Acrobot and LunarLander.
Torch 2.13 on two cores made all other runs."""
"""What the archived runs were made on: kept by hand."""

TRIED = {
    "Hopper-v5": "less noise with a step length that falls from the start (3232); γ 0.995; a step "
    "length that falls from a quarter on",
    "Ant-v5": "less noise with a step length that falls from the start (3238, but Walker2d 3693); "
    "more noise; γ 0.995; λ 0.98; the critic on one batch",
    "Swimmer-v5": "less noise with a step length that falls from the start (328); γ 0.9999 with λ "
    "0.95, 0.98 and 0.9995; other radii",
    "Humanoid-v5": "less noise with a step length that falls from the start (762); unscaled "
    "actions (632)",
    "InvertedPendulum-v5": "less noise with a step length that falls from the start (1000, but "
    "Walker2d 3693); four ways to slow the scaling of observations, which cost other tasks returns",
    "InvertedDoublePendulum-v5": "a step length that falls from the start (7594); less noise with "
    "a radius that falls from the start (7970)",
    "Acrobot-v1": "γ 0.99 with λ 0.95 and 0.98 (−85.4, −83.3); eight other settings on other seeds",
    "LunarLander-v3": "γ 0.99 with λ 0.95 (122.8) and 0.98 (163.8, but Pendulum −178.1, Acrobot "
    "−83.3); eight other settings on other seeds",
}
"""What was tried where the target was missed, with means of final policies."""
