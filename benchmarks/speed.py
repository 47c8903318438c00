"""What a step costs, in units of one gradient of the loss.

    python benchmarks/speed.py

Every figure is the median of interleaved runs in one process, so that a machine whose speed drifts
does not tilt the ratios.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal, kl_divergence

from trpo_optim import TrustRegionOptimizer
from trpo_optim.closure import Objective
from trpo_optim.curvature import second_order
from trpo_optim.parameter_vector import ParameterVector
from trpo_optim.transaction import Transaction


class Policy(nn.Module):
    """A Gaussian MLP of the size of HalfCheetah's: 17 observations, 6 actions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Linear(17, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh()
        )
        self.mean = nn.Linear(hidden, 6)
        self.log_std = nn.Parameter(torch.zeros(6))

    def forward(self, observation: Tensor) -> Distribution:
        """Return the distribution over actions."""
        return Independent(Normal(self.mean(self.network(observation)), self.log_std.exp()), 1)


def seconds(jobs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Return each job's median time, the jobs taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for repeat, (name, job) in product(range(repeats + 1), jobs.items()):
        start = time.perf_counter()
        job()
        if device != "cpu":
            torch.get_device_module(device).synchronize()
        if repeat:  # the first round warms up
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each) for name, each in times.items()}


def measure(hidden: int, samples: int, repeats: int, device: str) -> dict[str, float]:
    """Return the median times of a gradient, a product and an update of ten products."""
    torch.manual_seed(0)
    policy = Policy(hidden).to(device)
    observations = torch.randn(samples, 17, device=device)
    advantages = torch.randn(samples, device=device)
    with torch.no_grad():
        old = policy(observations)
        actions = old.sample()
        old_log_prob = old.log_prob(actions)

    def closure() -> tuple[Tensor, Tensor]:
        dist = policy(observations)
        ratio = (dist.log_prob(actions) - old_log_prob).exp()
        return -(ratio * advantages).mean(), kl_divergence(old, dist).mean()

    parameters = list(policy.parameters())
    start = [parameter.detach().clone() for parameter in parameters]
    optimizer = TrustRegionOptimizer(parameters, cg_iterations=10, cg_tolerance=0.0)

    def gradient() -> object:
        return torch.autograd.grad(closure()[0], parameters)

    def update() -> None:
        torch._foreach_copy_([parameter.detach() for parameter in parameters], start)
        optimizer.step(closure)

    vector = ParameterVector(parameters)
    with Transaction(vector) as transaction:
        model = second_order(Objective(closure, vector, transaction))
        times = seconds(
            {"gradient": gradient, "product": lambda: model.product(model.gradient)},
            repeats,
            device,
        )
    # A step writes the parameters, which ends the model's graph: hence a second round.
    again = seconds({"gradient": gradient, "update": update}, repeats, device)
    times["update"] = again["update"] * times["gradient"] / again["gradient"]
    return times


def main(repeats: int = 15, threads: int = 2, device: str = "cpu") -> None:
    """Print the table.

    Args:
        repeats: Timed runs of each job.
        threads: CPU threads of torch.
        device: Where to run: cpu, cuda, ...
    """
    torch.set_num_threads(threads)
    print("| network | samples | gradient (ms) | product (gradients) | update (gradients) |")
    print("| --- | --- | --- | --- | --- |")
    for hidden, samples in product((64, 256), (256, 2048, 20480)):
        times = measure(hidden, samples, repeats, device)
        unit = times["gradient"]
        print(
            f"| 17-{hidden}-{hidden}-6 | {samples} | {1000 * unit:.2f} | "
            f"{times['product'] / unit:.2f} | {times['update'] / unit:.1f} |"
        )


if __name__ == "__main__":
    tyro.cli(main)
