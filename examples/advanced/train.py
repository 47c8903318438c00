"""Train a Gymnasium agent with a handwritten loop around TrustRegionOptimizer.

    python examples/advanced/train.py --env-id Hopper-v5 --mode trpo --total-steps 200000 --seed 0

    torchrun --nproc-per-node 2 examples/advanced/train.py --env-id CartPole-v1

Box and Discrete actions; vector environments; GAE; observation and reward scaling; the critic by
Adam. By torchrun every process collects from its share of the environments, and all learn as one;
started again after one was lost, they go on from the checkpoint. Everything goes to
runs/ENV__MODE__SEED: TensorBoard events, training.png, and checkpoint.pt, from which ``--resume``
goes on bit for bit, the environments included. Without it, an earlier run's folder is kept under
another name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from agent import Policy, make_envs, mlp
from charts import draw, log
from checkpoint import load, prepare, save
from critic_fit import advantages, count_returns, errors, fit_critic
from normaliser import Normaliser, follow
from processes import Processes, leave
from step_length import joint_radius, set_length
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from training_run import Run

from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, ValueFit, policy_closure, single_path


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
    """environment steps, over all environments of all processes"""
    max_kl: float = 0.01
    """trust-region radius in nats: batch mean of the joint KL (modes trpo and natural)"""
    anneal_steps: int | None = None
    """environment step at which the steps' length is almost zero (it goes with √max_kl; in mode
    vanilla it is lr); None: it stays"""
    anneal_start: int = 0
    """environment step from which it falls, linearly"""
    advantage_floor: float = 0.0
    """standard deviation of the advantages by critic_lambda, over that of the returns, below which
    steps become shorter in proportion"""
    per_dimension: bool = False
    """multiply max_kl by the number of action dimensions, and divide the initial standard
    deviation by it, which is then at most 1"""
    constraint: Literal["mean", "max"] = "mean"
    """whether the batch's mean KL or its largest is held to the radius (mode trpo)"""
    lr: float | None = None
    """multiplies the policy's step; mode vanilla has no default: there it is the learning rate"""
    resume: bool = False
    """continue from the run's checkpoint, if there is one"""
    device: str = "cpu"
    """where the networks live: cpu, cuda, ..."""
    run_dir: Path | None = None
    """folder of the run; default runs/ENV__MODE__SEED"""
    num_envs: int = 8
    """environments stepped side by side, over all processes"""
    batch_size: int = 1024
    """environment steps per update, over all environments of all processes"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """GAE's lambda"""
    reuse: int = 0
    """how many earlier batches each step of the policy uses again"""
    reuse_weight: float = 1.0
    """how much a row of an earlier batch counts beside a row of the batch after it"""
    hidden: int = 64
    """width of the two hidden layers of policy and critic"""
    log_std: float = 0.0
    """initial log standard deviation of continuous actions"""
    critic_lr: float = 1e-3
    """the critic's learning rate"""
    critic_batches: int = 1
    """how many batches, the last ones, the critic is fitted to"""
    critic_lambda: float | None = None
    """λ of the critic's targets; None: gae_lambda"""
    critic_epochs: int = 20
    """the critic's passes over them"""
    critic_minibatch: int = 128
    """the critic's minibatch, over all processes"""
    checkpoint_every: int = 5
    """updates between two checkpoints"""
    threads: int = 1
    """CPU threads of torch; small networks are fastest with one"""

    def folder(self) -> Path:
        """Return the folder that the run writes to."""
        return self.run_dir or Path("runs") / f"{self.env_id}__{self.mode}__{self.seed}"


def new_run(args: Args, processes: Processes | None = None) -> Run:
    """Build environments, networks and optimizers, for this process alone or with others."""
    processes = processes or Processes(args.device)
    if args.num_envs % processes.size:
        raise SystemExit(
            f"num_envs {args.num_envs} must be a multiple of the {processes.size} processes."
        )
    torch.manual_seed(args.seed)  # the same networks everywhere
    own_envs = args.num_envs // processes.size
    envs = make_envs(replace(args, num_envs=own_envs))
    size = math.prod(envs.single_observation_space.shape or ())
    policy = Policy(size, envs.single_action_space, args).to(args.device)
    critic = mlp(size, args.hidden, 1, gain=1.0).to(args.device)
    if processes.rank:
        torch.manual_seed(processes.seed(args.seed))  # actions of its own
    return Run(
        args=args,
        processes=processes,
        envs=envs,
        policy=policy,
        critic=critic,
        critic_of_all=DistributedDataParallel(critic) if processes.group else critic,
        optimizer=TrustRegionOptimizer(
            policy.parameters(),
            mode=args.mode,
            max_kl=joint_radius(args, envs.single_action_space),
            constraint=args.constraint,
            lr=args.lr,
            process_group=processes.group,
        ),
        critic_optimizer=torch.optim.Adam(critic.parameters(), lr=args.critic_lr, fused=True),
        normalise=Normaliser(size, args.device),
        discounted=torch.zeros(own_envs, device=args.device),
    )


