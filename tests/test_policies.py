"""Products of every network with every family are exact; a page says by which engines."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from devices import each_device
from families import FAMILIES, Family
from networks import NETWORKS
from once_differentiable import ONCE_DIFFERENTIABLE
from policy_settings import Policy, Setting
from profiles import problems
from torch import Tensor, nn
from torch.distributions import Distribution

from trpo_optim.algorithm.direction import differences_of
from trpo_optim.closure.closures import Closures
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.batch import Batch
from trpo_optim.curvature.engine_choice import EngineChoice, nothing_learned
from trpo_optim.curvature.local_model import LocalModel

PAGE = Path(__file__).parent.parent / "docs" / "results" / "policies.md"

ENGINES = {
    "G": "Gauss-Newton",
    "F": "torch.func",
    "D": "double backward",
    "N": "finite differences",
}

BY_DIFFERENCES = 2e-3
"""Relative error of products by finite differences, in single precision."""

NOT_IN_SINGLE = {"the paper's Atari CNN", "dropout", "TransformerEncoder, dropout"}
"""Displacements reach across the kinks of rectifiers; and the masks of dropout are others."""

DRAWS = "it draws random numbers, and `torch.func` may draw another mask than the trials"

NOT_BY_TORCH_FUNC = {
    "LSTM, packed": ("data pointer", "torch's packed sequences read the memory of tensors"),
    "TransformerEncoder, dropout": ("random numbers", DRAWS),
    "batch norm": ("in-place operation", "in training mode it writes its statistics in place"),
    "dropout": ("random numbers", DRAWS),
    "checkpoint, not reentrant": ("hooks", "checkpoints use saved-tensor hooks"),
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


ONCE = {name: make for name, (make, reason) in ONCE_DIFFERENTIABLE.items() if reason}


@pytest.fixture(scope="module", autouse=True)
def _compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
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
        choice = nothing_learned()
        choice["refusal"] = "another engine is tried" if letter == "D" else ""
        choice["flaw"] = "another engine is tried" if letter == "N" else ""
        model, product = product_of(setting, vector, direction, choice, third=letter == "G")
        if letter == "F" and choice["refusal"]:
            refusal = choice["refusal"]
            assert model.engine == "double backward"
            continue
        assert model.engine == engine, model.fallback
        most = max(tolerance, BY_DIFFERENCES if letter == "N" else 0.0)
        if torch.allclose(product, oracle, rtol=0, atol=most * float(oracle.norm())):
            exact += letter
    return exact, refusal


def product_of(
    setting: Setting,
    vector: ParameterVector,
    direction: Tensor,
    choice: EngineChoice,
    *,
    third: bool,
) -> tuple[LocalModel, Tensor]:
    """Return the local model and a product, as a step that knows as much takes them."""
    closures = Closures([functools.partial(setting.closure, third=third)])
    with Transaction(vector) as transaction:
        transaction.hold(closures.every)
        transaction.begin()
        batch = Batch(closures, vector, transaction, {"parts": choice})
        model = batch.second_order()
        if model.engine == "finite differences":
            return model, differences_of(batch, transaction, model).product(direction)
        return model, model.product(direction)


def expected_engines(network: str, family: str) -> str:
    """Return the letters of the engines that are exact."""
    if network in ONCE:
        return "N"
    without = LESS_EXACT.get(family, "") + "F" * (network in NOT_BY_TORCH_FUNC)
    return "".join(letter for letter in ENGINES if letter not in without)


def some_of(families: dict[str, Family], network: str) -> dict[str, Family]:
    """Return all if thorough, else every third, quick one; of each network others."""
    stride = len(families) if problems() < 100 else 3 if problems() == 100 else 1
    first = [*NETWORKS, *ONCE].index(network) % stride
    return dict(list(families.items())[first::stride])


@pytest.mark.no_cover
@each_device
@pytest.mark.parametrize("network", [each for each in NETWORKS if each not in NOT_IN_SINGLE])
def test_products_by_finite_differences_in_single_precision_are_near_those_in_double(
    network: str, device: str
) -> None:
    torch.manual_seed(0)
    body = NETWORKS[network]().to(device, torch.float64)
    families = some_of(FAMILIES, network)
    for name, family in families.items():
        if family.sampled or name in LESS_EXACT or (network, device) in IN_SINGLE_PRECISION:
            continue  # others are sampled, or the oracle is of another precision
        double = Setting(Policy(body, family))
        vector = ParameterVector(double.trained)
        unit = torch.randn(len(vector), generator=torch.Generator().manual_seed(0)).double()
        unit = unit.to(device) / unit.norm()
        single = Setting(copy.deepcopy(double.policy).float())
        oracle = double.fisher_vector_product(unit, vector)
        choice = nothing_learned()
        choice["flaw"] = "finite differences are tried"
        product = product_of(
            single, ParameterVector(single.trained), unit.float(), choice, third=False
        )[1]
        error = float((product.double() - oracle).norm() / oracle.norm())
        assert error <= BY_DIFFERENCES, name


@pytest.mark.no_cover
@each_device
@pytest.mark.parametrize("network", NETWORKS)
def test_products_are_exact(network: str, device: str) -> None:
    torch.manual_seed(0)
    body = NETWORKS[network]().to(device, torch.float64)
    single = (network, device) in IN_SINGLE_PRECISION
    words, _ = NOT_BY_TORCH_FUNC.get(network, ("", ""))
    for name, family in some_of(FAMILIES, network).items():
        if single and name in LESS_EXACT:
            continue
        setting = Setting(Policy(body, family))
        exact, refusal = exact_engines(setting, tolerance=5e-3 if single else 1e-6)
        assert exact == expected_engines(network, name), name
        assert bool(words) == bool(refusal)
        assert words in refusal


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("network", ONCE)
def test_products_of_what_torch_differentiates_once_are_exact(network: str) -> None:
    torch.manual_seed(0)
    body = ONCE[network]().double()
    choice = nothing_learned()
    choice["flaw"] = "as a step finds"
    for name, family in some_of(FAMILIES, network).items():
        setting = Setting(Policy(body, family))
        vector = ParameterVector(setting.trained)
        direction = torch.randn(len(vector), generator=torch.Generator().manual_seed(0)).double()
        _, product = product_of(setting, vector, direction, choice, third=False)
        with without_reentrance(body):
            oracle = setting.fisher_vector_product(direction, vector)
        error = float((product - oracle).norm() / oracle.norm())
        assert error <= BY_DIFFERENCES, name


@contextmanager
def without_reentrance(body: nn.Module) -> Iterator[None]:
    """Have checkpoints be such that autograd.grad can go through them, as the oracle does."""
    reentrant: list[Any] = [each for each in body.modules() if getattr(each, "reentrant", False)]
    for module in reentrant:
        module.reentrant = False
    yield
    for module in reentrant:
        module.reentrant = True


def page() -> str:
    """Return docs/results/policies.md."""
    heads = ["", *(name.replace(", ", ",<br>") for name in FAMILIES)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += [
        " | ".join([name, *(expected_engines(name, family) or "–" for family in FAMILIES)])
        for name in [*NETWORKS, *ONCE]
    ]
    table = "\n".join(f"| {line} |" for line in lines)
    reasons = [("network", "why not `torch.func`"), ("---", "---")]
    reasons += [(name, reason) for name, (_, reason) in NOT_BY_TORCH_FUNC.items()]
    refusals = "\n".join(f"| {name} | {reason} |" for name, reason in reasons)
    return f"""# Policies

