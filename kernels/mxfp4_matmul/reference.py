"""What mxfp4 codes mean, and the product with them: the plain statement that every kernel must agree with."""

from __future__ import annotations

from torch import Tensor

from tierstore.kernels.fp4_matmul.reference import e2m1_values

GROUP = 32
"""Neighbouring columns that share a scale."""


def unpack(codes: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """The matrix, float32 [n, k]: ``e2m1 * 2 ** (scale code - 127)``, exact in bfloat16 too.

    ``codes`` is uint8 [n, kp / 2] as ``e2m1_values`` reads it, ``scales`` float8_e8m0fnu [n, kp / 32] one for each
    ``GROUP`` neighbouring columns of a row; kp is k rounded up to ``GROUP``.
    """
    groups = e2m1_values(codes).view(*scales.shape, GROUP)
    return (groups * scales.float()[:, :, None]).flatten(1)[:n, :k].contiguous()


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(codes, scales, n, x.shape[1]).T).to(x.dtype)
