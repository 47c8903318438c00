"""The public names of trpo_optim."""

from trpo_optim.closure.closures import Closures
from trpo_optim.closure.evaluation import Closure
from trpo_optim.distributions import (
    entropy,
    frozen,
    joint_kl,
    log_prob,
    mean_kl,
    sample,
    sampled_kl,
)
from trpo_optim.errors import RankError, TrustRegionError
from trpo_optim.optimizer import TrustRegionOptimizer
from trpo_optim.report import Outcome, StepReport

__version__ = "0.1.0"

__all__ = [
    "Closure",
    "Closures",
    "Outcome",
    "RankError",
    "StepReport",
    "TrustRegionError",
    "TrustRegionOptimizer",
    "entropy",
    "frozen",
    "joint_kl",
    "log_prob",
    "mean_kl",
    "sample",
    "sampled_kl",
]
