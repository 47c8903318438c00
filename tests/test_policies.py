"""Every network with every family: exact products by every engine, steps that keep the contract.

The table in docs/policies.md is what the first test found. ``UPDATE_DOCS=1 pytest
tests/test_policies.py`` writes it anew.
"""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from devices import each_device, random_state, set_random_state
from families import FAMILIES, Family
from networks import INPUTS, NETWORKS, OUTPUTS, SAMPLES, Autocast, Checkpointed, Network, around
from problems import Snapshot
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from trpo_optim import (
    StepReport,
    TrustRegionError,
    TrustRegionOptimizer,
    frozen,
    log_prob,
    mean_kl,
    sample,
    sampled_kl,
)
from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.engine_choice import EngineChoice
from trpo_optim.curvature.local_model import second_order

PAGE = Path(__file__).parent.parent / "docs" / "policies.md"

ENGINES = {"G": "Gauss-Newton", "F": "torch.func", "D": "double backward"}

DRAWS = "it draws random numbers, and `torch.func` may draw another mask than the trials"

NOT_BY_TORCH_FUNC = {
    "LSTM, packed": ("data pointer", "torch's packed sequences read the memory of tensors"),
    "TransformerEncoder, dropout": ("random numbers", DRAWS),
    "batch norm": ("in-place operation", "in training mode it writes its statistics in place"),
    "dropout": ("random numbers", DRAWS),
    "checkpoint, not reentrant": ("saved tensor hooks", "checkpoints use saved-tensor hooks"),
    "autograd.Function": ("setup_context", "the function has no `setup_context`"),
}
"""A part of torch's refusal, and the reason in the page's words."""

IN_SINGLE_PRECISION = {("weight norm", "cuda")}
"""Torch computes these in it, and so the oracle; the wrong second derivatives are off by 0.1."""

LESS_EXACT = {"Laplace": "DF"}
"""Engines that take the Hessian of the KL, where that is not the Fisher matrix."""


pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:nested_from_padded CUDA kernels"
)


class Policy(nn.Module):
    """A network and three free parameters, made into a policy's distributions by a family."""

    def __init__(self, network: Network, family: Family) -> None:
        super().__init__()
        self.network = network
        self.free = nn.Parameter(torch.tensor([-0.3, 0.1, 0.2]).to(next(network.parameters())))
        self.family = family

    def forward(self) -> Any:
        return self.family.make(self.network(), self.free)


class Setting:
    """A policy, what its old self did, and the closure on both."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.trained = [each for each in policy.parameters() if each.requires_grad]
        self.buffers = copy.deepcopy(dict(policy.named_buffers()))
        self.random = random_state()
        device = self.trained[0].device
        self.mask = policy.family.mask(SAMPLES).to(device) if policy.family.mask else None
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # with the dropout mask of a step
            self.old = frozen(policy())
            self.rewind()
            self.actions = sample(self.old)
            self.old_log_prob = log_prob(self.old, self.actions)
            self.advantages = torch.randn_like(self.old_log_prob)
        self.rewind()

    def rewind(self) -> None:
        """Return buffers and random state to where they were before the old policy acted."""
        set_random_state(self.random)
        for name, buffer in self.policy.named_buffers():
            buffer.copy_(self.buffers[name])

    def closure(self, *, third: bool = True) -> Any:
        dist = self.policy()
        new_log_prob = log_prob(dist, self.actions)
        loss = -((new_log_prob - self.old_log_prob).exp() * self.advantages).mean()
        if self.policy.family.sampled:
            kl = sampled_kl(self.old_log_prob, new_log_prob, low_variance=True)
            parameters = new_log_prob
        else:
            kl = mean_kl(self.old, dist, self.mask)
            parameters = dist
        return (loss, kl, parameters) if third else (loss, kl)

    def fisher_vector_product(self, direction: Tensor, vector: ParameterVector) -> Tensor:
        """Return Fv by central differences of the KL's gradient, or by the score's definition."""
        if self.policy.family.sampled:
            scores = [self.slope(row, vector) for row in range(SAMPLES)]
            rows = torch.stack(scores)
            return rows.T @ (rows @ direction) / SAMPLES
        origin = vector.gather([each.detach() for each in self.trained])
        width = 1e-5 / float(direction.norm())
        ends = []
        for shift in (width, -width):
            vector.write(vector.scatter(origin + shift * direction))
            ends.append(self.slope(None, vector))
        vector.write(vector.scatter(origin))
        return (ends[0] - ends[1]) / (2 * width)

    def slope(self, row: int | None, vector: ParameterVector) -> Tensor:
        """Return the gradient of the KL, or of one action's log-probability."""
        self.rewind()
        dist = self.policy()
        if row is not None:
            value = log_prob(dist, self.actions)[row]
        elif isinstance(getattr(dist, "base_dist", None), Laplace):
            value = laplace_surrogate(self.old.base_dist, dist.base_dist)
        else:
            value = mean_kl(self.old, dist, self.mask)
        slopes = torch.autograd.grad(value, self.trained, allow_unused=True)
        self.rewind()
        return vector.gather(slopes)


