"""Earlier batches on several ranks: what counts, and what one rank refuses."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, values_of
from test_standardisation import batch_of, rows_of
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributions import Independent, Normal

from trpo_optim.rollouts import policy_closure

pytestmark = pytest.mark.ranks

LOG_PROB = -0.5 - 0.5 * math.log(2 * math.pi)
"""Of the action 1 under a normal distribution around 0."""


def of_two_batches(rank: int) -> tuple[list[Tensor], tuple[int, ...]]:
    """Return a rank's standardised advantages by batch; the second batch of rank 0 is far."""
    values, valid = rows_of(rank)
    near = replace(batch_of(valid), log_prob=torch.full(valid.shape, LOG_PROB))
    far = replace(near, log_prob=torch.full(valid.shape, LOG_PROB - 3.0 * (rank == 0)))
    means = nn.Parameter(torch.zeros(valid.numel(), 1, dtype=torch.float64))
    built = policy_closure(
        lambda rows: Independent(Normal(means[rows[:, 0]], 1.0), 1),
        [near, far],
        [values, values + 7.0],
        batch_weights=(2.0, 1.0),
        max_batch_kl=0.1,
        standardise=True,
        process_group=dist.group.WORLD,
    )
    found = []
    for part, weight in zip(built.parts, built.weights or [], strict=True):
        (slopes,) = torch.autograd.grad(part()[0], means)
        found.append(-slopes[valid.reshape(-1), 0] * int(valid.sum()))
        assert float(weight) == (2.0, 1.0)[len(found) - 1] * int(valid.sum())
    return found, built.batches


def test_batches_count_by_their_weights_on_a_rank_that_is_left_with_one_of_them() -> None:
    (first, kept), (second, all_kept) = values_of(on_ranks(2, of_two_batches))
    assert (kept, all_kept) == ((0,), (0, 1))
    own = [values[valid].double().numpy() for values, valid in map(rows_of, range(2))]
    every = np.concatenate([own[0], own[1], own[1] + 7.0])
    weights = np.repeat([2.0, 2.0, 1.0], [len(own[0]), len(own[1]), len(own[1])])
    mean = np.average(every, weights=weights)
    deviation = np.sqrt(np.average((every - mean) ** 2, weights=weights))
    wanted = np.split((every - mean) / deviation, [len(own[0]), len(own[0]) + len(own[1])])
    for found, each in zip([*first, *second], wanted, strict=True):
        np.testing.assert_allclose(found.numpy(), each, rtol=1e-7, atol=1e-9)


def sharded(rank: int, mistake: str) -> tuple[str, str, bool]:
    """Return what is raised where a policy in FSDP is asked how far an earlier batch is."""
    values, valid = rows_of(rank)
    batch = replace(batch_of(valid), log_prob=torch.full(valid.shape, -1.0))
    core = nn.Linear(1, 1)
    fully_shard(core, mesh=init_device_mesh("cpu", (2,)))
    good = values.masked_fill(~valid, 0.0)
    bad = good.masked_fill(valid, math.nan) if (rank, mistake) == (1, "NaN") else good
    with pytest.raises(Exception) as caught:  # noqa: PT011 (its kind is looked at by the test)
        policy_closure(
            lambda rows: Independent(Normal(core(rows.float()), 1.0), 1),
            [batch, batch],
            [bad, good],
            max_batch_kl=0.5,
            curvature=2.0 if (rank, mistake) == (1, "share") else None,
            standardise=True,
            process_group=dist.group.WORLD,
        )
    lost = bool(getattr(caught.value, "lost", False))
    return type(caught.value).__name__, str(caught.value), lost


@pytest.mark.parametrize(
    ("mistake", "words"), [("NaN", r"advantages\[0\] is nan"), ("share", "curvature is 2.0")]
)
def test_what_one_rank_refuses_keeps_no_other_in_a_sharded_policy(mistake: str, words: str) -> None:
    (kind, text, lost), (own, own_text, _) = values_of(on_ranks(2, sharded, mistake, timeout=20.0))
    assert (kind, own, lost) == ("RankError", "TrustRegionError", False)
    assert re.search(f"rank 1 raised .*{words}", text)
    assert re.search(words, own_text)
