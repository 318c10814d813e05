"""Values and rows of packed matrices: those that each format says, without a whole copy on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tierstore.formats import tables, tiles
from tierstore.formats.format import Format, Parts, pack_tensor, unpack_tensor
from tierstore.formats.fp4 import Fp4
from tierstore.formats.fp8 import Fp8
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.linear import dequantise, linear, unpack_rows
from tierstore.formats.mxfp4 import MxFp4
from tierstore.formats.named import FORMATS
from tierstore.formats.scratch import Scratch

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SHAPES = [(1, 1), (1, 64), (64, 64), (65, 3), (3, 65), (130, 100), (63, 32), (200, 256), (129, 320)]


@pytest.fixture(params=list(FORMATS))
def form(request: pytest.FixtureRequest) -> Format:
    return FORMATS[request.param]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def matrix(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


# --- values ---


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_those_of_the_format(form: Format, dtype: torch.dtype) -> None:
    scratch = Scratch()
    for n, k in SHAPES:
        parts = form.pack(matrix(n, k))
        values = dequantise(form, parts, (n, k), dtype, scratch)
        assert values.is_contiguous()
        assert torch.equal(values, form.unpack(parts, n, k).to(dtype)), (n, k)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(list(FORMATS)),
    st.integers(1, 140),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.floats(-30, 30),
    st.integers(0, 3),
)
def test_values_are_those_of_the_format_at_any_size(
    name: str, n: int, k: int, dtype: torch.dtype, power: float, seed: int
) -> None:
    form = FORMATS[name]
    parts = form.pack(matrix(n, k, seed) * 10.0**power)
    assert torch.equal(dequantise(form, parts, (n, k), dtype, None), form.unpack(parts, n, k).to(dtype))
    rows = torch.arange(n).flip(0)[::2]
    assert torch.equal(unpack_rows(form, parts, n, k, rows, dtype), form.unpack(parts, n, k)[rows].to(dtype))


@pytest.mark.parametrize(
    "shape", [(3, 5, 33), (2, 2, 70, 64), (8, 4, 3, 3), (7,), (64, 1, 3), (0, 5), (4, 0), (2, 0, 32)]
)
def test_values_of_tensors_of_any_shape(form: Format, shape: tuple[int, ...]) -> None:
    parts = pack_tensor(form, torch.randn(shape))
    for scratch in (None, Scratch()):
        values = dequantise(form, parts, shape, torch.bfloat16, scratch)
        assert values.shape == shape
        assert torch.equal(values, unpack_tensor(form, parts, shape, torch.bfloat16))


def test_values_stand_in_scratch_or_apart() -> None:
    form, scratch = Int4(), Scratch()
    one, other = (form.pack(matrix(64, 64, seed)) for seed in (1, 2))
    first = dequantise(form, one, (64, 64), torch.float32, scratch)
    kept = dequantise(form, one, (64, 64), torch.float32, None)
    second = dequantise(form, other, (64, 64), torch.float32, scratch)
    assert first.data_ptr() == second.data_ptr()
    assert torch.equal(first, second)
    assert torch.equal(kept, form.unpack(one, 64, 64))


def every_code(form: Format) -> tuple[dict[str, Tensor], int, int]:
    """Parts by hand in which every code meets every scale, as far as packing could make them, and n and k."""
    order = torch.arange(256)
    bits = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)  # e4m3 but for NaN
    match form:
        case Int4():
            codes = order.view(-1, 32).repeat(1, form.group).to(torch.uint8)  # 8 blocks, every pair of nibbles
            scales = matrix(3, 512 * 2).view(3, 512, 2).bfloat16()
            return {"codes": codes.repeat(1, 3), "scales": scales}, 512, 3 * form.group
        case Int8():
            planes = torch.randint(0, 256, (2, 4, 256 * 64 * 32), dtype=torch.uint8)
            scales = torch.stack(torch.meshgrid(order, order[1:], indexing="ij"), 2).flip(2)  # every pair
            scales = scales.view(-1, 2)[: 256 * 255].repeat(2, 1)[: 256 * 256].reshape(4, -1).to(torch.uint8)
            steps = torch.rand(256, 1) * 1e-3
            return {"high": planes[0], "low": planes[1], "scales": scales, "steps": steps}, 256, 256 * 64
        case Int8Row():
            return {"codes": order.to(torch.int8).repeat(100, 1), "scales": matrix(100, 1).bfloat16()}, 100, 256
        case Fp8():
            return {"codes": bits.view(torch.float8_e4m3fn).repeat(100, 1), "scales": matrix(100, 1).abs()}, 100, 254
        case Fp4():
            codes = order.to(torch.uint8).repeat(254, 1)
            scales = bits.view(torch.float8_e4m3fn)[:, None].repeat(1, 32)
            return {"codes": codes, "scales": scales, "scale": torch.tensor([[0.0123]])}, 254, 512
        case MxFp4():
            codes = order.to(torch.uint8).repeat(255, 1)
            return (
                {"codes": codes, "scales": order[:255, None].repeat(1, 16).to(torch.uint8).view(torch.float8_e8m0fnu)},
                255,
                512,
            )
        case _:
            return {"codes": matrix(100, 100).bfloat16()}, 100, 100


def test_every_code_means_what_the_format_says(form: Format) -> None:
    parts, n, k = every_code(form)
    for spec in form.parts(n, k):
        assert tuple(parts[spec.name].shape) == spec.shape, spec
    exact = form.unpack(parts, n, k)
    assert exact.isfinite().all() or form == MxFp4()  # of which the greatest scale times 6 is beyond float32
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(dequantise(form, parts, (n, k), dtype, None), exact.to(dtype))
    rows = torch.randperm(n)[:50]
    assert torch.equal(unpack_rows(form, parts, n, k, rows, torch.float32), exact[rows])


@pytest.mark.parametrize("offset", [1, 2, 6])
def test_parts_may_begin_at_any_address(form: Format, offset: int) -> None:
    n, k = 70, 96
    parts = form.pack(matrix(n, k))
    moved = {}
    for name, part in parts.items():
        skip = -(-offset // part.itemsize) * part.itemsize
        memory = torch.empty(part.nbytes + skip, dtype=torch.uint8)
        moved[name] = memory.view(torch.uint8)[skip:].view(part.dtype).view(part.shape).copy_(part)
    x = torch.randn(3, k).bfloat16()
    scratch = Scratch()
    assert torch.equal(dequantise(form, moved, (n, k), torch.float32, None), form.unpack(parts, n, k))
    product = linear(x, form, moved, n, k, None, scratch)
    assert torch.equal(product, linear(x, form, parts, n, k, None, scratch))


# --- rows of a table ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_those_of_the_format(form: Format, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "AT_ONCE", 3 * 320 * 32)
    for n, k in SHAPES:
        parts = form.pack(matrix(n, k))
        whole = form.unpack(parts, n, k).to(dtype)
        for rows in (
            torch.arange(n),
            torch.randint(0, n, (17,)),
            torch.tensor([n - 1] * 4),
            torch.tensor([], dtype=torch.int64),
        ):
            found = unpack_rows(form, parts, n, k, rows, dtype)
            assert torch.equal(found, whole[rows])
            assert torch.equal(unpack_rows(form, parts, n, k, rows.int(), dtype), found)


@pytest.mark.parametrize("row", [-1, 65, 127, 2**40])
def test_rows_that_are_not_there(form: Format, row: int) -> None:
    with pytest.raises(IndexError, match=r"out of range.*of a table of 65"):
        unpack_rows(form, form.pack(matrix(65, 64)), 65, 64, torch.tensor([3, row]), torch.float32)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operations that read one of ``parts``, and the largest new memory that any operation takes."""

    def __init__(self, parts: Parts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parts = {part.untyped_storage().data_ptr(): name for name, part in parts.items()}
        self.read: set[tuple[str, str]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in args:
            if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in self._parts:
                self.read.add((self._parts[value.untyped_storage().data_ptr()], func._schema.name))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in self._parts:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_rows_are_looked_up_part_by_part(form: Format) -> None:
    parts = form.pack(matrix(300, 64))
    with Watch(parts) as watch:
        unpack_rows(form, parts, 300, 64, torch.tensor([5, 299]), torch.bfloat16)
    whole = {("scales", "aten::index_select")} if isinstance(form, Int4) else {("scale", "aten::mul_")}
    assert {name for name, _ in watch.read} == set(parts)
    assert {entry for entry in watch.read if entry[1] != "aten::embedding"} <= whole


# --- memory ---


@pytest.mark.parametrize("m", [1, 60])
def test_no_whole_matrix_stands_unpacked(form: Format, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "TILE", 1 << 14)
    n, k, scratch = 1024, 256, Scratch()
    parts = form.pack(matrix(n, k))
    x = torch.randn(m, k).bfloat16()
    with torch.inference_mode(), Watch(parts) as watch:
        linear(x, form, parts, n, k, None, scratch)
    assert watch.largest < n * k
    assert scratch.nbytes < n * k


def test_buffers_are_used_again() -> None:
    form, scratch = Int4(), Scratch()
    parts, x = form.pack(matrix(256, 128)), torch.randn(3, 128)
    linear(x, form, parts, 256, 128, None, scratch)
    held = scratch.nbytes
    assert held > 0
    with Watch(parts) as watch:
        product = linear(x, form, parts, 256, 128, None, scratch)
    assert scratch.nbytes == held
    assert watch.largest <= max(held, product.nbytes)
    assert scratch.take("values", (4,), torch.float32, x.device) is scratch.take(
        "values", (4,), torch.float32, x.device
    )
