"""A good citizen of torch.optim: schedulers, hooks, state, copies, groups."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import MODES, GaussianPolicy, Problem, gaussian
from torch import Tensor, nn
from torch.optim import lr_scheduler

from trpo_optim import StepReport, TrustRegionError, TrustRegionOptimizer
from trpo_optim.hyperparameters import ModeName

TESTS = Path(__file__).parent


def renewed(problem: Problem) -> Problem:
    """Return the next iteration's problem: the same observations, a new batch of actions."""
    return Problem(problem.policy, problem.observations, problem.seed + 1)


def train(
    problem: Problem, optimizer: TrustRegionOptimizer, steps: int
) -> tuple[Problem, list[StepReport]]:
    reports = []
    for _ in range(steps):
        reports.append(optimizer.step(problem.closure))
        problem = renewed(problem)
    return problem, reports


def through_torch_save(optimizer: TrustRegionOptimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


SCHEDULERS: list[Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]] = [
    lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch),
    lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
    lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=5, cycle_momentum=False
    ),
    lambda optimizer: lr_scheduler.LinearLR(optimizer, total_iters=3),
]


@pytest.mark.parametrize("make", SCHEDULERS)
@pytest.mark.parametrize("mode", MODES)
def test_schedulers_drive_the_length_of_the_step(
    make: Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler], mode: str
) -> None:
    problem = gaussian()
    optimizer = problem.proven_optimizer(mode=mode, max_kl=1e-4)
    scheduler = make(optimizer)
    rates = set()
    for _ in range(4):
        rate = optimizer.param_groups[0]["lr"]
        twin = Problem(copy.deepcopy(problem.policy), problem.observations, problem.seed)
        by_hand = twin.proven_optimizer(mode=mode, max_kl=1e-4, lr=rate).step(twin.closure)
        report = optimizer.step(problem.closure)
        assert report == by_hand
        assert report.accepted
        rates.add(rate)
        scheduler.step()
        problem = renewed(problem)
    assert len(rates) == 4


def test_annealing_by_hand_changes_the_next_step() -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode="natural")
    for max_kl in (0.02, 0.01, 0.005):
        optimizer.param_groups[0]["max_kl"] = max_kl
        assert optimizer.step(problem.closure).predicted_kl == pytest.approx(max_kl)
        problem = renewed(problem)


@pytest.mark.parametrize(
    ("name", "value", "changed"),
    [
        ("mode", "vanilla", lambda report: report.fisher_products == 0),
        ("damping", 10.0, lambda report: report.cg_iterations < 10),
        ("cg_iterations", 2, lambda report: report.cg_iterations == 2),
        ("cg_tolerance", 0.5, lambda report: report.cg_iterations < 10),
        ("maximize", True, lambda report: report.loss_after > report.loss_before),
    ],
)
def test_every_hyperparameter_is_live(
    name: str, value: object, changed: Callable[[StepReport], bool]
) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(damping=1e-3, cg_tolerance=1e-8)
    assert not changed(optimizer.step(problem.closure))
    optimizer.param_groups[0][name] = value
    assert changed(optimizer.step(renewed(problem).closure))


