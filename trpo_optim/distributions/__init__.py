"""KL, log-probability, entropy, samples and frozen copies of any policy distribution."""

from trpo_optim.distributions.frozen import frozen
from trpo_optim.distributions.policy import entropy, joint_kl, log_prob, mean_kl, sample
from trpo_optim.distributions.sampled import sampled_kl

__all__ = ["entropy", "frozen", "joint_kl", "log_prob", "mean_kl", "sample", "sampled_kl"]
