"""What a step costs, in gradients of the loss and beside other libraries.

    make bench
    PYTHONPATH=examples/advanced python benchmarks/speed.py --device cuda

Writes the tables of docs/results/speed.md and its picture, or of speed-cuda.md those that it has.
All take the same step, as far as they can: radius and damping are of the joint KL, ten iterations
of conjugate gradient, no critic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import page
import torch
import tyro
from costly_networks import NETWORKS, Recurrent
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from memory import peak_bytes
from peers import PEERS, peer
from real_batches import pool
from scene import ITERATIONS, RADIUS, Scene, gain, mlp
from table import records, steps_of
from timing import Job, over, taken_in_turn

from trpo_optim import TrustRegionOptimizer
from trpo_optim.rollouts import SinglePathBatch, policy_closure

ROUNDS, THREADS = 9, 2
OURS: dict[str, dict[str, Any]] = {
    "without the third value": {"third": False},
    "with it": {},
    "with it, curvature on 10 %": {"share": 0.1},
}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
"""Of Okabe and Ito, which colour-blind people can tell apart; peers are the last two."""
EXACT = ("default", "Gauss–Newton")
"""Columns of the table by network whose memory and gain are compared."""
REAL = ("HalfCheetah-v5", 100)
"""The policy whose steps are compared: its task, and its updates so far."""
ROLLOUTS = (2, 8, 20)
"""Numbers of its rollouts in a batch; a rollout is 1024 samples."""
SIZES = {64: (64, 256, 4096, 8192, 20480), 256: (256, 4096, 20480)}
"""Numbers of samples, by hidden units."""
BATCHES = (256, 1024, 4096, 16384, 65536, 200_000)
"""Numbers of samples in the picture."""
WIDTHS = (990, 3_150, 9_990)
"""Hidden units of one million, ten million and a hundred million parameters."""


def ms(times: list[float], form: str = ".1f") -> str:
    """Return the median in milliseconds."""
    return f"{1000 * median(times):{form}}"


def ratios(times: Mapping[str, list[float]]) -> dict[str, str]:
    """Return all other times over that of a gradient."""
    return {
        name: over(each, times["gradient"]) for name, each in times.items() if name != "gradient"
    }


def peak(job: Job, device: str) -> int:
    """Return the bytes that a job allocates at its peak."""
    job.prepare()
    return peak_bytes(job.run, device)


def in_gradients(device: str) -> str:
    """Return the table of what a product and an update cost in gradients."""
    engine = {"third": False, "engine": "finite differences"}
    how = OURS | {"without it, by finite differences": engine}
    rows = []
    for hidden, samples in [(hidden, each) for hidden, those in SIZES.items() for each in those]:
        scene = mlp(hidden, samples, device)
        rounds = ROUNDS * (3 if samples <= 256 else 1)
        jobs = {name: scene.update(**each) for name, each in how.items()}
        times = taken_in_turn({"gradient": scene.gradient(), **jobs}, rounds, device)
        alone = {"gradient": Job(scene.gradient().run)}  # a reset would end the products' graphs
        for name, third in (("product without", False), ("product with it", True)):
            model = scene.model(third=third)
            alone[name] = Job(partial(model.product, model.gradient))
        row = {"network": f"17–{hidden}–{hidden}–6", "samples": samples}
        row["gradient (ms)"] = ms(times["gradient"], ".2f")
        rows.append(row | ratios(taken_in_turn(alone, rounds, device)) | ratios(times))
    return records(rows)


def networks(device: str) -> str:
    """Return the table of what an update costs by network and engine, in gradients."""
    how: dict[str, dict[str, Any]] = {
        "default": {},
        "default without the third value": {"third": False},
        "Gauss–Newton": {"engine": "Gauss-Newton"},
        "torch.func": {"third": False, "engine": "torch.func"},
    }
    compiled, rows = "default, compiled, over not compiled", []
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        scene = Scene(make().to(device), torch.rand(shape, device=device))
        jobs = {"gradient": scene.gradient()}
        jobs |= {column: scene.update(**each) for column, each in how.items()}
        if make is not Recurrent:  # torch does not compile recurrence
            twin = copy.deepcopy(scene.policy)
            batch = scene.observations, scene.actions, scene.advantages
            jobs[compiled] = Scene(twin, *batch).update()
            twin.compile()
        times = taken_in_turn(jobs, ROUNDS, device)
        faster = over(times.pop(compiled), times["default"]) if compiled in times else "–"
        row = {"network": name, "gradient (ms)": ms(times["gradient"])}
        row |= {**ratios(times), compiled: faster}
        unit = peak(jobs["gradient"], device)
        row |= {f"memory, {each}": f"{peak(jobs[each], device) / unit:.1f}" for each in EXACT}
        default, exact = (gain(jobs[each].repeat()) for each in EXACT)
        rows.append(row | {"gain": f"{default / exact:.4f}"})
    return records(rows)


def beside_peers(device: str) -> str:
    """Return the table of how many times faster an update is than a peer's."""
    real, rows = pool(*REAL), []
    for rollouts in ROLLOUTS:
        scene = real.scene(range(rollouts), device)
        jobs = {name: scene.update(**how) for name, how in OURS.items()}
        jobs |= {name: peer(name, scene)[0] for name in PEERS}
        times = taken_in_turn(jobs, ROUNDS, device)
        for name in PEERS:
            row = {"samples": len(scene.advantages), "peer": name, "peer (ms)": ms(times[name])}
            rows.append(row | {each: over(times[name], times[each]) for each in OURS})
    return records(rows)


