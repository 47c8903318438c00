"""Products of every network with every family are exact; docs/policies.md says by which engines."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from devices import each_device
from families import FAMILIES, Family
from networks import NETWORKS
from policy_settings import Policy, Setting
from profiles import problems
from torch.distributions import Distribution

from trpo_optim.closure.evaluation import Objective
from trpo_optim.closure.parameters import ParameterVector
from trpo_optim.closure.transaction import Transaction
from trpo_optim.curvature.engine_choice import nothing_learned
from trpo_optim.curvature.local_model import second_order

PAGE = Path(__file__).parent.parent / "docs" / "policies.md"

ENGINES = {"G": "Gauss-Newton", "F": "torch.func", "D": "double backward"}

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
        with Transaction(vector) as transaction:
            transaction.begin()
            closure = functools.partial(setting.closure, third=letter == "G")
            choice = nothing_learned()
            choice["refusal"] = "another engine is tried" if letter == "D" else ""
            model = second_order(Objective(closure, vector, transaction), choice)
            product = model.product(direction)
        if letter == "F" and choice["refusal"]:
            refusal = choice["refusal"]
            assert model.engine == "double backward"
            continue
        assert model.engine == engine, model.fallback
        if torch.allclose(product, oracle, rtol=0, atol=tolerance * float(oracle.norm())):
            exact += letter
    return exact, refusal


def expected_engines(network: str, family: str) -> str:
    """Return the letters of the engines that are exact."""
    without = LESS_EXACT.get(family, "") + "F" * (network in NOT_BY_TORCH_FUNC)
    return "".join(letter for letter in ENGINES if letter not in without)


def some_of(families: dict[str, Family], network: str) -> dict[str, Family]:
    """Return all if thorough, else every third, quick one; of each network others."""
    stride = len(families) if problems() < 100 else 3 if problems() == 100 else 1
    first = list(NETWORKS).index(network) % stride
    return dict(list(families.items())[first::stride])


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


def page() -> str:
    """Return docs/policies.md."""
    heads = ["", *(name.replace(", ", ",<br>") for name in FAMILIES)]
    lines = [" | ".join(heads), " | ".join(["---"] * len(heads))]
    lines += [
        " | ".join([name, *(expected_engines(name, family) or "–" for family in FAMILIES)])
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

`tests/test_policies.py` fails where this table is wrong. `make test` tries a third of its entries,
`make test-thorough` all of them.

{table}
"""


def test_the_page_says_what_the_tests_hold() -> None:
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
