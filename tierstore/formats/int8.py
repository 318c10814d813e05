"""8-bit codes in two planes of nibbles, with scale and zero codes for each group: 8.25 bits a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.formats.format import Parts
from tierstore.formats.search import affine8
from tierstore.formats.tile64 import HALF, ROWS, finite, padded, to_tile64
from tierstore.kernels.int8_matmul import reference
from tierstore.kernels.int8_matmul.reference import GROUP
from tierstore.tensors import TensorSpec


@dataclass(frozen=True)
class Int8:
    """``(q - 136) * scale + 17 * zero``: two int4 products with the same scales make the product."""

    @property
    def name(self) -> str:
        return "int8"

    @property
    def group(self) -> int:
        return GROUP

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        rows, columns = padded(n, ROWS), padded(k, GROUP)
        plane = (rows // ROWS, columns * HALF)
        return (
            TensorSpec("high", "uint8", plane),
            TensorSpec("low", "uint8", plane),
            TensorSpec("scales", "uint8", (rows // ROWS, columns // GROUP * 2 * ROWS)),
            TensorSpec("steps", "float32", (rows, 1)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        n, k = matrix.shape
        rows, columns = padded(n, ROWS), padded(k, GROUP)
        whole = matrix.new_zeros((rows, columns), dtype=torch.float32)
        whole[:n, :k] = finite(matrix)
        codes, scale_codes, zero_codes, steps = affine8(whole.view(rows, columns // GROUP, GROUP))
        pairs = torch.stack((scale_codes, zero_codes), dim=2).view(rows // ROWS, ROWS, columns // GROUP, 2)
        flat = codes.view(rows, columns)
        return {
            "high": to_tile64(flat >> 4),
            "low": to_tile64(flat & 15),
            "scales": pairs.transpose(1, 2).reshape(rows // ROWS, columns // GROUP * 2 * ROWS),
            "steps": steps,
        }

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = n if stop is None else stop
        first, last = start // ROWS, padded(stop, ROWS) // ROWS
        some = reference.unpack(
            parts["high"][first:last],
            parts["low"][first:last],
            parts["scales"][first:last],
            parts["steps"][first * ROWS : last * ROWS],
            (last - first) * ROWS,
            k,
        )
        return some[start - first * ROWS : stop - first * ROWS]