def by_default(scene: Scene) -> Job:
    """Return a job that builds the closures of a batch and takes one step, all by default."""
    optimizer = TrustRegionOptimizer(scene.parameters, max_kl=RADIUS)
    valid = torch.ones_like(scene.advantages[:, None], dtype=torch.bool)
    unread: dict[str, Any] = dict.fromkeys(each.name for each in fields(SinglePathBatch))
    rows = {"observations": scene.observations[:, None], "actions": scene.actions[:, None]}
    rows |= {"rewards": valid * 0.0, "valid": valid}
    batch = SinglePathBatch(**unread | rows | {"info": {}})
    advantages = scene.advantages[:, None]
    return Job(lambda: optimizer.step(policy_closure(scene.policy, batch, advantages)), scene.reset)


def at_defaults(device: str) -> str:
    """Return the table of times with both libraries at their defaults."""
    rows = []
    for rollouts in ROLLOUTS:
        scene = pool(*REAL).scene(range(rollouts), device)
        jobs = {"ours": by_default(scene), "theirs": peer("sb3-contrib", scene, defaults=True)[0]}
        times = taken_in_turn(jobs, ROUNDS, device)
        report = jobs["ours"].repeat()
        rows.append(
            {
                "samples": steps_of(len(scene.advantages)),
                "sb3-contrib (ms)": ms(times["theirs"]),
                "times faster": over(times["theirs"], times["ours"]),
                "evaluations": report.closure_evaluations,
                "products": report.fisher_products,
            }
        )
    return records(rows)


