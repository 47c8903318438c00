"""What the training example keeps on disk: a checkpoint from which it goes on bit for bit."""

from __future__ import annotations

import io
import os
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from gymnasium.wrappers.utils import RunningMeanStd
from processes import Processes

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import capture, restore

if TYPE_CHECKING:
    from train import Args, Run

__all__ = ["load", "prepare", "save"]


def prepare(folder: Path, processes: Processes, *, resume: bool) -> bool:
    """Make the run's folder; that of an earlier run gets another name, so that nothing is lost.

    Args:
        folder: Where it is.
        processes: Those of the run.
        resume: Whether the run in it is to go on, whoever began it.

    Returns:
        Whether it goes on; it does, too, if the same torchrun began it and has started it again.
    """
    mark = folder / "launch.txt"
    resume |= processes.restarted and mark.exists() and mark.read_text() == processes.launch
    if not resume and (folder / "checkpoint.pt").exists():
        number = 1
        while (old := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(old)
    folder.mkdir(parents=True, exist_ok=True)
    if processes.launch:
        mark.write_text(processes.launch)
    return resume


def save(run: Run) -> None:
    """Have the first process write the checkpoint; whatever happens, there is a whole one."""
    environments = pickle.dumps((run.end, capture(run.envs)))
    own = {
        "discounted": run.discounted.cpu(),
        "fitted": [tuple(each.cpu() for each in pair) for pair in run.fitted],
        "environments": torch.frombuffer(bytearray(environments), dtype=torch.uint8),
        "random": torch.get_rng_state(),
        "random_cuda": torch.cuda.get_rng_state_all(),
    }
    processes = run.processes.all(own)
    if not run.processes.first:
        return
    content = {
        "args": _comparable(run.args),
        "update": run.update,
        "episodes": run.episodes,
        "kls": run.kls,
        "policy": run.policy.state_dict(),
        "critic": run.critic.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "critic_optimizer": run.critic_optimizer.state_dict(),
        "stats": {
            name: {
                key: torch.as_tensor(getattr(each, key), dtype=torch.float64)
                for key in ("mean", "var", "count")
            }
            for name, each in _stats(run).items()
        },
        "scaling": (run.normalise.mean.cpu(), run.normalise.scale.cpu()),
        "processes": processes,
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

    The run goes on bit for bit as if it had never stopped. Environments that do not return to their
    state start new episodes instead. A checkpoint holds pickled environments: load none that you do
    not trust.

    Args:
        run: A new run.

    Raises:
        SystemExit: If the checkpoint was made with other settings.
    """
    path = run.args.folder() / "checkpoint.pt"
    whole = run.processes.of_first(lambda: path.read_bytes() if path.exists() else None)
    if whole is None:
        return
    content = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    ours = _comparable(run.args)
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
    for name, stats in _stats(run).items():
        saved = content["stats"][name]
        stats.mean, stats.var = saved["mean"].numpy(), saved["var"].numpy()
        stats.count = saved["count"].item()
    run.normalise.mean, run.normalise.scale = (
        each.to(run.args.device) for each in content["scaling"]
    )
    parts = content["processes"]
    if len(parts) != run.processes.size:
        if run.processes.first:
            print(f"{path} is of {len(parts)} processes: the environments start new episodes.")
        return
    own = parts[run.processes.rank]
    run.fitted = [tuple(each.to(run.args.device) for each in pair) for pair in own["fitted"]]
    end, snapshot = pickle.loads(own["environments"].numpy().tobytes())
    run.envs.reset()
    try:
        restore(run.envs, snapshot)
        run.end, run.discounted = end, own["discounted"].to(run.args.device)
    except TrustRegionError as error:
        print(f"{run.args.env_id} starts new episodes: {error}")
    torch.set_rng_state(own["random"])
    if own["random_cuda"]:
        torch.cuda.set_rng_state_all(own["random_cuda"])


def _stats(run: Run) -> dict[str, RunningMeanStd]:
    """Return the run's running statistics by name."""
    return {"observation": run.normalise.stats, "return": run.return_stats}


def _comparable(args: Args) -> dict[str, Any]:
    """Return the settings that must not change in mid-run."""
    free = {"resume", "device", "run_dir", "total_steps", "checkpoint_every", "threads"}
    return {key: value for key, value in asdict(args).items() if key not in free}
