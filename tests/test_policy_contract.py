"""A step of any policy keeps the contract, by kernels that can be differentiated twice."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from devices import each_device
from families import FAMILIES
from networks import INPUTS, NETWORKS, SAMPLES, Autocast, Network
from once_differentiable import ONCE_DIFFERENTIABLE
from policy_settings import Policy, Setting
from problems import Snapshot
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from trpo_optim import (
    StepReport,
    TrustRegionOptimizer,
)
from trpo_optim.hyperparameters import EngineName

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors", "ignore:nested_from_padded CUDA kernels"
)


def require_contract(setting: Setting, engine: EngineName = "auto") -> StepReport:
    """Take a step and check that it kept the contract; return its report."""
    policy = setting.policy
    before = Snapshot.of(policy)
    report = TrustRegionOptimizer(setting.trained, max_kl=0.01, engine=engine).step(setting.closure)
    assert report.accepted, report.outcome
    cheaper = "finite differences are cheaper" in report.fallback
    assert report.engine == ("finite differences" if cheaper else "Gauss-Newton")
    assert not (cheaper and engine == "Gauss-Newton")
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
@pytest.mark.parametrize("engine", ["auto", "Gauss-Newton"])
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.usefixtures("compiler")
def test_a_step_of_any_network_keeps_the_contract(
    network: str, engine: EngineName, device: str
) -> None:
    torch.manual_seed(0)
    setting = Setting(Policy(NETWORKS[network]().to(device), FAMILIES["Categorical"]))
    require_contract(setting, engine)


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


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("third", [True, False])
@pytest.mark.parametrize("name", ONCE_DIFFERENTIABLE)
def test_what_cannot_be_differentiated_twice_is_driven_by_finite_differences(
    name: str, third: bool
) -> None:
    make, reason = ONCE_DIFFERENTIABLE[name]
    torch.manual_seed(0)
    setting = Setting(Policy(make(), FAMILIES["Categorical"]))
    optimizer = TrustRegionOptimizer(setting.trained)
    report = optimizer.step(functools.partial(setting.closure, third=third))
    assert report.accepted
    if reason:  # some releases of torch differentiate it twice
        assert report.engine == "finite differences"
        assert reason in report.fallback
    assert 0.009 < report.kl <= 0.01


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
