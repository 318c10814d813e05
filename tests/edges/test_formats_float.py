"""Formats of small floats: what codes mean, which are chosen, and what packing takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.torch_threads import threads
from tierstore.errors import ModuleError
from tierstore.extents import align_up
from tierstore.formats import rows
from tierstore.formats.format import Format, pack_tensor, part_specs, unpack_tensor
from tierstore.formats.fp8 import TOPS
from tierstore.formats.named import FORMATS
from tierstore.formats.small_floats import E2M1, E4M3, SmallFloat, squares_
from tierstore.kernels.fp4_matmul import reference as fp4_reference
from tierstore.kernels.fp8_matmul import reference as fp8_reference
from tierstore.kernels.mxfp4_matmul import reference as mxfp4_reference

NAMES = ("fp8", "fp4", "mxfp4", "bf16")
E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]
FLOAT32_MAX = torch.finfo(torch.float32).max

every_format = pytest.mark.parametrize("form", [FORMATS[name] for name in NAMES], ids=NAMES)
every_4bit_format = pytest.mark.parametrize("form", [FORMATS["fp4"], FORMATS["mxfp4"]], ids=["fp4", "mxfp4"])

sizes = st.tuples(st.integers(1, 5), st.integers(1, 70))
finite = st.floats(-(2.0**100), 2.0**100, width=32) | st.floats(-4, 4, width=32) | st.sampled_from([0.0, -0.0])


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    n, k = draw(sizes)
    if draw(st.booleans()):
        return torch.tensor(draw(st.lists(finite, min_size=n * k, max_size=n * k))).view(n, k)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    return torch.randn(n, k, generator=generator) * 10.0 ** draw(st.integers(-30, 30))


def normal(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def unpacked(form: Format, matrix: Tensor) -> Tensor:
    return form.unpack(form.pack(matrix), *matrix.shape)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Bit for bit: torch does not compare float8."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.uint8), right[name].view(torch.uint8)) for name in left
    )


def scale_of_each(form: Format, parts: dict[str, Tensor], k: int) -> Tensor:
    """What e2m1 values are multiplied with, float64 [n, k]."""
    scales = parts["scales"].float().double() * (parts["scale"].double() if "scale" in parts else 1)
    return scales.repeat_interleave(form.group, 1)[:, :k]


@contextmanager
def tiles_of(elements: int) -> Iterator[None]:
    before = rows.TILE
    rows.TILE = elements
    try:
        yield
    finally:
        rows.TILE = before


# What codes mean


def test_every_e2m1_code_is_the_standards_value() -> None:
    low_first = torch.tensor([[high << 4 | low for high in range(16) for low in range(16)]], dtype=torch.uint8)
    values = fp4_reference.e2m1_values(low_first)
    sixteen = torch.tensor(E2M1_VALUES)
    want = torch.stack((sixteen.repeat(16), sixteen.repeat_interleave(16)), 1).view(1, 512)
    assert torch.equal(values, want)
    assert torch.equal(values.signbit(), want.signbit())


def e4m3(code: int) -> float:
    """The OCP 8-bit floating point specification's E4M3."""
    sign, exponent, mantissa = -1 if code & 128 else 1, code >> 3 & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    return sign * (2.0**-9 * mantissa if not exponent else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def test_every_fp8_code_is_the_standards_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None].view(torch.float8_e4m3fn)
    values = FORMATS["fp8"].unpack({"codes": codes, "scales": torch.tensor([[0.375]])}, 1, 256)
    want = torch.tensor([[e4m3(code) for code in range(256)]]) * 0.375
    torch.testing.assert_close(values, want, rtol=0, atol=0, equal_nan=True)


