"""What the testing kit says of the broken policies and closures."""

from __future__ import annotations

import torch
from broken_policies import BROKEN_POLICIES

from trpo_optim.testing import (
    PolicyReport,
    check_policy,
)


def policy_report(name: str, *, skip: set[str] | None = None) -> PolicyReport:
    broken = BROKEN_POLICIES[name]
    torch.manual_seed(0)
    policy = broken.make()
    return check_policy(policy, broken.observations(), skip=skip or set(), **broken.options)
