"""What a step costs, in gradients of the loss and beside other libraries.

    make bench
    PYTHONPATH=examples/advanced python benchmarks/speed.py --device cuda

Writes docs/results/speed.md and speed.png, or speed-cuda.md and its picture. All take the same
step, as far as they can: radius and damping are of the joint KL, ten iterations of conjugate
gradient, no critic.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from memory import peak_bytes
from peers import Peer, Sb3Contrib, Tianshou
from real_batches import pool
from scene import Scene
from table import table
from timing import Job, taken_in_turn

OURS: dict[str, dict[str, Any]] = {
    "without the third value": {"third": False},
    "with it": {"third": True},
    "with it, curvature on 10 %": {"third": True, "share": 0.1},
}
REAL = ("HalfCheetah-v5", 100)
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
    names = [f"update {name}" for name in OURS]
    rows = [["network", "samples", "gradient (ms)", "product without", "product with it", *names]]
    for hidden, samples in product((64, 256), (256, 4096, 20480)):
        scene = Scene(hidden, samples, settings.device)
        unit = {"gradient": scene.gradient()}
        jobs = {name: scene.update(**how) for name, how in OURS.items()}
        updates = taken_in_turn(unit | jobs, settings.rounds, settings.device)
        scene.reset()
        unit = {"gradient": Job(scene.gradient().run)}
        jobs = {name: scene.product(third=third) for name, third in (("H", False), ("G", True))}
        products = taken_in_turn(unit | jobs, settings.rounds, settings.device)
        rows.append(
            [
                f"17–{hidden}–{hidden}–6",
                str(samples),
                f"{1000 * updates['gradient'].median:.2f}",
                *(products[name].over(products["gradient"]) for name in jobs),
                *(updates[name].over(updates["gradient"]) for name in OURS),
            ]
        )
    return table(*rows)


def engines(settings: Settings) -> str:
    """Return the table of what an update costs by each engine, in updates by double backward."""
    by: dict[str, dict[str, Any]] = {
        "double backward": {"third": False, "torch_func": False},
        "torch.func": {"third": False},
        "Gauss–Newton": {"third": True},
    }
    rows = [["samples", "double backward (ms)", "torch.func", "Gauss–Newton"]]
    for samples in (64, 256, 2048, 8192):
        scene = Scene(64, samples, settings.device)
        jobs = {name: scene.update(**how) for name, how in by.items()}
        times = taken_in_turn(jobs, 3 * settings.rounds, settings.device)
        unit = times["double backward"]
        ratios = [times[name].over(unit) for name in ("torch.func", "Gauss–Newton")]
        rows.append([str(samples), f"{1000 * unit.median:.2f}", *ratios])
    return table(*rows)


def beside_peers(settings: Settings, *, defaults: bool) -> str:
    """Return the table of how many times faster an update is than a peer's."""
    peers = {"sb3-contrib": Sb3Contrib} if defaults else PEERS
    real = pool(settings.pools, *REAL)
    rows = [["samples", "peer", "peer (ms)", *OURS]]
    for samples in (2048, 8192, 20480):
        scene = Scene(64, samples, settings.device, pool=real)
        jobs = {name: scene.update(**how, defaults=defaults) for name, how in OURS.items()}
        jobs |= {name: scene.peer(kind, defaults=defaults) for name, kind in peers.items()}
        times = taken_in_turn(jobs, settings.rounds, settings.device)
        for peer in peers:
            ratios = [times[peer].over(times[name]) for name in OURS]
            rows.append([str(samples), peer, f"{1000 * times[peer].median:.1f}", *ratios])
    return table(*rows)