def test_hooks_fire_once_per_step() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("state_dict"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load_state_dict"))
    optimizer.step(problem.closure)
    assert calls == ["before", "after"]
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls[2:] == ["state_dict", "load_state_dict"]


def test_a_hook_that_unwraps_a_checkpoint_runs_before_the_state_is_checked() -> None:
    optimizer = gaussian().optimizer(max_kl=0.02)
    saved = {"policy": None, "optimizer": optimizer.state_dict()}
    other = gaussian().optimizer()
    hook = other.register_load_state_dict_pre_hook(lambda _, state: state["optimizer"])
    for _ in range(2):
        other.load_state_dict(saved)
        assert other.state_dict() == optimizer.state_dict()
    adam = torch.optim.Adam([*gaussian().parameters()]).state_dict()
    with pytest.raises(TrustRegionError, match="another kind of optimizer"):
        other.load_state_dict({"optimizer": adam})
    hook.remove()
    other.load_state_dict(optimizer.state_dict())
    assert other.state_dict() == optimizer.state_dict()


def test_the_last_report_is_kept() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    assert optimizer.last_report is None
    assert optimizer.step(problem.closure) is optimizer.last_report


@pytest.mark.parametrize("mode", MODES)
def test_saved_and_loaded_it_goes_on_as_if_never_stopped(mode: str) -> None:
    settings = {"mode": mode, "max_kl": 0.02, "lr": 0.5, "damping": 0.03}
    whole = gaussian()
    optimizer = whole.optimizer(**settings)
    halfway, _ = train(whole, optimizer, 3)
    state = through_torch_save(optimizer)
    resumed = Problem(copy.deepcopy(halfway.policy), halfway.observations, halfway.seed)
    _, expected = train(halfway, optimizer, 3)

    other = resumed.optimizer()
    other.load_state_dict(state)
    _, reports = train(resumed, other, 3)
    assert reports == expected
    assert torch.equal(resumed.vector(), halfway.vector())


CONTINUE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from problems import Problem, gaussian
from test_optimizer import train
saved = torch.load(sys.argv[2], weights_only=True)
problem = gaussian()
problem.policy.load_state_dict(saved["policy"])
problem = Problem(problem.policy, problem.observations, saved["seed"])
optimizer = problem.optimizer()
optimizer.load_state_dict(saved["optimizer"])
train(problem, optimizer, 3)
torch.save(problem.vector(), sys.argv[3])
"""


@pytest.mark.slow
def test_a_fresh_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(max_kl=0.02)
    problem, _ = train(problem, optimizer, 2)
    content = {
        "policy": problem.policy.state_dict(),
        "optimizer": optimizer.state_dict(),
        "seed": problem.seed,
    }
    torch.save(content, tmp_path / "saved.pt")
    train(problem, optimizer, 3)
    files = [str(TESTS), str(tmp_path / "saved.pt"), str(tmp_path / "result.pt")]
    subprocess.run([sys.executable, "-c", CONTINUE, *files], check=True)
    assert torch.equal(torch.load(tmp_path / "result.pt", weights_only=True), problem.vector())


def by_deepcopy(policy: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    return copy.deepcopy((policy, optimizer))


def by_pickle(policy: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    result: tuple[nn.Module, Any] = pickle.loads(pickle.dumps((policy, optimizer)))
    return result


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_goes_on_as_the_original(duplicate: Callable[..., Any], mode: str) -> None:
    problem = gaussian()
    optimizer = problem.optimizer(mode=mode, lr=0.7)
    optimizer.param_groups[0]["damping"] = 0.02
    problem, _ = train(problem, optimizer, 2)
    policy, other = duplicate(problem.policy, optimizer)
    assert other.last_report == optimizer.last_report
    assert other.state_dict() == optimizer.state_dict()
    twin = Problem(policy, problem.observations, problem.seed)
    assert train(twin, other, 2)[1] == train(problem, optimizer, 2)[1]
    assert torch.equal(twin.vector(), problem.vector())


def test_a_state_from_before_a_hyperparameter_existed_takes_its_default() -> None:
    optimizer = gaussian().optimizer(damping=0.3)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["improvement_ratio"]
    other = gaussian().optimizer(improvement_ratio=0.2)
    other.load_state_dict(state)
    assert other.param_groups[0]["improvement_ratio"] == 0.2
    assert other.param_groups[0]["damping"] == 0.3


@pytest.mark.parametrize("mode", MODES)
def test_parameters_in_groups_or_named_take_the_same_step(mode: ModeName) -> None:
    def grouped(problem: Problem) -> list[dict[str, Any]]:
        policy = problem.policy
        assert isinstance(policy, GaussianPolicy)
        return [{"params": [policy.log_std]}, {"params": list(policy.network.parameters())}]

    results: list[Tensor] = []
    forms: list[Callable[[Problem], Any]] = [
        lambda problem: problem.policy.parameters(),
        lambda problem: problem.policy.named_parameters(),
        grouped,
    ]
    for form in forms:
        problem = gaussian()
        optimizer = TrustRegionOptimizer(form(problem), mode=mode, lr=1.0)
        assert optimizer.step(problem.closure).accepted
        results.append(problem.vector())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_it_sits_beside_another_optimizer_whose_gradients_it_leaves_alone() -> None:
    problem = gaussian()
    adam = torch.optim.Adam(problem.policy.parameters())
    problem.closure()[0].backward()
    gradients = [parameter.grad for parameter in problem.parameters()]
    kept = copy.deepcopy(gradients)
    problem.optimizer().step(problem.closure)
    for parameter, gradient, value in zip(problem.parameters(), gradients, kept, strict=True):
        assert parameter.grad is gradient
        assert gradient is not None
        assert value is not None
        assert torch.equal(gradient, value)
    adam.step()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("mode", MODES)
def test_a_step_that_is_compiled_or_called_by_compiled_code_runs_eagerly(mode: str) -> None:
    def update(x: Tensor, closure: Any) -> tuple[Tensor, StepReport]:
        return x + 1, optimizers[1].step(closure)

    problems = [gaussian() for _ in range(3)]
    optimizers = [each.optimizer(mode=mode) for each in problems]
    step = torch.compile(optimizers[0].step, backend="eager")
    called = torch.compile(update, backend="eager")
    for _ in range(3):
        reports = [step(problems[0].closure), called(torch.zeros(2), problems[1].closure)[1]]
        expected = optimizers[2].step(problems[2].closure)
        assert expected.accepted
        assert reports == [expected, expected]
        problems = [renewed(each) for each in problems]
    assert torch.equal(problems[0].vector(), problems[2].vector())


def test_the_state_of_another_kind_of_optimizer_is_refused() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    before = optimizer.state_dict()
    with pytest.raises(TrustRegionError, match="another kind of optimizer"):
        optimizer.load_state_dict(torch.optim.Adam(problem.parameters()).state_dict())
    assert optimizer.state_dict() == before
