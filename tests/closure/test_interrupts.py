"""A step is whole or nothing, before whichever line it is interrupted."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from problem_with_statistics import small_problem, take_a_step
from problems import Snapshot, switches
from profiles import problems
from torch.nn.modules import module as module_registry

import trpo_optim
from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure import torch_switches
from trpo_optim.closure.torch_switches import differentiable, uncompiled, without_cudnn
from trpo_optim.closure.transaction import Transaction

pytestmark = pytest.mark.no_cover

PACKAGE = str(Path(trpo_optim.__file__).parent)


@contextmanager
def interrupted_at_line(number: int, seen: list[tuple[str, int]]) -> Iterator[None]:
    """Raise KeyboardInterrupt before the n-th line that the package executes."""

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return go_on if frame.f_code.co_filename.startswith(PACKAGE) else None

    def go_on(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            seen.append((frame.f_code.co_filename, frame.f_lineno))
            if len(seen) == number:
                raise KeyboardInterrupt
        return go_on

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


def lines_of_a_step(rejected: bool, mode: str, first: bool = False) -> list[tuple[str, int]]:
    gc.collect()  # what it frees later would change the number of lines
    seen: list[tuple[str, int]] = []
    with interrupted_at_line(-1, seen):
        take_a_step(small_problem(), rejected=rejected, mode=mode, first=first)
    return seen


def global_hooks() -> list[dict[int, Any]]:
    return [
        dict(module_registry._global_buffer_registration_hooks),
        dict(module_registry._global_forward_pre_hooks),
    ]


def autocast_depth() -> int:
    """Return in how many autocast blocks this thread is."""
    depth: int = torch.autocast_increment_nesting() - 1
    torch.autocast_decrement_nesting()
    return depth


def put_switches_back() -> None:
    for switch in (differentiable, uncompiled, without_cudnn):
        switch._lock, switch._holders, switch._held = threading.RLock(), [], None
    torch.backends.mha.set_fastpath_enabled(True)
    torch.compiler.set_stance("default")
    for enable in (
        torch.backends.cuda.enable_flash_sdp,
        torch.backends.cuda.enable_mem_efficient_sdp,
        torch.backends.cuda.enable_math_sdp,
        torch.backends.cuda.enable_cudnn_sdp,
    ):
        enable(True)


OTHER_STEPS = [
    (True, "trpo", False),
    (False, "vanilla", False),
    (True, "vanilla", False),
    (False, "trpo", True),
]


def worth_interrupting(lines: list[tuple[str, int]]) -> list[int]:
    """Return when each line runs first or, of every other line, last; thorough: both; by number."""
    first = {line: index + 1 for index, line in reversed(list(enumerate(lines)))}
    last = {line: index + 1 for index, line in enumerate(lines)}
    if problems() > 100:
        return sorted({*first.values(), *last.values()})
    return sorted({(first, last)[index % 2][line] for index, line in enumerate(sorted(first))})


@pytest.mark.parametrize(
    ("rejected", "mode", "first", "only_new"),
    [
        (False, "trpo", False, False),
        *((*variant, True) for variant in OTHER_STEPS),
        *(pytest.param(*variant, False, marks=pytest.mark.thorough) for variant in OTHER_STEPS),
    ],
)
def test_an_interrupt_before_any_line_leaves_the_old_state_or_the_whole_step(
    rejected: bool, mode: str, first: bool, only_new: bool
) -> None:
    """Of the other steps, only before the lines that an accepted one of TRPO does not run."""
    finished = small_problem()
    take_a_step(finished, rejected=rejected, mode=mode, first=first)
    after = Snapshot.of(finished.policy)
    hooks = global_hooks()
    lines = lines_of_a_step(rejected, mode, first)
    numbers = worth_interrupting(lines)
    assert len(numbers) > 150
    if only_new:
        known = {*lines_of_a_step(rejected=False, mode="trpo")}
        numbers = [number for number in numbers if lines[number - 1] not in known]
        assert numbers
    numbers = numbers[:: max(1, 200 // problems())]  # every one if thorough
    outcomes = set()
    for number in numbers:
        problem = small_problem()
        before = Snapshot.of(problem.policy)
        seen: list[tuple[str, int]] = []
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(number, seen):
            take_a_step(problem, rejected=rejected, mode=mode, first=first)
        now = Snapshot.of(problem.policy)
        changed = before.differences(now)
        if seen[-1][0] == torch_switches.__file__:
            put_switches_back()  # nothing puts back what a line should that was interrupted
            changed = [each for each in changed if each != "switches"]
            assert before.switches == switches()
        if changed:
            parameters = {name for name, _ in problem.policy.named_parameters()}
            assert set(changed) <= parameters, (seen[-1], changed)
            assert torch.equal(problem.vector(), finished.vector()), seen[-1]
        outcomes.add(bool(changed))
        assert global_hooks() == hooks, seen[-1]
        assert autocast_depth() == 0, seen[-1]
    assert False in outcomes or only_new
    assert after.training == Snapshot.of(finished.policy).training


def remembers(optimizer: TrustRegionOptimizer) -> list[bool]:
    """Return of which parameters an optimizer keeps the mean squared gradient."""
    found = (optimizer.state[each] for group in optimizer.param_groups for each in group["params"])
    return [bool(each and each["gradient_rms"].isfinite().all()) for each in found]


def test_an_interrupt_at_the_end_leaves_no_step_without_its_memory() -> None:
    """Parameters that have moved, and the preconditioner's memory of their gradients."""
    settings: dict[str, Any] = {"preconditioner": "diagonal", "cg_iterations": 1, "damping": 1e-3}
    for _ in range(2):  # the first run of some lines is longer
        gc.collect()
        finished = small_problem()
        optimizer = finished.proven_optimizer(**settings)
        lines: list[tuple[str, int]] = []
        with interrupted_at_line(-1, lines):
            assert optimizer.step(finished.closure).accepted
    assert all(remembers(optimizer))
    commit = Transaction.commit.__code__
    of_commit = {(commit.co_filename, line) for *_, line in commit.co_lines()}
    begun = next(index for index, line in enumerate(lines) if line in of_commit)
    outcomes = set()
    for number in [number for number in worth_interrupting(lines) if number > begun]:
        problem = small_problem()
        before = problem.vector()
        optimizer = problem.proven_optimizer(**settings)
        seen: list[tuple[str, int]] = []
        with pytest.raises(KeyboardInterrupt), interrupted_at_line(number, seen):
            optimizer.step(problem.closure)
        whole = not torch.equal(problem.vector(), before)
        assert torch.equal(problem.vector(), finished.vector() if whole else before), seen[-1]
        assert set(remembers(optimizer)) == {whole}, seen[-1]
        outcomes.add(whole)
        put_switches_back()
    assert outcomes == {False, True}
