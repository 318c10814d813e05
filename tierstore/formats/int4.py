"""4-bit codes with a scale and a zero for each group: 4.5 bits a weight in groups of 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.formats.format import Parts
from tierstore.formats.search import affine4
from tierstore.formats.tile64 import HALF, ROWS, finite, padded, to_tile64
from tierstore.kernels.int4_matmul import reference
from tierstore.tensors import TensorSpec


@dataclass(frozen=True)
class Int4:
    """``(q - 8) * scale + zero``, as torch's ``_weight_int4pack_mm_for_cpu`` reads it. ``group`` is a multiple of 32."""

    group: int = 64

    @property
    def name(self) -> str:
        return "int4" if self.group == 64 else f"int4-g{self.group}"

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        rows, columns = padded(n, ROWS), padded(k, self.group)
        return (
            TensorSpec("codes", "uint8", (rows // ROWS, columns * HALF)),
            TensorSpec("scales", "bfloat16", (columns // self.group, rows, 2)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        whole = matrix.new_zeros((padded(n, ROWS), padded(k, self.group)), dtype=torch.float32)
        whole[:n, :k] = finite(matrix)
        codes, scale, zero = affine4(whole.view(whole.shape[0], whole.shape[1] // self.group, self.group))
        return {
            "codes": to_tile64(codes.view(whole.shape)),
            "scales": torch.stack((scale.T, zero.T), dim=2).bfloat16(),
        }

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = n if stop is None else stop
        first, last = start // ROWS, padded(stop, ROWS) // ROWS
        some = reference.unpack(
            parts["codes"][first:last],
            parts["scales"][:, first * ROWS : last * ROWS],
            (last - first) * ROWS,
            k,
            self.group,
        )
        return some[start - first * ROWS : stop - first * ROWS]
