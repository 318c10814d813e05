"""8-bit codes with one scale a row: the plainest format, and the fastest to multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.formats.format import Parts
from tierstore.formats.search import symmetric8
from tierstore.formats.tile64 import finite
from tierstore.kernels.int8_row_matmul import reference
from tierstore.tensors import TensorSpec


@dataclass(frozen=True)
class Int8Row:
    """``code * scale``, as torch's ``_weight_int8pack_mm`` reads it."""

    @property
    def name(self) -> str:
        return "int8-row"

    @property
    def group(self) -> int:
        return 0

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        return TensorSpec("codes", "int8", (n, k)), TensorSpec("scales", "bfloat16", (n, 1))

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        codes, scales = symmetric8(finite(matrix).to(torch.float32))
        return {"codes": codes, "scales": scales}

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        rows = slice(start, n if stop is None else stop)
        return reference.unpack(parts["codes"][rows], parts["scales"][rows], n, k)