def memory(device: str) -> str:
    """Return the table of the memory that one update needs at its peak, its time and its gain."""
    scene = mlp(64, 20480, device)
    how = OURS | {
        "with it, 8 micro-batches": {"micro_batches": 8},
        "with it, 8 micro-batches, exact products": {"micro_batches": 8, "engine": "Gauss-Newton"},
        "with it, 8 micro-batches, curvature on 10 %": {"micro_batches": 8, "share": 0.1},
    }
    updates = {f"update {name}": scene.update(**each) for name, each in how.items()}
    jobs = {"one gradient": scene.gradient(), "one gradient, 8 micro-batches": scene.gradient(8)}
    jobs |= updates | {f"{name}'s update": peer(name, scene)[0] for name in PEERS}
    times = taken_in_turn(jobs, ROUNDS, device)
    peaks = {name: peak(job, device) for name, job in jobs.items()}
    whole = gain(updates["update with it"].repeat())
    gains = {name: gain(job.repeat()) / whole for name, job in updates.items()}
    return records(
        {
            "": name,
            "peak (MiB)": f"{peaks[name] / 2**20:.1f}",
            "peak, in gradients": f"{peaks[name] / peaks['one gradient']:.2f}",
            "time, in gradients": over(times[name], times["one gradient"]),
            "gain at equal KL": f"{gains[name]:.5f}" if name in gains else "",
        }
        for name in jobs
    )


def large_networks(device: str) -> str:
    """Return the table of the memory of an optimizer's first step, on 16 samples."""
    rows = []
    mlp(64, 16, device).update().run()  # loads the code
    for width in WIDTHS:
        scene = mlp(width, 16, device)
        count = sum(each.numel() for each in scene.parameters)
        size = peak(scene.update(), device)
        sizes = {"peak (vectors)": f"{size / 4 / count:.1f}", "peak (GiB)": f"{size / 2**30:.2f}"}
        rows.append({"parameters": steps_of(count), **sizes})
    return records(rows)


def draw(device: str, path: Path) -> None:
    """Draw the time of an update against batch size, parameters and iterations."""
    figure = Figure(figsize=(9, 12), layout="constrained")
    sweeps: dict[str, list[tuple[int, Scene, int]]] = {
        "samples (17–64–64–6)": [(size, mlp(64, size, device), ITERATIONS) for size in BATCHES],
        "iterations (4096 samples)": [(n, mlp(64, 4096, device), n) for n in (5, 10, 20, 40)],
    }
    scenes = [mlp(width, 512, device) for width in (64, 128, 256, 512, 1024, 3_150)]
    sweeps["parameters (512 samples)"] = [
        (sum(each.numel() for each in scene.parameters), scene, ITERATIONS) for scene in scenes
    ]
    for axis, (label, points) in zip(figure.subplots(3, 1), sweeps.items(), strict=True):
        lines: dict[str, list[float]] = {name: [] for name in (*OURS, *PEERS)}
        for _, scene, iterations in points:
            jobs = {
                name: scene.update(cg_iterations=iterations, **how) for name, how in OURS.items()
            }
            jobs |= {name: peer(name, scene, iterations=iterations)[0] for name in PEERS}
            for name, each in taken_in_turn(jobs, ROUNDS // 3, device).items():
                lines[name].append(median(each))
        for colour, (name, line) in zip(COLOURS, lines.items(), strict=True):
            style = "o--" if name in PEERS else "o-"
            sizes = [size for size, _, _ in points]
            axis.loglog(sizes, line, style, markersize=4, label=name, color=colour)
        axis.set_xlabel(label, fontsize=13)
        axis.set_ylabel("seconds per update", fontsize=13)
        axis.tick_params(labelsize=12)
        axis.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].legend(fontsize=12)
    figure.savefig(path, dpi=120)


TABLES: dict[str, Callable[[str], str]] = {
    "setting": partial(page.setting, ("sb3-contrib", "tianshou")),
    "gradients": in_gradients,
    "networks": networks,
    "peers": beside_peers,
    "defaults": at_defaults,
    "memory": memory,
    "large": large_networks,
}


def main(device: str = "cpu") -> None:
    """Write the tables that the device's page has, and its picture.

    Args:
        device: cpu, cuda, ...
    """
    path = Path("docs/results/speed.md" if device == "cpu" else f"docs/results/speed-{device}.md")
    wanted = {name: partial(TABLES[name], device) for name in page.marks(path) if name in TABLES}
    page.renew(path, wanted, THREADS)
    torch.set_num_threads(THREADS)
    draw(device, path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