def collect(run: Run) -> SinglePathBatch:
    """Return the next batch; episodes run on from one to the next."""
    args = run.args
    batch = single_path(
        run.envs,
        run.act,
        steps=args.batch_size // args.num_envs,
        after=run.end,
        seed=run.processes.seed(args.seed, run.update) if run.end is None else None,
        device=args.device,
    )
    run.end = batch.end
    ends = (batch.terminated | batch.truncated).nonzero()[:, 0].tolist()
    own = [
        (float(run.step + (step + 1) * args.num_envs), value)
        for step, value in zip(ends, batch.episode_returns, strict=True)
    ]
    run.episodes += sorted(chain(*run.processes.all(own)), key=itemgetter(0))
    return batch


def improve_policy(run: Run) -> StepReport:
    """Take one step of the policy."""
    args, (batch, *again) = run.args, run.batches[: run.args.reuse + 1]
    set_length(run, errors(run, batch))
    estimates = advantages(run, batch, args.gae_lambda)
    earlier = [advantages(run, each, args.gae_lambda, each.log_ratios(run.act)) for each in again]
    closures = policy_closure(  # products on all rows, as in the published results
        run.act,
        [batch, *again] if args.reuse else batch,
        [estimates, *earlier] if args.reuse else estimates,
        batch_weights=[args.reuse_weight**age for age in range(len(again) + 1)]
        if args.reuse
        else None,
        standardise=True,
        curvature=None,
        process_group=run.processes.group,
    )
    return run.optimizer.step(closures)


def improve(run: Run, batch: SinglePathBatch) -> tuple[StepReport, ValueFit]:
    """Take one step of the policy, and fit the critic to its targets."""
    count_returns(run, batch)
    run.batches = [batch, *run.batches][: max(run.args.reuse + 1, run.args.critic_batches)]
    report = improve_policy(run)
    fit = fit_critic(run)
    follow(run, batch.flat(batch.observations))
    return report, fit


def train(args: Args) -> Run:
    """Train one agent from beginning to end, or from its checkpoint.

    Args:
        args: The settings.

    Returns:
        The finished run.

    Raises:
        SystemExit: If the settings do not fit together.
    """
    if min(args.num_envs, args.checkpoint_every) < 1:
        raise SystemExit(
            f"num_envs {args.num_envs} and checkpoint_every {args.checkpoint_every} must be at "
            "least 1."
        )
    if args.batch_size % args.num_envs or args.total_steps < args.batch_size:
        raise SystemExit(
            f"batch_size {args.batch_size} must be a multiple of num_envs {args.num_envs} and at "
            f"most total_steps {args.total_steps}."
        )
    if not 0 <= args.anneal_start < (args.anneal_steps or 1):
        raise SystemExit(
            f"anneal_start {args.anneal_start} must be at least 0 and before anneal_steps "
            f"{args.anneal_steps}."
        )
    torch.set_num_threads(args.threads)
    processes = Processes(args.device)
    run = new_run(args, processes)  # before the folder: it refuses settings that do not fit
    resume = processes.of_first(lambda: prepare(args.folder(), processes, resume=args.resume))
    if resume:
        load(run)
        if processes.first:
            print(f"{args.folder()} goes on from step {run.step}.")
    updates = args.total_steps // args.batch_size
    writer: SummaryWriter | None = None
    if processes.first:
        writer = SummaryWriter(str(args.folder()), purge_step=run.step + 1 if run.update else None)
    bar: dict[str, Any] = {} if processes.first else {"disable": True}  # or as TQDM_DISABLE says
    with tqdm(total=updates * args.batch_size, initial=run.step, unit="step", **bar) as progress:
        while run.update < updates:
            report, fit = improve(run, collect(run))
            run.update += 1
            run.kls.append((float(run.step), report.kl))
            if writer is not None:
                log(run, writer, report, fit)
            if run.update % args.checkpoint_every == 0 or run.update == updates:
                save(run)
            progress.update(args.batch_size)
            progress.set_postfix_str(
                f"return {run.recent_return():.1f}, KL {report.kl:.4f}, {report.outcome.name}"
            )
    run.envs.close()
    if writer is not None:
        writer.close()
        print(
            f"{args.env_id} {args.mode} seed {args.seed}: mean return of the last 20 episodes "
            f"{run.recent_return():.1f} after {run.step} steps; {draw(run)}"
        )
    return run


if __name__ == "__main__":
    train(tyro.cli(Args))
    leave()