def memory(settings: Settings) -> str:
    """Return the table of the memory that one update needs at its peak, and of its time."""
    scene = Scene(64, 20480, settings.device)
    jobs = {"one gradient": scene.gradient()}
    jobs |= {f"update {name}": scene.update(**how) for name, how in OURS.items()}
    jobs["update with it, 8 micro-batches"] = scene.update(third=True, micro_batches=8)
    jobs |= {f"{name}'s update": scene.peer(kind) for name, kind in PEERS.items()}
    times = taken_in_turn(jobs, max(7, settings.rounds // 2), settings.device)
    rows = [["", "peak (MiB)", "peak, in gradients", "time, in gradients"]]
    unit = 0
    for name, job in jobs.items():
        job.prepare()
        peak = peak_bytes(job.run, settings.device)
        unit = unit or peak
        slower = times[name].over(times["one gradient"])
        rows.append([name, f"{peak / 2**20:.1f}", f"{peak / unit:.2f}", slower])
    return table(*rows)


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
        axis.loglog(sizes, line, "o--" if name in PEERS else "o-", markersize=4, label=name)
    axis.set(xlabel=label, ylabel="seconds per update")
    axis.xaxis.set_minor_formatter(NullFormatter())
    logs = np.log(sizes)
    return {name: float(np.polyfit(logs, np.log(line), 1)[0]) for name, line in lines.items()}


def sweeps(settings: Settings) -> str:
    """Draw cost against batch size, parameters and iterations; return the table of slopes."""
    torch.manual_seed(0)
    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 3)
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
    axes[0].legend(fontsize=8)
    settings.folder.mkdir(exist_ok=True)
    figure.savefig(settings.picture, dpi=120)
    names = [*OURS, *PEERS]
    rows = [["time grows with", *names]]
    rows += [[size, *(f"{each[name]:.2f}" for name in names)] for size, each in slopes.items()]
    return table(*rows)


def main(settings: Settings) -> None:
    """Write the page and its picture."""
    torch.set_num_threads(settings.threads)
    where = f"`make bench` on {settings.threads} CPU cores ({platform.machine()})"
    if settings.device != "cpu":
        card = torch.get_device_module(settings.device).get_device_name()
        where = f"`benchmarks/speed.py --device {settings.device}` on one {card}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "sb3-contrib", "tianshou"))
    page = PAGE.format(
        where=where,
        versions=versions,
        rounds=settings.rounds,
        in_gradients=in_gradients(settings),
        engines=engines(settings),
        beside_peers=beside_peers(settings, defaults=False),
        at_defaults=beside_peers(settings, defaults=True),
        memory=memory(settings),
        slopes=sweeps(settings),
        picture=settings.picture.name,
    )
    settings.picture.with_suffix(".md").write_text(page)
    print(page)


PAGE = """# What a step costs

This page was written by {where}, with {versions}. Figures
without a unit are ratios of medians over {rounds} rounds. The jobs run in turns within one process.
The quartiles of the rounds' own ratios are in brackets.

The policy is a Gaussian MLP with two hidden tanh layers, 17 observations and 6 actions. A network
17–64–64–6 has two hidden layers of 64 units. The third value is the distribution that a closure may
return. *With it* means with the third value.

## In gradients

The unit is one evaluation of the closure with the gradient of its loss.

{in_gradients}

## By engine

`torch.func` differentiates a closure of two values. If `torch.func` refuses a closure, double
backward differentiates it. With the third value, products are Gauss–Newton. The unit is one update
of ten products by double backward. The network is 17–64–64–6.

{engines}

## Beside other libraries

The table shows how many times faster an update of ten products is than the peer's. Critics are
switched off. All libraries use the same radius and damping, for the joint KL. A peer that averages
the KL over action dimensions gets a sixth of each. The policy (17–64–64–6) and the batch come from
HalfCheetah-v5 after 100 updates.

{beside_peers}

The next table uses the defaults of both libraries, with the same radius. The defaults of
sb3-contrib are 15 iterations and its damping of 0.1.

{at_defaults}

## Memory

The table shows the peak memory that one update of ten products allocates. The network is
17–64–64–6, with 20 480 samples.

{memory}

## Against size

![Seconds per update against samples, parameters and iterations]({picture})

The time grows as a power of each size. The table shows the exponents, fitted over the points of the
picture. An exponent of 1 means linear growth.

{slopes}
"""


if __name__ == "__main__":
    main(tyro.cli(Settings))
