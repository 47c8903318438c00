"""Collect data: trajectories and vines of Gymnasium's environments. Needs the extra gym."""

# Imported first, since it raises the error that names the extra if Gymnasium is missing.
from trpo_optim.snapshots import (
    Replayed,
    Simulator,
    Snapshot,
    capture,
    register_simulator,
    restorable,
    restore,
)

# isort: split
from trpo_optim.errors import RolloutError
from trpo_optim.rollouts.policy_closure import PolicyClosures, policy_closure
from trpo_optim.rollouts.returns import (
    discounted_returns,
    explained_variance,
    gae,
    n_step_returns,
    trajectory_weights,
)
from trpo_optim.rollouts.single_path import single_path
from trpo_optim.rollouts.surrogate import surrogate
from trpo_optim.rollouts.trajectories import Cursor, SinglePathBatch
from trpo_optim.rollouts.value_function import ValueFit, fit_value
from trpo_optim.rollouts.vine import VineBatch, vine
from trpo_optim.rollouts.vine_closure import vine_closure

__all__ = [
    "Cursor",
    "PolicyClosures",
    "Replayed",
    "RolloutError",
    "Simulator",
    "SinglePathBatch",
    "Snapshot",
    "ValueFit",
    "VineBatch",
    "capture",
    "discounted_returns",
    "explained_variance",
    "fit_value",
    "gae",
    "n_step_returns",
    "policy_closure",
    "register_simulator",
    "restorable",
    "restore",
    "single_path",
    "surrogate",
    "trajectory_weights",
    "vine",
    "vine_closure",
]
