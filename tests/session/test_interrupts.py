"""Ctrl-C at any moment: the exception comes out, and whatever runs next is exact."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from torch import nn

import tierstore
from tierstore import Budget
from tierstore.binding.uninterrupted import Uninterrupted

IDS = torch.arange(0, 8192, 700).reshape(2, 6)


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(128, 128) for _ in range(12)]
    return nn.Sequential(nn.Embedding(8192, 128), *layers).eval()


@pytest.mark.parametrize("hbm", [4_300_000, 4_700_000])
def test_interrupted_anywhere(tmp_path: Path, alarm: None, hbm: int) -> None:
    random = Random(hbm)
    module = model()
    with torch.no_grad():
        expected = module(IDS)
    interrupted = 0
    with tierstore.offload(module, Budget(hbm), store=tmp_path) as session, torch.no_grad():
        module(IDS)
        start = time.perf_counter()
        assert torch.equal(module(IDS), expected)
        usual = time.perf_counter() - start
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 1.2 * usual + 1e-3))
                for _ in range(20):
                    module(IDS)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert torch.equal(module(IDS), expected)
        assert session.report().peak_bytes["hbm"] <= hbm
    assert interrupted > 30
    with torch.no_grad():
        assert torch.equal(module(IDS), expected)


def test_handlers_run_after_the_step(alarm: None) -> None:
    steps = []

    def step() -> None:
        with Uninterrupted(), Uninterrupted():
            signal.raise_signal(signal.SIGALRM)
            steps.append("whole")

    with pytest.raises(KeyboardInterrupt):
        step()
    assert steps == ["whole"]
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGALRM)