The [table](#every-network-with-every-family) has a row for each network and a column for each
family of distributions. Each letter is an engine whose Fisher-vector products were correct:

- **G**, Gauss–Newton. The closure returns the distribution as its third value (for the sampled KL,
  the new log-probabilities).
- **F**, `torch.func`. The closure returns two values.
- **D**, double backward. A step uses it if the closure returns two values and `torch.func` refuses.
- **N**, finite differences of the KL's gradient. A step uses them if torch cannot differentiate the
  closure twice.

The products were compared with central differences of the KL's gradient. They agree to 10⁻⁶ in
float64 (N: to 2·10⁻³, in float64 and in float32). Two families need another reference. For the
sampled KL, it is the mean of ∇ln π ∇ln πᵀ. The KL of Laplace has a kink, so its reference is a
smooth function with the same Fisher matrix. N was not measured in float32 for dropout, sampled KLs,
Laplace, weight norm on CUDA and the Atari CNN.

The optimizer selects the kernels of attention, recurrence and weight norm. In the first evaluation,
it runs compiled modules uncompiled. It uses one dropout mask and restores buffers. You need not do
any of this. Under autocast, a step of the MLP equals the step in single precision except for
rounding.

## What torch differentiates once

Some operations have only a first derivative: `nn.EmbeddingBag`, `torch.cdist` up to torch 2.13,
flash attention that the closure asks for, checkpoints with `use_reentrant=True`, and your own
functions whose backward is marked `once_differentiable`. A step then uses finite differences: Fv =
(∇KL(θ + εv) − ∇KL(θ)) / ε. A product costs one gradient. In single precision, the displacement has
a KL of 3·10⁻⁸ nats, or of 3·10⁻⁹ if one side serves. In double precision, it is 10⁻¹⁵ nats.

A backward may also leave torch without a mark (NumPy, C++, a Triton kernel). Torch then uses zero
as the second derivative, without an error. [The first step of an optimizer checks
this](../concepts/curvature.md#the-check-of-the-first-step), with the product along the gradient.
The check costs three to five evaluations. `state_dict` saves its result, so it is not repeated.

Rounding makes finite differences useless in two cases: in half precision, and in single precision
if many samples are close to a kink, such as that of a rectifier. Exact products then serve. If
there are none, the step raises an error that says what to do. Straight-through estimators keep
their engine, because their gradients are not those of their values.

## What torch.func refuses

If `torch.func` refuses a network or would be wrong, the optimizer uses double backward. It does not
try `torch.func` again.

{refusals}

## Every network with every family

`tests/test_policies.py` fails if this table is wrong. `make test` tests a third of its entries.
`make test-thorough` tests all of them.

{table}
"""


def test_the_page_says_what_the_tests_hold() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
