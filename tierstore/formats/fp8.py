"""8-bit floats with one scale a row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.formats.format import Parts
from tierstore.formats.rows import row_tiles
from tierstore.formats.small_floats import E4M3, best_scales
from tierstore.kernels.fp8_matmul import reference
from tierstore.tensors import TensorSpec

TOPS = (448.0, 384.0, 320.0, 256.0)
"""What the largest value of a row may become: codes, so that unpacking and packing again changes nothing."""


@dataclass(frozen=True)
class Fp8:
    """``code * scale`` with e4m3 codes: 3 bits below the leading one, from 448 down to 2^-9, no infinities."""

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def group(self) -> int:
        return 0

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return TensorSpec("codes", "float8_e4m3fn", (n, k)), TensorSpec("scales", "float32", (n, 1))

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        codes = matrix.new_empty((n, k), dtype=torch.float8_e4m3fn)
        scales = matrix.new_ones((n, 1), dtype=torch.float32)
        for rows, tile in row_tiles(matrix) if k else ():
            scales[rows] = best_scales(E4M3, tile, 1, candidates(tile))
            codes[rows] = (tile / scales[rows]).to(torch.float8_e4m3fn)
        return {"codes": codes, "scales": scales}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(start, n if stop is None else stop)
        return reference.unpack(parts["codes"][rows], parts["scales"][rows], n, k)


def candidates(tile: Tensor) -> Iterator[Tensor]:
    """Scales, float32 [rows, 1], that take the largest of each row to one of ``TOPS``."""
    top = tile.abs().amax(1, keepdim=True)
    for code in TOPS:
        # Where a row is zero or denormal any scale does, but not zero: values are divided by it.
        yield (top / top.new_tensor(code)).clamp_min_(torch.finfo(torch.float32).tiny)
