"""States of environments that can be put back; needs the extra gym."""

from trpo_optim.snapshots.replay import Replayed
from trpo_optim.snapshots.simulators import Simulator, register_simulator
from trpo_optim.snapshots.snapshot import Snapshot, capture, restorable, restore

__all__ = [
    "Replayed",
    "Simulator",
    "Snapshot",
    "capture",
    "register_simulator",
    "restorable",
    "restore",
]
