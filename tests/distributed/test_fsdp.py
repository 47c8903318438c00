"""Parameters sharded by FSDP2: the step of the same policy in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsdp_policies import (
    SAMPLES,
    alone,
    core_of,
    sharded,
    steps_on,
    task_of,
    together,
    vector_of,
)
from ranks import on_ranks, values_of
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import MixedPrecisionPolicy
from wrapped_steps import closure_on

from trpo_optim import Outcome, StepReport, long_vectors
from trpo_optim.algorithm import krylov_basis

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.no_cover,
    pytest.mark.skipif(torch.__version__ < "2.13", reason="refused"),
]

DIFFERENCES = "finite differences"
SETTINGS: dict[str, dict[str, Any]] = {
    "trpo": {},
    "natural": {"mode": "natural"},
    "vanilla": {"mode": "vanilla", "lr": 0.1},
    "preconditioner": {"preconditioner": "diagonal"},
}
CUTS = {
    "1": [[64]],
    "2 even": [[32], [32]],
    "2 uneven": [[40], [24]],
    "3 uneven": [[30], [24], [10]],
    "2 in micro-batches": [[20, 20], [14, 10]],
}


def apart(vector: Tensor, expected: Tensor, before: Tensor) -> float:
    """Return the distance of two ends of a way, relative to its length."""
    return float((vector - expected).norm() / (expected - before).norm())


@pytest.mark.parametrize(
    ("kind", "cut", "name", "options"),
    [
        ("all parameters", "2 uneven", "trpo", {}),
        ("all parameters", "3 uneven", "natural", {"reshard_after_forward": False}),
        ("all parameters", "2 in micro-batches", "preconditioner", {}),
        ("all parameters", "2 uneven", "vanilla", {"reshard_after_forward": True}),
        ("all parameters", "1", "trpo", {}),
        ("adapters", "2 uneven", "trpo", {}),
        ("one number", "2 uneven", "trpo", {}),
        ("checkpoints", "2 uneven", "trpo", {"reshard_after_forward": True}),
    ],
)
def test_sharded_parameters_take_the_step_of_whole_ones(
    kind: str, cut: str, name: str, options: dict[str, Any]
) -> None:
    settings = SETTINGS[name]
    before, expected, own = alone(kind, torch.float64, engine=DIFFERENCES, **settings)
    _, exact, _ = alone(kind, torch.float64, engine="double backward", **settings)
    shares = CUTS[cut]
    results = on_ranks(len(shares), together, kind, shares, torch.float64, options, settings)
    for vector, report in values_of(results):
        vanilla = name == "vanilla"
        assert apart(vector, expected, before) < (1e-12 if vanilla else 1e-7)  # as rounding has it
        assert apart(vector, exact, before) < (1e-12 if vanilla else 1e-5)
        assert report.accepted
        assert report.engine == own.engine
        assert report.kl == pytest.approx(own.kl, rel=1e-6)
        assert report.step_norm == pytest.approx(own.step_norm, rel=1e-6)


def in_single_precision(rank: int, kind: str, compact: bool) -> tuple[Tensor, StepReport]:
    """Step in single precision, maybe with the solve of long vectors, in half their memory."""
    if compact:
        long_vectors._LONG = 1
    return together(rank, kind, CUTS["2 even"], torch.float32, {}, {})


@pytest.mark.parametrize("compact", [False, True], ids=["", "as long vectors"])
@pytest.mark.parametrize("kind", ["all parameters", "one number"])
def test_sharded_parameters_in_single_precision_gain_as_whole_ones_do(
    kind: str, compact: bool
) -> None:
    before, expected, own = alone(kind, torch.float32, engine="double backward")
    for vector, report in values_of(on_ranks(2, in_single_precision, kind, compact)):
        assert apart(vector, expected, before) < 0.05
        assert report.improvement == pytest.approx(own.improvement, rel=0.01)


def lengths(rank: int) -> tuple[int, int]:
    """Return the length of this rank's vectors, and that of its parts of the parameters."""
    task = sharded(task_of())
    optimizer = task.optimizer(process_group=dist.group.WORLD)
    found: list[int] = []
    usual: Any = krylov_basis.FullBasis.absorb

    def noting(self: Any, image: Tensor) -> Any:
        found.append(len(image))
        return usual(self, image)

    setattr(krylov_basis.FullBasis, "absorb", noting)  # noqa: B010 (typed as the method)
    optimizer.step(closure_on(task, slice(32 * rank, 32 * (rank + 1))))
    (length,) = set(found)
    parts: list[Any] = task.parameters()
    return length, sum(each.to_local().numel() for each in parts)


