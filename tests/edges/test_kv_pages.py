"""Triton packs and unpacks pages bit for bit as the reference: interpreted, compiled for several cards, and on one."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.edges.compiler import compiled
from tests.edges.interpreter import Interpreter
from tierstore.kernels.kv_pages import reference
from tierstore.kernels.kv_pages.layout import CODE_BITS, layout_of

pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

Call = Callable[..., Any]
MODULE = "kv_pages.triton"
SIZES = [(2, 64, 2, 64, 64), (1, 16, 3, 80, 5), (2, 8, 1, 1, 7)]
"""Pages, tokens, heads, dims of keys and of values."""


@pytest.fixture(scope="module")
def interpreted(interpreter: Interpreter) -> Call:
    return interpreter.call


def on_a_card(module: str, function: str, *arguments: Any) -> Any:
    return getattr(import_module(f"tierstore.kernels.{module}"), function)(*arguments)


def some(sizes: tuple[int, ...], *, hostile: bool) -> tuple[Tensor, Tensor]:
    """Keys that are strided, and values; hostile ones are constant, tiny, huge and no numbers in places."""
    pages, tokens, heads, key_dim, value_dim = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    keys = torch.randn(pages, heads, tokens, key_dim, generator=generator).transpose(1, 2)
    keys = keys + 3 * torch.randn(heads, key_dim, generator=generator)
    values = torch.randn(pages, tokens, heads, value_dim, generator=generator)
    if hostile:
        keys[0, :, 0, key_dim // 2] = 1.5
        keys[-1, :, :, -1] = 1e-40
        keys[0, 3, 0, 0], keys[-1, 0, -1, 0], keys[-1, 5, -1, -1] = math.nan, -math.inf, 3e38
        values[0, 2, 0, 0] = math.inf
        values[0, 5], values[0, 6] = 0, values[0, 6] * 1e38
    return keys, values


def check(call: Call, name: str, sizes: tuple[int, ...], *, hostile: bool, device: str = "cpu") -> None:
    keys, values = (states.to(device) for states in some(sizes, hostile=hostile))
    pages, tokens, heads, key_dim, value_dim = sizes
    nbytes = layout_of(name, heads, tokens, key_dim, value_dim).nbytes
    cells = torch.full((pages, nbytes + 16), 7, dtype=torch.uint8)
    right = cells.clone()
    reference.pack(name, keys.cpu(), values.cpu(), right)
    found = cells.to(device)
    filled = call(MODULE, "pack", name, keys, values, found)
    found = found if filled is None else filled[3]
    assert torch.equal(found.cpu(), right)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        unpacked = call(MODULE, "unpack", name, right.to(device), heads, tokens, key_dim, value_dim, dtype)
        wanted = reference.unpack(name, right, heads, tokens, key_dim, value_dim, dtype)
        for states, exact in zip(unpacked, wanted, strict=True):
            torch.testing.assert_close(states.cpu(), exact, rtol=0, atol=0, equal_nan=True)
            assert states.stride() == exact.stride()


@pytest.mark.parametrize("name", CODE_BITS)
@pytest.mark.parametrize("sizes", SIZES)
def test_interpreted(interpreted: Call, name: str, sizes: tuple[int, ...]) -> None:
    check(interpreted, name, sizes, hostile=True)


@pytest.mark.parametrize("name", CODE_BITS)
def test_numbers_are_equal_where_all_are_finite(interpreted: Call, name: str) -> None:
    check(interpreted, name, (1, 32, 2, 20, 24), hostile=False)


@pytest.mark.parametrize(
    ("name", "dim", "capability"),
    [("int8", 256, 120), ("fp8", 64, 90), ("int4", 128, 80), ("fp4", 80, 90), ("int2", 64, 80)],
)
def test_every_card_has_room(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, dim: int, capability: int
) -> None:
    states = torch.zeros(2, 64, 2, dim)
    cells = torch.zeros(2, layout_of(name, 2, 64, dim, dim).nbytes, dtype=torch.uint8)
    with compiled(monkeypatch, tmp_path, capability) as made:
        on_a_card(MODULE, "pack", name, states, states, cells)
        on_a_card(MODULE, "unpack", name, cells, 2, 64, dim, dim, torch.bfloat16)
    assert len(made) == 4
    for kernel in made:
        assert kernel.metadata.shared <= 48 << 10
        assert "st.local" not in kernel.asm["ptx"], "spilled from registers"


@pytest.mark.cuda
@pytest.mark.parametrize("name", CODE_BITS)
@pytest.mark.parametrize("sizes", [*SIZES, (40, 64, 8, 128, 128), (3, 64, 2, 256, 256)])
def test_on_a_card(name: str, sizes: tuple[int, ...]) -> None:
    check(on_a_card, name, sizes, hostile=True, device="cuda")
