"""What fp8 codes mean, and the product with them: the plain statement that every kernel must agree with."""

from __future__ import annotations

from torch import Tensor


def unpack(codes: Tensor, scales: Tensor, n: int, k: int) -> Tensor:
    """The matrix, float32 [n, k]: ``code * scale``. ``codes`` is float8_e4m3fn [n, k], ``scales`` float32 [n, 1]."""
    return codes[:n, :k].float() * scales[:n]


def matmul(x: Tensor, codes: Tensor, scales: Tensor, n: int) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, [m, n], for ``x`` [m, k] and the matrix W of ``unpack``, in float32."""
    return (x.float() @ unpack(codes, scales, n, x.shape[1]).T).to(x.dtype)