def test_every_rank_solves_with_its_part_of_each_vector() -> None:
    (first, own), (second, others) = values_of(on_ranks(2, lengths))
    assert (first, second) == (own, others)
    assert first + second == sum(each.numel() for each in task_of().parameters())


def rejected(rank: int, options: dict[str, Any]) -> list[Any]:
    """Return what a rejected step has changed, and whether the policy still says the same."""
    task = sharded(task_of(), **options)
    optimizer = task.optimizer(process_group=dist.group.WORLD, improvement_ratio=0.999)
    optimizer.param_groups[0]["max_backtracks"] = 0
    parameters: list[Any] = task.parameters()
    gradients = [torch.ones_like(each) for each in parameters]
    for each, gradient in zip(parameters, gradients, strict=True):
        each.grad = gradient
    before = [each.to_local().clone() for each in parameters]
    with torch.no_grad():
        said = core_of(task)(task.observations)
    report = optimizer.step(closure_on(task, slice(32 * rank, 32 * (rank + 1))))
    kept = [one is other for one, other in zip(parameters, task.parameters(), strict=True)]
    with torch.no_grad():
        same = list(map(torch.equal, core_of(task)(task.observations), said))
    assert all(map(torch.equal, before, [each.to_local() for each in parameters]))
    grads = [
        each.grad is own and bool((own.to_local() == 1).all())
        for each, own in zip(parameters, gradients, strict=True)
    ]
    return [report.outcome, all(same), all(grads), all(kept)]


@pytest.mark.parametrize("keep", [False, True], ids=["resharded", "kept whole after forward"])
def test_a_rejected_step_leaves_every_bit(keep: bool) -> None:
    for found in values_of(on_ranks(2, rejected, {"reshard_after_forward": not keep})):
        assert found == [Outcome.NO_IMPROVEMENT, True, True, True]


def set_otherwise(rank: int, name: str) -> Tensor:
    """Return the parameters after two steps with FSDP set in another way."""
    task = sharded(task_of())
    blocks = core_of(task).blocks
    if name == "divide factor":
        core_of(task).set_gradient_divide_factor(1.0)  # the blocks keep the number of ranks
    elif name == "prefetch":
        core_of(task).set_modules_to_forward_prefetch([*blocks])
        blocks[1].set_modules_to_backward_prefetch([blocks[0]])
    else:
        core_of(task).set_reshard_after_backward(False)
    steps_on(task, [32], 32 * rank, process_group=dist.group.WORLD)
    core_of(task).reshard()
    return vector_of(task.policy)


@pytest.mark.parametrize("name", ["divide factor", "prefetch", "whole after backward"])
def test_how_fsdp_is_set_changes_no_step(name: str) -> None:
    before, expected, _ = alone("all parameters", torch.float64, engine=DIFFERENCES)
    for vector in values_of(on_ranks(2, set_otherwise, name)):
        assert apart(vector, expected, before) < 1e-7


def on_a_part(rank: int, share: bool) -> Tensor:
    """Return the parameters after a step whose curvature is that of some rows."""
    task = sharded(task_of()) if share else task_of()
    rows = slice(40 * rank, 40 + 24 * rank) if share else slice(64)
    settings = {"process_group": dist.group.WORLD} if share else {"engine": DIFFERENCES}
    optimizer = task.optimizer(**settings)
    if share:
        part = closure_on(task, slice(rows.start, rows.start + 8))
        weights = rows.stop - rows.start
        optimizer.step(closure_on(task, rows), curvature=part, weights=weights)
        return vector_of(task.policy)
    first, second = (closure_on(task, slice(start, start + 8)) for start in (0, 40))

    def part_of_both() -> Any:
        return tuple(
            (40 * one + 24 * other) / 64
            for one, other in zip(first()[:2], second()[:2], strict=True)
        )

    optimizer.step(closure_on(task, rows), curvature=part_of_both)
    return vector_of(task.policy)


