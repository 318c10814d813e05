"""8-bit codes in two planes of nibbles, with scale and zero codes for each group: 8.25 bits a weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tierstore.extents import align_up
from tierstore.formats.blocks import Blocks, zero_parts
from tierstore.formats.format import Parts
from tierstore.formats.search8 import TOP_CODE, affine8, needed_step
from tierstore.formats.tile64 import HALF, tile_of_columns
from tierstore.kernels.int4_matmul.reference import ROWS
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
        rows, columns = align_up(n, ROWS), align_up(k, GROUP)
        plane = (rows // ROWS, columns * HALF)
        return (
            TensorSpec("high", "uint8", plane),
            TensorSpec("low", "uint8", plane),
            TensorSpec("scales", "uint8", (rows // ROWS, columns // GROUP * 2 * ROWS)),
            TensorSpec("steps", "float32", (rows, 1)),
        )

    def pack(self, matrix: Tensor) -> dict[str, Tensor]:
        parts = zero_parts(self.parts(*matrix.shape), matrix)
        blocks = Blocks(matrix, GROUP)
        for number in blocks.numbers():
            low, high = blocks.ranges(number)
            scales = parts["scales"][number].view(-1, ROWS, 2)
            steps = needed_step(low, high).amax(0) / TOP_CODE
            parts["steps"][number * ROWS : (number + 1) * ROWS, 0] = steps
            for block in blocks.across(number):
                codes, scale_codes, zero_codes = affine8(
                    blocks.columns(block), low[block.groups], high[block.groups], steps, blocks.memory
                )
                whole = codes.view(-1, ROWS).to(torch.int16)
                there = slice(block.start * HALF, block.stop * HALF)
                parts["high"][number, there] = tile_of_columns(whole >> 4)
                parts["low"][number, there] = tile_of_columns(whole.bitwise_and_(15))
                scales[block.groups, :, 0] = scale_codes
                scales[block.groups, :, 1] = zero_codes
        return parts

    def unpack(self, parts: Parts, n: int, k: int, *, start: int = 0, stop: int | None = None) -> Tensor:
        stop = n if stop is None else stop
        first, last = start // ROWS, align_up(stop, ROWS) // ROWS
        some = reference.unpack(
            parts["high"][first:last],
            parts["low"][first:last],
            parts["scales"][first:last],
            parts["steps"][first * ROWS : last * ROWS],
            (last - first) * ROWS,
            k,
        )
        return some[start - first * ROWS : stop - first * ROWS]