def test_every_fp4_group_scale_is_the_standards_value() -> None:
    scales = torch.arange(127, dtype=torch.uint8)[:, None].view(torch.float8_e4m3fn)
    codes = torch.full((127, 8), 0x23, dtype=torch.uint8)
    values = FORMATS["fp4"].unpack({"codes": codes, "scales": scales, "scale": torch.tensor([[0.25]])}, 127, 16)
    want = torch.tensor([[e4m3(code) * 0.25] for code in range(127)]) * torch.tensor([1.5, 1.0]).repeat(8)
    assert torch.equal(values, want)


def test_every_mxfp4_scale_is_a_power_of_two() -> None:
    scales = torch.arange(254, dtype=torch.uint8)[:, None].view(torch.float8_e8m0fnu)
    values = FORMATS["mxfp4"].unpack(
        {"codes": torch.full((254, 16), 0x21, dtype=torch.uint8), "scales": scales}, 254, 32
    )
    want = torch.tensor([[2.0 ** (code - 127)] for code in range(254)]) * torch.tensor([0.5, 1.0]).repeat(16)
    assert torch.equal(values, want)


def test_layout_of_fp4_is_written_out() -> None:
    matrix = torch.zeros(2, 17)
    matrix[0, :16] = torch.tensor(E2M1_VALUES) * 448
    matrix[1, 16] = -3 * 224
    parts = FORMATS["fp4"].pack(matrix)
    assert parts["scale"].tolist() == [[1.0]]
    assert parts["scales"].view(torch.uint8)[[0, 1], [0, 1]].tolist() == [0x7E, 0x6E]  # 448 and, as 6 * 112, 112
    assert parts["codes"][0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert parts["codes"][1].tolist() == [0] * 8 + [0x0F] + [0] * 7


def test_layout_of_mxfp4_is_written_out() -> None:
    matrix = torch.zeros(2, 33)
    matrix[0, :16] = torch.tensor(E2M1_VALUES) / 4
    matrix[1, 32] = -1.5
    parts = FORMATS["mxfp4"].pack(matrix)
    assert parts["scales"].view(torch.uint8)[[0, 1], [0, 1]].tolist() == [125, 125]
    assert parts["codes"][0].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] + [0] * 8 + [0] * 16
    assert parts["codes"][1].tolist() == [0] * 16 + [0x0F] + [0] * 15


def test_layout_of_fp8_is_written_out() -> None:
    parts = FORMATS["fp8"].pack(torch.tensor([[0.5, -448.0, 1.0], [224.0, 0.0, -0.5]]))
    assert parts["scales"].tolist() == [[1.0], [0.5]]
    assert parts["codes"].view(torch.uint8).tolist() == [[0x30, 0xFE, 0x38], [0x7E, 0x00, 0xB8]]


@every_format
@pytest.mark.parametrize("shape", [(1, 1), (3, 65), (5, 16), (2, 32), (2, 3, 40), (8, 2, 3, 3), (0, 64), (5, 0)])
def test_parts_are_as_promised(form: Format, shape: tuple[int, ...]) -> None:
    tensor = normal(1, torch.Size(shape).numel()).view(shape)
    parts = pack_tensor(form, tensor)
    assert [(name, str(part.dtype), tuple(part.shape)) for name, part in parts.items()] == [
        (spec.name, f"torch.{spec.dtype}", spec.shape) for spec in part_specs(form, shape)
    ]
    assert all(len(spec.shape) >= 2 for spec in part_specs(form, shape))
    if tensor.numel():
        values = unpack_tensor(form, parts, shape, torch.float32)
        assert values.shape == tensor.shape
        assert (values - tensor).norm() < 0.16 * tensor.norm()
    else:
        assert form.unpack(parts, *shape).shape == shape


# Rounding


def brute_nearest(value: float, grid: list[float]) -> float:
    """Ties to the even place in ``grid``, which lists sizes in the order of their codes."""
    size = min(abs(value), grid[-1])
    best = min(range(len(grid)), key=lambda code: (abs(grid[code] - size), code & 1))
    return grid[best] if value >= 0 else -grid[best]


