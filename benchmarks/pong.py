"""Pong from frames, by both sampling schemes of the paper and at random.

    make bench-pong

Killed at any moment, the same command goes on where it stopped, from checkpoints in runs/pong.
Every finished run is one line of docs/results/pong.jsonl.xz, and is not made again. At the end, it
fills the table of docs/results/pong.md and draws docs/results/pong.png.
"""

from __future__ import annotations

import os
from concurrent.futures import as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import page
import tyro
import vine
from checkpoint import comparable, require_same
from evaluation import returns_at_random, returns_of
from pong_report import PAGE, draw, runs_table
from results import lines_of, write_archive
from tqdm import tqdm
from workers import pool

ARCHIVE = Path("docs/results/pong.jsonl.xz")

COMMON = vine.Args(env_id="ALE/Pong-v5")
"""Of both schemes; what neither changes is the example's default."""

SETTINGS = {
    "single-path": replace(
        COMMON,
        sampling="single-path",
        total_steps=700_000,
        max_kl=0.02,
        trunk_steps=128,
        curvature=0.1,
        critic_epochs=3,
    ),
    "vine": replace(COMMON, total_steps=1_400_000, max_kl=0.005, horizon=5, critic_epochs=8),
}

SCHEMES = (*SETTINGS, "random")
SEEDS, WORKERS = 2, 2
FOLDER = Path("runs/pong")
"""Where runs are kept that are not finished."""


def settings_of(scheme: str, seed: int) -> vine.Args:
    """Return the settings of a run."""
    return replace(SETTINGS.get(scheme, COMMON), seed=seed)


def finished() -> list[dict[str, Any]]:
    """Return the lines of the finished runs.

    Raises:
        SystemExit: If they were run with other settings, or are of another length.
    """
    lines = lines_of(ARCHIVE)
    for line in lines:
        if "settings" in line:
            saved = comparable(vine.Args()) | line["settings"]
            require_same(ARCHIVE, saved, recorded(settings_of(line["scheme"], line["seed"])))
    return lines


def recorded(args: vine.Args) -> dict[str, Any]:
    """Return the settings that a run's line says it was made with."""
    return {**comparable(args), "total_steps": args.total_steps}


def played(scheme: str, seed: int, device: str) -> dict[str, Any]:
    """Make one run, or the rest of it; return its settings, its episodes and its final returns."""
    args = replace(settings_of(scheme, seed), device=device)
    line = {"scheme": scheme, "seed": seed}
    if scheme == "random":
        returns = returns_at_random(vine.make_envs(args), seed)
        return {**line, "sampled": returns, "deterministic": []}
    run = vine.train(replace(args, checkpoint=FOLDER / f"{scheme}__{seed}.pt"))
    return {
        **line,
        "settings": recorded(args),
        "seconds": round(run.seconds),
        "episodes": run.episodes,
        **returns_of(vine.make_envs(args), run.agent.act, seed, device),
    }


def main(device: str = "cpu") -> None:
    """Make the runs that are not finished, and write the table and the picture.

    Args:
        device: Where the networks live: cpu, cuda, ...
    """
    os.environ["TQDM_DISABLE"] = "1"  # one bar for all runs, not one each
    there = {(line["scheme"], line["seed"]) for line in finished()}
    with pool(WORKERS) as workers:
        waiting = [
            workers.submit(played, scheme, seed, device)
            for seed in range(SEEDS)
            for scheme in SCHEMES
            if (scheme, seed) not in there
        ]
        done = as_completed(waiting)
        try:
            for future in tqdm(done, total=len(waiting), unit="run", disable=False):
                write_archive([*finished(), future.result()], ARCHIVE)
        finally:
            workers.shutdown(cancel_futures=True)  # of one that failed, the others are not begun
    page.fill(PAGE, pong=runs_table(finished()))
    draw(finished(), PAGE.with_name("pong.png"))


if __name__ == "__main__":
    tyro.cli(main)
