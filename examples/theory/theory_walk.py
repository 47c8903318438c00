"""The paper's derivation in numbers: every statement with both its sides, each of them checked.

    python examples/theory/theory_walk.py

Equation numbers are those of Schulman et al. (2015), arXiv 1502.05477v5. One random process with
four states and three actions; π is the old policy and π̃ the new one; nothing is sampled but for
(16).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import tyro
from monotonic import RADIUS, exact_closure
from torch import Tensor, nn

import trpo_optim.theory as exact
from trpo_optim import StepReport, TrustRegionOptimizer
from trpo_optim.rollouts import surrogate


def section(title: str) -> None:
    """Print a headline."""
    print(f"\n{title}")


def claim(equation: str, words: str, left: float, relation: str, right: float) -> None:
    """Print a statement and its two sides, and stop if it does not hold, but for rounding."""
    print(f"{equation:>5}  {words:<56} {left:>12.8f} {relation} {right:.8f}")
    near = math.isclose(left, right, rel_tol=1e-8, abs_tol=1e-8)
    holds = {"=": near, "≤": near or left <= right, "≥": near or left >= right}
    if not holds[relation]:
        raise ArithmeticError(f"{words}: {left!r} {relation} {right!r} does not hold.")


def local_approximation(mdp: exact.TabularMDP, logits: Tensor, new: Tensor) -> None:
    """Equations 1 to 4: the return by another policy's advantages, and L."""
    section("The return of π̃ by the advantages of π")
    old = logits.softmax(1)
    gained = (new * mdp.advantages(old)).sum(1)
    horizon = math.ceil(math.log(1e-12) / math.log(mdp.gamma))
    on_the_way = sum(
        mdp.gamma**time * float(mdp.state_distribution(new, time) @ gained)
        for time in range(horizon)
    )
    value, start = mdp.expected_return(new), mdp.expected_return(old)
    claim("(1)", "η(π̃) = η(π) + E[Σ γᵗ A(sₜ, aₜ)], step by step", value, "=", start + on_the_way)
    claim("(2)", "η(π̃) = η(π) + Σ ρ_π̃ Σ π̃ A", value, "=", mdp.return_by_advantages(old, new))
    claim("(3)", "L(π) = η(π)", mdp.surrogate(old, old), "=", start)
    of_return = slopes(lambda to: mdp.expected_return(to.softmax(1)), logits)
    of_surrogate = slopes(lambda to: mdp.surrogate(old, to.softmax(1)), logits)
    claim("(4)", "‖∇η − ∇L‖ at π", float((of_return - of_surrogate).norm()), "=", 0)
    claim("", "where ‖∇η‖ is", float(of_return.norm()), "≥", 1e-3)


def slopes(function: Callable[[Tensor], float], at: Tensor, width: float = 1e-4) -> Tensor:
    """Return a function's central differences by every entry of a table, in a row."""
    units = width * torch.eye(at.numel(), dtype=at.dtype).view(-1, *at.shape)
    ends = [(function(at - unit), function(at + unit)) for unit in units]
    return torch.tensor([(after - before) / (2 * width) for before, after in ends])


def lower_bounds(mdp: exact.TabularMDP, old: Tensor, new: Tensor) -> None:
    """Equations 5 to 9: how far the return can fall behind L."""
    section("What the return does not fall below")
    greedy, mixed = exact.policy_iteration_step(mdp, old), exact.conservative_step(mdp, old)
    share = exact.max_total_variation(old, mixed) / exact.max_total_variation(old, greedy)
    value, start = mdp.expected_return(mixed), mdp.expected_return(old)
    bound = exact.conservative_lower_bound(mdp, old, greedy, share)
    claim("(5)", "η((1 − α) π + α π') ≥ η(π), with the bound's best α", value, "≥", start)
    claim("(6)", "and ≥ L − 2εγα²/(1 − γ)²", value, "≥", bound)
    apart, kl = exact.max_total_variation(old, new), exact.max_kl_divergence(old, new)
    claim("(7)", "D_TV² ≤ D_KL, both the largest of a state", apart**2, "≤", kl)
    value, loss = mdp.expected_return(new), coefficient(mdp, old) * apart**2
    claim("(8)", "η(π̃) ≥ L(π̃) − C D_TV²", value, "≥", mdp.surrogate(old, new) - loss)
    claim("(9)", "η(π̃) ≥ L(π̃) − C D_KL", value, "≥", exact.lower_bound(mdp, old, new))
    for time in (1, 3):
        parted = mdp.state_distribution(old, time) - mdp.state_distribution(new, time)
        most = exact.state_distribution_bound(time, kl)
        claim("", f"Σ |P(sₜ) − P̃(sₜ)| ≤ t √(2 D_KL), t = {time}", float(parted.norm(1)), "≤", most)


