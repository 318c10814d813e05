"""Where the parts of a cell stand, in integers: see ``reference.py`` for what they hold."""

from __future__ import annotations

from dataclasses import dataclass

ALIGN = 16
"""Each part starts at a multiple of it, so that wide loads need no check."""
SCALE_NBYTES = 2
CODE_BITS = {"int8": 8, "fp8": 8, "int4": 4, "fp4": 4, "int2": 2}
"""Bits of a code in each format."""
BY_TOKEN = ("int8", "fp8")
"""Formats with one scale for each token of a head, and nothing else. The others have scales and zeros of keys by
channel, of values by token, and the page's first token unpacked."""


@dataclass(frozen=True, slots=True)
class CellLayout:
    """Byte offsets of the parts of a cell, and the bytes of the whole cell, padding included.

    ``key_first`` and ``value_first`` are where a page's first token would stand in formats that do not keep it.
    """

    key_codes: int
    value_codes: int
    key_scales: int
    value_scales: int
    nbytes: int
    key_first: int = 0
    value_first: int = 0


def layout_of(name: str, heads: int, tokens: int, key_dim: int, value_dim: int) -> CellLayout:
    """The layout of cells of format ``name``. ``tokens`` are a multiple of 4, and more than 4."""
    bits = CODE_BITS[name]
    sizes = [heads * (tokens * bits // 8) * dim for dim in (key_dim, value_dim)]
    if name in BY_TOKEN:
        sizes += [heads * tokens * SCALE_NBYTES] * 2
    else:
        sizes += [heads * 2 * count * SCALE_NBYTES for count in (key_dim, tokens)]
        sizes += [heads * dim * SCALE_NBYTES for dim in (key_dim, value_dim)]
    starts = [0]
    for nbytes in sizes:
        starts.append(starts[-1] + -(-nbytes // ALIGN) * ALIGN)
    key_codes, value_codes, key_scales, value_scales, *first, nbytes = starts
    return CellLayout(key_codes, value_codes, key_scales, value_scales, nbytes, *first)