def rounded(form: SmallFloat, values: Tensor) -> Tensor:
    return form.round_(values.clone(), torch.empty_like(values))


E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def test_e2m1_rounds_ties_to_the_even_code() -> None:
    ties = torch.tensor(E2M1_TIES)
    above, below = torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1)
    assert rounded(E2M1, ties).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert rounded(E2M1, above).tolist() == [0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert rounded(E2M1, below).tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    assert torch.equal(rounded(E2M1, -above), -rounded(E2M1, above))


@given(st.lists(st.floats(-8, 8, width=32) | st.sampled_from([*E2M1_TIES, 1e30, -1e30, 1e-45]), min_size=1))
@settings(deadline=None)
def test_e2m1_rounds_to_the_nearest(values: list[float]) -> None:
    assert rounded(E2M1, torch.tensor(values)).tolist() == [brute_nearest(value, E2M1_VALUES[:8]) for value in values]


def test_e4m3_rounds_as_torch_does() -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).float()
    every = every[every.abs() <= 448]
    every = torch.cat((every, every + every.abs() * 2**-23)).clamp(-448, 448)  # and what is not a bfloat16
    assert torch.equal(rounded(E4M3, every), every.to(torch.float8_e4m3fn).float())


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([0, 1]))
@settings(deadline=None)
def test_sums_of_squares(a: int, b: int, axis: int) -> None:
    values = torch.arange(a * b, dtype=torch.float32).view(a, b)
    assert torch.equal(squares_(values.clone(), axis), (values * values).sum(axis, keepdim=True))


# Laws


@every_4bit_format
@given(matrix=matrices())
@settings(deadline=None)
def test_no_other_4bit_code_is_nearer(form: Format, matrix: Tensor) -> None:
    parts = form.pack(matrix)
    scales = scale_of_each(form, parts, matrix.shape[1])
    errors = (form.unpack(parts, *matrix.shape).double() - matrix.double()).abs()
    others = (torch.tensor(E2M1_VALUES).double() * scales[..., None] - matrix.double()[..., None]).abs().amin(-1)
    assert torch.all(errors <= others + 1e-6 * (scales + matrix.double().abs()))


@given(matrices())
@settings(deadline=None)
def test_fp8_errors_are_half_a_step(matrix: Tensor) -> None:
    parts = FORMATS["fp8"].pack(matrix)
    errors = (FORMATS["fp8"].unpack(parts, *matrix.shape).double() - matrix.double()).abs()
    smallest = parts["scales"].double() * 2**-6  # the least normal code: below it, steps are as at it
    assert torch.all(errors <= torch.maximum(matrix.double().abs(), smallest) * 2**-4 * (1 + 1e-6))


@given(matrices())
@settings(deadline=None)
def test_bf16_is_torchs(matrix: Tensor) -> None:
    assert torch.equal(FORMATS["bf16"].pack(matrix)["codes"], matrix.to(torch.bfloat16))


def plain_errors(name: str, matrix: Tensor) -> Tensor:
    """Squared errors of each group with the scales that standards and papers give, in float64."""
    group = FORMATS[name].group or matrix.shape[1]
    wide = torch.nn.functional.pad(matrix, (0, align_up(matrix.shape[1], group) - matrix.shape[1])).double()
    groups = wide.view(len(wide), -1, group)
    tops = groups.abs().amax(2, keepdim=True)
    if name == "mxfp4":
        scales = 2.0 ** (tops.log2().floor() - 2)
    elif name == "fp8":
        scales = tops / 448
    else:
        whole = tops.max() / (6 * 448)
        scales = (tops / 6 / whole).float().to(torch.float8_e4m3fn).double().clamp_min(2**-9) * whole
    form = E4M3 if name == "fp8" else E2M1
    values = (groups / scales.clamp_min(1e-300)).nan_to_num(0)
    return (rounded(form, values.float().contiguous()).double() * scales - groups).square().sum(2)


