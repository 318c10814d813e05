"""Formats of KV pages: what comes back, how far off it may be, and what one bad number spoils."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.kernels.kv_pages import reference
from tierstore.kernels.kv_pages.layout import BY_TOKEN, CODE_BITS, layout_of
from tierstore.kernels.kv_pages.rotation import rotate, rotation
from tierstore.kvformats.format import KvFormat, KvShape
from tierstore.kvformats.named import KV_FORMAT_NAMES, kv_format

PACKED = list(CODE_BITS)
WIDE, NARROW, HALF = torch.float32, torch.bfloat16, torch.float16
SHAPES = st.builds(KvShape, st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.sampled_from([8, 16, 64]))


def some(shape: KvShape, pages: int, seed: int, dtype: torch.dtype = WIDE) -> tuple[Tensor, Tensor]:
    """Keys with channels apart from zero, and values."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(pages, shape.page_tokens, shape.heads, shape.key_dim, generator=generator)
    keys += 4 * torch.randn(shape.heads, shape.key_dim, generator=generator)
    values = torch.randn(pages, shape.page_tokens, shape.heads, shape.value_dim, generator=generator)
    return keys.to(dtype), values.to(dtype)


def cells_of(form: KvFormat, shape: KvShape, keys: Tensor, values: Tensor, spare: int = 0) -> Tensor:
    cells = torch.full((len(keys), form.cell_nbytes(shape, keys.dtype) + spare), 171, dtype=torch.uint8)
    form.pack(keys, values, cells)
    return cells


