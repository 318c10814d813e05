"""NVFP4: 4-bit floats in groups of 16, each with an 8-bit float as its scale, and one scale for them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.extents import align_up
from tierstore.formats.format import Parts
from tierstore.formats.rows import row_tiles
from tierstore.formats.small_floats import E2M1, E4M3, best_scales, e2m1_bytes, group_columns
from tierstore.kernels.fp4_matmul import reference
from tierstore.kernels.fp4_matmul.reference import GROUP
from tierstore.tensors import TensorSpec

LEAST_SCALE, LAST_SCALE = 1, 126
"""Codes of the e4m3 scales in use: neither zero nor NaN."""

LEAST_TENSOR_SCALE = 2.0**-117
"""Keeps its product with the least group scale, which values are divided by, a normal float32."""


@dataclass(frozen=True)
class Fp4:
    """``e2m1 * group scale * tensor scale``.

    As NVIDIA describes it, the tensor's scale takes the largest value to 6 * 448. For each group, the scales that take
    its largest value to about 6 or 4 are tried, and the one with the least squared error is kept.
    """

    @property
    def name(self) -> str:
        return "fp4"

    @property
    def group(self) -> int:
        return GROUP

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        columns = align_up(k, GROUP)
        return (
            TensorSpec("codes", "uint8", (n, columns // 2)),
            TensorSpec("scales", "float8_e4m3fn", (n, columns // GROUP)),
            TensorSpec("scale", "float32", (1, 1)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        columns = align_up(k, GROUP)
        codes = matrix.new_empty((n, columns // 2), dtype=torch.uint8)
        scales = matrix.new_empty((n, columns // GROUP), dtype=torch.float8_e4m3fn)
        top = max((float(torch.stack(tile.aminmax()).abs().max()) for _, tile in row_tiles(matrix) if k), default=0.0)
        scale = matrix.new_full(
            (1, 1), max(top / (E2M1.largest * E4M3.largest), LEAST_TENSOR_SCALE), dtype=torch.float32
        )
        for rows, tile in row_tiles(matrix, GROUP) if k else ():
            groups = group_columns(tile / scale, GROUP)
            best = best_scales(E2M1, groups, 0, candidates(groups))
            codes[rows] = e2m1_bytes(groups.div_(best), len(tile))
            scales[rows] = best.to(torch.float8_e4m3fn).reshape(len(tile), -1)
        return {"codes": codes, "scales": scales, "scale": scale}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(start, n if stop is None else stop)
        return reference.unpack(parts["codes"][rows], parts["scales"][rows], parts["scale"], n, k)


def candidates(groups: Tensor) -> Iterator[Tensor]:
    """Scales that take the largest of each column to about 6 and 4, and their neighbours: float32 [1, columns]."""
    tops = groups.abs().amax(0, keepdim=True)
    for level in (6.0, 4.0):
        near = (tops * (1 / level)).clamp_max_(E4M3.largest).to(torch.float8_e4m3fn).view(torch.uint8).int()
        for step in (0, -1, 1):
            code = (near + step).clamp_(LEAST_SCALE, LAST_SCALE).to(torch.uint8)
            yield code.view(torch.float8_e4m3fn).float()
