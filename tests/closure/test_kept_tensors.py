"""What a policy keeps of an evaluation is a plain tensor afterwards, whatever the outcome."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import GaussianPolicy, Problem, Snapshot, gaussian, give_gradients
from torch import Tensor, nn
from torch.distributions import Distribution

from trpo_optim import Outcome, StepReport

pytestmark = pytest.mark.no_cover


class Keeping(nn.Module):
    """Keeps what it computes: as attributes, in containers, as views, in a plain object."""

    class Notes:
        """No module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = GaussianPolicy(4, 6, 2).double()
        self.first = self.inner.get_submodule("network.0")
        self.kept: dict[str, Any] = {"list": [], "notes": Keeping.Notes()}
        self.hidden: Tensor | None = None
        self.mask: Tensor | None = None

    def forward(self, observations: Tensor) -> Distribution:
        if self.mask is None:
            self.mask = torch.ones(observations.shape[1], dtype=observations.dtype)
        hidden = self.first(observations * self.mask)
        self.hidden = hidden.tanh()
        self.kept["list"].append(hidden[:3])
        self.kept["notes"].scale = self.inner.log_std.exp()
        self.kept["weight"] = self.first.get_parameter("weight").t()
        dist: Distribution = self.inner(observations * self.mask)
        return dist

    def tensors(self) -> list[Tensor]:
        """Return what was kept."""
        others = [self.mask, self.hidden, self.kept["notes"].scale, self.kept["weight"]]
        return [each for each in [*others, *self.kept["list"]] if each is not None]


def spoilt(problem: Problem) -> None:
    problem.advantages[0] = torch.nan


def flat(problem: Problem) -> None:
    problem.advantages.zero_()


def sound(problem: Problem) -> None:
    pass


OUTCOMES: dict[str, tuple[Callable[[Problem], None], dict[str, Any], Outcome]] = {
    "accepted": (sound, {}, Outcome.ACCEPTED),
    "no rate": (sound, {"lr": 0.0}, Outcome.ZERO_LEARNING_RATE),
    "not a number": (spoilt, {}, Outcome.NON_FINITE_LOSS),
    "no gradient": (flat, {}, Outcome.ZERO_GRADIENT),
    "withdrawn": (sound, {"max_kl": 3.0, "max_backtracks": 0}, Outcome.KL_ABOVE_RADIUS),
}


def keeping() -> tuple[Problem, Keeping]:
    torch.manual_seed(0)
    policy = Keeping()
    problem = Problem(policy, torch.randn(32, 4, dtype=torch.float64))
    policy.kept = {"list": [], "notes": Keeping.Notes()}
    policy.hidden = policy.mask = None
    return problem, policy


def require_plain(policy: Keeping) -> None:
    """Check that what was kept can be read, copied and pickled, and has no graph."""
    assert len(policy.tensors()) > 4
    for tensor in policy.tensors():
        assert not tensor.requires_grad
        assert torch.equal(pickle.loads(pickle.dumps(tensor)), tensor)
        assert torch.equal(copy.deepcopy(tensor), tensor)
        assert tensor.numpy().shape == tensor.shape
    twin = copy.deepcopy(policy)
    observations = torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(twin(observations).mean, policy(observations).mean)


@pytest.mark.parametrize("engine", ["torch.func", "Gauss-Newton", "double backward", "autograd"])
@pytest.mark.parametrize("outcome", OUTCOMES)
def test_kept_tensors_are_plain_after_every_outcome(outcome: str, engine: str) -> None:
    change, settings, expected = OUTCOMES[outcome]
    problem, policy = keeping()
    change(problem)
    if engine == "double backward":
        problem.refused = "another engine is tried"
    if engine == "autograd":
        settings = {"mode": "vanilla", "lr": 1e-3, **settings}
    optimizer = problem.optimizer(**settings)
    closure = problem.closure_with_dist if engine == "Gauss-Newton" else problem.closure
    report: StepReport = optimizer.step(closure)
    if (engine, outcome) != ("autograd", "withdrawn"):
        assert report.outcome is expected
    assert report.engine == engine
    require_plain(policy)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2])
def test_kept_tensors_are_plain_after_an_exception(error: type[BaseException], call: int) -> None:
    problem, policy = keeping()
    calls = 0

    def closure() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        values = problem.closure()
        if calls == call:
            raise error("gone")
        return values

    with pytest.raises(error, match="gone"):
        problem.optimizer().step(closure)
    require_plain(policy)


def test_values_kept_are_those_of_the_evaluation() -> None:
    problem, policy = keeping()
    with torch.no_grad():
        expected = policy.first(problem.observations).tanh()
    assert problem.proven_optimizer(lr=0.0).step(problem.closure).engine == "torch.func"
    torch.testing.assert_close(policy.hidden, expected, rtol=0, atol=0)


def test_a_graph_from_before_the_step_is_left_alone() -> None:
    """A function may return the very tensor that it was given."""
    problem = gaussian()
    encoder = nn.Linear(4, 4).double()
    features = encoder(problem.observations)

    def closure() -> tuple[Tensor, Tensor]:
        seen = features.contiguous().detach()
        return problem.values(problem.policy(seen - seen + problem.observations))

    assert problem.optimizer().step(closure).accepted
    features.sum().backward()
    assert encoder.weight.grad is not None


@pytest.mark.parametrize("third", [False, True])
def test_a_graph_of_somebody_elses_parameters_is_left_alone(third: bool) -> None:
    """Features of another optimizer's encoder, made when the closure first needs them."""
    problem = gaussian()
    encoder = nn.Linear(4, 4).double()
    cache: list[Tensor] = []

    def closure() -> Any:
        if not cache:
            cache.append(encoder(problem.observations))
        dist = problem.policy(problem.observations + 0 * cache[0].detach())
        values = problem.values(dist)
        return (*values, dist) if third else values

    assert problem.optimizer().step(closure).accepted
    cache[0].sum().backward()
    assert encoder.weight.grad is not None


def test_what_cannot_be_made_plain_costs_nothing_else() -> None:
    problem = gaussian()
    give_gradients(problem.policy)
    before = Snapshot.of(problem.policy)
    kept: list[Any] = []

    def closure() -> tuple[Tensor, Tensor]:
        loss, kl = problem.closure()
        if torch.is_grad_enabled():
            held = 2 * loss
            kept.append((held, torch._C._WeakTensorRef(held)))  # type: ignore[attr-defined]  # private
        return loss, kl

    assert problem.optimizer(lr=0.0).step(closure).outcome is Outcome.ZERO_LEARNING_RATE
    assert kept
    assert before.differences(Snapshot.of(problem.policy)) == []
