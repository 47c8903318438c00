"""What a training run shows of itself: TensorBoard's events and a picture."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from trpo_optim import StepReport
from trpo_optim.rollouts import ValueFit

if TYPE_CHECKING:
    from training_run import Run


def log(run: Run, writer: SummaryWriter, report: StepReport, fit: ValueFit) -> None:
    """Write the figures and texts of report and fit, and the run's own figures, to TensorBoard."""
    for name, value in report.as_dict().items():
        writer.add_scalar(f"report/{name}", value, run.step)
    texts = {"outcome": report.outcome.value, "engine": report.engine, "fallback": report.fallback}
    for name, text in texts.items():
        writer.add_text(f"report/{name}", text, run.step)
    writer.add_scalar("charts/recent_return", run.recent_return(), run.step)
    for name, value in asdict(fit).items():
        writer.add_scalar(f"critic/{name}", value, run.step)


def draw(run: Run) -> Path:
    """Draw return and KL against environment steps; return the picture's path."""
    from matplotlib.figure import Figure  # slow to import, and of use to one process at its end

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
        radius = run.optimizer.defaults["max_kl"]
        bottom.axhline(radius, color="black", linewidth=0.8, label="max_kl at the start")
    bottom.set(xlabel="environment steps", ylabel="KL (nats)", ylim=(0, None))
    bottom.legend()
    path = run.args.folder() / "training.png"
    figure.savefig(path, dpi=120)
    return path
