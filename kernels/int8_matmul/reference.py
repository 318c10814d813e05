"""What int8 codes in two planes of nibbles mean, and the product with them."""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.kernels.int4_matmul.reference import ROWS, nibbles_of

GROUP = 64
"""Neighbouring columns that share a scale and a zero."""

MIDDLE = 136
"""The code that means the zero of its group: the nibbles 8 and 8, each the middle of an int4 code."""

PLANES = 17
"""1 + 16: how often a product of both planes counts the zero of an int4 code, the low plane once, the high 16 times."""

ZERO_STEP = 1.25
"""How many scales a zero code is worth: an odd number of quarters, so that of four neighbouring zero codes each has the
256 codes at another place, and the weights of a group are nearest to them at one of these."""


def scales_and_zeros(scales: Tensor, steps: Tensor) -> Tensor:
    """(scale, zero) for each group and row, bfloat16 [kp / 64, np, 2]: what both planes have as int4 weights.

    ``scales`` is uint8 [np / 64, kp / 64 * 128], for each block of 64 rows [kp / 64, 64, 2] with (scale code, zero
    code); ``steps`` is float32 [np, 1]. The scale is ``bfloat16(steps * scale code)``, the zero
    ``bfloat16(scale * (zero code - 128) * 1.25 / 17)`` in float32 arithmetic.
    """
    blocks, groups = scales.shape[0], scales.shape[1] // (2 * ROWS)
    codes = scales.reshape(blocks, groups, ROWS, 2).transpose(0, 1).reshape(groups, blocks * ROWS, 2).float()
    scale = (steps.T * codes[:, :, 0]).bfloat16()
    zero = (scale.float() * (codes[:, :, 1] - 128) * ZERO_STEP / PLANES).bfloat16()
    return torch.stack((scale, zero), dim=2)


def unpack(high: Tensor, low: Tensor, scales: Tensor, steps: Tensor, n: int, k: int) -> Tensor:
    """The matrix, float32 [n, k]: ``(q - 136) * scale + 17 * zero`` with ``q = 16 * high + low``.

    ``high`` and ``low`` are uint8 [np / 64, kp * 32] as ``nibbles_of`` of int4 reads them; ``scales`` and ``steps`` as
    ``scales_and_zeros`` reads them. np and kp are n and k rounded up to multiples of 64.

    As ``q - 136 = 16 * (high - 8) + (low - 8)``, the product with this matrix is the int4 product with ``low``, plus 16
    times that with ``high``, both of group 64 with these scales and zeros.
    """
    scale, zero = scales_and_zeros(scales, steps).float().permute(2, 1, 0).repeat_interleave(GROUP, dim=2).unbind(0)
    codes = nibbles_of(high).float() * 16 + nibbles_of(low)
    return ((codes - MIDDLE) * scale + PLANES * zero)[:n, :k].contiguous()


def matmul(x: Tensor, high: Tensor, low: Tensor, scales: Tensor, steps: Tensor, n: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(high, low, scales, steps, n, x.shape[1]).T).to(x.dtype)
