"""What an environment's constructor makes and no step changes."""

from __future__ import annotations

import functools
import io
import logging
import operator
import re
import threading
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

__all__ = ["MADE_ONCE", "made_once"]

MADE_ONCE = (
    gym.Env,
    VectorEnv,
    gym.Space,
    torch.nn.Module,
    torch.optim.Optimizer,
    logging.Logger,
    EnvSpec,
    ModuleType,
    FunctionType,
    BuiltinFunctionType,
    MethodType,
    functools.partial,
    type,
    type(threading.Lock()),
    type(threading.RLock()),
    np.ufunc,
    functools._lru_cache_wrapper,
    *(operator.itemgetter, operator.attrgetter, operator.methodcaller),
    re.Pattern,
    logging.Handler,
    io.IOBase,
)
"""The types of such objects."""


def made_once(value: object) -> bool:
    """Return whether a value is of what is made once, or a list of nothing else."""
    if not (isinstance(value, list | tuple) and value):
        return isinstance(value, MADE_ONCE)
    return all(isinstance(each, MADE_ONCE) for each in value)
