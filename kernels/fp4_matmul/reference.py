"""What fp4 (NVFP4) codes mean, and the product with them: the plain statement that every kernel must agree with."""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the codes 0 to 7: two bits of exponent, one of mantissa (OCP Microscaling Formats 1.0, table 5)."""

GROUP = 16
"""Neighbouring columns that share a scale."""


def e2m1_values(codes: Tensor) -> Tensor:
    """The values, float32 [n, 2 b], of two codes in each byte of ``codes``, uint8 [n, b].

    The low half of a byte is the even column. Bit 3 of a code is its sign, the lower three its place in ``E2M1``.
    """
    values = torch.tensor([*E2M1, *(-value for value in E2M1)], device=codes.device)
    return values[torch.stack((codes & 15, codes >> 4), dim=2).flatten(1).int()]


def unpack(codes: Tensor, scales: Tensor, scale: Tensor, n: int, k: int) -> Tensor:
    """The matrix, float32 [n, k]: ``e2m1 * group scale * tensor scale``, multiplied in this order.

    ``codes`` is uint8 [n, kp / 2] as ``e2m1_values`` reads it, ``scales`` float8_e4m3fn [n, kp / 16] one for each
    ``GROUP`` neighbouring columns of a row, ``scale`` float32 [1, 1]; kp is k rounded up to ``GROUP``.
    """
    groups = e2m1_values(codes).view(*scales.shape, GROUP)
    return ((groups * scales.float()[:, :, None]).flatten(1) * scale)[:n, :k].contiguous()


def matmul(x: Tensor, codes: Tensor, scales: Tensor, scale: Tensor, n: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(codes, scales, scale, n, x.shape[1]).T).to(x.dtype)
