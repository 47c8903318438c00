"""The paper's theory, exact on tabular Markov decision processes, in double precision."""

from trpo_optim.theory.algorithms import (
    conservative_step,
    constrained_step,
    monotonic_step,
    penalised_step,
    policy_iteration_step,
)
from trpo_optim.theory.bounds import (
    conservative_lower_bound,
    improvement_bound,
    kl_by_state,
    lower_bound,
    max_kl_divergence,
    max_total_variation,
    mean_kl_divergence,
    penalty_coefficient,
    state_distribution_bound,
)
from trpo_optim.theory.tabular_mdp import TabularMDP, random_mdp

__all__ = [
    "TabularMDP",
    "conservative_lower_bound",
    "conservative_step",
    "constrained_step",
    "improvement_bound",
    "kl_by_state",
    "lower_bound",
    "max_kl_divergence",
    "max_total_variation",
    "mean_kl_divergence",
    "monotonic_step",
    "penalised_step",
    "penalty_coefficient",
    "policy_iteration_step",
    "random_mdp",
    "state_distribution_bound",
]
