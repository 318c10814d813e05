"""Proof mode proves exactness, and fails when there is nothing to prove or a number is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tierstore import Budget
from tierstore.binding import slot
from tierstore.testing.proof import prove


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6))).eval()


@torch.no_grad()
def run(module: nn.Module) -> torch.Tensor:
    return module(torch.ones(2, 64))  # type: ignore[no-any-return]


def test_an_offloaded_module_is_proved(tmp_path: Path) -> None:
    proof = prove(model(), run, Budget(40_000), store=tmp_path, passes=3)
    assert proof.calls == 8
    assert proof.bytes_moved > 0
    assert "8 calls equal" in str(proof)


def test_a_module_that_fits_proves_nothing(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="no weight moved"):
        prove(model(), run, Budget("1MiB"), store=tmp_path)


def test_a_wrong_number_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    true = slot.Slot.tensor
    monkeypatch.setattr(slot.Slot, "tensor", lambda self, block, like: true(self, block, like).mul(1.0001))
    with pytest.raises(AssertionError, match="differs from the plain run's"):
        prove(model(), run, Budget(40_000), store=tmp_path)
