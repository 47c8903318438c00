"""Train a Gymnasium agent with a handwritten loop around TrustRegionOptimizer.

    python examples/train.py --env-id Hopper-v5 --mode trpo --total-steps 200000 --seed 0

Box and Discrete actions; vector environments; GAE; observation and reward scaling; the critic by
Adam. Everything goes to runs/ENV__MODE__SEED: TensorBoard events, training.png, and checkpoint.pt,
from which ``--resume`` continues. Without it, an earlier run's folder is kept under another name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from trpo_optim import StepReport, TrustRegionOptimizer, frozen, mean_kl


@dataclass(frozen=True)
class Args:
    """Settings of one run."""

    env_id: str = "CartPole-v1"
    """Gymnasium environment"""
    mode: Literal["trpo", "natural", "vanilla"] = "trpo"
    """which policy gradient: the optimizer's flag"""
    seed: int = 0
    """seed of the networks, the actions and the environments"""
    total_steps: int = 100_000
    """environment steps, over all environments"""
    max_kl: float = 0.01
    """trust-region radius in nats: batch mean of the joint KL (modes trpo and natural)"""
    lr: float = 1.0
    """multiplies the policy's step; mode vanilla: the learning rate"""
    resume: bool = False
    """continue from the run's checkpoint, if there is one"""
    device: str = "cpu"
    """where the networks live: cpu, cuda, ..."""
    run_dir: Path | None = None
    """folder of the run; default runs/ENV__MODE__SEED"""
    num_envs: int = 8
    """environments stepped side by side"""
    batch_size: int = 1024
    """environment steps per update, over all environments"""
    gamma: float = 0.99
    """discount"""
    gae_lambda: float = 0.95
    """GAE's lambda"""
    hidden: int = 64
    """width of the two hidden layers of policy and critic"""
    log_std: float = 0.0
    """initial log standard deviation of continuous actions"""
    critic_lr: float = 1e-3
    """the critic's learning rate (Adam)"""
    critic_epochs: int = 20
    """the critic's passes over each batch"""
    critic_minibatch: int = 128
    """the critic's minibatch"""
    checkpoint_every: int = 5
    """updates between two checkpoints"""
    threads: int = 1
    """CPU threads of torch; small networks are fastest with one"""

    def folder(self) -> Path:
        """Return the folder that the run writes to."""
        return self.run_dir or Path("runs") / f"{self.env_id}__{self.mode}__{self.seed}"


def make_envs(args: Args) -> SyncVectorEnv:
    """Return vector environments that restart within the step that ends an episode."""

    def make() -> gym.Env[Any, Any]:
        recorded = gym.wrappers.RecordEpisodeStatistics(gym.make(args.env_id))
        env = gym.wrappers.FlattenObservation(recorded)
        return gym.wrappers.ClipAction(env) if isinstance(env.action_space, gym.spaces.Box) else env

    return SyncVectorEnv([make] * args.num_envs, autoreset_mode=AutoresetMode.SAME_STEP)


def mlp(inputs: int, hidden: int, outputs: int, gain: float) -> nn.Sequential:
    """Return a network of two tanh layers, orthogonally initialised."""

    def layer(fan_in: int, fan_out: int, scale: float) -> nn.Linear:
        linear = nn.Linear(fan_in, fan_out)
        nn.init.orthogonal_(linear.weight, scale)
        nn.init.zeros_(linear.bias)
        return linear

    first, second = layer(inputs, hidden, math.sqrt(2)), layer(hidden, hidden, math.sqrt(2))
    return nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), layer(hidden, outputs, gain))


class Policy(nn.Module):
    """Maps normalised observations to a distribution over actions."""

    def __init__(self, observations: int, actions: gym.Space[Any], args: Args) -> None:
        super().__init__()
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        if isinstance(actions, gym.spaces.Discrete):
            outputs = int(actions.n)
        elif isinstance(actions, gym.spaces.Box):
            outputs = math.prod(actions.shape)
            self.log_std = nn.Parameter(torch.full((outputs,), args.log_std))
        else:
            raise SystemExit(
                f"{args.env_id} has the action space {actions}; this loop knows Box and Discrete."
            )
        self.network = mlp(observations, args.hidden, outputs, gain=0.01)

    def forward(self, observation: Tensor) -> Distribution:
        """Return the distribution over actions, joint over their dimensions."""
        output = self.network(observation)
        if self.discrete:
            return Categorical(logits=output)
        return Independent(Normal(output, self.log_std.exp()), 1)


