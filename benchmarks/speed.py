"""What a step costs, in gradients of the loss and beside other libraries.

    make bench
    PYTHONPATH=examples/advanced python benchmarks/speed.py --device cuda

Writes docs/results/speed.md and speed.png, or speed-cuda.md and its picture. All take the same
step, as far as they can: radius and damping are of the joint KL, ten iterations of conjugate
gradient, no critic.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from dear_networks import compiled, networks
from defaults import beside_sb3
from large_networks import large_networks
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from memory import peak_bytes
from peers import Peer, Sb3Contrib, Tianshou
from real_batches import pool
from scene import Scene
from table import table
from timing import Job, taken_in_turn

from trpo_optim import TrustRegionOptimizer

OURS: dict[str, dict[str, Any]] = {
    "without the third value": {"third": False},
    "with it": {"third": True},
    "with it, curvature on 10 %": {"third": True, "share": 0.1},
}
REAL = ("HalfCheetah-v5", 100)
COLOURS = dict(
    zip(
        [*OURS, "sb3-contrib", "Tianshou"],
        ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"],
        strict=True,
    )
)
"""Of Okabe and Ito, which colour-blind people can tell apart."""
PEERS: dict[str, type[Peer]] = {"sb3-contrib": Sb3Contrib, "Tianshou": Tianshou}


@dataclass(frozen=True)
class Settings:
    """How the benchmark runs."""

    rounds: int = 9
    """timed rounds of each table; the sweeps behind the picture take a third"""
    threads: int = 2
    """CPU threads of torch"""
    device: str = "cpu"
    """cpu, cuda, ..."""
    largest_batch: int = 200_000
    """samples at the end of the sweep over batch sizes"""
    largest_hidden: int = 3_150
    """hidden units at the end of the sweep over parameters; 3150 make ten million"""
    folder: Path = Path("docs/results")
    """where the page and its picture go"""
    pools: Path = Path("runs/pools")
    """where real batches are kept; missing ones are made"""

    @property
    def picture(self) -> Path:
        """Where the picture goes; the page lies beside it."""
        return self.folder / ("speed.png" if self.device == "cpu" else f"speed-{self.device}.png")


def in_gradients(settings: Settings) -> str:
    """Return the table of what a product and an update cost in gradients."""
    jobs: dict[str, dict[str, Any]] = {
        "update without the third value": {"third": False},
        "by finite differences": {"third": False, "engine": "finite differences"},
        "with it": {"third": True},
        "with it, curvature on 10 %": {"third": True, "share": 0.1},
    }
    head = ["network", "samples", "gradient (ms)", "product without", "product with it", *jobs]
    rows = [[*head, "checks"]]
    sizes = {64: (64, 256, 4096, 8192, 20480), 256: (256, 4096, 20480)}
    for hidden, samples in [(hidden, each) for hidden, those in sizes.items() for each in those]:
        scene = Scene(hidden, samples, settings.device)
        rounds = settings.rounds * (3 if samples <= 256 else 1)
        unit = {"gradient": scene.gradient()}
        updates = {name: scene.update(**how) for name, how in jobs.items()}
        times = taken_in_turn(unit | updates, rounds, settings.device)
        scene.reset()
        unit = {"gradient": Job(scene.gradient().run)}
        parts = {name: scene.product(third=third) for name, third in (("H", False), ("G", True))}
        found = taken_in_turn(unit | parts | scene.checks(), rounds, settings.device)
        checks = found["checked"].median - found["unchecked"].median
        rows.append(
            [
                f"17–{hidden}–{hidden}–6",
                str(samples),
                f"{1000 * times['gradient'].median:.2f}",
                *(found[name].over(found["gradient"]) for name in parts),
                *(times[name].over(times["gradient"]) for name in updates),
                f"{checks / found['gradient'].median:.2f}",
            ]
        )
    return table(*rows)


def engines(settings: Settings) -> str:
    """Return the table of what an update costs by each engine, in updates by double backward."""
    by: dict[str, dict[str, Any]] = {
        "double backward": {"third": False, "engine": "double backward"},
        "torch.func": {"third": False},
        "Gauss–Newton": {"third": True},
        "finite differences": {"third": True, "engine": "finite differences"},
    }
    unit, *others = by
    rows = [["samples", f"{unit} (ms)", *others]]
    for samples in (64, 256, 2048, 8192):
        scene = Scene(64, samples, settings.device)
        jobs = {name: scene.update(**how) for name, how in by.items()}
        times = taken_in_turn(jobs, 3 * settings.rounds, settings.device)
        ratios = [times[name].over(times[unit]) for name in others]
        rows.append([str(samples), f"{1000 * times[unit].median:.2f}", *ratios])
    return table(*rows)


def beside_peers(settings: Settings) -> str:
    """Return the table of how many times faster an update is than a peer's."""
    real = pool(settings.pools, *REAL)
    rows = [["samples", "peer", "peer (ms)", *OURS]]
    for samples in (2048, 8192, 20480):
        scene = Scene(64, samples, settings.device, pool=real)
        jobs = {name: scene.update(**how) for name, how in OURS.items()}
        jobs |= {name: scene.peer(kind) for name, kind in PEERS.items()}
        times = taken_in_turn(jobs, settings.rounds, settings.device)
        for peer in PEERS:
            ratios = [times[peer].over(times[name]) for name in OURS]
            rows.append([str(samples), peer, f"{1000 * times[peer].median:.1f}", *ratios])
    return table(*rows)


