"""Rounding to codes and to bfloat16 by Triton, bit for bit as ``codes.py`` does it, on every card."""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from tierstore.kernels.kv_pages import codes as reference

TINY: tl.constexpr = tl.constexpr(reference.TINY)
HUGE: tl.constexpr = tl.constexpr(reference.HUGE)
NAN: tl.constexpr = tl.constexpr(0x7FC0)
"""The bits of bfloat16's NaN."""


@triton.jit
def is_finite(values: tl.tensor) -> tl.tensor:
    """Neither infinite nor NaN."""
    return values - values == 0


@triton.jit
def as_held(values: tl.tensor) -> tl.tensor:
    """As bfloat16 holds them, ties to even, in float32. NaN become anything."""
    bits = values.to(tl.int32, bitcast=True)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def usable(values: tl.tensor, good: tl.tensor) -> tl.tuple:
    """Scales as bfloat16 holds them, 0 where they are tiny, and which of them are not huge."""
    held = as_held(values)
    good = good & is_finite(values) & (held <= HUGE)
    return tl.where(held < TINY, 0.0, held), good


@triton.jit
def store_held(start: tl.tensor, values: tl.tensor, good: tl.tensor, mask: tl.tensor) -> None:
    """To bfloat16 at ``start``: what bfloat16 holds, and NaN where it is not ``good``."""
    bits = (as_held(values).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    tl.store(start, tl.where(good, bits, NAN).to(tl.int16), mask=mask)


@triton.jit
def scaled(values: tl.tensor, scales: tl.tensor, good: tl.tensor) -> tl.tensor:
    """``values / scales``, by the inverse; 0 where there is none, or where there was no number."""
    there = good & (scales > 0)
    inverse = tl.where(there, tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), tl.where(there, scales, 1.0)), 0.0)
    found = values * inverse
    return tl.where(found == found, found, 0.0)


@triton.jit
def to_whole(numbers: tl.tensor) -> tl.tensor:
    """The nearest whole numbers, ties to even, below 2 ** 22."""
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def to_e4m3(numbers: tl.tensor) -> tl.tensor:
    """Codes, int32, nearest to ``numbers`` from -448 to 448: ties to even."""
    bits = numbers.to(tl.int32, bitcast=True)
    sizes = tl.abs(numbers)
    binade = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    step = tl.maximum(binade, 0.015625) * 1572864.0  # beside it float32 itself has steps of an eighth of the binade
    sizes = (sizes + step) - step
    normal = (sizes.to(tl.int32, bitcast=True) >> 20) - 960
    codes = tl.where(sizes >= 0.015625, normal, (sizes * 512.0).to(tl.int32))
    return codes | ((bits >> 24) & 0x80)


@triton.jit
def few_bits(
    x: tl.tensor, scales: tl.tensor, zeros: tl.tensor, good: tl.tensor, FLOAT: tl.constexpr, MOST: tl.constexpr
) -> tl.tensor:
    """int32 codes of few bits."""
    numbers = scaled(x - zeros, scales, good)
    if FLOAT:
        sizes = tl.abs(numbers)
        codes = tl.where(numbers < 0, 8, 0)
        codes += (sizes > 0.25).to(tl.int32) + (sizes > 0.75).to(tl.int32) + (sizes > 1.25).to(tl.int32)
        codes += (sizes > 1.75).to(tl.int32) + (sizes > 2.5).to(tl.int32) + (sizes > 3.5).to(tl.int32)
        codes += (sizes > 5.0).to(tl.int32)
        return codes
    return to_whole(tl.minimum(tl.maximum(numbers, 0.0), MOST)).to(tl.int32)


@triton.jit
def values_of(codes: tl.tensor, FLOAT: tl.constexpr) -> tl.tensor:
    """What codes of few bits are before scale and zero, as float32."""
    if FLOAT:
        sizes = codes & 7
        doubled = tl.maximum(tl.maximum(sizes, sizes * 2 - 4), sizes * 4 - 16).to(tl.float32) * 0.5
        return tl.where(codes < 8, doubled, -doubled)
    return codes.to(tl.float32)


@triton.jit
def store_first(where: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    """To bfloat16: infinities too."""
    bits = (as_held(values).to(tl.int32, bitcast=True) >> 16) & 0xFFFF
    tl.store(where, tl.where(values == values, bits, NAN).to(tl.int16), mask=mask)