def coefficient(mdp: exact.TabularMDP, old: Tensor) -> float:
    """Return the paper's C at a policy."""
    return exact.penalty_coefficient(float(mdp.advantages(old).abs().max()), mdp.gamma)


def algorithm_1(mdp: exact.TabularMDP, policy: Tensor) -> None:
    """Equation 10: maximising the bound cannot lower the return."""
    section("Algorithm 1 maximises M(π̃) = L(π̃) − C D_KL")
    for iteration in (1, 2, 3):
        new = exact.monotonic_step(mdp, policy)
        before, after = mdp.expected_return(policy), mdp.expected_return(new)
        bound = exact.lower_bound(mdp, policy, new)
        claim("(10)", f"iteration {iteration}: η(π̃) ≥ M(π̃)", after, "≥", bound)
        claim("", "M(π̃) ≥ M(π) = η(π)", bound, "≥", before)
        policy = new


def radius_for_penalty(mdp: exact.TabularMDP, old: Tensor) -> None:
    """Equation 11: a constraint that stands for a smaller penalty."""
    section("A radius in place of the penalty")
    new = exact.constrained_step(mdp, old, RADIUS)
    largest = exact.max_kl_divergence(old, new)
    claim("(11)", "the best step with D_KL ≤ δ has D_KL", largest, "≤", RADIUS)

    def best(radius: Tensor) -> float:
        return mdp.surrogate(old, exact.constrained_step(mdp, old, float(radius)))

    price = float(slopes(best, torch.tensor([RADIUS], dtype=torch.float64), 1e-6))
    penalised = exact.penalised_step(mdp, old, price)
    found = mdp.surrogate(old, penalised) - price * exact.max_kl_divergence(old, penalised)
    worth = mdp.surrogate(old, new) - price * RADIUS
    claim("", "it is the best step at the penalty dL/dδ, too", found, "=", worth)
    claim("", "C beside that penalty", coefficient(mdp, old), "≥", price)
    wide, greedy = exact.constrained_step(mdp, old, 30.0), exact.policy_iteration_step(mdp, old)
    claim("", "without a radius: policy iteration", float((wide - greedy).norm()), "=", 0)


def samples(mdp: exact.TabularMDP, old: Tensor, new: Tensor, draws: int = 1_000_000) -> None:
    """Equations 13 to 16: L as an expectation over actions that some q drew."""
    section("L by samples")
    visits, q_values = mdp.visitation(old), mdp.action_values(old)
    gain = mdp.surrogate(old, new) - mdp.expected_return(old)
    by_q = float(visits @ ((new - old) * q_values).sum(1))
    claim("(13)", "Q in place of A moves L by a constant", by_q, "=", gain)
    uniform = torch.full_like(old, 1 / old.shape[1])
    wanted = float(visits @ (new * q_values).sum(1))
    for words, q in (("q = π", old), ("q uniform", uniform)):
        # Every state and action once, weighted as often as ρ and q come upon it.
        shares = old.numel() * visits[:, None] * q
        loss = surrogate(new.log(), q.log(), q_values, weights=shares)
        claim(
            "(14)", f"E over s of ρ, a of q [π̃/q Q] = Σ ρ Σ π̃ Q, {words}", -float(loss), "=", wanted
        )
    here, before = float(new[0] @ q_values[0]), float(old[0] @ q_values[0])
    by_advantages = float(new[0] @ mdp.advantages(old)[0])
    claim("(15)", "in one state: Σ π̃ Q − Σ π Q = Σ π̃ A", here - before, "=", by_advantages)
    generator = torch.Generator().manual_seed(0)
    drawn = old[0].multinomial(draws, replacement=True, generator=generator)
    ratio, values = (new / old)[0, drawn], q_values[0, drawn]
    found = float((ratio * values).sum() / ratio.sum())
    error = float((ratio * (values - found)).std()) / math.sqrt(draws)
    claim("(16)", "there: |Σ r Q / Σ r − Σ π̃ Q| ≤ 4 errors", abs(found - here), "≤", 4 * error)
    moved = float((ratio * (values + 5)).sum() / ratio.sum()) - 5
    claim("", "which a baseline does not change", moved, "=", found)