MICRO_BATCHES: dict[str, dict[str, Any]] = {
    "8 micro-batches": {"micro_batches": 8},
    "8 micro-batches, exact products": {"micro_batches": 8, "engine": "Gauss-Newton"},
    "8 micro-batches, curvature on 10 %": {"micro_batches": 8, "share": 0.1},
}


def memory(settings: Settings) -> str:
    """Return the table of the memory that one update needs at its peak, its time and its gain."""
    scene = Scene(64, 20480, settings.device)
    ours = {f"update {name}": how for name, how in OURS.items()}
    ours |= {
        f"update with it, {name}": {"third": True, **how} for name, how in MICRO_BATCHES.items()
    }
    made = {name: scene.update_and_optimizer(**how) for name, how in ours.items()}
    jobs = {"one gradient": scene.gradient(), "one gradient, 8 micro-batches": scene.gradient(8)}
    jobs |= {name: job for name, (job, _) in made.items()}
    jobs |= {f"{name}'s update": scene.peer(kind) for name, kind in PEERS.items()}
    times = taken_in_turn(jobs, max(7, settings.rounds // 2), settings.device)
    rows = [["", "peak (MiB)", "peak, in gradients", "time, in gradients", "gain at equal KL"]]
    unit = 0
    whole = _gain(made["update with it"][1])
    for name, job in jobs.items():
        job.prepare()
        peak = peak_bytes(job.run, settings.device)
        unit = unit or peak
        slower = times[name].over(times["one gradient"])
        gain = f"{_gain(made[name][1]) / whole:.5f}" if name in made else ""
        rows.append([name, f"{peak / 2**20:.1f}", f"{peak / unit:.2f}", slower, gain])
    return table(*rows)


def _gain(optimizer: TrustRegionOptimizer) -> float:
    """Return the improvement of the last step over √KL, which the step's length leaves alone."""
    report = optimizer.last_report
    assert report is not None
    return report.improvement / math.sqrt(report.kl)


def sweep(settings: Settings, axis: Axes, label: str, scenes: dict[int, Scene]) -> dict[str, float]:
    """Draw the time of an update against one size; return the slopes of log–log.

    Args:
        settings: How to run.
        axis: Where to draw.
        label: Of the horizontal axis.
        scenes: By size.

    Returns:
        By job, the power of the size that the time grows with.
    """
    lines: dict[str, list[float]] = {}
    for scene in scenes.values():
        jobs = {name: scene.update(**how) for name, how in OURS.items()}
        jobs |= {name: scene.peer(kind) for name, kind in PEERS.items()}
        times = taken_in_turn(jobs, max(3, settings.rounds // 3), settings.device)
        for name, each in times.items():
            lines.setdefault(name, []).append(each.median)
    sizes = list(scenes)
    for name, line in lines.items():
        style = "o--" if name in PEERS else "o-"
        axis.loglog(sizes, line, style, markersize=4, label=name, color=COLOURS[name])
    axis.set_xlabel(label, fontsize=13)
    axis.set_ylabel("seconds per update", fontsize=13)
    axis.tick_params(labelsize=12)
    axis.xaxis.set_minor_formatter(NullFormatter())
    logs = np.log(sizes)
    return {name: float(np.polyfit(logs, np.log(line), 1)[0]) for name, line in lines.items()}


def sweeps(settings: Settings) -> str:
    """Draw cost against batch size, parameters and iterations; return the table of slopes."""
    torch.manual_seed(0)
    figure = Figure(figsize=(9, 12), layout="constrained")
    axes = figure.subplots(3, 1)
    device = settings.device
    batches = [256, 1024, 4096, 16384, 65536, settings.largest_batch]
    widths = [64, 128, 256, 512, 1024, settings.largest_hidden]
    by_samples = {size: Scene(64, size, device) for size in batches}
    by_width = [Scene(width, 512, device) for width in widths]
    by_parameters = {sum(p.numel() for p in scene.parameters): scene for scene in by_width}
    by_iterations = {n: Scene(64, 4096, device, iterations=n) for n in (5, 10, 20, 40)}
    slopes = {
        "samples": sweep(settings, axes[0], "samples (17–64–64–6)", by_samples),
        "parameters": sweep(settings, axes[1], "parameters (512 samples)", by_parameters),
        "iterations": sweep(settings, axes[2], "iterations (4096 samples)", by_iterations),
    }
    axes[0].legend(fontsize=12)
    settings.folder.mkdir(exist_ok=True)
    figure.savefig(settings.picture, dpi=120)
    names = [*OURS, *PEERS]
    rows = [["time grows with", *names]]
    rows += [[size, *(f"{each[name]:.2f}" for name in names)] for size, each in slopes.items()]
    return table(*rows)


def alone(make: Callable[..., str], *arguments: object) -> str:
    """Return a table that a new process makes: its memory is not as others left it."""
    with ProcessPoolExecutor(1, get_context("spawn")) as workers:
        return workers.submit(make, *arguments).result()


def main(settings: Settings) -> None:
    """Write the page and its picture."""
    torch.set_num_threads(settings.threads)
    where = f"`make bench` on {settings.threads} CPU cores ({platform.machine()})"
    on_cpu = settings.device == "cpu"
    if not on_cpu:
        card = torch.get_device_module(settings.device).get_device_name()
        where = f"`benchmarks/speed.py --device {settings.device}` on one {card}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "sb3-contrib", "tianshou"))
    page = PAGE.read_text(encoding="utf-8").format(
        where=where,
        versions=versions,
        rounds=settings.rounds,
        in_gradients=in_gradients(settings),
        engines=engines(settings),
        networks=networks(settings.rounds, settings.device),
        compiled=alone(compiled, settings.rounds, settings.device),
        beside_peers=beside_peers(settings),
        at_defaults=alone(beside_sb3, settings.pools, settings.rounds) if on_cpu else ELSEWHERE,
        memory=alone(memory, settings),
        large=large_networks(threads=settings.threads) if on_cpu else ELSEWHERE,
        slopes=sweeps(settings),
        picture=settings.picture.name,
    )
    settings.picture.with_suffix(".md").write_text(page)
    print(page)


ELSEWHERE = "(On the page of the CPU.)"
PAGE = Path(__file__).with_name("speed_page.md")


if __name__ == "__main__":
    main(tyro.cli(Settings))
