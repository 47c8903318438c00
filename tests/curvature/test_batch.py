"""A batch in micro-batches: the step of the whole, in a part of the memory."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from memory import peak_bytes
from micro_batches import UNEVEN, lengths, on_rows
from problems import MODES, PROBLEMS, Problem, Snapshot, gaussian
from torch import Tensor, nn
from torch.autograd import Function

from trpo_optim import TrustRegionError, TrustRegionOptimizer
from trpo_optim.curvature.engine_choice import learned


def exact(problem: Problem, **settings: Any) -> TrustRegionOptimizer:
    """Return an optimizer that knows that finite differences do not serve."""
    optimizer = problem.proven_optimizer(**settings)
    learned(optimizer.param_groups[0])["parts"]["smooth"] = False
    return optimizer


@pytest.mark.parametrize("third", [False, True], ids=["hessian", "gauss-newton"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make", PROBLEMS)
def test_micro_batches_take_the_step_of_the_whole_batch(
    make: Callable[[], Problem], mode: str, third: bool
) -> None:
    whole, parts = make(), make()
    engine = "Gauss-Newton" if third else "torch.func"
    settings = {"mode": mode, "cg_iterations": 4, "engine": engine}
    expected = whole.optimizer(**settings).step(on_rows(whole, slice(0, 64), third=third))
    closures = [on_rows(parts, chunk, third=third) for chunk in UNEVEN]
    report = parts.optimizer(**settings).step(closures, weights=lengths(UNEVEN))
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-12)
    counts = {"closure_evaluations"}
    for name in expected.as_dict().keys() - counts:
        assert report.as_dict()[name] == pytest.approx(
            expected.as_dict()[name], rel=1e-9, abs=1e-14
        )
    assert (report.outcome, report.engine) == (expected.outcome, expected.engine)


def test_micro_batches_without_weights_count_alike() -> None:
    whole, parts = gaussian(), gaussian()
    whole.optimizer().step(whole.closure)
    quarters = [slice(16 * index, 16 * index + 16) for index in range(4)]
    parts.optimizer(engine="torch.func").step([on_rows(parts, chunk) for chunk in quarters])
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-12)


def test_eight_micro_batches_in_single_precision_stay_within_rounding() -> None:
    whole, parts = (gaussian(dtype=torch.float32, samples=512) for _ in range(2))
    chunks = [slice(64 * index, 64 * index + 64) for index in range(8)]
    whole.optimizer().step(whole.closure)
    optimizer = parts.optimizer(engine="torch.func")
    optimizer.step([on_rows(parts, chunk) for chunk in chunks], weights=[64] * 8)
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-5)


class Tracer(Function):
    """The identity, which leaves a token in the graph for as long as that lives."""

    tokens: ClassVar[list[weakref.ref[set[int]]]] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = set[int]()
        Tracer.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]

    @classmethod
    def alive(cls) -> int:
        return sum(token() is not None for token in cls.tokens)


class Traced(nn.Module):
    """A layer that says how long its graph lives."""

    def forward(self, x: Tensor) -> Tensor:
        tracer: type[Function] = Tracer
        result: Tensor = tracer.apply(x)
        return result


@pytest.mark.parametrize("chunks", [UNEVEN, [slice(0, 64)]], ids=["several", "one"])
@pytest.mark.parametrize("third", [False, True], ids=["hessian", "gauss-newton"])
def test_one_closure_at_a_time_holds_a_graph_and_none_during_the_trials(
    third: bool, chunks: list[slice]
) -> None:
    problem = gaussian()
    network = problem.policy.network
    assert isinstance(network, nn.Sequential)
    network.append(Traced())
    before: list[int] = []

    def watched(closure: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            before.append(Tracer.alive())
            return closure()

        return call

    closures = [watched(on_rows(problem, chunk, third=third)) for chunk in chunks]
    Tracer.tokens.clear()
    gc.disable()
    try:
        report = problem.optimizer(damping=1e-4, max_kl=0.05).step(closures)
    finally:
        gc.enable()
    assert report.accepted
    assert report.backtracks > 0
    assert before == [0] * report.closure_evaluations


@pytest.mark.slow
@pytest.mark.parametrize("third", [False, True], ids=["hessian", "gauss-newton"])
def test_eight_micro_batches_need_a_fifth_of_the_memory(third: bool) -> None:
    problem = gaussian(dtype=torch.float32, samples=2048, hidden=32)
    chunks = [slice(256 * index, 256 * index + 256) for index in range(8)]
    parts = [on_rows(problem, chunk, third=third) for chunk in chunks]
    whole = on_rows(problem, slice(0, 2048), third=third)
    start = copy.deepcopy(problem.policy.state_dict())
    reports = []

    def step(closure: Any) -> None:
        reports.append(problem.optimizer(cg_iterations=3, cg_tolerance=0.0).step(closure))
        problem.policy.load_state_dict(start)

    full = peak_bytes(lambda: step(whole))
    assert peak_bytes(lambda: step(parts)) <= 0.2 * full
    assert [report.fisher_products for report in reports] == [3, 3]


def test_a_dropout_mask_is_the_same_for_every_evaluation_of_a_micro_batch() -> None:
    torch.manual_seed(0)
    problem = gaussian()
    network = problem.policy.network
    assert isinstance(network, nn.Sequential)
    masks: list[Tensor] = []
    dropout = nn.Dropout(0.5)
    dropout.register_forward_hook(lambda _module, _input, output: masks.append(output == 0))
    network.insert(2, dropout)
    state = torch.get_rng_state()
    closures = []
    for chunk in (slice(0, 32), slice(32, 64)):
        torch.set_rng_state(state)
        closures.append(on_rows(problem, chunk))
    torch.set_rng_state(state)
    masks.clear()
    report = problem.optimizer().step(closures)
    assert len(masks) == report.closure_evaluations >= 2 * (1 + 10 + 1)
    assert all(torch.equal(mask, masks[0]) for mask in masks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"closure": []}, "empty list of closures"),
        ({"closure": [0.5]}, "0.5 as its closure"),
        ({"closure": [min, min], "weights": [1.0]}, "2 closures and 1 weights"),
        ({"closure": [min, min], "weights": [1.0, 0.0]}, "weights holds 0.0"),
        ({"closure": [min], "weights": [float("nan")]}, "weights holds nan"),
        ({"closure": [min], "weights": ["all"]}, r"weights is \['all'\]; it must hold one number"),
        ({"closure": [min], "weights": 3}, "weights is 3; it must hold one number"),
        ({"closure": [min], "curvature": [min]}, "In curvature: step\\(\\) got"),
        ({"closure": min, "weights": [1.0, 2.0]}, r"step\(\) got 1 closure and 2 weights"),
        ({"closure": min, "curvature": "part"}, "'part' as its closure"),
    ],
)
def test_misuse_names_what_came_and_the_remedy(arguments: dict[str, Any], message: str) -> None:
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=message):
        problem.optimizer().step(**arguments)
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_one_small_micro_batch_with_another_old_policy_is_refused_and_named() -> None:
    problem, other = gaussian(0), gaussian(1)
    stale = Problem(problem.policy, problem.observations)
    stale.old = other.old
    parts = [on_rows(problem, slice(0, 64)), stale.closure]
    with pytest.raises(TrustRegionError, match=r"In closure 2 of 2: .* not about zero"):
        problem.optimizer().step(parts, weights=[1e6, 1])


def test_a_mistake_in_a_micro_batch_says_in_which() -> None:
    problem = gaussian()
    good = on_rows(problem, slice(0, 32))
    with pytest.raises(TrustRegionError, match="In closure 2 of 3: The closure returned"):
        problem.optimizer().step([good, lambda: good()[:1], good])


def test_weights_may_be_a_tensor_and_closures_come_from_a_generator() -> None:
    whole, parts = gaussian(), gaussian()
    whole.optimizer().step(whole.closure)
    closures = (on_rows(parts, chunk) for chunk in UNEVEN)
    optimizer = parts.optimizer(engine="torch.func")
    optimizer.step(closures, weights=torch.tensor(lengths(UNEVEN)))
    torch.testing.assert_close(parts.vector(), whole.vector(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("bad", [0, 1])
def test_one_bad_micro_batch_keeps_the_parameters(bad: int) -> None:
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    good = on_rows(problem, slice(0, 32))
    closures = [good, good]
    closures[bad] = lambda: tuple(value * torch.nan for value in good())
    report = problem.optimizer().step(closures)
    assert not report.accepted
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_an_exception_in_the_last_micro_batch_rolls_back() -> None:
    problem = gaussian()
    before = Snapshot.of(problem.policy)
    good, calls = on_rows(problem, slice(0, 32)), []

    def failing() -> Any:
        calls.append(1)
        if len(calls) == 12:  # the first trial
            raise KeyboardInterrupt
        return good()

    with pytest.raises(KeyboardInterrupt):
        problem.optimizer(cg_tolerance=0.0).step([good, failing])
    assert before.differences(Snapshot.of(problem.policy)) == []


@pytest.mark.parametrize("engine", ["Gauss-Newton", "torch.func", "double backward"])
def test_a_kl_that_is_detached_only_when_a_product_is_made_again_is_refused(engine: str) -> None:
    problem = gaussian()
    before, calls = problem.vector(), 0

    def closure() -> Any:
        nonlocal calls
        calls += 1
        loss, kl, dist = problem.closure_with_dist()
        kl = kl.detach() if calls == 3 else kl  # the first two make the models
        return (loss, kl, dist) if engine == "Gauss-Newton" else (loss, kl)

    with pytest.raises(TrustRegionError, match=r"In closure 1 of 2: .* is detached"):
        exact(problem, engine=engine).step([closure, closure])
    assert (calls, torch.equal(before, problem.vector())) == (3, True)


def test_the_report_tells_of_every_engine_and_of_a_third_value_that_did_not_serve() -> None:
    problem = gaussian()
    good = on_rows(problem, slice(0, 32), third=True)
    other = on_rows(problem, slice(32, 64))

    def unfit() -> Any:
        return *other(), problem.parameters()[0]

    for closures in ([good, unfit], [unfit, good]):
        report = exact(problem, lr=0.0).step(closures)
        assert report.engine == "double backward"
        assert "other than through" in report.fallback


def test_unlike_parts_are_each_evaluated_once_a_product() -> None:
    """What one part returns says nothing of another."""
    problem = gaussian()
    parts = [
        on_rows(problem, slice(0, 32), third=True),
        on_rows(problem, slice(32, 64)),
    ]
    optimizer = exact(problem, cg_tolerance=0.0, cg_iterations=3)
    report = optimizer.step(parts)
    assert (report.engine, report.fisher_products) == ("torch.func", 3)
    once = 2 * (1 + 3 + 1 + report.backtracks)
    assert once <= report.closure_evaluations <= once + 2  # to learn what each returns


def test_what_a_closure_returned_is_not_taken_for_closures() -> None:
    problem = gaussian()
    with pytest.raises(TrustRegionError, match=r"Pass the closure itself: step\(closure\), not"):
        problem.optimizer().step(problem.closure())  # type: ignore[arg-type]  # the very mistake


@pytest.mark.parametrize("weight", [64, 64.0, np.int64(64), torch.tensor(64)], ids=repr)
def test_the_weight_of_a_single_closure_may_be_any_number(weight: Any) -> None:
    plain, weighed = gaussian(), gaussian()
    plain.optimizer().step(plain.closure)
    assert weighed.optimizer().step(weighed.closure, weights=weight).accepted
    assert torch.equal(weighed.vector(), plain.vector())
