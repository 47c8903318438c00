"""Capture and restore the states of environments. Needs the extra gym."""

try:
    from trpo_optim.snapshots.replay import Replayed
    from trpo_optim.snapshots.simulators import Simulator, register_simulator
    from trpo_optim.snapshots.snapshot import Snapshot, capture, restorable, restore
except ModuleNotFoundError as error:
    if error.name != "gymnasium":
        raise
    raise ImportError(
        "trpo_optim.rollouts and trpo_optim.snapshots need Gymnasium, which is not installed. "
        "Run: pip install 'trpo-optim[gym]'",
        name=error.name,
    ) from error

__all__ = [
    "Replayed",
    "Simulator",
    "Snapshot",
    "capture",
    "register_simulator",
    "restorable",
    "restore",
]
