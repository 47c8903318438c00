"""Policies over tokens: log-probabilities, advantages, losses and closures."""

from trpo_optim.tokens.advantages import group_advantages
from trpo_optim.tokens.chunks import chunked_log_prob
from trpo_optim.tokens.estimates import reference_kl, token_surrogate
from trpo_optim.tokens.log_prob import token_log_prob
from trpo_optim.tokens.token_closures import token_closures

__all__ = [
    "chunked_log_prob",
    "group_advantages",
    "reference_kl",
    "token_closures",
    "token_log_prob",
    "token_surrogate",
]