def there_and_back(form: KvFormat, shape: KvShape, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As the model would see them."""
    found = form.unpack(cells_of(form, shape, keys, values), shape, keys.dtype)
    return form.unrotate_output(found[0]), form.unrotate_output(found[1])


@pytest.mark.parametrize("dtype", [WIDE, NARROW, HALF])
def test_plain_pages_are_the_pages(dtype: torch.dtype) -> None:
    shape = KvShape(2, 5, 3, 8)
    keys, values = some(shape, 3, 0, dtype)
    form = kv_format(None, dtype)
    assert form.plain
    assert form.recent_tokens == 0
    cells = cells_of(form, shape, keys, values, spare=32)
    assert torch.equal(cells[0, :-32], torch.cat([states[0].flatten() for states in (keys, values)]).view(torch.uint8))
    found = form.unpack(cells, shape, dtype)
    assert torch.equal(found[0], keys)
    assert torch.equal(found[1], values)
    assert found[0].data_ptr() == cells.data_ptr()


def test_bf16_pages_are_rounded_once_and_plain_where_nothing_is() -> None:
    shape = KvShape(2, 5, 3, 8)
    keys, values = some(shape, 3, 0)
    form = kv_format("bf16", WIDE)
    assert (form.plain, kv_format("bf16", NARROW).plain) == (False, True)
    found = there_and_back(form, shape, keys, values)
    assert torch.equal(found[0], keys.bfloat16().float())
    assert torch.equal(found[1], values.bfloat16().float())


def test_unknown_names_and_odd_pages_are_refused() -> None:
    with pytest.raises(ModuleError, match=r"'int3'.*plain, bf16"):
        kv_format("int3", WIDE)
    for tokens in (0, 4, 12, 65):
        with pytest.raises(ModuleError, match="power of two"):
            kv_format("int4", WIDE).cell_nbytes(KvShape(1, 64, 64, tokens), WIDE)


@pytest.mark.parametrize(
    ("name", "most"), [("int8", 0.53), ("fp8", 0.53), ("int4", 0.30), ("fp4", 0.30), ("int2", 0.18)]
)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
def test_cells_are_as_small_as_promised(name: str, most: float, dim: int) -> None:
    for heads in (1, 3, 8):
        shape = KvShape(heads, dim, dim, 64)
        form = kv_format(name, WIDE)
        assert form.cell_nbytes(shape, WIDE) <= most * 64 * heads * 2 * dim * 2


@pytest.mark.parametrize("dim", [1, 2, 64, 128, 3, 80, 96, 257])
def test_the_rotation_is_its_own_inverse_and_spreads(dim: int) -> None:
    matrix = rotation(dim, torch.device("cpu")).double()
    torch.testing.assert_close(matrix @ matrix, torch.eye(dim, dtype=torch.float64), atol=1e-6, rtol=0)
    assert torch.equal(matrix, matrix.T)
    assert matrix.abs().max() <= math.sqrt(2 / dim) + 1e-7 or dim == 1


@pytest.mark.parametrize("dtype", [WIDE, NARROW])
def test_scores_are_the_same_for_rotated_queries_and_keys(dtype: torch.dtype) -> None:
    shape = KvShape(2, 80, 64, 16)
    keys, values = some(shape, 1, 1, dtype)
    query = torch.randn(5, 80, generator=torch.Generator().manual_seed(2)).to(dtype)
    form = kv_format("int8", dtype)
    rotated, _ = form.unpack(cells_of(form, shape, keys, values), shape, dtype)
    scores = form.rotate_query(query).float() @ rotated[0, :, 0].float().T
    exact = query.float() @ keys[0, :, 0].float().T
    assert (scores - exact).norm() < 0.02 * exact.norm()
    assert form.rotate_query(query).dtype == dtype


@settings(max_examples=25, deadline=None)
@given(shape=SHAPES, name=st.sampled_from(PACKED), seed=st.integers(0, 99))
def test_no_error_is_larger_than_the_step_of_its_scale(shape: KvShape, name: str, seed: int) -> None:
    keys, values = (rotate(states) for states in some(shape, 2, seed))
    cells = torch.zeros(2, layout_of(name, shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim).nbytes)
    cells = cells.to(torch.uint8)
    reference.pack(name, keys, values, cells)
    sizes = (shape.heads, shape.page_tokens, shape.key_dim, shape.value_dim)
    for exact, found, axis in zip((keys, values), reference.unpack(name, cells, *sizes, WIDE), (1, 3), strict=True):
        wrong = (found - exact).abs()
        largest = exact.abs().amax((1, 3), keepdim=True)
        if name in BY_TOKEN:
            most = exact.abs().amax(3, keepdim=True)
            allowed = most / 254 if name == "int8" else (exact.abs() / 16).maximum(most * 2.0**-9 / 448)
            assert (wrong <= 1.02 * allowed + largest * 2.0**-8).all()
            continue
        first = exact[:, 0].bfloat16().float()
        assert torch.equal(found[:, 0], first)
        counted = exact[:, 1:] if axis == 1 else exact
        span = counted.amax(axis, keepdim=True) - counted.amin(axis, keepdim=True)
        # Half a step, with int2 the part of the range that its codes leave out besides.
        allowed = span * {"int4": 0.5 / 15, "fp4": 1 / 12, "int2": 0.4 / 3}[name]
        assert (wrong <= 1.02 * allowed + largest * 2.0**-7)[:, 1:].all()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [WIDE, NARROW, HALF])
def test_unpacked_pages_are_one_rounding_from_float32_and_stand_head_by_head(name: str, dtype: torch.dtype) -> None:
    shape = KvShape(3, 24, 40, 16)
    form = kv_format(name, WIDE)
    cells = cells_of(form, shape, *some(shape, 4, 3), spare=16)
    for wide, found in zip(form.unpack(cells, shape, WIDE), form.unpack(cells, shape, dtype), strict=True):
        assert found.dtype == dtype
        assert torch.equal(wide.to(dtype), found)
        assert found.permute(2, 0, 1, 3).is_contiguous()
        assert found.permute(2, 0, 1, 3).flatten(1, 2).data_ptr() == found.data_ptr()


@pytest.mark.parametrize("name", [name for name in KV_FORMAT_NAMES if name != "plain"])
def test_a_page_depends_on_itself_alone_and_not_on_its_strides(name: str) -> None:
    shape = KvShape(2, 16, 24, 16)
    form = kv_format(name, WIDE)
    keys, values = some(shape, 5, 4)
    cells = cells_of(form, shape, keys, values)
    for page in range(5):
        assert torch.equal(cells_of(form, shape, keys[page : page + 1], values[page : page + 1])[0], cells[page])
    strided = [states.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for states in (keys, values)]
    assert torch.equal(cells_of(form, shape, strided[0], strided[1]), cells)
    longer = cells_of(form, shape, keys, values, spare=48)
    assert torch.equal(longer[:, :-48], cells)
    assert (longer[:, -48:] == 171).all()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("number", [0.0, 1.5, -3e-26, 2e30])
def test_constant_pages_come_back(name: str, number: float) -> None:
    shape = KvShape(2, 16, 5, 8)
    keys, values = torch.full((1, 8, 2, 16), number), torch.full((1, 8, 2, 5), number)
    cells = torch.zeros(1, layout_of(name, 2, 8, 16, 5).nbytes, dtype=torch.uint8)
    reference.pack(name, keys, values, cells)
    for found in reference.unpack(name, cells, 2, 8, 16, 5, WIDE):
        torch.testing.assert_close(found, torch.full_like(found, number), rtol=2.0**-7, atol=2e-28)
    for found in there_and_back(kv_format(name, WIDE), shape, torch.zeros_like(keys), torch.zeros_like(values)):
        assert not found.any()


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_what_is_not_finite_comes_back_as_nan_and_spoils_its_head_at_most(name: str, bad: float) -> None:
    shape = KvShape(2, 16, 16, 16)
    form = kv_format(name, WIDE)
    keys, values = some(shape, 2, 5)
    right = there_and_back(form, shape, keys, values)
    keys[0, 3, 0, 7] = values[0, 5, 1, 2] = bad
    found = there_and_back(form, shape, keys, values)
    assert found[0][0, 3, 0].isnan().all()
    assert found[1][0, 5, 1].isnan().all()
    found[0][0, :, 0] = right[0][0, :, 0]
    found[1][0, 5, 1] = right[1][0, 5, 1]
    assert torch.equal(found[0], right[0])
    assert torch.equal(found[1], right[1])


def test_nothing_can_be_packed_and_unpacked() -> None:
    shape = KvShape(2, 16, 16, 16)
    for name in KV_FORMAT_NAMES:
        form = kv_format(name, WIDE)
        keys, values = some(shape, 0, 0)
        found = there_and_back(form, shape, keys, values)
        assert found[0].shape == keys.shape
        assert found[1].shape == values.shape


def test_the_better_format_is_nearer() -> None:
    shape = KvShape(2, 64, 64, 64)
    keys, values = some(shape, 4, 6)
    wrong = {}
    for name in PACKED:
        found = there_and_back(kv_format(name, WIDE), shape, keys, values)
        centred = keys - keys.mean(1, keepdim=True)
        wrong[name] = float((found[0] - keys).norm() / centred.norm() + (found[1] - values).norm() / values.norm())
    assert list(wrong) == sorted(PACKED, key=["int8", "fp8", "int4", "fp4", "int2"].index)
    assert wrong["int8"] < wrong["fp8"] < wrong["int4"] < wrong["fp4"] < wrong["int2"] < 0.8


def test_cells_are_as_they_are_documented() -> None:
    """Bit for bit, by hand: two tokens differ in one channel."""
    keys = torch.zeros(1, 8, 1, 2)
    keys[0, 1:, 0, 0] = torch.tensor([0, 15, 7, 1, 2, 3, 4.0])
    keys[0, 0, 0] = torch.tensor([-96.0, 1.0])
    values = torch.zeros(1, 8, 1, 2)
    values[0, 2, 0] = torch.tensor([3.0, 18.0])
    at = layout_of("int4", 1, 8, 2, 2)
    assert (at.key_codes, at.value_codes, at.key_scales, at.value_scales) == (0, 16, 32, 48)
    assert (at.key_first, at.value_first, at.nbytes) == (80, 96, 112)
    cells = torch.zeros(1, 112, dtype=torch.uint8)
    reference.pack("int4", keys, values, cells)
    codes = cells[0, :8].view(4, 2)
    assert codes[:, 0].tolist() == [0x10, 0x20, 0x3F, 0x47]  # tokens 0 and 4 in a byte, 1 and 5, ...
    assert codes[:, 1].tolist() == [0, 0, 0, 0] or codes[:, 1].tolist() == [15, 0, 0, 0]
    assert cells[0, 32:40].view(NARROW).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert cells[0, 16:24].tolist() == [0, 0, 0, 0, 0x00, 0x0F, 0, 0]
    assert cells[0, 48:80].view(NARROW)[[2, 10]].tolist() == [1.0, 3.0]
    assert cells[0, 80:84].view(NARROW).tolist() == [-96.0, 1.0]
    fours = torch.zeros(1, layout_of("int8", 1, 8, 2, 2).nbytes, dtype=torch.uint8)
    reference.pack("int8", torch.tensor([127.0, -63.5]).expand(1, 8, 1, 2), values, fours)
    assert fours[0, :2].view(torch.int8).tolist() == [127, -64]
    assert fours[0, 32:34].view(NARROW).item() == 1.0