def test_the_curvature_of_a_part_weighs_as_the_ranks_whole_batch() -> None:
    before, expected = vector_of(task_of().policy), on_a_part(0, share=False)
    for vector in values_of(on_ranks(2, on_a_part, True)):
        assert apart(vector, expected, before) < 1e-7


def in_half_precision(rank: int) -> tuple[Outcome, Tensor]:
    """Return how a vanilla step goes that computes in half precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    task = sharded(task_of(dtype=torch.float32), mp_policy=policy)
    shares = {"mode": "vanilla", "max_norm": 0.1, "process_group": dist.group.WORLD}
    (report,) = steps_on(task, [32], 32 * rank, count=1, **shares)
    return report.outcome, vector_of(task.policy)


def test_a_vanilla_step_may_compute_in_half_precision() -> None:
    task = task_of(dtype=torch.float32)
    before = vector_of(task.policy)
    steps_on(task, [SAMPLES], 0, count=1, mode="vanilla", max_norm=0.1)
    for outcome, vector in values_of(on_ranks(2, in_half_precision)):
        assert outcome is Outcome.ACCEPTED
        assert apart(vector, vector_of(task.policy), before) < 0.05


def trained_after(rank: int, steps: int) -> Tensor:
    """Return a gradient of the user's own backward, after some steps."""
    task = sharded(task_of())
    steps_on(task, [32], 32 * rank, count=steps, process_group=dist.group.WORLD, lr=1e-12)
    mean, _ = core_of(task)(task.observations[32 * rank : 32 * (rank + 1)])
    mean.square().mean().backward()
    gradients: list[Any] = [each.grad for each in task.parameters()]
    return torch.cat([each.full_tensor().reshape(-1) for each in gradients if each is not None])


def test_the_users_own_backward_goes_on_as_before() -> None:
    (plain, _), (after, _) = (values_of(on_ranks(2, trained_after, steps)) for steps in (0, 1))
    torch.testing.assert_close(after, plain, rtol=1e-9, atol=1e-12)


def saved_and_stepped(rank: int, folder: Path, first: bool) -> tuple[Tensor, Any, Any]:
    """Save after two steps, or load what was saved; then take one more step on the whole batch."""
    task = task_of()
    if not first:
        with torch.no_grad():
            core_of(task).log_std.add_(1.0)
    sharded(task)
    radius = 0.02 if first else 0.01
    optimizer = task.optimizer(
        process_group=dist.group.WORLD, max_kl=radius, preconditioner="diagonal"
    )
    ranks = dist.get_world_size()
    rows = slice(SAMPLES * rank // ranks, SAMPLES * (rank + 1) // ranks)
    weight = rows.stop - rows.start
    if first:
        for _ in range(2):
            optimizer.step(closure_on(task, rows), weights=weight)
        model, state = get_state_dict(task.policy, optimizer)
        save({"model": model, "optimizer": state}, checkpoint_id=folder)
    else:
        model, state = get_state_dict(task.policy, optimizer)
        load({"model": model, "optimizer": state}, checkpoint_id=folder)
        set_state_dict(task.policy, optimizer, model_state_dict=model, optim_state_dict=state)
    report = optimizer.step(closure_on(task, rows), weights=weight)
    memory = torch.cat(
        [each["gradient_rms"].full_tensor().reshape(-1) for each in optimizer.state.values()]
    )
    return vector_of(task.policy), memory, (report.outcome, optimizer.param_groups[0]["max_kl"])


def test_a_distributed_checkpoint_goes_on_alike_on_other_numbers_of_ranks(tmp_path: Path) -> None:
    expected, *_ = values_of(on_ranks(2, saved_and_stepped, tmp_path, True))
    for ranks in (2, 3):
        for vector, memory, said in values_of(on_ranks(ranks, saved_and_stepped, tmp_path, False)):
            torch.testing.assert_close(vector, expected[0], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(memory, expected[1], rtol=1e-9, atol=1e-12)
            assert said == (Outcome.ACCEPTED, 0.02)
