"""A packed matrix a few rows at a time, unpacked into memory that is used again.

The values are exactly those of ``Format.unpack``, rounded to the wanted dtype. The way there is shorter: few passes,
each over a tile that stays near a core, and codes become numbers by integer operations on many of them at once.
Arithmetic is float32 for every dtype: measured, that is faster than the same in bfloat16, and it rounds once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from tierstore.extents import align_up
from tierstore.formats.bf16 import Bf16
from tierstore.formats.format import Format, Parts
from tierstore.formats.fp4 import Fp4
from tierstore.formats.fp8 import Fp8
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.mxfp4 import MxFp4
from tierstore.formats.scales import int4_scales, int8_scales, words
from tierstore.formats.scratch import Scratch
from tierstore.formats.tile64 import HALF
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.kernels.int8_matmul.reference import MIDDLE, PLANES

TILE = 3 << 18
"""Elements of a tile, unless 64 rows have more."""

Unpack = Callable[[int], Tensor]
"""The values from a row on, [rows or more, k or more], float32 or as stored, contiguous or the transpose of that. Valid
until the next call."""

Prepare = Callable[[int], Unpack]
"""For a number of rows at a time. Buffers are taken and shaped here, once, and not for every tile."""

Fill = Callable[[slice], None]


def tiles(
    form: Format, parts: Parts, n: int, k: int, dtype: torch.dtype, scratch: Scratch
) -> Iterator[tuple[int, Tensor]]:
    """The matrix [n, k] of ``parts`` tile by tile: the number of its first row, and its values [rows, k] as ``dtype``.

    The tensor is valid until the next one is asked for; it may be a transpose. ``dtype`` is a floating one.
    """
    if not n * k:
        return
    prepare = _UNPACKERS.get(type(form), _slowly)(form, parts, n, k, scratch)
    step = max(1, TILE // k // ROWS) * ROWS
    for start, rows in ((0, step), (n // step * step, n % step)):
        if not rows or start + rows > n:
            continue
        unpack, rounded = prepare(rows), None
        for first in range(start, n - rows + 1, rows):
            values = unpack(first)
            if values.dtype is not dtype:
                if rounded is None:
                    rounded = _like(values, dtype, scratch)
                values = rounded.copy_(values)
            yield first, values[:rows, :k]


def _like(values: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    if values.is_contiguous():
        return scratch.take("rounded", tuple(values.shape), dtype, values.device)
    return scratch.take("rounded", tuple(values.T.shape), dtype, values.device).T


def _slowly(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    return lambda rows: lambda first: form.unpack(parts, n, k, start=first, stop=first + rows)


def _bf16(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    return lambda rows: lambda first: parts["codes"][first : first + rows]


def _int4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    codes = words(parts["codes"], torch.int64)
    pairs = words(parts["scales"], torch.int32)[..., 0]

    def prepare_codes(low: Tensor, high: Tensor) -> Fill:
        def fill(blocks: slice) -> None:
            torch.bitwise_xor(codes[blocks], _bytes(0x88), out=high)  # as a number with a sign, a nibble q is q - 8 now
            torch.bitwise_left_shift(high, 4, out=low)
            low.bitwise_and_(_bytes(0xF0))
            high.bitwise_and_(_bytes(0xF0))

        return fill

    def scales(blocks: slice) -> tuple[Tensor, Tensor]:
        scale, zero = int4_scales(pairs[:, blocks.start * ROWS : blocks.stop * ROWS], scratch)
        return scale.mul_(1 / 16), zero  # the codes are in the upper halves of bytes

    return _turned(prepare_codes, scales, form.group, parts["codes"], scratch)


def _int8(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    lower, upper = (words(parts[plane], torch.int64) for plane in ("low", "high"))
    scale_codes, steps = words(parts["scales"], torch.int16), parts["steps"]

    def prepare_codes(low: Tensor, high: Tensor) -> Fill:
        spare = scratch.take("nibbles", tuple(low.shape), low.dtype, low.device)

        def fill(blocks: slice) -> None:
            torch.bitwise_and(lower[blocks], _bytes(0x0F), out=low)
            torch.bitwise_xor(upper[blocks], _bytes(0x88), out=high)
            torch.bitwise_left_shift(high, 4, out=spare)
            low.bitwise_or_(spare.bitwise_and_(_bytes(0xF0)))
            torch.bitwise_right_shift(lower[blocks], 4, out=spare)
            high.bitwise_and_(_bytes(0xF0)).bitwise_or_(spare.bitwise_and_(_bytes(0x0F)))

        return fill

    def scales(blocks: slice) -> tuple[Tensor, Tensor]:
        scale, zero = int8_scales(scale_codes[blocks], steps[blocks.start * ROWS : blocks.stop * ROWS], scratch)
        return scale, zero.mul_(PLANES).add_(scale, alpha=128 - MIDDLE)  # bytes with a sign hold the codes less 128

    return _turned(prepare_codes, scales, form.group, parts["low"], scratch)


def _turned(
    prepare_codes: Callable[[Tensor, Tensor], Fill],
    scales: Callable[[slice], tuple[Tensor, Tensor]],
    group: int,
    tile64: Tensor,
    scratch: Scratch,
) -> Prepare:
    """``code * scale + zero`` for codes in ``tile64``, which stand column by column, and so will the values.

    ``prepare_codes(low, high)`` gives what fills these two, int64 [blocks, kp * 4], for some blocks of 64 rows: with
    codes as bytes with a sign, those of the lower 32 rows of each block and those of the upper. ``scales`` gives
    (scale, zero) of these blocks, float32 [kp / group, rows].
    """
    k, device = tile64.shape[1] // HALF, tile64.device

    def prepare(rows: int) -> Unpack:
        count = align_up(rows, ROWS) // ROWS
        codes = scratch.take("codes", (2, count, k * HALF // 8), torch.int64, device)
        values = scratch.take("values", (k, count, 2, HALF), torch.float32, device)
        fill, columns = prepare_codes(codes[0], codes[1]), codes.view(torch.int8).view(2, count, k, HALF)
        # Copies of two axes each take a third of the time of one with four.
        copies = [(values[:, block, half], columns[half, block]) for block in range(count) for half in (0, 1)]
        grouped, tile = values.view(k // group, group, -1), values.view(k, -1).T

        def unpack(first: int) -> Tensor:
            blocks = slice(first // ROWS, first // ROWS + count)
            fill(blocks)
            for into, those in copies:
                into.copy_(those)
            scale, zero = scales(blocks)
            torch.addcmul(zero[:, None], grouped, scale[:, None], out=grouped)
            return tile

        return unpack

    return prepare


def _int8_row(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    codes, scales = parts["codes"], parts["scales"].float()

    def prepare(rows: int) -> Unpack:
        values = scratch.take("values", (rows, k), torch.float32, codes.device)
        return lambda first: values.copy_(codes[first : first + rows]).mul_(scales[first : first + rows])

    return prepare


def _fp8(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    codes, scales = parts["codes"].view(torch.int8), parts["scales"] * E4M3_UNIT

    def prepare(rows: int) -> Unpack:
        widen = _e4m3("values", (rows, k), codes.device, scratch)
        return lambda first: widen(codes[first : first + rows]).mul_(scales[first : first + rows])

    return prepare


def _fp4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    codes, scales, scale = parts["codes"], parts["scales"].view(torch.int8), parts["scale"]

    def prepare(rows: int) -> Unpack:
        widen = _e2m1((rows, codes.shape[1]), scales.shape[1], codes.device, scratch)
        factors = _e4m3("factors", (rows, scales.shape[1]), codes.device, scratch)

        def unpack(first: int) -> Tensor:
            there = slice(first, first + rows)
            return widen(codes[there], factors(scales[there]).mul_(E4M3_UNIT * E2M1_UNIT)).mul_(scale)

        return unpack

    return prepare


def _mxfp4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Prepare:
    codes, scales = parts["codes"], parts["scales"].view(torch.uint8)
    if scales.max() >= 255 - E2M1_UNIT_BITS:  # in units beyond float32
        return _slowly(form, parts, n, k, scratch)

    def prepare(rows: int) -> Unpack:
        widen = _e2m1((rows, codes.shape[1]), scales.shape[1], codes.device, scratch)
        bits = scratch.take("factors", (rows, scales.shape[1]), torch.int32, scales.device)

        def unpack(first: int) -> Tensor:
            there = slice(first, first + rows)
            bits.copy_(scales[there]).bitwise_left_shift_(23).clamp_min_(1 << 22)  # code 0 is 2^-127, denormal
            return widen(codes[there], bits.view(torch.float32).mul_(E2M1_UNIT))

        return unpack

    return prepare


# A float16 holds every value of these small floats in bits of the same order, their denormals as its own, and
# processors widen float16 to float32 in no time. Only the exponents have another bias, which makes a unit.

E4M3_UNIT = 2.0 ** (15 - 7)
E2M1_UNIT_BITS = 15 - 1
E2M1_UNIT = 2.0**E2M1_UNIT_BITS


def _e4m3(purpose: str, shape: tuple[int, int], device: torch.device, scratch: Scratch) -> Callable[[Tensor], Tensor]:
    """From codes, int8 of ``shape``, to float32 that lacks a factor of ``E4M3_UNIT``. Not for NaN, which none packs."""
    bits = scratch.take("bits", shape, torch.int16, device)
    halves, values = bits.view(torch.float16), scratch.take(purpose, shape, torch.float32, device)

    def widen(codes: Tensor) -> Tensor:
        bits.copy_(codes).mul_(1 << 7).bitwise_and_(~(1 << 14))
        return values.copy_(halves)

    return widen


def _e2m1(
    shape: tuple[int, int], groups: int, device: torch.device, scratch: Scratch
) -> Callable[[Tensor, Tensor], Tensor]:
    """From codes, two in each byte of ``shape``, and factors, float32 [rows, groups], to their products, float32
    [rows, kp], that lack a factor of ``E2M1_UNIT``."""
    rows, columns = shape[0], 2 * shape[1]
    pairs = scratch.take("bits", shape, torch.int32, device)
    bits, values = pairs.view(torch.int16), scratch.take("values", (rows, columns), torch.float32, device)
    halves, grouped = bits.view(torch.float16), values.view(rows, groups, -1)

    def widen(codes: Tensor, factors: Tensor) -> Tensor:
        # Each code to the upper end of 16 bits. What is left of its neighbour below, the mask takes away.
        pairs.copy_(codes).mul_((1 << 12) + (1 << 24))
        bits.bitwise_right_shift_(3).bitwise_and_(0x0E00 - 0x8000)
        values.copy_(halves)
        grouped.mul_(factors[:, :, None])
        return values

    return widen


def _bytes(byte: int) -> int:
    """An int64 of eight times the same byte."""
    return int.from_bytes(bytes((byte,)) * 8, "little", signed=True)


_UNPACKERS: Mapping[type, Callable[[Format, Parts, int, int, Scratch], Prepare]] = {
    Int4: _int4,
    Int8: _int8,
    Int8Row: _int8_row,
    Fp8: _fp8,
    Fp4: _fp4,
    MxFp4: _mxfp4,
    Bf16: _bf16,
}
