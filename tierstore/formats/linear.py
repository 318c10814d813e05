"""Products with packed matrices, and their values where something else than a product is wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from math import prod
from typing import Any, cast

import torch
from torch import Tensor

from tierstore.errors import DeviceError
from tierstore.formats.bf16 import Bf16
from tierstore.formats.cpu import arithmetic, choose, int4_tile_rows, packed_product
from tierstore.formats.fast4 import fast_product
from tierstore.formats.format import Format, Parts, matrices_in, matrices_of
from tierstore.formats.fp4 import Fp4
from tierstore.formats.fp8 import Fp8
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.mxfp4 import MxFp4
from tierstore.formats.scratch import Scratch
from tierstore.formats.tables import unpack_rows
from tierstore.formats.tiles import tiles
from tierstore.kernels.cards import runs_triton
from tierstore.kernels.machine_code import can_compile

__all__ = ["dequantise", "linear", "unpack_rows"]

MATMULS: Mapping[type, tuple[str, tuple[str, ...]]] = {
    Int4: ("int4_matmul", ("codes", "scales")),
    Int8: ("int8_matmul", ("high", "low", "scales", "steps")),
    Int8Row: ("int8_row_matmul", ("codes", "scales")),
    Fp8: ("fp8_matmul", ("codes", "scales")),
    Fp4: ("fp4_matmul", ("codes", "scales", "scale")),
    MxFp4: ("mxfp4_matmul", ("codes", "scales")),
}
"""The folder of ``kernels/`` for each format, and the parts in the order that its ``matmul`` takes them."""


def linear(x: Tensor, form: Format, parts: Parts, n: int, k: int, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """``F.linear`` of ``x`` [..., k] with the matrix [n, k] of ``parts`` and ``bias`` [n]: [..., n], contiguous.

    In the dtype of ``x``, any floating one. The matrix never stands unpacked in memory, only a tile of it at a time.
    Raises ``RuntimeError`` where shapes or dtypes do not fit, ``DeviceError`` for what is neither a CPU nor a GPU of
    CUDA.
    """
    shape = x.shape
    if not shape or shape[-1] != k or not x.dtype.is_floating_point:
        raise RuntimeError(
            f"a packed weight of shape ({n}, {k}) multiplies floating tensors with {k} values in their last axis, "
            f"got one of shape {tuple(shape)} and {x.dtype}"
        )
    m = x.numel() // k if k else prod(shape[:-1])
    on_cpu = x.device.type == "cpu"
    if not m * n * k:
        product = x.new_zeros(*shape[:-1], n)
    elif on_cpu and (way := choose(form.name, m, n, k, x.dtype, int4_tile_rows(), can_compile())) == "fast":
        product = fast_product(x, form, parts, n, k, scratch)
    else:
        rows = x.reshape(m, k).contiguous()
        if not on_cpu:
            product = _on_device(rows, form, parts, n, k, scratch)
        elif way == "packed":
            product = packed_product(rows, form, parts, n, k, scratch)
        else:
            product = by_tiles(rows, form, parts, n, k, arithmetic(x.dtype, m), scratch)
        product = product.view(*shape[:-1], n)
    return product if bias is None else product.add_(bias)


def dequantise(form: Format, parts: Parts, shape: Sequence[int], dtype: torch.dtype, scratch: Scratch | None) -> Tensor:
    """The values of a whole tensor of ``shape``, contiguous: those of ``Format.unpack``, rounded to ``dtype``.

    In memory of ``scratch`` that the next call on this thread overwrites; without one, in memory of its own.
    """
    front, n, k = matrices_of(shape)
    device = next(iter(parts.values())).device
    work = Scratch() if scratch is None else scratch
    whole = (*front, n, k)
    if scratch is None:
        out = torch.empty(whole, dtype=dtype, device=device)
    else:
        out = scratch.take("whole", whole, dtype, device)
    if out.numel() and device.type != "meta":
        for matrix, own in zip(out.view(-1, n, k), matrices_in(parts, front), strict=True):
            for first, tile in tiles(form, own, n, k, dtype, work):
                matrix[first : first + len(tile)] = tile
    return out.view(tuple(shape))


def _on_device(x: Tensor, form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Tensor:
    kind = x.device.type
    if kind == "meta":
        return x.new_empty(len(x), n)
    if kind != "cuda":
        raise DeviceError(
            f"weights packed as {form.name} are multiplied on cpu and cuda devices, as those of every format are, not "
            f"on {x.device}: move the module to one of these, or keep its weights unpacked"
        )
    if isinstance(form, Bf16) and x.dtype is torch.bfloat16:
        return torch.nn.functional.linear(x, parts["codes"])
    operation, names = MATMULS.get(type(form), ("", ()))
    matmul = _kernel(operation, x.device)
    if matmul is None or x.dtype is torch.float64:
        return by_tiles(x, form, parts, n, k, x.dtype, scratch)
    grouping = (form.group,) if isinstance(form, Int4) else ()
    return cast(Tensor, matmul(x, *(parts[name] for name in names), n, *grouping))


def by_tiles(x: Tensor, form: Format, parts: Parts, n: int, k: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """``x @ W.T`` in the dtype of ``x``, a tile of ``W`` at a time, worked out in ``dtype``."""
    work = x.to(dtype)
    product = work.new_empty(len(x), n)
    for first, tile in tiles(form, parts, n, k, dtype, scratch):
        torch.mm(work, tile.T, out=product[:, first : first + len(tile)])
    return product.to(x.dtype)


@cache
def _kernel(operation: str, device: torch.device) -> Any:
    """The Triton kernel of an operation; None where there is none, or ``device`` runs none."""
    if not operation or not runs_triton(device):
        return None
    return import_module(f"tierstore.kernels.{operation}.triton").matmul
