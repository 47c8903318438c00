"""The training example under torchrun: on one host and two, undisturbed and with a rank killed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from devices import needs_gpu
from ranks import on_ranks, values_of

SCRIPT = Path(train.__file__)
STEPS = 10_240
"""Of a run that is killed halfway: ten updates, saved after five."""

CRITIC_EPOCHS = 2
"""Of a run that need not learn much."""

SOLVED = 32_768
"""By when two processes have solved CartPole-v1."""

HOSTS = ("10.77.0.1", "10.77.0.2")
NAMES = [f"trpo{os.getpid()}{host}" for host in "ab"]
"""Their network namespaces, and the ends of the cable between them."""

pytestmark = [pytest.mark.ranks, pytest.mark.learns, pytest.mark.timeout(900)]


def torchrun(
    folder: Path,
    *options: str,
    host: int | None = None,
    script: Path = SCRIPT,
    steps: int = STEPS,
    critic_epochs: int = CRITIC_EPOCHS,
) -> subprocess.Popen[str]:
    """Start the example by torchrun, as a user would; in a network namespace or not."""
    inside = [] if host is None else ["ip", "netns", "exec", NAMES[host]]
    command = [*inside, sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1"]
    command += [*options, str(script), "--env-id", "CartPole-v1", "--total-steps", str(steps)]
    command += ["--critic-epochs", str(critic_epochs)]
    interface = "lo" if host is None else NAMES[host]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder)],
        env={
            **os.environ,
            "PYTHONPATH": f"{SCRIPT.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
            "GLOO_SOCKET_IFNAME": interface,
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def one_host(folder: Path, **more: Any) -> list[subprocess.Popen[str]]:
    """Start two processes on this host."""
    return [torchrun(folder, "--standalone", "--nproc-per-node", "2", **more)]


def two_hosts(folder: Path, **more: Any) -> list[subprocess.Popen[str]]:
    """Start one process on each of two hosts, which meet at an address of the first."""
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "trpo"]
    meeting += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:29400"]
    return [
        torchrun(
            folder,
            *meeting,
            *("--rdzv-conf", f"is_host={int(host == 0)}", "--local-addr", address),
            host=host,
            **more,
        )
        for host, address in enumerate(HOSTS)
    ]


def namespaces_allowed() -> bool:
    """Return whether this process may make network namespaces."""
    command = ["unshare", "--net", "ip", "link"]
    allowed = os.geteuid() == 0 and all(map(shutil.which, ("unshare", "ip")))
    return allowed and subprocess.run(command, check=False, capture_output=True).returncode == 0


@contextmanager
def network() -> Iterator[None]:
    """Set up two network namespaces with a cable between them."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

    try:
        for name in NAMES:
            ip("netns", "add", name)
        first, second = ([name, "netns", name] for name in NAMES)
        ip("link", "add", *first, "type", "veth", "peer", *second)
        for name, address in zip(NAMES, HOSTS, strict=True):
            ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            for interface in (name, "lo"):
                ip("-n", name, "link", "set", interface, "up")
        yield
    finally:
        for name in NAMES:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def workers(launchers: list[subprocess.Popen[str]]) -> dict[int, int]:
    """Return the process of every rank."""
    found = {}
    for launcher in launchers:
        for task in Path(f"/proc/{launcher.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
                variables = dict(each.partition(b"=")[::2] for each in environment)
                if b"RANK" in variables:
                    found[int(variables[b"RANK"])] = int(child)
    return found


def checkpoint(folder: Path) -> dict[str, Any]:
    """Load what a run has saved."""
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def finished(launchers: list[subprocess.Popen[str]]) -> str:
    """Wait for the end; return what was printed."""
    try:
        outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert all(launcher.returncode == 0 for launcher in launchers), "\n".join(outputs)
    return "\n".join(outputs)


def killed_halfway(launchers: list[subprocess.Popen[str]], folder: Path) -> str:
    """Kill rank 1 once half of the updates are saved; return what was printed until the end."""
    end = time.monotonic() + 200
    while time.monotonic() < end:
        time.sleep(0.2)
        if (folder / "checkpoint.pt").exists() and checkpoint(folder)["update"] >= STEPS // 2048:
            os.kill(workers(launchers)[1], signal.SIGKILL)
            break
    return finished(launchers)


END = """
from pathlib import Path

import tyro
from processes import leave
from train import Args, train


def gloo():
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    return [name for name in names if "gloo" in name]


rank = train(tyro.cli(Args)).processes.rank
before = gloo()
leave()
print(f"rank {rank}: {len(before)} threads before, {len(gloo())} after", flush=True)
"""


def train_undisturbed(rank: int, folder: Path) -> None:
    """Train with the settings of a run that is killed, on a rank that no torchrun started."""
    args = train.Args(env_id="CartPole-v1", run_dir=folder, total_steps=STEPS)
    train.train(replace(args, critic_epochs=CRITIC_EPOCHS))


@pytest.mark.parametrize("start", [one_host, pytest.param(two_hosts, marks=pytest.mark.thorough)])
def test_where_one_is_killed_halfway_they_come_to_the_same_end(
    start: Callable[..., list[subprocess.Popen[str]]], tmp_path: Path
) -> None:
    apart = start is two_hosts
    if apart and not namespaces_allowed():
        pytest.skip("two hosts take the right to make network namespaces")
    script = tmp_path / "end.py"
    script.write_text(END, "utf-8")
    with network() if apart else nullcontext():
        output = killed_halfway(start(tmp_path / "killed", script=script), tmp_path / "killed")
    assert "exitcode: -9" in output
    for rank in range(2):  # of gloo's threads none is left to abort a process that ends
        assert re.search(rf"rank {rank}: [1-9]\d* threads before, 0 after", output), output
    values_of(on_ranks(2, train_undisturbed, tmp_path / "whole"))
    whole, killed = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "killed")
    assert len(whole["processes"]) == 2
    for name in ("policy", "critic"):
        for key, value in whole[name].items():
            assert torch.equal(value, killed[name][key]), key
    assert killed["episodes"] == whole["episodes"]
    assert killed["kls"] == whole["kls"]


@pytest.mark.thorough
def test_two_processes_solve_cartpole(tmp_path: Path) -> None:
    finished(one_host(tmp_path, steps=SOLVED, critic_epochs=20))
    saved = checkpoint(tmp_path)
    returns = [value for _, value in saved["episodes"][-20:]]
    assert sum(returns) / len(returns) >= 475
    assert len(saved["processes"]) == 2


@needs_gpu
def test_nccl_serves_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", str(SCRIPT)]
    command += ["--device", "cuda", "--total-steps", "4096", "--run-dir", str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert checkpoint(tmp_path)["update"] == 4
