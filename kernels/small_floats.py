"""Floats of 4 and 8 bits made float32 by shifts and one product, so on every card.

The bits are put where float32 has its sign, the end of its exponent and the start of its fraction. The exponent is then
off by the difference of the two biases, which a product with a power of two makes good, exactly, subnormals as well.
"""

# mypy: allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def e4m3(codes: tl.tensor) -> tl.tensor:
    """float32 of uint8 ``codes`` with 4 bits of exponent and 3 of fraction, no infinities, as ``float8_e4m3fn``."""
    high = codes.to(tl.int32) << 24
    values = ((high >> 4) & -0x78100000).to(tl.float32, bitcast=True) * 2.0**120
    return tl.where((high & 0x7F000000) == 0x7F000000, float("nan"), values)


@triton.jit
def e2m1(high: tl.tensor) -> tl.tensor:
    """float32 of int32 whose highest 4 bits are a sign, 2 bits of exponent and 1 of fraction: 0 to 6."""
    return ((high >> 6) & -0x7E400000).to(tl.float32, bitcast=True) * 2.0**126


@triton.jit
def e8m0(codes: tl.tensor) -> tl.tensor:
    """float32 of uint8 ``codes`` that are exponents only: 2 ** (code - 127), and 255 is not a number."""
    wide = codes.to(tl.int32)
    bits = tl.where(wide == 0, 1 << 22, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
