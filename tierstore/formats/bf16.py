"""Plain bfloat16, for parameters that come wider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.errors import ModuleError
from tierstore.formats.format import Parts
from tierstore.formats.rows import all_finite, row_tiles
from tierstore.tensors import TensorSpec


@dataclass(frozen=True)
class Bf16:
    """The nearest bfloat16, ties to even."""

    @property
    def name(self) -> str:
        return "bf16"

    @property
    def group(self) -> int:
        return 0

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return (TensorSpec("codes", "bfloat16", (n, k)),)

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        codes = matrix.new_empty(matrix.shape, dtype=torch.bfloat16)
        for rows, tile in row_tiles(matrix):
            codes[rows] = tile
        if not all_finite(codes):  # the largest float32 values round up, out of range
            beyond = sum(int(row.isinf().sum()) for row in codes)
            raise ModuleError(
                f"{beyond} of {codes.numel()} values are beyond bfloat16's {torch.finfo(torch.bfloat16).max:.4g}: "
                "mend the weights, or keep this tensor as it is"
            )
        return {"codes": codes}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        return parts["codes"][start : n if stop is None else stop].float()
