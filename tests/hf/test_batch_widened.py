"""Products of 16-bit floats made float32 a piece at a time: right, row by row, and gone without a trace."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tierstore
from tests.torch_threads import threads
from tierstore import Budget
from tierstore.hf.batch import widened
from tierstore.hf.batch.widened import Widened, why_widened


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU that lacks what this one may have."""
    monkeypatch.setattr(widened, "_is_slow", lambda weight: weight.dtype in (torch.bfloat16, torch.float16))


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "columns", "features", "bias"), [(1, 7, 5, True), (40, 96, 70, False), (16, 9, 1, True)]
)
def test_it_is_the_float32_sum_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, columns: int, features: int, bias: bool
) -> None:
    monkeypatch.setattr(widened, "PIECE_ELEMENTS", 1600)  # several pieces
    torch.manual_seed(0)
    linear = nn.Linear(columns, features, bias=bias, dtype=dtype)
    given = torch.randn(2, rows, columns, dtype=dtype)
    ways = Widened(linear)
    with torch.no_grad(), ways.used():
        found = linear(given)
        wide = copy.deepcopy(linear).float()
    ways.close()
    with torch.no_grad():
        exact = wide(given.float())
    assert found.dtype == dtype
    assert found.is_contiguous()
    torch.testing.assert_close(found.float(), exact, rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10, atol=1e-5)


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rows", [8, 16, 40])
def test_bits_of_a_row_depend_on_that_row(rows: int, count: int) -> None:
    with threads(count):
        torch.manual_seed(1)
        linear = nn.Linear(192, 130, dtype=torch.bfloat16)
        given, others = torch.randn(2, rows, 192, dtype=torch.bfloat16).unbind()
        order = torch.randperm(rows)
        others[rows // 2] = given[0]
        ways = Widened(linear)
        with torch.no_grad(), ways.used():
            found = linear(given)
            assert torch.equal(linear(given[order]), found[order])
            assert torch.equal(linear(others)[rows // 2], found[0])
        ways.close()


@pytest.mark.usefixtures("slow")
def test_modules_are_left_as_they_were_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8, dtype=torch.bfloat16), nn.Linear(8, 8))
    before = [dict(each.__dict__) for each in model]
    assert "bfloat16" in why_widened(model)
    ways = Widened(model)
    assert "forward" in model[0].__dict__
    assert "forward" not in model[1].__dict__
    ways.close()
    ways.close()
    assert [dict(each.__dict__) for each in model] == before


@pytest.mark.usefixtures("slow")
def test_gradients_are_torchs_own() -> None:
    linear = nn.Linear(8, 8, dtype=torch.bfloat16)
    ways = Widened(linear)
    given = torch.randn(3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = linear(given)
    with ways.used():
        linear(given).sum().backward()
    ways.close()
    with torch.no_grad():
        assert torch.equal(linear(given), plain)
    assert linear.weight.grad is not None


def test_what_torch_is_fast_with_is_left_alone() -> None:
    assert why_widened(nn.Linear(8, 8)) == ""
    assert why_widened(nn.Linear(8, 8, dtype=torch.bfloat16, device="meta")) == ""


@pytest.mark.usefixtures("slow")
def test_a_weight_that_is_not_in_memory_is_brought_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widened, "PIECE_ELEMENTS", 64 * 16)
    config = LlamaConfig(
        vocab_size=16384,  # a table that rests on disk, and is the head as well
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    table = 16384 * 64 * 2
    with tierstore.load(tmp_path, Budget(table + 4096), device="cpu") as session, torch.no_grad():
        tokens = torch.arange(16)[None]
        ways = Widened(session.module)
        for _ in range(2):
            session.module(input_ids=tokens)
        moved = []
        for way in (nullcontext, ways.used):
            before = session.report().bytes_moved
            with way():
                session.module(input_ids=tokens)
            moved.append(session.report().bytes_moved - before)
        ways.close()
    assert moved[1] <= moved[0] + table // 2