@pytest.mark.parametrize("name", ["fp8", "fp4", "mxfp4"])
@given(seed=st.integers(0, 10**6), size=sizes, heavy=st.booleans())
@settings(deadline=None)
def test_scales_are_never_worse_than_plain_ones(name: str, seed: int, size: tuple[int, int], heavy: bool) -> None:
    matrix = normal(*size, seed) ** (3 if heavy else 1)
    form = FORMATS[name]
    group = form.group or size[1]
    wrong = unpacked(form, matrix).double() - matrix.double()
    ours = torch.nn.functional.pad(wrong, (0, align_up(size[1], group) - size[1])).view(size[0], -1, group)
    noise = 1e-6 * matrix.abs().max()  # errors are weighed in float32
    assert torch.all(ours.norm(dim=2) <= plain_errors(name, matrix).sqrt() + noise)


@pytest.mark.parametrize(("name", "most"), [("fp8", 0.0262), ("fp4", 0.0820), ("mxfp4", 0.1125), ("bf16", 0.0018)])
def test_relative_errors_on_normal_weights(name: str, most: float) -> None:
    matrix = normal(256, 1024)
    assert (unpacked(FORMATS[name], matrix) - matrix).norm() <= most * matrix.norm()


codes4 = st.integers(0, 15)


@given(st.data(), st.integers(1, 4), st.integers(1, 4), st.integers(1, 255), st.integers(-60, 60))
@settings(deadline=None)
def test_what_fp4_can_say_round_trips(data: st.DataObject, n: int, groups: int, steps: int, power: int) -> None:
    codes = torch.tensor(data.draw(st.lists(codes4, min_size=n * groups * 16, max_size=n * groups * 16)))
    codes = codes.to(torch.uint8).view(n, groups * 16)
    scales = torch.tensor(data.draw(st.lists(st.integers(32, 126), min_size=n * groups, max_size=n * groups)))
    codes[0, 0], scales[0] = 7, 126  # the largest value of all is 6 * 448, as packing makes it
    parts = {
        "codes": codes[:, 0::2] | codes[:, 1::2] << 4,
        "scales": scales.to(torch.uint8).view(n, groups).view(torch.float8_e4m3fn),
        "scale": torch.tensor([[steps * 2.0**power]]),
    }
    values = FORMATS["fp4"].unpack(parts, n, groups * 16)
    assert torch.equal(unpacked(FORMATS["fp4"], values), values)


@given(st.data(), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None)
def test_what_mxfp4_can_say_round_trips(data: st.DataObject, n: int, groups: int) -> None:
    count = n * groups * 16
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 255), min_size=count, max_size=count)), dtype=torch.uint8)
    scales = torch.tensor(data.draw(st.lists(st.integers(0, 252), min_size=n * groups, max_size=n * groups)))
    parts = {
        "codes": codes.view(n, groups * 16),
        "scales": scales.to(torch.uint8).view(n, groups).view(torch.float8_e8m0fnu),
    }
    values = FORMATS["mxfp4"].unpack(parts, n, groups * 32)
    assert torch.equal(unpacked(FORMATS["mxfp4"], values), values)


@given(st.data(), st.integers(1, 4), st.integers(1, 40), st.integers(1, 2**16), st.integers(-60, 60))
@settings(deadline=None)
def test_what_fp8_can_say_round_trips(data: st.DataObject, n: int, k: int, steps: int, power: int) -> None:
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 120), min_size=n * k, max_size=n * k)), dtype=torch.uint8)
    codes = (codes | torch.tensor(data.draw(st.sampled_from([0, 128])), dtype=torch.uint8)).view(n, k)
    top = data.draw(st.sampled_from(TOPS))
    values = codes.view(torch.float8_e4m3fn).float()  # up to 256
    values[:, 0] = top
    values *= steps * 2.0**power
    assert torch.equal(unpacked(FORMATS["fp8"], values), values)