def laplace_surrogate(old: Any, new: Any) -> Tensor:
    """Return a smooth function with a Laplace's Fisher matrix, 1/b² in location and in scale."""
    moved = (new.loc - old.loc).square() + (new.scale - old.scale).square()
    value: Tensor = (moved / (2 * old.scale.square())).sum(1).mean()
    return value


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, dict[str, str]]]:
    """Collect the engines that are exact on the CPU, by network and family."""
    torch._dynamo.reset()
    yield {}
    torch._dynamo.reset()
    Distribution.set_default_validate_args(True)  # compiling switches it off for the process


def exact_engines(setting: Setting, tolerance: float = 1e-6) -> tuple[str, str]:
    """Return the letters of the engines whose products equal the oracle's, and F's refusal."""
    vector = ParameterVector(setting.trained)
    direction = torch.randn(
        sum(each.numel() for each in setting.trained), generator=torch.Generator().manual_seed(0)
    ).to(vector.device, vector.dtype)
    oracle = setting.fisher_vector_product(direction, vector)
    exact, refusal = "", ""
    for letter, engine in ENGINES.items():
        with Transaction(vector) as transaction:
            transaction.begin()
            closure = functools.partial(setting.closure, third=letter == "G")
            choice = EngineChoice(refusal="another engine is tried" if letter == "D" else "")
            model = second_order(Objective(closure, vector, transaction), choice)
            product = model.product(direction)
        if letter == "F" and choice.refusal:
            refusal = choice.refusal
            assert model.engine == "double backward"
            continue
        assert model.engine == engine, model.fallback
        if torch.allclose(product, oracle, rtol=0, atol=tolerance * float(oracle.norm())):
            exact += letter
    return exact, refusal


@each_device
@pytest.mark.parametrize("network", NETWORKS)
def test_products_are_exact(network: str, device: str, found: dict[str, dict[str, str]]) -> None:
    torch.manual_seed(0)
    body = NETWORKS[network]().to(device, torch.float64)
    tolerance, families = 1e-6, FAMILIES
    if (network, device) in IN_SINGLE_PRECISION:
        tolerance = 5e-3
        families = {name: each for name, each in FAMILIES.items() if name not in LESS_EXACT}
    words, _ = NOT_BY_TORCH_FUNC.get(network, ("", ""))
    exact = {}
    for name, family in families.items():
        exact[name], refusal = exact_engines(Setting(Policy(body, family)), tolerance)
        assert bool(words) == bool(refusal)
        assert words in refusal
    if device == "cpu":
        found[network] = exact
    assert exact == {
        name: "".join(
            letter
            for letter in ENGINES
            if letter not in LESS_EXACT.get(name, "") and not (letter == "F" and words)
        )
        for name in families
    }


