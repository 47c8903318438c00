"""The page on sampling: what it shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).parents[2] / "docs" / "rollouts.md"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Box2D's bindings, when imported
def test_every_block_of_the_page_runs_in_its_order() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {"__name__": "page"}
    outcomes = []
    for block in blocks:
        names.pop("report", None)
        exec(compile(block, str(PAGE), "exec"), names)
        if "report" in names:
            outcomes.append(names["report"].outcome.name)
    assert outcomes == ["ACCEPTED"] * 6
