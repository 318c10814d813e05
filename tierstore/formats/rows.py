"""A matrix a few rows at a time, as float32: what packing works on, so that its memory is that of a few tiles."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from tierstore.errors import ModuleError
from tierstore.extents import align_up

TILE = 1 << 17
"""Elements of a tile, unless one row alone has more: 512 KiB of float32, which stays in a core's cache."""


def row_tiles(matrix: Tensor, group: int = 1) -> Iterator[tuple[slice, Tensor]]:
    """The rows of ``matrix``, a floating [n, k], tile by tile: which they are, and their values.

    Values are contiguous float32 with zeros up to a multiple of ``group`` columns. They may be those of ``matrix``
    itself: do not write to them. Raises ``ModuleError`` for values that are not finite.
    """
    n, k = matrix.shape
    matrix = matrix.detach()
    rows = max(1, TILE // max(k, 1))
    for start in range(0, n, rows):
        tile = pad(matrix[start : start + rows].to(torch.float32), (0, align_up(k, group) - k)).contiguous()
        if not all_finite(tile):
            wrong = sum(int((~row.to(torch.float32).isfinite()).sum()) for row in matrix)
            raise ModuleError(
                f"{wrong} of {matrix.numel()} values are not finite as float32, and no packed format has codes for "
                "them: mend the weights, or keep this tensor as it is"
            )
        yield slice(start, start + len(tile)), tile


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite. Takes no memory."""
    if not values.numel():
        return True
    least, most = values.aminmax()  # NaN where any value is
    return bool(least.isfinite() & most.isfinite())
