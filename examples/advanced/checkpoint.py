"""What the training examples keep on disk: checkpoints from which they go on bit for bit."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from gymnasium.vector import VectorEnv
from gymnasium.wrappers.utils import RunningMeanStd
from processes import Processes
from torch import Tensor

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import Cursor, SinglePathBatch
from trpo_optim.snapshots import capture, restore

if TYPE_CHECKING:
    from training_run import Run

__all__ = [
    "comparable",
    "dump",
    "fill",
    "load",
    "pack",
    "prepare",
    "random_state",
    "require_own",
    "require_same",
    "save",
    "set_random_state",
    "unpack",
    "whole",
    "write",
]


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
    written = [*folder.glob("checkpoint.pt"), *folder.glob("events.out.tfevents.*")]
    if not resume and written:
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
    own = {
        "discounted": run.discounted.cpu(),
        "batches": [_parts(batch) for batch in run.batches],
        "environments": pack(run.envs, run.end),
        **random_state(),
    }
    processes = run.processes.all(own)
    if not run.processes.first:
        return
    content = {
        "args": comparable(run.args),
        "update": run.update,
        "episodes": run.episodes,
        "kls": run.kls,
        "policy": run.policy.state_dict(),
        "critic": run.critic.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "critic_optimizer": run.critic_optimizer.state_dict(),
        "stats": {name: dump(each) for name, each in _stats(run).items()},
        "scaling": (run.normalise.mean.cpu(), run.normalise.scale.cpu()),
        "processes": processes,
    }
    write(content, run.args.folder() / "checkpoint.pt")


def load(run: Run) -> None:
    """Take up the run where its checkpoint left it, or at the beginning where there is none.

    The run goes on bit for bit as if it had never stopped. Environments that do not return to their
    state start new episodes instead; on another number of processes all do, earlier batches are
    forgotten, and random numbers start anew. A checkpoint holds pickled environments: load
    none that you do not trust.

    Args:
        run: A new run.

    Raises:
        SystemExit: If the checkpoint was made with other settings.
    """
    path = run.args.folder() / "checkpoint.pt"
    packed = run.processes.of_first(lambda: path.read_bytes() if path.exists() else None)
    if packed is None:
        return
    content = torch.load(io.BytesIO(packed), map_location="cpu", weights_only=True)
    require_own(path, content["args"], run.args)
    run.update, run.episodes, run.kls = content["update"], content["episodes"], content["kls"]
    run.policy.load_state_dict(content["policy"])
    run.critic.load_state_dict(content["critic"])
    run.optimizer.load_state_dict(content["optimizer"])
    run.critic_optimizer.load_state_dict(content["critic_optimizer"])
    for name, stats in _stats(run).items():
        fill(stats, content["stats"][name])
    run.normalise.mean, run.normalise.scale = (
        each.to(run.args.device) for each in content["scaling"]
    )
    parts = content["processes"]
    if len(parts) != run.processes.size:
        if run.processes.first:
            print(
                f"{path} is of {len(parts)} processes: environments start new episodes, earlier "
                "batches are forgotten, random numbers start anew."
            )
        return
    own = parts[run.processes.rank]
    run.batches = [_batch(each, run.args.device) for each in own.get("batches", [])]
    run.end = unpack(own["environments"], run.envs, run.args.env_id)
    if run.end is not None:
        run.discounted = own["discounted"].to(run.args.device)
    set_random_state(own)


def write(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; whatever happens, there is a whole one, the old or the new."""
    with whole(path) as file:
        torch.save(content, file)


@contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes the place of the one at ``path`` when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.half")
    with half.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def comparable(args: Any) -> dict[str, Any]:
    """Return an example's settings, those that must not change in mid-run."""
    free = {"total_steps", "run_dir", "resume", "checkpoint", "checkpoint_every"}
    free |= {"device", "threads"}
    return {key: value for key, value in asdict(args).items() if key not in free}


def require_own(path: Path, saved: dict[str, Any], args: Any) -> None:
    """Refuse what was made with other settings of an example.

    Args:
        path: Where it is.
        saved: What ``comparable`` returned then; settings that did not exist had today's defaults.
        args: The settings now.

    Raises:
        SystemExit: If one differs that must not change in mid-run.
    """
    require_same(path, comparable(type(args)()) | saved, comparable(args))


def require_same(path: Path, saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made with other settings.

    Args:
        path: Where it is.
        saved: Its settings.
        ours: Those that must not differ.

    Raises:
        SystemExit: If one does.
    """
    changed = [key for key in {**saved, **ours} if saved.get(key) != ours.get(key)]
    if changed:
        differences = ", ".join(f"{key} {saved.get(key)!r} -> {ours.get(key)!r}" for key in changed)
        raise SystemExit(
            f"{path} was made with other settings ({differences}). Go on with the same ones, or "
            "keep this run at another place."
        )


def pack(envs: VectorEnv[Any, Any, Any], end: Cursor | None) -> Tensor:
    """Return environments and where the rollout in them stands, as bytes."""
    return torch.frombuffer(bytearray(pickle.dumps((end, capture(envs)))), dtype=torch.uint8)


def unpack(packed: Tensor, envs: VectorEnv[Any, Any, Any], env_id: str) -> Cursor | None:
    """Bring new environments to where others were.

    Args:
        packed: What ``pack`` returned.
        envs: The environments.
        env_id: What they are called.

    Returns:
        Where the rollout in them stands; None for new episodes, where environments do not return to
        their state.
    """
    end, snapshot = pickle.loads(packed.numpy().tobytes())
    envs.reset()
    try:
        restore(envs, snapshot)
    except TrustRegionError as error:
        print(f"{env_id} starts new episodes: {error}")
        return None
    cursor: Cursor | None = end
    return cursor


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, the CPU's and every GPU's."""
    return {"random": torch.get_rng_state(), "random_cuda": torch.cuda.get_rng_state_all()}


def set_random_state(saved: dict[str, Any]) -> None:
    """Take over what ``random_state`` returned, as far as there are as many GPUs."""
    torch.set_rng_state(saved["random"])
    for index, state in zip(range(torch.cuda.device_count()), saved["random_cuda"], strict=False):
        torch.cuda.set_rng_state(state, index)


def dump(stats: RunningMeanStd) -> dict[str, Tensor]:
    """Return running statistics as tensors."""
    names = ("mean", "var", "count")
    return {name: torch.as_tensor(getattr(stats, name), dtype=torch.float64) for name in names}


def fill(stats: RunningMeanStd, saved: dict[str, Tensor]) -> None:
    """Take over what ``dump`` returned."""
    stats.mean, stats.var = saved["mean"].numpy(), saved["var"].numpy()
    stats.count = saved["count"].item()


def _parts(batch: SinglePathBatch) -> dict[str, Any]:
    """Return what a batch holds, but for where the next rollout goes on."""
    held = {name: value for name, value in vars(batch).items() if name != "end"}
    return {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in held.items()
    }


def _batch(parts: dict[str, Any], device: str) -> SinglePathBatch:
    """Return the batch that ``_parts`` took apart; no rollout can go on from it."""
    held = {
        name: each.to(device) if isinstance(each, Tensor) else each for name, each in parts.items()
    }
    return SinglePathBatch(**held, end=None)  # type: ignore[arg-type]  # as said


def _stats(run: Run) -> dict[str, RunningMeanStd]:
    """Return the run's running statistics by name."""
    return {"observation": run.normalise.stats, "return": run.return_stats}
