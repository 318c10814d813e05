"""What int4 codes mean, and the product with them: the plain statement that every kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 64
"""Rows of a tile. The row count of the parts is padded to a multiple of it."""


def nibbles_of(tiles: Tensor) -> Tensor:
    """The nibbles, uint8 [b * 64, k], of ``tiles`` uint8 [b, k * 32].

    Byte ``[b, c * 32 + j]`` holds column ``c`` of row ``64 b + j`` in its low half and of row ``64 b + 32 + j`` in its
    high half, ``j`` below 32: what torch's ``_convert_weight_to_int4pack_for_cpu`` makes on machines with AVX-512.
    """
    blocks, k = tiles.shape[0], tiles.shape[1] // (ROWS // 2)
    columns = tiles.reshape(blocks, k, ROWS // 2)
    return torch.stack((columns & 15, columns >> 4), dim=1).permute(0, 1, 3, 2).reshape(blocks * ROWS, k)


def unpack(codes: Tensor, scales: Tensor, n: int, k: int, group: int) -> Tensor:
    """The matrix, float32 [n, k]: ``(q - 8) * scale + zero`` for each nibble ``q``.

    ``codes`` is uint8 [np / 64, kp * 32] as ``nibbles_of`` reads it, ``scales`` bfloat16 [kp / group, np, 2] holds
    (scale, zero) for each ``group`` neighbouring columns of a row. np is n rounded up to 64, kp is k to the group.
    """
    scale, zero = scales.float().permute(2, 1, 0).repeat_interleave(group, dim=2).unbind(0)
    return ((nibbles_of(codes).float() - 8) * scale + zero)[:n, :k].contiguous()


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int, group: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(codes, scales, n, x.shape[1], group).T).to(x.dtype)


def round_input(x: Tensor, group: int, most: int) -> tuple[Tensor, Tensor]:
    """``x`` [m, kp] as integers and factors: int32 [m, kp / group, group] and float32 [m, kp / group].

    The product of both is near ``x``: each ``group`` neighbouring values are the nearest multiples, up to ``most`` of
    them, of a factor that the greatest magnitude among them determines. What multiplies integers computes with this.
    """
    values = x.float().view(len(x), -1, group)
    factors = values.abs().amax(2) / most
    whole = (values / factors[:, :, None]).clamp(-most, most).nan_to_num(0).round().to(torch.int32)
    return whole, factors
