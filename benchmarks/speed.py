"""What a step costs, in gradients of the loss and beside other libraries.

    make bench
    PYTHONPATH=examples/advanced python benchmarks/speed.py --device cuda

Writes the tables of docs/results/speed.md and its picture, or of speed-cuda.md those that it has.
All take the same step, as far as they can: radius and damping are of the joint KL, ten iterations
of conjugate gradient, no critic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import page
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from memory import peak_bytes
from networks import NETWORKS, Recurrent
from peers import PEERS, peer
from real_batches import pool
from scene import ITERATIONS, RADIUS, Scene, gain, mlp
from table import steps_of, table
from timing import Job, Times, taken_in_turn

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


def ms(times: Times, form: str = ".1f") -> str:
    """Return the median in milliseconds."""
    return f"{1000 * times.median:{form}}"


def in_gradients(device: str) -> str:
    """Return the table of what a product and an update cost in gradients."""
    how: dict[str, dict[str, Any]] = {
        "update without the third value": {"third": False},
        "by finite differences": {"third": False, "engine": "finite differences"},
        "with it": {},
        "with it, curvature on 10 %": {"share": 0.1},
    }
    head = ["network", "samples", "gradient (ms)", "product without", "product with it"]
    rows = [[*head, *how]]
    for hidden, samples in [(hidden, each) for hidden, those in SIZES.items() for each in those]:
        scene = mlp(hidden, samples, device)
        rounds = ROUNDS * (3 if samples <= 256 else 1)
        updates = {name: scene.update(**each) for name, each in how.items()}
        times = taken_in_turn({"gradient": scene.gradient(), **updates}, rounds, device)
        scene.reset()
        unit = {"gradient": Job(scene.gradient().run)}  # a reset would end the products' graphs
        models = {"without": scene.model(third=False), "with": scene.model()}
        products = {
            name: Job(partial(model.product, model.gradient)) for name, model in models.items()
        }
        found = taken_in_turn(unit | products, rounds, device)
        ratios = [found[name].over(found["gradient"]) for name in products]
        ratios += [times[name].over(times["gradient"]) for name in updates]
        network = f"17–{hidden}–{hidden}–6"
        rows.append([network, str(samples), ms(times["gradient"], ".2f"), *ratios])
    return table(*rows)


def networks(device: str) -> str:
    """Return the table of what an update costs by network and engine, in gradients."""
    how: dict[str, dict[str, Any]] = {
        "default": {},
        "default without the third value": {"third": False},
        "Gauss–Newton": {"engine": "Gauss-Newton"},
        "torch.func": {"third": False, "engine": "torch.func"},
    }
    compiled = "default, compiled, over not compiled"
    head = ["network", "gradient (ms)", *how, compiled]
    rows = [[*head, "memory, default", "memory, Gauss–Newton", "gain"]]
    for name, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        policy = make().to(device)
        scene = Scene(policy, torch.rand(shape, device=device))
        jobs = {"gradient": scene.gradient()}
        jobs |= {column: scene.update(**each) for column, each in how.items()}
        if make is not Recurrent:  # torch does not compile recurrence
            twin = copy.deepcopy(policy)
            batch = scene.observations, scene.actions, scene.advantages
            jobs[compiled] = Scene(twin, *batch).update()
            twin.compile()
        times = taken_in_turn(jobs, ROUNDS, device)
        peaks, gains = {}, {}
        for column in ("gradient", "default", "Gauss–Newton"):
            jobs[column].prepare()
            peaks[column] = peak_bytes(jobs[column].run, device)
            if column in how:
                gains[column] = gain(jobs[column].repeat())
        faster = times[compiled].over(times["default"]) if compiled in times else "–"
        rows.append(
            [
                name,
                ms(times["gradient"]),
                *(times[column].over(times["gradient"]) for column in how),
                faster,
                *(f"{peaks[each] / peaks['gradient']:.1f}" for each in gains),
                f"{gains['default'] / gains['Gauss–Newton']:.4f}",
            ]
        )
    return table(*rows)


def beside_peers(device: str) -> str:
    """Return the table of how many times faster an update is than a peer's."""
    real = pool(*REAL)
    rows = [["samples", "peer", "peer (ms)", *OURS]]
    for rollouts in ROLLOUTS:
        scene = real.scene(range(rollouts), device)
        jobs = {name: scene.update(**how) for name, how in OURS.items()}
        jobs |= {name: peer(name, scene)[0] for name in PEERS}
        times = taken_in_turn(jobs, ROUNDS, device)
        for name in PEERS:
            ratios = [times[name].over(times[each]) for each in OURS]
            rows.append([str(len(scene.observations)), name, ms(times[name]), *ratios])
    return table(*rows)