def page(found: dict[str, dict[str, str]]) -> str:
    """Return docs/policies.md."""
    heads = ["", *(name.replace(", ", ",<br>") for name in FAMILIES)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += [
        " | ".join([name, *(found[name][family] or "–" for family in FAMILIES)])
        for name in NETWORKS
    ]
    table = "\n".join(f"| {line} |" for line in lines)
    reasons = [("network", "why not `torch.func`"), ("---", "---")]
    reasons += [(name, reason) for name, (_, reason) in NOT_BY_TORCH_FUNC.items()]
    refusals = "\n".join(f"| {name} | {reason} |" for name, reason in reasons)
    return f"""# Policies

Networks down, distributions across. Each letter is an engine whose Fisher-vector products equalled,
to 10⁻⁶ in float64, central differences of the KL's gradient (for the sampled KL, the mean of
∇ln π ∇ln πᵀ; for Laplace, whose KL has a kink, those of a smooth function with the same Fisher
matrix).

- **G**, Gauss–Newton. The closure returns the distribution as its third value (for the sampled KL,
  the new log-probabilities).
- **F**, `torch.func`. The closure returns two values.
- **D**, double backward. It serves two-valued closures that `torch.func` refuses.

`report.engine` says which engine a step used, and `report.fallback` why it was not a faster one.
The optimizer chooses the kernels of attention, recurrence and weight norm. It runs compiled modules
uncompiled, holds the dropout mask and puts buffers back. You need not do any of this. Under
autocast, a step of the MLP equals the step in single precision except for rounding. If torch cannot
differentiate an operation twice, the error says what to use instead (`nn.EmbeddingBag`, reentrant
checkpointing, `torch.cdist`).

## What torch.func refuses

Where `torch.func` refuses a network, or would be wrong, double backward takes over. The optimizer
tries it once and remembers the refusal.

{refusals}

## Every network with every family

Written by `UPDATE_DOCS=1 pytest tests/test_policies.py`, from what that ran.

{table}
"""


def test_the_page_says_what_was_found(found: dict[str, dict[str, str]]) -> None:
    if found.keys() != NETWORKS.keys():
        pytest.skip("not every network was run")
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page(found))
    assert PAGE.read_text() == page(found)


def require_contract(setting: Setting) -> StepReport:
    """Take a step and check that it kept the contract; return its report."""
    policy = setting.policy
    before = Snapshot.of(policy)
    report = TrustRegionOptimizer(setting.trained, max_kl=0.01).step(setting.closure)
    assert report.accepted, report.outcome
    assert report.engine == "Gauss-Newton"
    assert report.improvement > 0
    changed = set(before.differences(Snapshot.of(policy)))
    assert changed
    assert changed <= {name for name, each in policy.named_parameters() if each.requires_grad}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        _, kl, *_ = setting.closure()
    setting.rewind()
    assert kl.item() == pytest.approx(report.kl, rel=1e-3)
    assert 0.008 < report.kl <= 0.01
    return report


@each_device
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.usefixtures("found")
def test_a_step_of_any_network_keeps_the_contract(network: str, device: str) -> None:
    torch.manual_seed(0)
    require_contract(Setting(Policy(NETWORKS[network]().to(device), FAMILIES["Categorical"])))


@each_device
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_any_family_keeps_the_contract(family: str, device: str) -> None:
    torch.manual_seed(0)
    require_contract(Setting(Policy(NETWORKS["MLP"]().to(device), FAMILIES[family])))


@each_device
def test_a_closure_under_autocast_steps_as_one_in_single_precision(device: str) -> None:
    steps = []
    for autocast in (True, False):
        torch.manual_seed(0)
        body = Autocast()
        network = Network(body if autocast else body.inner, torch.randn(SAMPLES, INPUTS))
        setting = Setting(Policy(network.to(device), FAMILIES["Categorical"]))
        start = nn.utils.parameters_to_vector(setting.trained).detach()
        require_contract(setting)
        steps.append(nn.utils.parameters_to_vector(setting.trained).detach() - start)
    similarity = nn.functional.cosine_similarity(steps[0], steps[1], dim=0)
    assert not torch.equal(steps[0], steps[1])
    assert similarity > 0.99


