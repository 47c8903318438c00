"""The random state that an evaluation may move, on devices of every type."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from devices import each_device

from trpo_optim.closure.random_state import generators, random_state_kept


def draw_and_stop(device: str) -> None:
    with random_state_kept([device]):
        torch.manual_seed(4)
        torch.rand(7, device=device)
        raise KeyboardInterrupt


@each_device
def test_afterwards_the_random_state_is_what_it_was(device: str) -> None:
    torch.manual_seed(3)
    torch.rand(2, device=device)
    expected = [each.get_state() for each in generators([device])]
    with pytest.raises(KeyboardInterrupt):
        draw_and_stop(device)
    found = [each.get_state() for each in generators([device])]
    assert len(found) == 1 + (device == "cuda")
    assert all(map(torch.equal, found, expected))


@each_device
def test_from_a_seed_draws_are_those_after_torch_manual_seed(device: str) -> None:
    torch.manual_seed(3)
    torch.rand(2, device=device)
    expected = [each.get_state() for each in generators([device])]
    with random_state_kept([device], seed=4):
        drawn = torch.rand(7), torch.rand(7, device=device)
    assert all(map(torch.equal, [each.get_state() for each in generators([device])], expected))
    torch.manual_seed(4)
    assert torch.equal(drawn[0], torch.rand(7))
    assert torch.equal(drawn[1], torch.rand(7, device=device))


def test_every_device_gives_its_generator_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, apple = (torch.Generator() for _ in range(3))
    accelerator = SimpleNamespace(default_generators=(first, second), current_device=lambda: 1)
    monkeypatch.setattr(torch, "xpu", accelerator)
    monkeypatch.setattr(torch.mps, "_get_default_mps_generator", lambda: apple)
    cpu = torch.default_generator
    assert generators(["cpu", "meta"]) == [cpu]
    assert generators(["xpu:0", torch.device("xpu:0")]) == [cpu, first]
    assert generators(["xpu"]) == [cpu, second]  # the current one
    assert generators(["xpu", "xpu:1", "mps:0", "mps"]) == [cpu, second, apple]