@dataclass
class Batch:
    """One rollout, T steps of N environments; observations are already normalised."""

    observations: Tensor  # (T, N, D)
    actions: Tensor  # (T, N) or (T, N, A)
    rewards: Tensor  # (T, N), scaled
    dones: Tensor  # (T, N), 1 where an episode ended after the step
    next_observations: Tensor  # (N, D), after the last step
    cut: list[tuple[int, int, Tensor]]  # step, environment, final observation: time limits
    raw_observations: np.ndarray[Any, Any]  # (T * N, D), as they came


@dataclass
class Run:
    """Everything that a run carries from one update to the next."""

    args: Args
    envs: SyncVectorEnv
    policy: Policy
    critic: nn.Sequential
    optimizer: TrustRegionOptimizer
    critic_optimizer: torch.optim.Adam
    observation_stats: RunningMeanStd
    return_stats: RunningMeanStd = field(default_factory=RunningMeanStd)
    update: int = 0
    episodes: list[tuple[float, float]] = field(default_factory=list)  # step, return
    kls: list[tuple[float, float]] = field(default_factory=list)  # step, KL of the update

    @property
    def step(self) -> int:
        """Environment steps so far."""
        return self.update * self.args.batch_size

    def recent_return(self) -> float:
        """Mean return of the last 20 episodes."""
        return float(np.mean([value for _, value in self.episodes[-20:]] or [math.nan]))

    def normalise(self, observation: np.ndarray[Any, Any]) -> Tensor:
        """Return observations of zero mean and unit variance, clipped at 10."""
        stats = self.observation_stats
        scaled = (observation - stats.mean) / np.sqrt(stats.var + 1e-8)
        return torch.as_tensor(scaled, dtype=torch.float32).clamp_(-10, 10).to(self.args.device)


def new_run(args: Args) -> Run:
    """Build environments, networks and optimizers."""
    torch.manual_seed(args.seed)
    envs = make_envs(args)
    observations = math.prod(envs.single_observation_space.shape or ())
    policy = Policy(observations, envs.single_action_space, args).to(args.device)
    critic = mlp(observations, args.hidden, 1, gain=1.0).to(args.device)
    return Run(
        args=args,
        envs=envs,
        policy=policy,
        critic=critic,
        optimizer=TrustRegionOptimizer(
            policy.parameters(), mode=args.mode, max_kl=args.max_kl, lr=args.lr
        ),
        critic_optimizer=torch.optim.Adam(critic.parameters(), lr=args.critic_lr),
        observation_stats=RunningMeanStd(shape=(observations,)),
    )


def for_envs(run: Run, action: Tensor) -> np.ndarray[Any, Any]:
    """Return actions as the environments' space has them."""
    space = run.envs.single_action_space
    if isinstance(space, gym.spaces.Discrete):
        return action.cpu().numpy() + int(space.start)
    return action.cpu().numpy().reshape(-1, *(space.shape or ()))


def rollouts(run: Run) -> Iterator[Batch]:
    """Yield one batch after another; episodes run on from each to the next."""
    args, envs = run.args, run.envs
    length = args.batch_size // args.num_envs
    seed = np.random.SeedSequence([args.seed, run.update]).generate_state(1)
    raw, _ = envs.reset(seed=int(seed[0]))
    discounted = np.zeros(args.num_envs)
    while True:
        raws, actions, rewards, dones, cut = [], [], [], [], []
        for step in range(length):
            raws.append(raw)
            with torch.no_grad():
                action = run.policy(run.normalise(raw)).sample()
            raw, reward, terminated, truncated, info = envs.step(for_envs(run, action))
            done = terminated | truncated
            actions.append(action)
            rewards.append(reward)
            dones.append(done)
            for index in np.flatnonzero(done):
                episode = info["final_info"]["episode"]["r"][index]
                now = run.step + (step + 1) * args.num_envs
                run.episodes.append((float(now), float(episode)))
                if not terminated[index]:
                    cut.append((step, int(index), run.normalise(info["final_obs"][index])))
        returns = []
        for reward, done in zip(rewards, dones, strict=True):
            discounted = args.gamma * discounted + reward
            returns.append(discounted)
            discounted = discounted * ~done
        run.return_stats.update(np.concatenate(returns))
        scale = math.sqrt(run.return_stats.var + 1e-8)
        yield Batch(
            observations=run.normalise(np.stack(raws)),
            actions=torch.stack(actions),
            rewards=torch.as_tensor(np.stack(rewards) / scale, dtype=torch.float32).to(args.device),
            dones=torch.as_tensor(np.stack(dones), dtype=torch.float32).to(args.device),
            next_observations=run.normalise(raw),
            cut=cut,
            raw_observations=np.concatenate(raws),
        )