def practice(mdp: exact.TabularMDP, logits: Tensor) -> None:
    """Equations 12, 17 and 18: the optimizer's modes on the same problem."""
    section("The optimizer on a softmax table")
    old = logits.softmax(1)
    moved, report = step(mdp, logits, max_kl=RADIUS)
    new = moved.softmax(1)
    claim("(12)", "TRPO: mean KL ≤ δ", exact.mean_kl_divergence(mdp, old, new), "≤", RADIUS)
    largest = exact.max_kl_divergence(old, new)
    claim("", "the largest of a state, which nothing holds", largest, "≥", RADIUS)
    rise = mdp.expected_return(new) - mdp.expected_return(old)
    largest = float(mdp.advantages(old).abs().max())
    bound = exact.improvement_bound(report, advantage=largest, gamma=mdp.gamma)
    claim("", "what η rose by, and improvement − C · KL of this step", rise, "≥", bound)
    visits = (1 - mdp.gamma) * mdp.visitation(old)
    gradient = (visits[:, None] * old * mdp.advantages(old)).reshape(-1)
    fisher = torch.block_diag(
        *(share * (row.diag() - row.outer(row)) for share, row in zip(visits, old, strict=True))
    )
    direction = torch.linalg.pinv(fisher) @ gradient
    wanted = math.sqrt(2 * RADIUS / float(direction @ fisher @ direction)) * direction
    exactly = {"max_kl": RADIUS, "damping": 0.0, "cg_tolerance": 1e-12, "cg_iterations": 50}
    moved, _ = step(mdp, logits, mode="natural", **exactly)
    off = float(((moved - logits).reshape(-1) - wanted).norm())
    claim("(17)", "natural PG: ‖step − √(2δ / gᵀF⁻¹g) F⁻¹g‖", off, "=", 0)
    length = math.sqrt(2 * RADIUS)
    moved, _ = step(mdp, logits, mode="vanilla", max_norm=length)
    off = float(((moved - logits).reshape(-1) - length * gradient / gradient.norm()).norm())
    claim("(18)", "vanilla PG: ‖step − √(2δ) g / ‖g‖‖", off, "=", 0)


def step(mdp: exact.TabularMDP, logits: Tensor, **settings: Any) -> tuple[Tensor, StepReport]:
    """Return the table after one step of the optimizer, and its report."""
    table = nn.Parameter(logits.clone())
    report = TrustRegionOptimizer([table], **settings).step(exact_closure(mdp, table))
    return table.detach(), report


def main(seed: int = 1) -> None:
    """Walk through the derivation.

    Args:
        seed: Of the process and of both policies.
    """
    mdp = exact.random_mdp(4, 3, 0.9, seed)
    generator = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    old, new = logits.softmax(1), (logits + 0.3 * other).softmax(1)
    local_approximation(mdp, logits, new)
    lower_bounds(mdp, old, new)
    algorithm_1(mdp, old)
    radius_for_penalty(mdp, old)
    samples(mdp, old, new)
    practice(mdp, logits)


if __name__ == "__main__":
    tyro.cli(main)
