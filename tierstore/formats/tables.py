"""Rows of a packed table, worked out from the parts of these rows alone.

Every part is read by ``F.embedding``, so that of a part that stands on disk only the wanted rows are brought.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding

from tierstore.extents import align_up
from tierstore.formats.format import Format, Parts
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.scratch import Scratch
from tierstore.formats.tile64 import HALF
from tierstore.formats.tiles import tiles
from tierstore.kernels.int4_matmul.reference import ROWS
from tierstore.kernels.int8_matmul.reference import MIDDLE, PLANES, ZERO_STEP

AT_ONCE = 8 << 20
"""Bytes of ``tile64`` that are held at a time: those of one row are in the same bytes as those of 63 others."""


def unpack_rows(form: Format, parts: Parts, n: int, k: int, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """``Format.unpack(...)[rows]`` as ``dtype``, [r, k], for ``rows`` int64 or int32 [r]: the same values, to the bit.

    Raises ``IndexError``, on a CPU, for rows that the matrix does not have.
    """
    out = torch.empty((len(rows), k), dtype=dtype, device=rows.device)
    if not len(rows):
        return out
    if rows.device.type == "cpu" and not 0 <= int(rows.min()) <= int(rows.max()) < n:
        raise IndexError(f"index out of range in self: rows {int(rows.min())} to {int(rows.max())} of a table of {n}")
    if isinstance(form, Int4 | Int8):
        step = max(1, AT_ONCE // max(1, align_up(k, form.group) * HALF))
        take = _int4 if isinstance(form, Int4) else _int8
        for first in range(0, len(rows), step):
            some = slice(first, first + step)
            scale, zero, codes = take(parts, rows[some])
            values = codes.view(*scale.shape, form.group).mul_(scale[:, :, None]).add_(zero[:, :, None])
            out[some] = values.flatten(1)[:, :k]
    else:  # their rows, by themselves, are a matrix of the same format
        own = {name: part if name == "scale" else embedding(rows, part) for name, part in parts.items()}
        for first, tile in tiles(form, own, len(rows), k, dtype, Scratch()):
            out[first : first + len(tile)] = tile
    return out


def _int4(parts: Parts, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zeros, float32 [r, kp / group], and codes, float32 [r, kp]."""
    scale, zero = parts["scales"].index_select(1, rows).float().permute(2, 1, 0).unbind(0)
    return scale, zero, _nibbles(parts["codes"], rows) - 8


def _int8(parts: Parts, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = embedding(rows // ROWS, parts["scales"]).view(len(rows), -1, ROWS, 2)
    pairs = codes[torch.arange(len(rows), device=rows.device), :, rows % ROWS].float()
    scale = (embedding(rows, parts["steps"]) * pairs[:, :, 0]).bfloat16().float()
    zero = (scale * (pairs[:, :, 1] - 128) * ZERO_STEP / PLANES).bfloat16().float()
    whole = _nibbles(parts["high"], rows).mul_(16).add_(_nibbles(parts["low"], rows))
    return scale, zero * PLANES, whole - MIDDLE


def _nibbles(codes: Tensor, rows: Tensor) -> Tensor:
    """Those of some rows of a ``tile64``, float32 [r, kp]."""
    columns = embedding(rows // ROWS, codes).view(len(rows), -1, HALF)
    own = columns[torch.arange(len(rows), device=rows.device), :, rows % HALF]
    upper = (rows % ROWS >= HALF)[:, None]
    return torch.where(upper, own >> 4, own & 15).float()
