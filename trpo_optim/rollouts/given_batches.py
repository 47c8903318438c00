"""The batches of one step, what is given for each of them, and which of them count."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trpo_optim.distributions.arguments import require_tensor
from trpo_optim.distributions.nesting import mapped
from trpo_optim.errors import TrustRegionError
from trpo_optim.rollouts.trajectories import WITHOUT_LOG_PROB, SinglePathBatch

__all__ = ["Given", "given_for", "require_alike", "require_numbers", "within"]


@dataclass(frozen=True)
class Given:
    """A batch, and what is given for its rows.

    Attributes:
        batch: The batch.
        advantages: Shape (T, N).
        weights: Importance weights of the states, (T, N), or None.
        sampling_log_prob: ln q(a|s) of what drew the actions, (T, N). None: the old policy did.
        weight: How much a row counts.
        index: The place of the batch in the list of batches, or None if there is no list.
    """

    batch: SinglePathBatch
    advantages: Tensor
    weights: Tensor | None
    sampling_log_prob: Tensor | None
    weight: float = 1.0
    index: int | None = None

    def named(self, name: str) -> str:
        """Return the name of an argument with the place in its list."""
        return name if self.index is None else f"{name}[{self.index}]"


def given_for(
    batch: SinglePathBatch | Sequence[SinglePathBatch],
    advantages: Tensor | Sequence[Tensor],
    *,
    weights: Tensor | Sequence[Tensor | None] | None,
    sampling_log_prob: Tensor | None,
    batch_weights: Sequence[float] | None,
    max_batch_kl: float | None,
) -> list[Given]:
    """Return the arguments of ``policy_closure`` batch by batch.

    Args:
        batch: One or several.
        advantages: As many.
        weights: As many, or None.
        sampling_log_prob: Of a single batch.
        batch_weights: As many numbers.
        max_batch_kl: A limit in nats.

    Raises:
        TrustRegionError: If they do not go together.
    """
    if isinstance(batch, SinglePathBatch):
        if batch_weights is not None or max_batch_kl is not None:
            raise TrustRegionError(
                "batch_weights and max_batch_kl are for a list of batches, and policy_closure() "
                "got one batch. Pass a list, or leave them out."
            )
        for name, value in {"advantages": advantages, "weights": weights}.items():
            if not isinstance(value, Tensor | None):
                raise TrustRegionError(
                    f"{name} is a {type(value).__name__}, and policy_closure() got one batch. Pass "
                    "one tensor, or a list of batches."
                )
        return [Given(batch, advantages, weights, sampling_log_prob)]  # type: ignore[arg-type]  # as checked
    batches: Any = batch
    if not (
        isinstance(batches, Sequence)
        and batches
        and all(isinstance(each, SinglePathBatch) for each in batches)
    ):
        kind = "an empty list" if batches == [] else f"a {type(batches).__name__}"
        raise TrustRegionError(
            f"policy_closure() got {kind}; it takes what single_path() returned, or a list of "
            "these. For a vine there is vine_closure()."
        )
    if sampling_log_prob is not None:
        raise TrustRegionError(
            "sampling_log_prob is for one batch. Each batch of a list has its own log_prob; pass "
            "dataclasses.replace(batch, log_prob=...) to change it."
        )
    if max_batch_kl is not None and not max_batch_kl > 0:
        raise TrustRegionError(
            f"max_batch_kl is {max_batch_kl!r}; it must be above 0, in nats, or None."
        )
    count = len(batches)
    every = _as_many("advantages", advantages, count)
    state_weights = [None] * count if weights is None else _as_many("weights", weights, count)
    shares: Any = [1.0] * count if batch_weights is None else batch_weights
    if hasattr(shares, "tolist"):  # an array
        shares = shares.tolist()
    for share in _as_many("batch_weights", shares, count):
        if not (math.isfinite(share) and share > 0):
            raise TrustRegionError(
                f"batch_weights holds {share!r}; each must be a finite number above 0. Leave out "
                "a batch that is not to count."
            )
    return [
        Given(batches[i], every[i], state_weights[i], batches[i].log_prob, float(shares[i]), i)
        for i in range(count)
    ]


def within(
    policy: Callable[..., Any], given: list[Given], max_batch_kl: float | None
) -> list[Given]:
    """Return the batches of policies near the present one. The first one always counts.

    Args:
        policy: The present policy.
        given: The batches, checked.
        max_batch_kl: The most KL(behaviour ‖ present), estimated on the batch's own actions by the
            mean of ρ − 1 − ln ρ. None: no limit.
    """
    if max_batch_kl is None:
        return given
    kept = given[:1]
    for each in given[1:]:
        logs = each.batch.log_ratios(policy)[each.batch.valid].double()
        if bool((logs.expm1() - logs).mean() <= max_batch_kl):
            kept.append(each)
    return kept


def require_alike(given: list[Given]) -> None:
    """Check that a list of batches comes from one kind of environments and policy.

    Args:
        given: The batches.

    Raises:
        TrustRegionError: If a batch has no log-probabilities, or another form than the first one.
    """
    for each in given:
        if each.index is not None and each.batch.log_prob is None:
            raise TrustRegionError(
                f"{each.named('batch')} has no log_prob, which the ratios of a list of batches "
                f"need. {WITHOUT_LOG_PROB}"
            )
    first = given[0].batch
    for each in given[1:]:
        for name in ("observations", "actions", "info", "state"):
            ours, theirs = (_form(name, one) for one in (first, each.batch))
            if ours != theirs:
                raise TrustRegionError(
                    f"{name} of batch[0] have the form {ours}, and of {each.named('batch')} the "
                    f"form {theirs}. Pass batches of the same environments and kind of policy."
                )
        if each.batch.rewards.device != first.rewards.device:
            raise TrustRegionError(
                f"batch[0] is on {first.rewards.device} and {each.named('batch')} on "
                f"{each.batch.rewards.device}. Bring all batches to one device."
            )


def require_numbers(given: Given) -> None:
    """Check what is given for every row, by its name.

    Args:
        given: One batch.

    Raises:
        TrustRegionError: If shapes do not fit, no row is valid, or a valid row has no number.
    """
    valid = given.batch.valid
    if not valid.any():
        name = "The batch" if given.index is None else given.named("batch")
        raise TrustRegionError(f"{name} is empty: no row is valid. Collect more steps.")
    logs = "sampling_log_prob" if given.index is None else f"{given.named('batch')}.log_prob"
    _require_rows(given.named("advantages"), given.advantages, valid)
    optional = {given.named("weights"): given.weights, logs: given.sampling_log_prob}
    for name, value in optional.items():
        if value is not None:
            _require_rows(name, value, valid)
    weights = given.weights
    if weights is not None and bool((weights[valid] < 0).any()):
        raise TrustRegionError(
            f"{given.named('weights')} holds {float(weights[valid].min())}; a weight is a ratio of "
            "probabilities, which cannot be negative. See trajectory_weights()."
        )


def _require_rows(name: str, values: Tensor, valid: Tensor) -> None:
    """Check that there is a number for every valid row."""
    require_tensor(name, values)
    if values.is_complex():
        raise TrustRegionError(f"{name} is {values.dtype}; it must hold real numbers.")
    if values.shape != valid.shape:
        raise TrustRegionError(
            f"{name} has shape {tuple(values.shape)} and the batch {tuple(valid.shape)}: T steps "
            "of N environments. Give one number (advantage, Q, weight, …) per row."
        )
    bad = (~values.isfinite() & valid).nonzero()
    if len(bad):
        step, env = bad[0].tolist()
        remedy = "Look at the rewards and at the critic."
        if name.endswith("log_prob"):
            remedy = "Move the action inside the support, and compute its log-probability anew."
        elif name.startswith("weights"):
            remedy = "Pass largest= to trajectory_weights(), which limits the products of ratios."
        raise TrustRegionError(
            f"{name} is {float(values[step, env])} at step {step} of environment {env}; it must be "
            f"a number. {remedy}"
        )


def _as_many(name: str, values: Any, count: int) -> Any:
    """Check that there is one value per batch."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence) or len(values) != count:
        said = f"{len(values)} {name}" if isinstance(values, Sequence) else f"{name} as one value"
        raise TrustRegionError(
            f"policy_closure() got {count} batches and {said}. Pass a list with one for each batch."
        )
    return values


def _form(name: str, batch: SinglePathBatch) -> Any:
    """Return the shapes of an attribute, without the dimensions of time and environments."""
    value = getattr(batch, name)
    if value is None:
        return None
    if name == "state":
        return mapped(lambda each: (len(each), *each.shape[2:]), value)
    return mapped(lambda each: tuple(each.shape[2:]), value)
