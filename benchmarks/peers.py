"""One policy update of other libraries' TRPO, on a scene's policy and batch.

Each peer runs its own shipped update, critic switched off. What a radius and a damping mean differs
from library to library; here both are given for the joint KL and converted.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import sb3_contrib
import torch
from gymnasium import Env, spaces
from scene import DAMPING, ITERATIONS, RADIUS, Scene
from stable_baselines3.common.logger import Logger
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy
from tianshou.algorithm.modelfree.trpo import TRPO
from tianshou.algorithm.optim import TorchOptimizerFactory
from tianshou.data import Batch
from timing import Job, putting_back
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution

Made = tuple[list[nn.Parameter], Callable[[], Any], Callable[[], None]]
"""A copy's parameters in the order of the policy's own; what returns the copy's log-probabilities
of the batch's actions; what runs one policy update by the library's own code."""
Solver = tuple[float, int] | None
"""λ in (F + λI) x = g, F the Hessian of the joint KL, and iterations; None: the library's own."""


def peer(
    library: str, scene: Scene, *, defaults: bool = False, iterations: int = ITERATIONS
) -> tuple[Job, list[nn.Parameter]]:
    """Return a job that takes one step by another library, and the parameters that it moves.

    Args:
        library: One of PEERS.
        scene: The policy (its parameters are those of linear layers with tanh in between, after
            ``log_std`` where actions are continuous) and the batch. No peer standardises the
            advantages again.
        defaults: Whether damping and iterations are the library's defaults. It may mean another
            KL by its damping.
        iterations: Of conjugate gradient, unless they are the library's default.

    Raises:
        ValueError: If the copy is not the same policy.
    """
    with warnings.catch_warnings():  # one library recommends CPUs
        warnings.simplefilter("ignore")
        made = PEERS[library](scene, None if defaults else (DAMPING, iterations))
    parameters, log_prob, update = made
    with torch.no_grad():
        for theirs, ours in zip(parameters, scene.parameters, strict=True):
            theirs.copy_(ours)
        difference = float((log_prob() - scene.old_log_prob).abs().max())
    if not difference < 1e-5:
        raise ValueError(
            f"{library} finds log-probabilities that differ by up to {difference:.2g} from the "
            "scene's; hand over the starting policy, with tanh between its layers."
        )

    def run() -> None:
        with warnings.catch_warnings():  # of backtracking, and of a mean over no critic losses
            warnings.simplefilter("ignore")
            update()

    return Job(run, putting_back(parameters)), parameters


def _sb3(scene: Scene, solver: Solver) -> Made:
    """Set sb3-contrib up, whose KL is KL(new ‖ old), averaged over the action dimensions."""
    layers = [each for each in scene.policy.modules() if isinstance(each, nn.Linear)]
    samples = len(scene.observations)
    env: Env[Any, Any] = Env()  # never stepped
    env.observation_space, env.action_space = _box(scene.observations), _action_space(scene)
    dimensions = math.prod(env.action_space.shape or ())
    algorithm = sb3_contrib.TRPO(
        "MlpPolicy",
        env,
        n_steps=samples,
        batch_size=samples,
        target_kl=RADIUS / dimensions,
        n_critic_updates=0,
        normalize_advantage=False,
        policy_kwargs={
            "net_arch": {"pi": [layer.out_features for layer in layers[:-1]], "vf": []},
            "activation_fn": nn.Tanh,
        },
        device=scene.observations.device,
    )
    if solver:
        damping, algorithm.cg_max_steps = solver
        algorithm.cg_damping = damping / dimensions
    algorithm.set_logger(Logger(folder=None, output_formats=[]))
    buffer = algorithm.rollout_buffer
    buffer.observations[:, 0] = scene.observations.cpu().numpy()
    buffer.actions[:, 0] = scene.actions.reshape(samples, -1).cpu().numpy()
    buffer.advantages[:, 0] = scene.advantages.cpu().numpy()
    buffer.log_probs[:, 0] = scene.old_log_prob.cpu().numpy()
    buffer.pos, buffer.full = samples, True
    copied = algorithm.policy
    return (
        [each for name, each in copied.named_parameters() if not name.startswith("value_net")],
        lambda: copied.evaluate_actions(scene.observations, scene.actions)[1],
        algorithm.train,
    )


def _tianshou(scene: Scene, solver: Solver) -> Made:
    """Set Tianshou up, whose KL is KL(old ‖ new) of the policy's distribution: joint."""
    actor = _Actor(scene.policy)
    algorithm: Any = TRPO(
        policy=ProbabilisticActorPolicy(
            actor=actor,  # type: ignore[arg-type, unused-ignore]
            dist_fn=lambda distribution: distribution,  # type: ignore[arg-type, unused-ignore]
            action_space=_action_space(scene),
            action_scaling=False,
            action_bound_method=None,
        ),
        critic=_Zero().to(scene.observations.device),
        optim=TorchOptimizerFactory(torch.optim.SGD, lr=0.0),
        optim_critic_iters=1,
        max_kl=RADIUS,
    )
    if solver:
        algorithm._damping, iterations = solver
        solve = algorithm._conjugate_gradients  # the update asks it for another number
        algorithm._conjugate_gradients = lambda *given, **_: solve(*given, nsteps=iterations)
    batch: Any = Batch(
        obs=scene.observations,
        act=scene.actions,
        adv=scene.advantages,
        logp_old=scene.old_log_prob,
        returns=torch.zeros_like(scene.advantages),
        info=Batch(),
    )
    return (
        list(actor.parameters()),
        lambda: algorithm.policy(batch).dist.log_prob(scene.actions),
        lambda: algorithm._update_with_batch(batch, batch_size=None, repeat=1),
    )


PEERS: dict[str, Callable[[Scene, Solver], Made]] = {"sb3-contrib": _sb3, "Tianshou": _tianshou}


class _Actor(nn.Module):
    """A copy of the policy, called as Tianshou calls an actor."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__()
        self.policy = copy.deepcopy(policy)

    def forward(self, obs: Tensor, state: Any = None, info: Any = None) -> tuple[Distribution, Any]:  # noqa: ARG002
        return self.policy(obs), state


class _Zero(nn.Module):
    """A critic of one number, which is right already: Tianshou fails without a critic's update."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))

    def forward(self, obs: Tensor) -> Tensor:
        return self.value.expand(len(obs))


def _action_space(scene: Scene) -> spaces.Space[Any]:
    with torch.no_grad():
        distribution = scene.policy(scene.observations[:1])
    if isinstance(distribution, Categorical):
        return spaces.Discrete(distribution.logits.shape[-1])
    return _box(scene.actions)


def _box(rows: Tensor) -> spaces.Box:
    """Return a space of the rows' shape; its limits, which have to be finite, change nothing."""
    return spaces.Box(-1.0, 1.0, shape=tuple(rows.shape[1:]))
