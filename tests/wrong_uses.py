"""Ten mistakes that a type checker finds; ``test_types.py`` says what each error names."""

import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from trpo_optim import Outcome, TrustRegionOptimizer, mean_kl

policy = nn.Linear(4, 2)
observations = torch.randn(8, 4)
old = Categorical(logits=torch.zeros(8, 2))


def pair() -> tuple[Tensor, Tensor]:
    new = Categorical(logits=policy(observations))
    return -new.log_prob(old.sample()).mean(), mean_kl(old, new)


def one_value() -> Tensor:
    return pair()[0]


def floats() -> tuple[float, float]:
    loss, kl = pair()
    return loss.item(), kl.item()


def name_for_third() -> tuple[Tensor, Tensor, str]:
    return *pair(), "categorical"


optimizer = TrustRegionOptimizer(policy.parameters())
TrustRegionOptimizer(policy.parameters(), mode="trpoo")
TrustRegionOptimizer(policy.parameters(), constraint="largest")
TrustRegionOptimizer(policy.parameters(), max_kl="0.01")
TrustRegionOptimizer(policy.parameters(), cg_iterations=2.5)
optimizer.step(one_value)
optimizer.step(floats)
optimizer.step(name_for_third)
optimizer.step(pair())
report = optimizer.step(pair)
print(report.outcome is Outcome.ACCEPTD)
print(report.engine == "gauss newton")
