"""4-bit codes with a scale and a zero for each group: 4.5 bits a weight in groups of 64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.extents import align_up
from tierstore.formats.blocks import Blocks, zero_parts
from tierstore.formats.format import Parts
from tierstore.formats.search import affine4
from tierstore.formats.tile64 import HALF, tile_of_columns
from tierstore.kernels.int4_matmul import reference
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.tensors import TensorSpec


@dataclass(frozen=True)
class Int4:
    """``(q - 8) * scale + zero``, as torch's ``_weight_int4pack_mm_for_cpu`` reads it, in groups of 32, 64 or 128."""

    group: int = 64

    @property
    def name(self) -> str:
        return "int4" if self.group == 64 else f"int4-g{self.group}"

    def parts(self, n: int, k: int) -> tuple[TensorSpec, ...]:
        rows, columns = align_up(n, ROWS), align_up(k, self.group)
        return (
            TensorSpec("codes", "uint8", (rows // ROWS, columns * HALF)),
            TensorSpec("scales", "bfloat16", (columns // self.group, rows, 2)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        parts = zero_parts(self.parts(*matrix.shape), matrix)
        blocks = Blocks(matrix, self.group)
        for block in blocks:
            values = blocks.columns(block)
            low, high = values.amin(1), values.amax(1)
            blocks.check(low, high)
            codes, scale, zero = affine4(values, low, high, blocks.scratch(block))
            there = slice(block.start * HALF, block.stop * HALF)
            parts["codes"][block.number, there] = tile_of_columns(codes.view(-1, ROWS).to(torch.int16))
            parts["scales"][block.groups, block.rows, 0] = scale
            parts["scales"][block.groups, block.rows, 1] = zero
        return parts

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = n if stop is None else stop
        first, last = start // ROWS, align_up(stop, ROWS) // ROWS
        some = reference.unpack(
            parts["codes"][first:last],
            parts["scales"][:, first * ROWS : last * ROWS],
            (last - first) * ROWS,
            k,
            self.group,
        )
        return some[start - first * ROWS : stop - first * ROWS]