class Bag(nn.Module):
    """The bare nn.EmbeddingBag."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(10, OUTPUTS)

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.bag(tokens)
        return result


REFUSED: dict[str, tuple[Callable[[], Network], str]] = {
    "embedding bag": (
        lambda: Network(Bag(), torch.arange(2 * SAMPLES).view(-1, 2) % 10),
        r"nn\.EmbeddingBag has no second derivatives: use nn\.Embedding.*vanilla",
    ),
    "reentrant checkpoint": (
        lambda: around(Checkpointed(reentrant=True)),
        r"Reentrant checkpointing .* use checkpoint\(\.\.\., use_reentrant=False\)",
    ),
    "an attention kernel of the closure's own": (
        lambda: Network(Flash(), torch.randn(SAMPLES, 2, 5, 8)),
        r"drop its sdpa_kernel\(\)",
    ),
}


class Flash(nn.Module):
    """Attention by a kernel that the closure insists on."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.head = nn.Linear(16, OUTPUTS)

    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            mixed = nn.functional.scaled_dot_product_attention(self.project(x), x, x)
        result: Tensor = self.head(mixed[:, :, 0].flatten(1))
        return result


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_twice_is_named_with_the_way_out(name: str) -> None:
    make, message = REFUSED[name]
    torch.manual_seed(0)
    setting = Setting(Policy(make(), FAMILIES["Categorical"]))
    before = Snapshot.of(setting.policy)
    optimizer = TrustRegionOptimizer(setting.trained)
    for third in (True, False):
        with pytest.raises(TrustRegionError, match=message):
            optimizer.step(functools.partial(setting.closure, third=third))
    assert before.differences(Snapshot.of(setting.policy)) == []


class Recording(TorchFunctionMode):
    """Notes whether cuDNN is switched on when a function is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[bool]] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        self.seen.setdefault(func.__name__, []).append(torch.backends.cudnn.enabled)
        return func(*args, **(kwargs or {}))


@each_device
@pytest.mark.parametrize(
    ("network", "function", "enabled"),
    [
        ("RNN", "rnn_tanh", False),
        ("GRU", "gru", False),
        ("LSTM, packed", "lstm", False),
        ("CNN", "conv2d", True),
    ],
)
def test_recurrence_runs_without_cudnn_at_every_evaluation_and_convolution_with_it(
    network: str, function: str, enabled: bool, device: str
) -> None:
    torch.manual_seed(0)
    setting = Setting(Policy(NETWORKS[network]().to(device), FAMILIES["Categorical"]))
    with Recording() as record:
        report = TrustRegionOptimizer(setting.trained).step(setting.closure)
    calls = record.seen[function]
    assert len(calls) % report.closure_evaluations == 0
    assert set(calls) == {enabled}
    assert torch.backends.cudnn.enabled


@each_device
@pytest.mark.parametrize("fast", [True, False])
def test_attention_runs_by_twice_differentiable_kernels_at_every_evaluation(
    fast: bool, device: str
) -> None:
    torch.manual_seed(0)
    setting = Setting(Policy(NETWORKS["MultiheadAttention"]().to(device), FAMILIES["Categorical"]))
    backends, seen = torch.backends, []

    def closure() -> Any:
        seen.append((backends.mha.get_fastpath_enabled(), backends.cuda.flash_sdp_enabled()))
        return setting.closure()

    before = backends.mha.get_fastpath_enabled(), backends.cuda.flash_sdp_enabled()
    try:
        backends.mha.set_fastpath_enabled(fast)
        backends.cuda.enable_flash_sdp(fast)
        TrustRegionOptimizer(setting.trained).step(closure)
        assert (backends.mha.get_fastpath_enabled(), backends.cuda.flash_sdp_enabled()) == (
            fast,
            fast,
        )
    finally:
        backends.mha.set_fastpath_enabled(before[0])
        backends.cuda.enable_flash_sdp(before[1])
    assert len(seen) > 1
    assert set(seen) == {(False, False)}
