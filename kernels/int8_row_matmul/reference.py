"""What int8 codes with one scale a row mean, and the product with them."""

from __future__ import annotations

from torch import Tensor


def unpack(codes: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """The matrix, float32 [n, k]: ``codes`` int8 [n, k] times ``scales`` bfloat16 [n, 1]."""
    return codes[:n, :k].float() * scales[:n].float()


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(codes, scales, n, x.shape[1]).T).to(x.dtype)
