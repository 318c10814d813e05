"""What a cell, one page of keys and values in one layer, holds in each format: packing and unpacking in plain torch.

A cell is four parts, at the offsets that ``layout.py`` computes: codes of the keys, codes of the values, scales of the
keys, scales of the values. H are the KV heads, T the tokens of a page, D the size of a head (Dk of keys, Dv of values).
All numbers are little-endian; scales are bfloat16. Values are computed in float32, then rounded to the dtype asked for.

int8: ``value = code * scale``.
    key codes    int8 [H, T, Dk]
    value codes  int8 [H, T, Dv]
    key scales   bfloat16 [H, Dk]: of a channel, over the tokens of the page
    value scales bfloat16 [H, T]: of a token, over the channels of the head

What is not finite makes its whole scale NaN: then all that this scale covers comes back as NaN, never as a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.kernels.kv_pages.layout import CellLayout, lay_out

SCALE_NBYTES = 2


def int8_layout(heads: int, tokens: int, key_dim: int, value_dim: int) -> CellLayout:
    """Where the parts of an int8 cell are."""
    return lay_out(
        heads * tokens * key_dim,
        heads * tokens * value_dim,
        heads * key_dim * SCALE_NBYTES,
        heads * tokens * SCALE_NBYTES,
    )


def part(cells: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of every cell, [n, *shape] of ``dtype``: a view of ``cells``, uint8 [n, nbytes]."""
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    return cells[:, offset : offset + nbytes].view(dtype).view(-1, *shape)


def pack_int8(keys: Tensor, values: Tensor, cells: Tensor) -> None:
    """Packs ``keys`` [n, T, H, Dk] and ``values`` [n, T, H, Dv] into ``cells``, uint8 [n, nbytes]."""
    _, tokens, heads, key_dim = keys.shape
    value_dim = values.shape[3]
    layout = int8_layout(heads, tokens, key_dim, value_dim)
    for states, axis, codes_at, scales_at in (
        (keys, 2, layout.key_codes, layout.key_scales),
        (values, 3, layout.value_codes, layout.value_scales),
    ):
        wide = states.transpose(1, 2).float()
        scales = wide.abs().amax(axis, keepdim=True).div_(127).to(torch.bfloat16)
        scales = torch.where(scales.isfinite(), scales, torch.nan)
        factors = torch.where(scales > 0, scales.float().reciprocal(), 0.0)
        codes = (wide * factors).nan_to_num_(0.0).round_().clamp_(-127, 127)
        part(cells, codes_at, tuple(codes.shape[1:]), torch.int8).copy_(codes)
        flat = scales.squeeze(axis)
        part(cells, scales_at, tuple(flat.shape[1:]), torch.bfloat16).copy_(flat)


def unpack_int8(
    cells: Tensor, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys [n, T, H, Dk] and values [n, T, H, Dv] of ``cells``, uint8 [n, at least nbytes].

    Both are views of memory [H, n, T, D]: with the head in front, pages follow each other without a copy."""
    layout = int8_layout(heads, tokens, key_dim, value_dim)
    found = []
    for dim, per_token, codes_at, scales_at in (
        (key_dim, False, layout.key_codes, layout.key_scales),
        (value_dim, True, layout.value_codes, layout.value_scales),
    ):
        codes = part(cells, codes_at, (heads, tokens, dim), torch.int8)
        scales = part(cells, scales_at, (heads, tokens if per_token else dim), torch.bfloat16)
        scales = scales.unsqueeze(3 if per_token else 2)
        out = torch.empty((heads, len(cells), tokens, dim), dtype=dtype, device=cells.device)
        torch.mul(codes.transpose(0, 1), scales.transpose(0, 1).float(), out=out)
        found.append(out.permute(1, 2, 0, 3))
    return found[0], found[1]
