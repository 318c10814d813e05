"""Where the parts of a cell stand, in integers: codes of keys, codes of values, scales of keys, scales of values."""

from __future__ import annotations

from dataclasses import dataclass

ALIGN = 16
"""Each part starts at a multiple of it, so that wide loads need no check."""


@dataclass(frozen=True, slots=True)
class CellLayout:
    """Byte offsets of the four parts in a cell, and the bytes of the whole cell, padding included."""

    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    nbytes: int


def lay_out(key_codes: int, value_codes: int, key_scales: int, value_scales: int) -> CellLayout:
    """The layout of parts of so many bytes, each at the first multiple of ``ALIGN`` behind the one before."""
    starts = [0]
    for nbytes in (key_codes, value_codes, key_scales, value_scales):
        starts.append(starts[-1] + -(-nbytes // ALIGN) * ALIGN)
    return CellLayout(*starts)