def by_default(scene: Scene) -> Job:
    """Return a job that builds the closures of a batch and takes one step, all by default."""
    optimizer = TrustRegionOptimizer(scene.parameters, max_kl=RADIUS)
    zeros = torch.zeros_like(scene.advantages[:, None])
    nothing: Any = None  # what a step does not read
    batch = SinglePathBatch(
        observations=scene.observations[:, None],
        actions=scene.actions[:, None],
        rewards=zeros,
        terminated=zeros.bool(),
        truncated=zeros.bool(),
        starts=zeros.bool(),
        valid=~zeros.bool(),
        cut_observations=nothing,
        cut_rows=torch.zeros(0, 2, dtype=torch.long),
        state=None,
        episode_returns=[],
        episode_lengths=[],
        end=nothing,
    )
    advantages = scene.advantages[:, None]
    return Job(lambda: optimizer.step(policy_closure(scene.policy, batch, advantages)), scene.reset)


def at_defaults(device: str) -> str:
    """Return the table of times with both libraries at their defaults."""
    rows = [["samples", "sb3-contrib (ms)", "times faster", "evaluations", "products"]]
    for rollouts in ROLLOUTS:
        scene = pool(*REAL).scene(range(rollouts), device)
        jobs = {"ours": by_default(scene), "theirs": peer("sb3-contrib", scene, defaults=True)[0]}
        times = taken_in_turn(jobs, ROUNDS, device)
        report = jobs["ours"].repeat()
        counts = str(report.closure_evaluations), str(report.fisher_products)
        faster = times["theirs"].over(times["ours"])
        rows.append([steps_of(len(scene.observations)), ms(times["theirs"]), faster, *counts])
    return table(*rows)


def memory(device: str) -> str:
    """Return the table of the memory that one update needs at its peak, its time and its gain."""
    scene = mlp(64, 20480, device)
    micro: dict[str, dict[str, Any]] = {
        "with it, 8 micro-batches": {},
        "with it, 8 micro-batches, exact products": {"engine": "Gauss-Newton"},
        "with it, 8 micro-batches, curvature on 10 %": {"share": 0.1},
    }
    how = OURS | {name: {"micro_batches": 8, **each} for name, each in micro.items()}
    updates = {f"update {name}": scene.update(**each) for name, each in how.items()}
    jobs = {"one gradient": scene.gradient(), "one gradient, 8 micro-batches": scene.gradient(8)}
    jobs |= updates | {f"{name}'s update": peer(name, scene)[0] for name in PEERS}
    times = taken_in_turn(jobs, ROUNDS, device)
    rows = [["", "peak (MiB)", "peak, in gradients", "time, in gradients", "gain at equal KL"]]
    peaks = {}
    whole = gain(updates["update with it"].repeat())
    for name, job in jobs.items():
        job.prepare()
        peaks[name] = peak_bytes(job.run, device)
        gained = f"{gain(job.repeat()) / whole:.5f}" if name in updates else ""
        peak = f"{peaks[name] / 2**20:.1f}", f"{peaks[name] / peaks['one gradient']:.2f}"
        rows.append([name, *peak, times[name].over(times["one gradient"]), gained])
    return table(*rows)


def large_networks(device: str) -> str:
    """Return the table of the memory of an optimizer's first step, on 16 samples."""
    rows = [["parameters", "peak (vectors)", "peak (GiB)"]]
    mlp(64, 16, device).update().run()  # loads the code
    for width in WIDTHS:
        scene = mlp(width, 16, device)
        peak = peak_bytes(scene.update().run, device)
        count = sum(each.numel() for each in scene.parameters)
        rows.append([steps_of(count), f"{peak / 4 / count:.1f}", f"{peak / 2**30:.2f}"])
    return table(*rows)


def draw(device: str, path: Path) -> None:
    """Draw the time of an update against batch size, parameters and iterations.

    Args:
        device: Where the policies are.
        path: Where the picture goes.
    """
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
                lines[name].append(each.median)
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
    wanted = {name: partial(TABLES[name], device) for name in page.marks(path)}
    page.renew(path, wanted, THREADS)
    torch.set_num_threads(THREADS)
    draw(device, path.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)
