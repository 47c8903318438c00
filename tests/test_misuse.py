"""What a closure does wrong is an error that names it, and nothing has moved."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from faulty_closures import (
    Change,
    calls_of_a_step,
    dropout_problem,
    modes,
    problems_and_modes,
    step,
)
from problems import Problem, Snapshot, gaussian
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import Closures, TrustRegionError, TrustRegionOptimizer, mean_kl

MISUSES: list[tuple[Change, str]] = [
    (lambda loss, kl: loss, "one value"),
    (lambda loss, kl: (loss,), "1 values"),
    (lambda loss, kl: (loss, kl, kl, kl), "4 values"),
    (lambda loss, kl: None, "one value"),
    (lambda loss, kl: (loss.item(), kl), "loss is a float, not a tensor"),
    (lambda loss, kl: (loss, kl.item()), "kl is a float, not a tensor"),
    (lambda loss, kl: (loss.expand(5), kl), r"loss has shape \(5,\)"),
    (lambda loss, kl: (loss, kl.expand(2, 3)), r"kl has shape \(2, 3\)"),
    (lambda loss, kl: (loss.to(torch.complex64), kl), "loss is torch.complex64"),
    (lambda loss, kl: (loss, kl.to(torch.int64)), "kl is torch.int64"),
    (lambda loss, kl: (loss, kl, "dist"), "third value is a str"),
    (lambda loss, kl: (loss, kl, ()), "third value is a tuple"),
]


@problems_and_modes
@pytest.mark.parametrize(("change", "message"), MISUSES, ids=[row[1] for row in MISUSES])
def test_a_wrong_return_is_an_error_that_names_it_at_every_call(
    make: Callable[[], Problem], mode: str, change: Change, message: str
) -> None:
    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(TrustRegionError, match=message):
            step(problem, mode, change, at)
        assert before.differences(Snapshot.of(problem.policy)) == []


FIRST_CALL_MISUSES: list[tuple[Change, str]] = [
    (lambda loss, kl: (loss.detach(), kl), "detached"),
    (lambda loss, kl: (loss, kl.detach()), "detached"),
]


@problems_and_modes
@pytest.mark.parametrize(("change", "message"), FIRST_CALL_MISUSES)
def test_misuse_that_shows_at_the_current_parameters_is_an_error(
    make: Callable[[], Problem], mode: str, change: Change, message: str
) -> None:
    problem = make()
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=message):
        step(problem, mode, change, 1)
    assert before.differences(Snapshot.of(problem.policy)) == []


@problems_and_modes
@pytest.mark.parametrize("offset", [0.05, -0.05])
def test_a_kl_that_is_not_zero_at_the_current_parameters_is_an_error_where_it_is_used(
    make: Callable[[], Problem], mode: str, offset: float
) -> None:
    problem = make()
    before = Snapshot.of(problem.policy)
    if mode == "vanilla":
        report, _ = step(problem, mode, lambda loss, kl: (loss, kl + offset), 1)
        assert report.accepted
        return
    with pytest.raises(TrustRegionError, match=rf"KL is {offset} at the current parameters"):
        step(problem, mode, lambda loss, kl: (loss, kl + offset), 1)
    assert before.differences(Snapshot.of(problem.policy)) == []


@pytest.mark.parametrize("noise", [0.0, 0.1], ids=["an earlier iterate", "another engine's logits"])
def test_an_old_policy_that_another_drew_by_is_an_error_that_says_so(noise: float) -> None:
    torch.manual_seed(0)
    policy, observations = nn.Linear(4, 3), torch.randn(64, 4)
    logits = policy(observations).detach()
    old = Categorical(logits=logits + noise * torch.randn_like(logits))
    actions, advantages = old.sample(), torch.randn(64)
    optimizer = TrustRegionOptimizer(policy.parameters())

    def closure() -> tuple[Tensor, Tensor]:
        new = Categorical(logits=policy(observations))
        ratio = (new.log_prob(actions) - old.log_prob(actions)).exp()
        return -(ratio * advantages).mean(), mean_kl(old, new)

    if not noise:
        assert optimizer.step(closure).accepted
    with pytest.raises(
        TrustRegionError,
        match=r"(?s)inference server or an earlier iterate, use that policy in the ratio",
    ):
        optimizer.step(closure)


@problems_and_modes
@pytest.mark.parametrize("backward", [Tensor.backward, torch.autograd.backward])
def test_backward_inside_the_closure_is_an_error_at_every_call(
    make: Callable[[], Problem], mode: str, backward: Callable[[Tensor], None]
) -> None:
    def change(loss: Tensor, kl: Tensor) -> tuple[Tensor, Tensor]:
        backward(loss)
        return loss, kl

    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(TrustRegionError, match=r"called backward\(\)"):
            step(problem, mode, change, at)
        assert before.differences(Snapshot.of(problem.policy)) == []


@problems_and_modes
@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), KeyError("x"), KeyboardInterrupt(), SystemExit()]
)
def test_what_the_closure_raises_comes_out_and_nothing_has_moved(
    make: Callable[[], Problem], mode: str, error: BaseException
) -> None:
    def change(loss: Tensor, kl: Tensor) -> object:
        raise error

    for at in range(1, calls_of_a_step(make, mode) + 1):
        problem = make()
        before = Snapshot.of(problem.policy)
        with pytest.raises(type(error)) as caught:
            step(problem, mode, change, at)
        assert caught.value is error
        assert before.differences(Snapshot.of(problem.policy)) == []


@modes
@pytest.mark.parametrize("detached", [True, False])
def test_an_old_policy_computed_inside_the_closure_is_an_error(mode: str, detached: bool) -> None:
    problem = gaussian(dtype=torch.float32)

    def closure() -> tuple[Tensor, Tensor]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            problem.old = problem.policy(problem.observations)
        return problem.closure()

    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match="region has no effect"):
        problem.optimizer(mode=mode).step(closure)
    assert before.differences(Snapshot.of(problem.policy)) == []


@problems_and_modes
@pytest.mark.parametrize("leak", ["old_log_prob", "old"])
def test_an_old_policy_that_was_not_detached_is_an_error(
    make: Callable[[], Problem], mode: str, leak: str
) -> None:
    problem = make()
    state = torch.get_rng_state()
    old = problem.policy(problem.observations)
    torch.set_rng_state(state)
    setattr(problem, leak, old if leak == "old" else old.log_prob(problem.actions))
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match="computed before it ran"):
        problem.optimizer(mode=mode).step(problem.closure)
    assert before.differences(Snapshot.of(problem.policy)) == []


@modes
@pytest.mark.parametrize("closure", [None, 3, "closure"])
def test_a_missing_closure_is_an_error(mode: str, closure: object) -> None:
    problem = dropout_problem()
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=f"got {closure!r} as its closure"):
        problem.optimizer(mode=mode).step(closure)  # type: ignore[arg-type]  # misuse on purpose
    assert before.differences(Snapshot.of(problem.policy)) == []


def test_a_step_without_arguments_names_a_hook_that_serves() -> None:
    problem = gaussian()
    optimizer = problem.optimizer()
    with pytest.raises(TrustRegionError, match="got None as its closure") as caught:
        optimizer.step()
    hook = re.findall(r"register_step_pre_hook\((.*)\)\.", str(caught.value))
    optimizer.register_step_pre_hook(eval(hook[0], {"closure": problem.closure}))
    assert optimizer.step().accepted


def test_a_value_error_of_the_closures_own_is_never_swallowed() -> None:
    problem = gaussian()

    def closure() -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            raise ValueError("no such episode")
        return problem.closure()

    with pytest.raises(ValueError, match="no such episode"):
        problem.optimizer().step(closure)


class Shared(nn.Module):
    """A policy whose old distribution, made without a copy, shares memory with its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.Linear(4, 2)
        self.std = nn.Parameter(torch.full((2,), 0.7))

    def forward(self, observation: Tensor) -> torch.distributions.Distribution:
        mean = self.mean(observation)
        normal = torch.distributions.Normal(mean, self.std.expand_as(mean))
        return torch.distributions.Independent(normal, 1)