@torch.no_grad()
def advantages(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return GAE's advantages and the critic's targets, both (T, N).

    A terminated episode is worth nothing after its end; one that the time limit cut goes on being
    worth the critic's value of its last observation.
    """
    observations = torch.cat([batch.observations, batch.next_observations[None]])
    values = run.critic(observations).squeeze(-1)
    following = values[1:] * (1 - batch.dones)
    for step, index, observation in batch.cut:
        following[step, index] = run.critic(observation).squeeze(-1)
    deltas = batch.rewards + run.args.gamma * following - values[:-1]
    result = torch.zeros_like(deltas)
    carried = torch.zeros_like(deltas[0])
    for step in reversed(range(len(deltas))):
        fade = run.args.gamma * run.args.gae_lambda * (1 - batch.dones[step])
        carried = deltas[step] + fade * carried
        result[step] = carried
    return result, result + values[:-1]


def update_policy(run: Run, batch: Batch, advantage: Tensor) -> StepReport:
    """Take one step of the optimizer on the surrogate loss."""
    observations, actions = batch.observations.flatten(0, 1), batch.actions.flatten(0, 1)
    advantage = advantage.flatten()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    with torch.no_grad():
        old = frozen(run.policy(observations))
        old_log_prob = old.log_prob(actions)

    def closure() -> tuple[Tensor, Tensor, Distribution]:
        dist = run.policy(observations)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantage).mean(), mean_kl(old, dist), dist

    return run.optimizer.step(closure)


def fit_critic(run: Run, batch: Batch, target: Tensor) -> float:
    """Fit the critic to its targets by Adam; return the last mean squared error."""
    observations, targets = batch.observations.flatten(0, 1), target.flatten()
    loss = torch.zeros(())
    for _ in range(run.args.critic_epochs):
        for rows in torch.split(torch.randperm(len(targets)), run.args.critic_minibatch):
            loss = (run.critic(observations[rows]).squeeze(-1) - targets[rows]).square().mean()
            run.critic_optimizer.zero_grad()
            loss.backward()
            run.critic_optimizer.step()
    return loss.item()


def save(run: Run) -> None:
    """Write the checkpoint so that whatever happens, a whole one is there."""
    stats = {
        name: {key: torch.as_tensor(getattr(each, key)) for key in ("mean", "var", "count")}
        for name, each in (("observation", run.observation_stats), ("return", run.return_stats))
    }
    content = {
        "args": comparable(run.args),
        "update": run.update,
        "episodes": run.episodes,
        "kls": run.kls,
        "policy": run.policy.state_dict(),
        "critic": run.critic.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "critic_optimizer": run.critic_optimizer.state_dict(),
        "stats": stats,
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }
    path = run.args.folder() / "checkpoint.pt"
    half = path.with_suffix(".tmp")
    with half.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def load(run: Run) -> None:
    """Take up the run where its checkpoint left it, or at the beginning where there is none.

    Environments cannot be saved: they start new episodes, seeded by the number of the update, so
    that two resumptions agree.

    Args:
        run: A new run.

    Raises:
        SystemExit: If the checkpoint was made with other settings.
    """
    path = run.args.folder() / "checkpoint.pt"
    if not path.exists():
        return
    content = torch.load(path, map_location="cpu", weights_only=True)
    ours = comparable(run.args)
    changed = [key for key in ours if ours[key] != content["args"].get(key)]
    if changed:
        differences = ", ".join(
            f"{key} {content['args'].get(key)!r} -> {ours[key]!r}" for key in changed
        )
        raise SystemExit(
            f"{path} was made with other settings ({differences}). Resume with the same ones, or "
            "give this run a --run-dir of its own."
        )
    run.update, run.episodes, run.kls = content["update"], content["episodes"], content["kls"]
    run.policy.load_state_dict(content["policy"])
    run.critic.load_state_dict(content["critic"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.critic_optimizer.load_state_dict(content["critic_optimizer"])
    for name, stats in (("observation", run.observation_stats), ("return", run.return_stats)):
        saved = content["stats"][name]
        stats.mean, stats.var = saved["mean"].numpy(), saved["var"].numpy()
        stats.count = saved["count"].item()
    torch.set_rng_state(content["random"])
    if content["random_cuda"]:
        torch.cuda.set_rng_state_all(content["random_cuda"])


def make_way(folder: Path) -> None:
    """Rename the folder of an earlier run with the same settings, so that nothing of it is lost."""
    if (folder / "checkpoint.pt").exists():
        number = 1
        while (old := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(old)


def comparable(args: Args) -> dict[str, Any]:
    """Return the settings that must not change in mid-run."""
    free = {"resume", "device", "run_dir", "total_steps", "checkpoint_every", "threads"}
    return {key: value for key, value in asdict(args).items() if key not in free}


def log(run: Run, writer: SummaryWriter, report: StepReport, critic_loss: float) -> None:
    """Write every field of the report, and the run's own figures, to TensorBoard."""
    for name, value in report.as_dict().items():
        if isinstance(value, str):
            writer.add_text(f"report/{name}", value, run.step)
        else:
            writer.add_scalar(f"report/{name}", value, run.step)
    writer.add_scalar("charts/recent_return", run.recent_return(), run.step)
    writer.add_scalar("losses/critic", critic_loss, run.step)


def draw(run: Run) -> Path:
    """Draw return and KL against environment steps; return the picture's path."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps, returns = np.array(run.episodes or [(math.nan, math.nan)]).T
    window = min(20, len(returns))
    smooth = np.convolve(returns, np.ones(window) / window, mode="valid")
    top.plot(steps, returns, ".", markersize=2, alpha=0.3, label="episode")
    top.plot(steps[window - 1 :], smooth, label=f"mean of {window}")
    top.set(ylabel="return", title=f"{run.args.env_id}, {run.args.mode}, seed {run.args.seed}")
    top.legend()
    bottom.plot(*np.array(run.kls).T, ".", markersize=3, label="KL of the update")
    if run.args.mode != "vanilla":
        bottom.axhline(run.args.max_kl, color="black", linewidth=0.8, label="max_kl")
    bottom.set(xlabel="environment steps", ylabel="KL (nats)", ylim=(0, None))
    bottom.legend()
    path = run.args.folder() / "training.png"
    figure.savefig(path, dpi=120)
    return path


def train(args: Args) -> Run:
    """Train one agent from beginning to end, or from its checkpoint.

    Args:
        args: The settings.

    Returns:
        The finished run.

    Raises:
        SystemExit: If the settings do not fit together.
    """
    if args.batch_size % args.num_envs or args.total_steps < args.batch_size:
        raise SystemExit(
            f"batch_size {args.batch_size} must be a multiple of num_envs {args.num_envs} and at "
            f"most total_steps {args.total_steps}."
        )
    torch.set_num_threads(args.threads)
    if not args.resume:
        make_way(args.folder())
    args.folder().mkdir(parents=True, exist_ok=True)
    run = new_run(args)
    if args.resume:
        load(run)
    updates = args.total_steps // args.batch_size
    writer = SummaryWriter(str(args.folder()), purge_step=run.step + 1 if run.update else None)
    batches = rollouts(run)
    with tqdm(total=updates * args.batch_size, initial=run.step, unit="step") as progress:
        while run.update < updates:
            batch = next(batches)
            advantage, target = advantages(run, batch)
            report = update_policy(run, batch, advantage)
            critic_loss = fit_critic(run, batch, target)
            run.observation_stats.update(batch.raw_observations)
            run.update += 1
            run.kls.append((float(run.step), report.kl))
            log(run, writer, report, critic_loss)
            if run.update % args.checkpoint_every == 0 or run.update == updates:
                save(run)
            progress.update(args.batch_size)
            progress.set_postfix_str(
                f"return {run.recent_return():.1f}, KL {report.kl:.4f}, {report.outcome.name}"
            )
    writer.close()
    run.envs.close()
    print(
        f"{args.env_id} {args.mode} seed {args.seed}: mean return of the last 20 episodes "
        f"{run.recent_return():.1f} after {run.step} steps; {draw(run)}"
    )
    return run


if __name__ == "__main__":
    train(tyro.cli(Args))
