"""What a type checker says of wrong uses: one error each, which names the mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mypy import api

WRONG_USES = Path(__file__).parent / "wrong_uses.py"

EXPECTED = {
    'mode="trpoo"': ['"mode"', "Literal['trpoo']", "Literal['trpo', 'natural', 'vanilla']"],
    'constraint="largest"': ['"constraint"', "Literal['largest']", "Literal['mean', 'max']"],
    'max_kl="0.01"': ['"max_kl"', '"str"', '"float | None"'],
    "cg_iterations=2.5": ['"cg_iterations"', '"float"', '"int"'],
    "step(one_value)": ['"step"', "Callable[[], Tensor]", "tuple[Tensor, Tensor]"],
    "step(floats)": ['"step"', "tuple[float, float]", "tuple[Tensor, Tensor]"],
    "step(name_for_third)": ['"step"', "tuple[Tensor, Tensor, str]", "Distribution | Tensor"],
    "step(pair())": ['"step"', '"tuple[Tensor, Tensor]"', 'expected "Callable'],
    "ACCEPTD": ["type[Outcome]", "no attribute", "ACCEPTD"],
    '"gauss newton"': ["equality", "Literal['Gauss-Newton'", "Literal['gauss newton']"],
}


@pytest.fixture(scope="module")
def errors() -> dict[int, str]:
    """Return what mypy says, by line."""
    output, problems, _ = api.run(["--strict", "--no-error-summary", str(WRONG_USES)])
    assert not problems
    found = re.findall(r"wrong_uses\.py:(\d+): error: (.*)", output)
    assert len(found) == len(dict(found)) == len(EXPECTED) == 10, output
    return {int(line): text for line, text in found}


@pytest.mark.slow
@pytest.mark.parametrize("use", EXPECTED)
def test_a_wrong_use_is_an_error_that_names_the_mistake(use: str, errors: dict[int, str]) -> None:
    lines = WRONG_USES.read_text("utf-8").splitlines()
    (error,) = (errors[n] for n, line in enumerate(lines, 1) if use in line and n in errors)
    for words in EXPECTED[use]:
        assert words in error
