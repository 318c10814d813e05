"""MXFP4: 4-bit floats in groups of 32, each with a power of two as its scale (OCP Microscaling Formats 1.0)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.extents import align_up
from tierstore.formats.format import Parts
from tierstore.formats.rows import row_tiles
from tierstore.formats.small_floats import E2M1, best_scales, e2m1_bytes, group_columns
from tierstore.kernels.mxfp4_matmul import reference
from tierstore.kernels.mxfp4_matmul.reference import GROUP
from tierstore.tensors import TensorSpec

BIAS = 127
LAST_SCALE = 252
"""The largest scale code in use: 2^125, with which no value is beyond float32 or bfloat16. 255 would be NaN."""


@dataclass(frozen=True)
class MxFp4:
    """``e2m1 * 2 ** (scale code - 127)``.

    The standard's scale takes the largest value of a group into [4, 8), where what lies beyond 6 becomes 6. The next
    one up takes it into [2, 4): the one with the least squared error is kept.
    """

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def group(self) -> int:
        return GROUP

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        columns = align_up(k, GROUP)
        return (
            TensorSpec("codes", "uint8", (n, columns // 2)),
            TensorSpec("scales", "float8_e8m0fnu", (n, columns // GROUP)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        columns = align_up(k, GROUP)
        codes = matrix.new_empty((n, columns // 2), dtype=torch.uint8)
        scales = matrix.new_empty((n, columns // GROUP), dtype=torch.uint8)
        for rows, tile in row_tiles(matrix, GROUP) if k else ():
            groups = group_columns(tile, GROUP)
            standard = ((groups.abs().amax(0, keepdim=True).view(torch.int32) >> 23) - 2).clamp_(0, LAST_SCALE)
            groups.mul_(power_of_two(BIAS - standard))
            step = (standard + 1).clamp_max_(LAST_SCALE).sub_(standard)
            best = best_scales(E2M1, groups, 0, (torch.ones_like(step, dtype=torch.float32), power_of_two(step)))
            codes[rows] = e2m1_bytes(groups.div_(best), len(tile))
            scales[rows] = (standard + (best > 1)).to(torch.uint8).reshape(len(tile), -1)
        return {"codes": codes, "scales": scales.view(torch.float8_e8m0fnu)}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(start, n if stop is None else stop)
        return reference.unpack(parts["codes"][rows], parts["scales"][rows], n, k)


def power_of_two(exponents: Tensor) -> Tensor:
    """Float32 powers of two, normal ones: int32 ``exponents`` from -126 to 127."""
    return ((exponents + BIAS) << 23).view(torch.float32)
