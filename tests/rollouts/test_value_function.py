"""The fit of the value function, by Adam and by L-BFGS."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import pytest
import torch
from torch import Tensor, nn

from trpo_optim import TrustRegionError
from trpo_optim.rollouts import fit_value, single_path


def problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 1))
    observations = torch.randn(512, 3)
    targets = observations[:, 0] * observations[:, 1] + observations[:, 2].sin()
    return critic, observations, targets


def adam(critic: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(critic.parameters(), lr=1e-2)


def test_adam_and_lbfgs_fit_and_say_how_well() -> None:
    lbfgs = lambda critic: torch.optim.LBFGS(critic.parameters(), max_iter=50)  # noqa: E731
    for make, options in ((adam, {"epochs": 40, "minibatch": 64}), (lbfgs, {"epochs": 2})):
        critic, observations, targets = problem()
        fit = fit_value(critic, observations, targets, make(critic), **options)
        assert fit.explained_variance_before < 0.3
        assert fit.explained_variance > 0.95
        with torch.no_grad():
            left = critic(observations).squeeze(-1) - targets
        assert fit.loss == pytest.approx(float(left.square().mean()), rel=1e-5)
        share = 1 - float(left.var(correction=0) / targets.var(correction=0))
        assert fit.explained_variance == pytest.approx(share, abs=1e-5)


def test_a_linear_value_function_is_the_least_squares_solution() -> None:
    torch.manual_seed(0)
    observations, targets = torch.randn(200, 4).double(), torch.randn(200).double()
    critic = nn.Linear(4, 1, bias=False).double()
    optimizer = torch.optim.LBFGS(
        critic.parameters(), max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16
    )
    fit_value(critic, observations, targets, optimizer, epochs=3)
    exact = torch.linalg.lstsq(observations, targets[:, None]).solution
    torch.testing.assert_close(critic.weight.detach().T, exact, rtol=1e-5, atol=1e-6)


def test_every_epoch_sees_every_row_once() -> None:
    critic, observations, targets = problem()
    seen: list[Tensor] = []

    def watched(rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(rows)
        value: Tensor = critic(rows)
        return value

    fit_value(watched, observations, targets, adam(critic), epochs=2, minibatch=100)
    assert [len(each) for each in seen] == [100] * 5 + [12] + [100] * 5 + [12]
    for epoch in (seen[:6], seen[6:]):
        rows = torch.cat(epoch)
        assert torch.equal(rows[:, 0].sort().values, observations[:, 0].sort().values)
    assert not torch.equal(torch.cat(seen[:6]), torch.cat(seen[6:]))


def test_observations_may_be_nested() -> None:
    critic, observations, targets = problem()
    nested = {"first": observations[:, :1], "rest": (observations[:, 1:],)}

    def joined(rows: Any) -> Tensor:
        value: Tensor = critic(torch.cat([rows["first"], *rows["rest"]], 1))
        return value

    fit = fit_value(joined, nested, targets, adam(critic), epochs=20, minibatch=64)
    assert fit.explained_variance > 0.8


def fitting(observations: Tensor, targets: Tensor, **options: int) -> Callable[[], object]:
    critic = problem()[0]
    return lambda: fit_value(critic, observations, targets, adam(critic), **options)


ROWS, TARGETS = problem()[1:]
REFUSED = {
    "lengths": (fitting(ROWS[:5], TARGETS), "5 observations and 512 targets"),
    "a column": (fitting(ROWS, TARGETS[:, None]), r"targets has shape \(512, 1\)"),
    "no rows": (fitting(ROWS[:0], TARGETS[:0]), r"targets has shape \(0,\)"),
    "NaN": (fitting(ROWS, TARGETS * math.nan), "targets holds NaN"),
    "a graph": (fitting(ROWS, TARGETS.clone().requires_grad_()), "targets requires grad.*no_grad"),
    "another critic's optimizer": (
        lambda: fit_value(problem()[0], ROWS, TARGETS, adam(problem()[0])),
        "do not depend on any parameter of the optimizer",
    ),
    "a critic without gradients": (
        lambda: fit_value(
            lambda seen: problem()[0](seen).detach(), ROWS, TARGETS, adam(problem()[0])
        ),
        "do not depend on any parameter.*require gradients",
    ),
    "an array": (fitting(ROWS, TARGETS.numpy()), "targets is a ndarray; it must be a tensor"),  # type: ignore[arg-type]  # the mistake
    "no epochs": (fitting(ROWS, TARGETS, epochs=0), "epochs is 0"),
    "an empty minibatch": (fitting(ROWS, TARGETS, minibatch=0), "minibatch is 0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused_by_name(name: str) -> None:
    call, message = REFUSED[name]
    with pytest.raises(TrustRegionError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float64])
@pytest.mark.parametrize("minibatch", [None, 64])
def test_targets_of_any_type_are_numbers(dtype: torch.dtype, minibatch: int | None) -> None:
    critic, observations, targets = problem()
    ones = (targets > 0).to(dtype)
    fit = fit_value(critic, observations, ones, adam(critic), epochs=50, minibatch=minibatch)
    assert fit.explained_variance > 0.5


WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "several values": lambda seen: seen,
    "a row": lambda seen: seen[None, :, 0],
    "one value for all": lambda seen: seen.mean(),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_critic_of_another_shape_is_named(name: str) -> None:
    _, observations, targets = problem()
    weight = nn.Parameter(torch.ones(()))

    def critic(seen: Tensor) -> Tensor:
        return weight * WRONG[name](seen)

    optimizer = torch.optim.Adam([weight])
    with pytest.raises(TrustRegionError, match=r"values of shape .* for 512 observations; it must"):
        fit_value(critic, observations, targets, optimizer)
    envs = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    batch = single_path(envs, lambda seen: (seen[:, 2] > 0).long(), steps=4, seed=0)
    with pytest.raises(TrustRegionError, match=r"values of shape .* for 8 observations; it must"):
        batch.values(critic)
