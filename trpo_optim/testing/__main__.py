"""Check a policy from the command line: python -m trpo_optim.testing package.module:make_policy."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.testing.policy import POLICY_CHECKS, check_policy

_SPACES = "a shape (17 or 4x84x84), Discrete(N), or the id of a Gymnasium environment"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table of findings.

    Args:
        arguments: The command line; None: that of the process.

    Returns:
        The exit status: 0 if every check passed, 1 if one failed, 2 if there was nothing to check.
    """
    parser = argparse.ArgumentParser(prog="python -m trpo_optim.testing", description=__doc__)
    parser.add_argument("policy", help="package.module:name of a policy, or of what makes one")
    parser.add_argument("--observation-space", required=True, metavar="SPACE", help=_SPACES)
    parser.add_argument("--rows", type=int, default=256, help="observations (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip", nargs="*", default=[], choices=POLICY_CHECKS, metavar="CHECK")
    parser.add_argument("--method", help="the policy's method, where it is not called itself")
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    try:
        policy = _found(options.policy)
        observations = _observations(options.observation_space, options.rows, options.seed)
        called = getattr(policy, options.method) if options.method else policy
        report = check_policy(called, observations, skip=options.skip, seed=options.seed)
    except (TrustRegionError, ImportError, AttributeError) as error:
        print(error, file=sys.stderr)
        return 2
    print(report)
    return 0 if report.passed else 1


def _found(place: str) -> Any:
    """Import a policy, or call what makes one."""
    module, _, name = place.partition(":")
    if not name:
        raise TrustRegionError(f"{place!r} names no policy. Write package.module:make_policy.")
    sys.path.insert(0, "")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        return found
    try:
        return found()
    except Exception as error:
        raise TrustRegionError(
            f"{place} is no module, and calling it without arguments raises {error!r}. Name a "
            "module, or a function that makes one and takes no arguments."
        ) from error


def _observations(space: str, rows: int, seed: int) -> Any:
    if rows < 2:
        raise TrustRegionError(f"--rows is {rows}; it must be at least 2.")
    if re.fullmatch(r"\d+(x\d+)*", space):
        return torch.randn(rows, *map(int, space.split("x")))
    if match := re.fullmatch(r"Discrete\(([1-9]\d*)\)", space):
        return torch.randint(int(match[1]), (rows,))
    try:
        import gymnasium  # the kit itself needs torch alone
    except ImportError as error:
        raise TrustRegionError(
            f"{space!r} is neither a shape nor Discrete(N), and Gymnasium is not installed to look "
            "for an environment of that name."
        ) from error
    try:
        env = gymnasium.make(space)
    except gymnasium.error.Error as error:
        raise TrustRegionError(f"{space!r} is not known ({error}). Give {_SPACES}.") from error
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    seen: list[Tensor] = []
    while len(seen) < rows:
        seen.append(mapped(lambda each: torch.as_tensor(each).clone(), observation))
        observation, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()
    return mapped(_stacked, *seen)


def _stacked(*rows: Tensor) -> Tensor:
    stacked = torch.stack(rows)
    return stacked.float() if stacked.is_floating_point() else stacked


if __name__ == "__main__":
    sys.exit(main())