@modes
def test_an_old_distribution_that_shares_memory_with_a_parameter_is_an_error(mode: str) -> None:
    torch.manual_seed(0)
    problem = Problem(Shared(), torch.randn(30, 4))
    before = Snapshot.of(problem.policy)
    with pytest.raises(TrustRegionError, match=r"shares memory with a parameter.*clone\(\)"):
        problem.optimizer(mode=mode).step(problem.closure)
    assert before.differences(Snapshot.of(problem.policy)) == []
    with torch.no_grad():
        policy = problem.policy
        assert isinstance(policy, Shared)
        mean = policy.mean(problem.observations)
        cloned = torch.distributions.Normal(mean, policy.std.expand_as(mean).clone())
        problem.old = torch.distributions.Independent(cloned, 1)
        problem.old_log_prob = problem.old.log_prob(problem.actions)
    report = problem.optimizer(mode=mode, lr=0.5).step(problem.closure)
    assert report.accepted
    with torch.no_grad():
        assert problem.closure()[1].item() == report.kl


@modes
def test_an_assignment_to_data_inside_the_closure_is_an_error(mode: str) -> None:
    problem = gaussian()
    buffer = torch.zeros(3)

    def closure() -> tuple[Tensor, Tensor]:
        buffer.data = torch.ones(3)
        return problem.closure()

    with pytest.raises(TrustRegionError, match=r"assigns to the \.data"):
        problem.optimizer(mode=mode).step(closure)
    assert not buffer.any()


def test_closures_of_one_function_are_refused() -> None:
    with pytest.raises(TrustRegionError, match=r"got a function as its parts.*\[closure\]"):
        Closures(lambda: None)  # type: ignore[arg-type]
