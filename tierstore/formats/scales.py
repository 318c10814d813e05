"""The scales and zeros of groups, as arithmetic wants them: all in a few vector operations.

A bfloat16 is the upper half of a float32, so that a pair of them is taken apart, or put together, as one int32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.formats.scratch import Scratch
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.kernels.int8_matmul.reference import PLANES, ZERO_STEP

UPPER_HALF = -0x10000


def words(part: Tensor, dtype: torch.dtype) -> Tensor:
    """``part`` with its last axis read as wider integers; a copy only where it lies so that this cannot be."""
    if not part.is_contiguous() or part.storage_offset() * part.itemsize % dtype.itemsize:
        part = part.clone(memory_format=torch.contiguous_format)
    return part.view(dtype)


def int4_scales(pairs: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """(scale, zero), each float32 [kp / group, rows], of the ``scales`` of int4 read as int32, of any strides."""
    scale, zero = scratch.take("scales", (2, *pairs.shape), torch.int32, pairs.device).unbind(0)
    torch.bitwise_left_shift(pairs, 16, out=scale)
    torch.bitwise_and(pairs, UPPER_HALF, out=zero)
    return scale.view(torch.float32), zero.view(torch.float32)


def int8_scales(codes: Tensor, steps: Tensor, scratch: Scratch) -> tuple[Tensor, Tensor]:
    """(scale, zero), each float32 [kp / 64, rows] that bfloat16 holds, of the ``scales`` and ``steps`` of int8.

    ``codes`` are the scales of some blocks of 64 rows read as int16, [rows / 64, kp].
    """
    blocks, groups, device = codes.shape[0], codes.shape[1] // ROWS, codes.device
    scale, zero, spare = scratch.take("scales", (3, groups, blocks * ROWS), torch.int32, device).unbind(0)
    scale.view(groups, blocks, ROWS).copy_(codes.view(blocks, groups, ROWS).transpose(0, 1))
    torch.bitwise_right_shift(scale, 8, out=zero)
    torch.bitwise_and(scale, 255, out=spare)
    torch.bitwise_and(zero, 255, out=zero)
    scale, zero = scale.view(torch.float32).copy_(spare), spare.view(torch.float32).copy_(zero)
    rounded = scratch.take("rounded", tuple(scale.shape), torch.bfloat16, device)
    scale.copy_(rounded.copy_(scale.mul_(steps.view(-1))))
    zero.sub_(128).mul_(scale).mul_(ZERO_STEP).div_(PLANES)
    zero.copy_(rounded.copy_(zero))
    return scale, zero


def int8_pairs(codes: Tensor, steps: Tensor, scratch: Scratch) -> Tensor:
    """What ``int8_scales`` gives as the ``scales`` of int4, bfloat16 [kp / 64, rows, 2]."""
    scale, zero = int8_scales(codes, steps, scratch)
    pairs = scratch.take("pairs", tuple(scale.shape), torch.int32, scale.device)
    torch.bitwise_right_shift(scale.view(torch.int32), 16, out=pairs)
    pairs.bitwise_and_(~UPPER_HALF).bitwise_or_(zero.view(torch.int32))
    return pairs.view(torch.bfloat16).view(*scale.shape, 2)