@every_format
@given(matrix=matrices(), data=st.data())
@settings(deadline=None)
def test_ranges_of_rows_are_slices(form: Format, matrix: Tensor, data: st.DataObject) -> None:
    n, k = matrix.shape
    start = data.draw(st.integers(0, n))
    stop = data.draw(st.integers(start, n))
    parts = form.pack(matrix)
    whole = form.unpack(parts, n, k)
    assert whole.dtype == torch.float32
    assert torch.equal(form.unpack(parts, n, k, start=start, stop=stop), whole[start:stop])
    assert torch.equal(form.unpack(parts, n, k, start=start), whole[start:])


@every_format
@pytest.mark.parametrize("shape", [(17, 130), (1, 4096), (40, 16), (5, 1)])
def test_tiles_change_nothing(form: Format, shape: tuple[int, int]) -> None:
    matrix = normal(*shape) ** 3
    want = form.pack(matrix)
    for elements in (1, 100, 1000):
        with tiles_of(elements):
            assert same(form.pack(matrix), want)


@every_format
@pytest.mark.parametrize("shape", [(40, 4000), (1, 150_000)])
def test_threads_change_nothing(form: Format, shape: tuple[int, int]) -> None:
    matrix = normal(*shape) ** 3
    want = form.pack(matrix)
    with threads(3):
        assert same(form.pack(matrix), want)


@pytest.mark.parametrize("name", ["fp8", "mxfp4", "bf16"])
def test_rows_do_not_know_each_other(name: str) -> None:
    matrix = normal(9, 333)
    whole = FORMATS[name].pack(matrix)
    for row in range(9):
        one = FORMATS[name].pack(matrix[row : row + 1])
        assert same(one, {part: values[row : row + 1] for part, values in whole.items()})


# Edges


@every_format
@pytest.mark.parametrize("value", [0.0, -0.0, 1e30, -3e38, 1e-30, 2.0**-126])
def test_extreme_values(form: Format, value: float) -> None:
    matrix = torch.full((3, 50), value)
    matrix[1] = 0
    matrix[2, 1:] = 0
    values = unpacked(form, matrix)
    assert values.isfinite().all()
    assert torch.equal(values == 0, matrix == 0)
    assert (values - matrix).norm() <= 0.2 * matrix.norm()


@every_format
@pytest.mark.parametrize("power", range(-149, -120))
def test_values_too_small_for_a_format_become_small(form: Format, power: int) -> None:
    matrix = torch.full((1, 40), 2.0**power)
    matrix[0, 0] *= -1.5
    assert (unpacked(form, matrix) - matrix).abs().max() <= max(2.0**-127, matrix.abs().max().item() / 4)


@every_format
def test_nothing_is_divided_by_a_scale_that_may_flush_to_zero(form: Format) -> None:
    matrix = torch.stack([torch.full((40,), 2.0**power) for power in (-120, -110, -100)])
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor always keeps denormals")
    try:
        values = [unpacked(form, matrix[:rows]) for rows in range(1, 4)]
    finally:
        torch.set_flush_denormal(False)
    assert all(torch.all((some[-1] - matrix[len(some) - 1]).abs() <= some[-1] / 4) for some in values)


