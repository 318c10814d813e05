"""8-bit codes with one scale a row: the plainest format, and the fastest to multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.formats.format import Parts
from tierstore.formats.rows import row_tiles
from tierstore.formats.search import TINY, as_bfloat16, inverse
from tierstore.formats.small_floats import squares_
from tierstore.kernels.int8_row_matmul import reference
from tierstore.tensors import TensorSpec

SHARES = (129 / 127, 128 / 127, 1.0, 0.98, 0.95, 0.9)
"""How much of a row's range the codes are laid over: a few values at the end of a long row are worth less than finer
steps. Those above 1 make room at the shorter side of the codes and for the rounding of the scale."""

LARGEST = torch.finfo(torch.bfloat16).max / 128
"""The largest scale with which no code overflows."""


@dataclass(frozen=True)
class Int8Row:
    """``code * scale``, as torch's ``_weight_int8pack_mm`` reads it. Scales may be negative."""

    @property
    def name(self) -> str:
        return "int8-row"

    @property
    def group(self) -> int:
        return 0

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return TensorSpec("codes", "int8", (n, k)), TensorSpec("scales", "bfloat16", (n, 1))

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        codes = matrix.new_empty((n, k), dtype=torch.int8)
        scales = matrix.new_zeros((n, 1), dtype=torch.bfloat16)
        for rows, tile in row_tiles(matrix) if k else ():
            scale = best_row_scales(tile)
            codes[rows] = (tile * inverse(scale)).round_().clamp_(-128, 127)
            scales[rows] = scale
        return {"codes": codes, "scales": scales}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(start, n if stop is None else stop)
        return reference.unpack(parts["codes"][rows], parts["scales"][rows], rows.stop - rows.start, k)


def best_row_scales(tile: Tensor) -> Tensor:
    """For each row of ``tile`` [rows, k] the scale, float32 [rows, 1] that bfloat16 holds, of the least squared error
    among those that ``SHARES`` lead to."""
    low, high = tile.amin(1, keepdim=True), tile.amax(1, keepdim=True)
    # The farther end becomes -128, which has no positive twin: by a negative scale where it is the upper end.
    end = torch.where(high > -low, high, low)
    unit = inverse(torch.where(end.abs() < TINY, 0.0, end))
    exact, codes = torch.empty_like(tile), torch.empty_like(tile)
    best, least = torch.zeros_like(end), torch.full_like(end, torch.inf)
    for share in SHARES:
        scale = as_bfloat16(end * (-share / 128)).clamp_(-LARGEST, LARGEST)
        torch.mul(tile, inverse(scale), out=exact)
        torch.round(exact, out=codes).clamp_(-128, 127)
        errors = squares_(exact.sub_(codes), 1) * (scale * unit).square()
        best, least = torch.where(errors < least, scale, best), torch.minimum(errors, least)
    return best
