"""Products, rows and values of packed tensors, whose parts may be somewhere else until they are used.

Where the parts are plain they are computed with at once. Where they are stand-ins, the whole computation is one
operation of the dispatcher, so that whoever holds their bytes lends them once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tierstore.formats.cpu import arithmetic
from tierstore.formats.format import Format, Parts, matrices_of
from tierstore.formats.linear import dequantise, linear, unpack_rows
from tierstore.formats.named import format_named
from tierstore.formats.packed_views import PackedView
from tierstore.formats.scratch import Scratch
from tierstore.formats.tiles import tiles


def multiply(x: Tensor, weight: Tensor, view: PackedView, bias: Tensor | None) -> Tensor:
    """``F.linear`` of x [..., k] with the one packed matrix that ``weight`` shows, and a bias [n]."""
    packing = view.packing
    parts = view.parts_of(weight.__dict__)
    if _plain(parts.values()) and _plain((x,) if bias is None else (x, bias)):
        return linear(x, packing.form, parts, packing.n, packing.k, bias, packing.scratch)
    product = _OPERATIONS.packed_linear(x, list(parts.values()), packing.form.name, packing.n, packing.k, bias)
    return cast(Tensor, product)


def multiply_back(x: Tensor, weight: Tensor, view: PackedView) -> Tensor:
    """x [m, n] times the one packed matrix [n, k] that ``weight`` shows, as the gradient of ``multiply`` needs it."""
    packing = view.packing
    parts = view.parts_of(weight.__dict__)
    tensors = list(parts.values())
    if _plain((x, *tensors)):
        return _by_rows(x, packing.form, parts, packing.n, packing.k, packing.scratch)
    return cast(Tensor, _OPERATIONS.packed_matmul(x, tensors, packing.form.name, packing.n, packing.k))


def _by_rows(x: Tensor, form: Format, parts: Parts, n: int, k: int, scratch: Scratch) -> Tensor:
    """A tile of the matrix at a time; the sum over them is worked out in float32 at least."""
    x = x.contiguous()
    work = x.to(arithmetic(x.dtype, len(x)) if x.device.type == "cpu" else x.dtype)
    product = work.new_zeros((len(x), k), dtype=torch.promote_types(work.dtype, torch.float32))
    for first, tile in tiles(form, parts, n, k, work.dtype, scratch):
        product += work[:, first : first + len(tile)] @ tile
    return product.to(x.dtype)


def values_of(weight: Tensor, view: PackedView, *, apart: bool = False) -> Tensor:
    """What a packed tensor shows, in memory that the next call overwrites; with ``apart``, in memory of its own."""
    packing = view.packing
    parts = view.parts_of(weight.__dict__)
    shape = packing.shape if view.number is None or not packing.front else (packing.n, packing.k)
    if _plain(parts.values()):
        values = dequantise(packing.form, parts, shape, packing.dtype, None if apart else packing.scratch)
    else:
        values = _OPERATIONS.unpacked(list(parts.values()), packing.form.name, shape, packing.dtype)
    return view.within(values)


def rows_of(weight: Tensor, view: PackedView, indices: Tensor) -> Tensor:
    """Rows of a packed matrix [n, k]: [*indices.shape, k]. Raises ``IndexError`` for rows that it does not have."""
    packing = view.packing
    wanted = indices.reshape(-1)
    if wanted.device.type != "cpu":  # on a CPU, unpack_rows looks
        cast(Any, torch)._assert_async(((wanted >= 0) & (wanted < packing.n)).all())
    rows = unpack_rows(packing.form, view.parts_of(weight.__dict__), packing.n, packing.k, wanted, packing.dtype)
    return rows.view(*indices.shape, packing.k)


_PLAIN = Tensor.__torch_dispatch__


def _plain(tensors: Iterable[Tensor]) -> bool:
    """Whether no class of theirs has a say in what operations do."""
    for tensor in tensors:  # noqa: SIM110  # a generator takes three times as long
        if type(tensor).__torch_dispatch__ is not _PLAIN:
            return False
    return True


def _named(form: str, tensors: Sequence[Tensor], n: int, k: int) -> Parts:
    return dict(zip((part.name for part in format_named(form).parts(n, k)), tensors, strict=True))


def _packed_linear(x: Tensor, parts: list[Tensor], format: str, n: int, k: int, bias: Tensor | None) -> Tensor:
    return linear(x, format_named(format), _named(format, parts, n, k), n, k, bias, Scratch())


def _packed_matmul(x: Tensor, parts: list[Tensor], format: str, n: int, k: int) -> Tensor:
    return _by_rows(x, format_named(format), _named(format, parts, n, k), n, k, Scratch())


def _unpacked(parts: list[Tensor], format: str, shape: list[int], dtype: torch.dtype) -> Tensor:
    _, n, k = matrices_of(shape)
    return dequantise(format_named(format), _named(format, parts, n, k), tuple(shape), dtype, None)


_OPERATIONS = cast(Any, torch.ops).tierstore


def _define() -> Any:
    """The operations, for as long as the library lives; None where they are known already."""
    if hasattr(_OPERATIONS, "unpacked"):
        return None
    library = cast(Any, torch.library).Library("tierstore", "FRAGMENT")
    library.define("packed_linear(Tensor x, Tensor[] parts, str format, int n, int k, Tensor? bias) -> Tensor")
    library.define("packed_matmul(Tensor x, Tensor[] parts, str format, int n, int k) -> Tensor")
    library.define("unpacked(Tensor[] parts, str format, int[] shape, ScalarType dtype) -> Tensor")
    library.impl("packed_linear", _packed_linear, "CompositeExplicitAutograd")
    library.impl("packed_matmul", _packed_matmul, "CompositeExplicitAutograd")
    library.impl("unpacked", _unpacked, "CompositeExplicitAutograd")
    return library


_LIBRARY = _define()