@pytest.mark.parametrize("name", ["fp8", "fp4", "mxfp4"])
def test_the_largest_float32_values(name: str) -> None:
    matrix = torch.tensor([[FLOAT32_MAX]]).repeat(64, 64)
    bits = torch.randint(0, 1 << 20, (64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    matrix = (matrix.view(torch.int32) - bits).view(torch.float32)
    values = unpacked(FORMATS[name], matrix)
    assert values.isfinite().all()
    assert torch.all((values.double() - matrix.double()).abs() <= 0.26 * matrix.double())


def test_group_of_one_large_value_among_small_ones() -> None:
    matrix = normal(8, 64) * 1e-6
    matrix[0, 0] = 1e6
    for name in NAMES:
        values = unpacked(FORMATS[name], matrix)
        assert abs(values[0, 0] - 1e6) < 0.05e6
    for name in ("fp8", "mxfp4"):  # rows and groups beside it are as good as ever
        values = unpacked(FORMATS[name], matrix)
        assert (values[1:] - matrix[1:]).norm() < 0.15 * matrix[1:].norm()


def test_scales_of_mxfp4_are_never_nan() -> None:
    matrix = torch.tensor([[2.0**power] * 32 for power in range(-149, 128)] + [[FLOAT32_MAX] * 32, [0.0] * 32])
    scales = FORMATS["mxfp4"].pack(matrix)["scales"]
    assert scales.view(torch.uint8).max() <= 252
    assert scales.view(torch.uint8).min() == 0


@every_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_values_that_are_not_finite_are_counted(form: Format, dtype: torch.dtype) -> None:
    matrix = normal(40, 30).to(dtype)
    matrix[3, 4] = torch.nan
    matrix[39, 29] = torch.inf
    matrix[20, 0] = -torch.inf
    with tiles_of(300), pytest.raises(ModuleError, match=r"3 of 1200 values are not finite.*keep"):
        form.pack(matrix)


@every_format
def test_values_beyond_float32_are_not_finite(form: Format) -> None:
    with pytest.raises(ModuleError, match="1 of 4 values are not finite as float32"):
        form.pack(torch.tensor([[1.0, 1e300], [2.0, 3.0]], dtype=torch.float64))


def test_values_beyond_bfloat16_are_counted() -> None:
    with pytest.raises(ModuleError, match=r"2 of 4 values are beyond bfloat16's 3\.39e\+38"):
        FORMATS["bf16"].pack(torch.tensor([[FLOAT32_MAX, 1.0], [2.0, -FLOAT32_MAX]]))


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_packs_as_its_float32(form: Format, dtype: torch.dtype) -> None:
    matrix = normal(5, 70).to(dtype)
    assert same(form.pack(matrix), form.pack(matrix.float()))


@every_format
def test_any_strides_and_gradients(form: Format) -> None:
    wide = normal(40, 90)
    want = form.pack(wide[::2, ::3].contiguous())
    assert same(form.pack(wide[::2, ::3]), want)
    assert same(form.pack(wide[::2, ::3].T.contiguous().T), want)
    parameter = torch.nn.Parameter(wide[::2, ::3].contiguous())
    assert same(form.pack(parameter), want)
    assert not any(part.requires_grad for part in form.pack(parameter).values())


@every_format
def test_packing_leaves_its_input_alone(form: Format) -> None:
    matrix = normal(30, 70)
    before = matrix.clone()
    form.pack(matrix)
    assert torch.equal(matrix, before)


class Sizes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the shapes of all tensors that operations make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(one.shape) for one in torch.utils._pytree.tree_leaves(made) if isinstance(one, Tensor)}
        return made


@every_format
def test_packing_takes_a_few_tiles(form: Format) -> None:
    n, k, elements = 120, 330, 2000
    matrix = normal(n, k)
    with tiles_of(elements), Sizes() as made:
        parts = form.pack(matrix)
    whole = {tuple(part.shape) for part in parts.values()} | {(n, k)}  # the input itself, and the parts
    assert max(torch.Size(shape).numel() for shape in made.shapes - whole) <= elements * 352 / 330


# References


@pytest.mark.parametrize("m", [0, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_products(m: int, dtype: torch.dtype) -> None:
    x, matrix = normal(m, 90).to(dtype), normal(11, 90, seed=1)
    for name, reference in (("fp8", fp8_reference), ("fp4", fp4_reference), ("mxfp4", mxfp4_reference)):
        parts = FORMATS[name].pack(matrix)
        product = reference.matmul(x, *parts.values(), n=11)
        assert product.dtype == dtype
        assert torch.equal(product, (x.float() @ unpacked(FORMATS[name], matrix).T).to(dtype))
