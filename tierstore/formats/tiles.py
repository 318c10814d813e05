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

TILE = 3 << 17
"""Elements of a tile, unless 64 rows have more."""

Unpack = Callable[[int, int], Tensor]
"""At least the rows from one to before another, [rows or more, k or more], float32 or as stored, contiguous or the
transpose of that. Valid until the next call."""


def tiles(
    form: Format, parts: Parts, n: int, k: int, dtype: torch.dtype, scratch: Scratch
) -> Iterator[tuple[int, Tensor]]:
    """The matrix [n, k] of ``parts`` tile by tile: the number of its first row, and its values [rows, k] as ``dtype``.

    The tensor is valid until the next one is asked for; it may be a transpose. ``dtype`` is a floating one.
    """
    step = max(1, TILE // max(k, 1) // ROWS) * ROWS
    unpack = _UNPACKERS.get(type(form), _slowly)(form, parts, n, k, scratch)
    for first in range(0, n, step):
        last = min(first + step, n)
        yield first, _rounded(unpack(first, last), dtype, scratch)[: last - first, :k]


def _rounded(tile: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    if tile.dtype is dtype:
        return tile
    straight = tile if tile.is_contiguous() else tile.T
    rounded = scratch.take("rounded", straight.shape, dtype, tile.device).copy_(straight)
    return rounded if straight is tile else rounded.T


def _slowly(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    return lambda first, last: form.unpack(parts, n, k, start=first, stop=last)


def _bf16(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    return lambda first, last: parts["codes"][first:last]


def _int4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    codes = words(parts["codes"], torch.int64, scratch)
    scale, zero = int4_scales(parts["scales"], scratch)
    scale.mul_(1 / 16)  # codes come out in the upper halves of bytes

    def signed(blocks: slice, low: Tensor, high: Tensor) -> None:
        torch.bitwise_xor(codes[blocks], _bytes(0x88), out=high)  # as a number with a sign, a nibble q is q - 8 then
        torch.bitwise_left_shift(high, 4, out=low)
        low.bitwise_and_(_bytes(0xF0))
        high.bitwise_and_(_bytes(0xF0))

    return _turned(signed, scale, zero, form.group, scratch)


def _int8(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    lower, upper = (words(parts[plane], torch.int64, scratch) for plane in ("low", "high"))
    scale, zero = int8_scales(parts["scales"], parts["steps"], scratch)
    zero.mul_(PLANES).add_(scale, alpha=128 - MIDDLE)  # codes come out less 128, which is what a byte with a sign holds

    def signed(blocks: slice, low: Tensor, high: Tensor) -> None:
        spare = scratch.take("nibbles", low.shape, torch.int64, low.device)
        torch.bitwise_and(lower[blocks], _bytes(0x0F), out=low)
        torch.bitwise_xor(upper[blocks], _bytes(0x88), out=high)
        torch.bitwise_left_shift(high, 4, out=spare)
        low.bitwise_or_(spare.bitwise_and_(_bytes(0xF0)))
        torch.bitwise_right_shift(lower[blocks], 4, out=spare)
        high.bitwise_and_(_bytes(0xF0)).bitwise_or_(spare.bitwise_and_(_bytes(0x0F)))

    return _turned(signed, scale, zero, form.group, scratch)


def _turned(
    signed: Callable[[slice, Tensor, Tensor], None], scale: Tensor, zero: Tensor, group: int, scratch: Scratch
) -> Unpack:
    """``code * scale + zero`` for codes in ``tile64``, which stand column by column, and so do the values.

    ``signed`` writes the codes of blocks of 64 rows as bytes with a sign, [blocks, k * 32], the lower 32 rows of each
    block apart from the upper.
    """
    groups, device = scale.shape[0], scale.device
    k = groups * group

    def unpack(first: int, last: int) -> Tensor:
        blocks = slice(first // ROWS, align_up(last, ROWS) // ROWS)
        count = blocks.stop - blocks.start
        codes = scratch.take("codes", (2, count, k * HALF // 8), torch.int64, device)
        signed(blocks, codes[0], codes[1])
        columns = codes.view(torch.int8).view(2, count, k, HALF)
        values = scratch.take("values", (k, count, 2, HALF), torch.float32, device)
        for block in range(count):  # with two axes each, these copies take a third of the time of one with four
            values[:, block, 0].copy_(columns[0, block])
            values[:, block, 1].copy_(columns[1, block])
        grouped, rows = values.view(groups, group, -1), slice(blocks.start * ROWS, blocks.stop * ROWS)
        torch.addcmul(zero[:, None, rows], grouped, scale[:, None, rows], out=grouped)
        return values.view(k, -1).T

    return unpack


def _int8_row(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    codes, scales = parts["codes"], parts["scales"].float()

    def unpack(first: int, last: int) -> Tensor:
        values = scratch.take("values", (last - first, k), torch.float32, codes.device)
        return values.copy_(codes[first:last]).mul_(scales[first:last])

    return unpack


def _fp8(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    codes, scales = parts["codes"].view(torch.int8), parts["scales"] * E4M3_UNIT

    def unpack(first: int, last: int) -> Tensor:
        return _e4m3("values", codes[first:last], scratch).mul_(scales[first:last])

    return unpack


def _fp4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    codes, scales, scale = parts["codes"], parts["scales"].view(torch.int8), parts["scale"]

    def unpack(first: int, last: int) -> Tensor:
        factors = _e4m3("factors", scales[first:last], scratch).mul_(E4M3_UNIT * E2M1_UNIT)
        return _grouped(codes[first:last], factors, scratch).mul_(scale)

    return unpack


def _mxfp4(form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Unpack:
    codes, scales = parts["codes"], parts["scales"].view(torch.uint8)
    if scales.numel() and scales.max() >= 255 - E2M1_UNIT_BITS:  # beyond float32 with the unit
        return _slowly(form, parts, n, k, scratch)

    def unpack(first: int, last: int) -> Tensor:
        exponents = scratch.take("factors", (last - first, scales.shape[1]), torch.int32, scales.device)
        exponents.copy_(scales[first:last]).bitwise_left_shift_(23).clamp_min_(1 << 22)  # code 0 is 2^-127, denormal
        return _grouped(codes[first:last], exponents.view(torch.float32).mul_(E2M1_UNIT), scratch)

    return unpack


def _grouped(codes: Tensor, factors: Tensor, scratch: Scratch) -> Tensor:
    """Float32 [rows, kp]: e2m1 ``codes`` uint8 [rows, kp / 2], in units, times ``factors`` [rows, kp / group]."""
    values = _e2m1("values", codes, scratch)
    values.view(*factors.shape, -1).mul_(factors[:, :, None])
    return values


# A float16 has all the bits of these small floats, denormals too. Every processor widens float16 to float32 fast.

E4M3_UNIT = 2.0**8
"""The difference of the exponents' biases, 15 and 7."""

E2M1_UNIT_BITS = 14
E2M1_UNIT = 2.0**E2M1_UNIT_BITS
"""The same for biases of 15 and 1."""


def _e4m3(purpose: str, codes: Tensor, scratch: Scratch) -> Tensor:
    """``codes``, int8, as float32 in units of 1 / ``E4M3_UNIT``. Not for NaN, which no format makes."""
    halves = scratch.take("halves", codes.shape, torch.int16, codes.device)
    halves.copy_(codes).mul_(1 << 7).bitwise_and_(~(1 << 14))
    return scratch.take(purpose, codes.shape, torch.float32, codes.device).copy_(halves.view(torch.float16))


def _e2m1(purpose: str, codes: Tensor, scratch: Scratch) -> Tensor:
    """``codes``, two in each byte of uint8 [rows, b], as float32 [rows, 2 b] in units of 1 / ``E2M1_UNIT``."""
    pairs = scratch.take("halves", codes.shape, torch.int32, codes.device)
    # Each code at the upper end of 16 bits; below there is a part of its neighbour, which the mask takes away.
    halves = pairs.copy_(codes).mul_((1 << 12) + (1 << 24)).view(torch.int16)
    halves.bitwise_right_shift_(3).bitwise_and_(0x0E00 - 0x8000)
    return scratch.take(purpose, halves.shape, torch.float32, codes.device).copy_(halves.view(torch.float16))


def _bytes(byte: int) -> int:
    """An int64 of eight times the same byte."""
    return int.from_bytes(bytes((byte,)) * 8, "little", signed=True)


_UNPACKERS: Mapping[type, Callable[[Format, Parts, int, int, Scratch], Unpack]] = {
    Int4: _int4,
    Int8: _int8,
    Int8Row: _int8_row,
    Fp8: _fp8,
    Fp4: _fp4,
    MxFp4: _mxfp4,
    Bf16: _bf16,
}
