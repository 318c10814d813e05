"""What a cell, one page of keys and values in one layer, holds in each format: packing and unpacking in plain torch.

H are the KV heads, T the tokens of a page, D the size of a head (Dk of keys, Dv of values). Keys and values are rotated
(``rotation.py``) before they come here. The parts of a cell are at the offsets of ``layout.py``, in this order. All
numbers are little-endian. ``value = code * scale`` or ``code * scale + zero`` in float32, then rounded to the dtype
asked for: a product of a code and a scale is exact, so fused or not, multiply and add round once.

int8, fp8: a scale for each token of a head.
    key codes, value codes    [H, T, D]: int8 from -127 to 127; or float8_e4m3fn
    key scales, value scales  bfloat16 [H, T]

int4, fp4, int2: a scale and a zero for each channel of a key head over the page, and for each token of a value head.
    key codes, value codes    uint8 [H, T / c, D] of c codes each, 2 of 4 bits or 4 of 2 bits: bits [j b, j b + b) of
                              byte [h, r, d] are token ``j * T / c + r``. int4 and int2: a number from 0 on. fp4: e2m1,
                              a sign and the place in (0, 0.5, 1, 1.5, 2, 3, 4, 6)
    key scales                bfloat16 [H, 2, Dk]: of each channel, then the zero of each channel
    value scales              bfloat16 [H, 2, T]: of each token, then the zero of each token
    key first, value first    bfloat16 [H, D]: token 0 of the page, which comes back as these, whatever its codes say.
                              Models lay much of their attention on the first token of a text (attention sinks, Xiao et
                              al. 2023): its error alone is half of the whole; and it is far from the others, so it does
                              not count for the scales of keys

What is not finite, or larger than about 2 ** 100, makes its scale NaN: then all that has this scale comes back as NaN,
and never as a number. That is the token in its head, and for keys by channel the channels of the page in its head.
Other heads and pages do not change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.kernels.kv_pages.codes import BYTES, CODES, to_bfloat16
from tierstore.kernels.kv_pages.layout import BY_TOKEN, CODE_BITS, layout_of

KEY_AXIS, VALUE_AXIS = 2, 3
"""Of [n, H, T, D]: what has a scale in common, where keys have it by channel."""


def pack(name: str, keys: Tensor, values: Tensor, cells: Tensor) -> None:
    """Packs pages: ``keys`` [n, T, H, Dk] and ``values`` [n, T, H, Dv], rotated, to ``cells``, uint8 [n, nbytes]."""
    _, tokens, heads, key_dim = keys.shape
    at = layout_of(name, heads, tokens, key_dim, values.shape[3])
    for states, axis, codes_at, scales_at, first_at in (
        (keys, KEY_AXIS, at.key_codes, at.key_scales, at.key_first),
        (values, VALUE_AXIS, at.value_codes, at.value_scales, at.value_first),
    ):
        wide = states.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if name in BY_TOKEN:
            codes, scales = BYTES[name].nearest(wide)
        else:
            _write(cells, first_at, to_bfloat16(wide[:, :, 0]))
            codes, scales = CODES[name].nearest(wide, axis)
            codes = _fold(codes, CODE_BITS[name])
        _write(cells, scales_at, scales)
        _write(cells, codes_at, codes)


def unpack(
    name: str, cells: Tensor, heads: int, tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys [n, T, H, Dk] and values [n, T, H, Dv] of ``cells``, uint8 [n, at least nbytes]; still rotated.

    Both are views of memory [H, n, T, D]: with the head in front, pages follow each other without a copy."""
    at = layout_of(name, heads, tokens, key_dim, value_dim)
    found = []
    for dim, axis, codes_at, scales_at, first_at in (
        (key_dim, KEY_AXIS, at.key_codes, at.key_scales, at.key_first),
        (value_dim, VALUE_AXIS, at.value_codes, at.value_scales, at.value_first),
    ):
        out = torch.empty((heads, len(cells), tokens, dim), dtype=dtype, device=cells.device)
        if name in BY_TOKEN:
            code = BYTES[name]
            numbers, unit = code.values(part(cells, codes_at, (heads, tokens, dim), code.dtype))
            scales = part(cells, scales_at, (heads, tokens, 1), torch.bfloat16).float() * unit
            numbers = numbers.transpose(0, 1)
            if dtype == torch.float32:  # two passes of one dtype are faster than one of two
                numbers = out.copy_(numbers)
            torch.mul(numbers, scales.transpose(0, 1), out=out)
        else:
            bits = CODE_BITS[name]
            codes = part(cells, codes_at, (heads, tokens * bits // 8, dim), torch.uint8)
            count = dim if axis == KEY_AXIS else tokens
            pairs = part(cells, scales_at, (heads, 2, count), torch.bfloat16).transpose(0, 1).float()
            scales, zeros = pairs.unsqueeze(axis + 1).unbind(2)
            _spread(name, codes.transpose(0, 1), scales, zeros, out)
            out[:, :, 0] = part(cells, first_at, (heads, dim), torch.bfloat16).transpose(0, 1)
        found.append(out.permute(1, 2, 0, 3))
    return found[0], found[1]


def part(cells: Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A part of every cell, [n, *shape] of ``dtype``: a view of ``cells``, uint8 [n, nbytes]."""
    nbytes = dtype.itemsize * torch.Size(shape).numel()
    return cells[:, offset : offset + nbytes].view(dtype).view(-1, *shape)


def _write(cells: Tensor, offset: int, what: Tensor) -> None:
    part(cells, offset, tuple(what.shape[1:]), what.dtype).copy_(what)


def _fold(codes: Tensor, bits: int) -> Tensor:
    """Bytes [n, H, T / c, D] of ``codes`` uint8 [n, H, T, D]."""
    pieces = codes.chunk(8 // bits, 2)
    folded = pieces[0]
    for number, piece in enumerate(pieces[1:], 1):
        folded = folded | (piece << bits * number)
    return folded


def _spread(name: str, folded: Tensor, scales: Tensor, zeros: Tensor, out: Tensor) -> None:
    """Values of ``folded`` codes [H, n, T / c, D] to ``out`` [H, n, T, D]; scales and zeros [H, n, T or 1, D or 1]."""
    height = folded.shape[2]
    by_token = scales.shape[2] > 1
    for number in range(8 // CODE_BITS[name]):
        tokens = slice(number * height, (number + 1) * height)
        rows = tokens if by_token else slice(None)
        numbers, unit = CODES[name].values(folded, number)
        piece = out[:, :, tokens]
        wide = piece if out.dtype == torch.float32 else torch.empty_like(piece, dtype=torch.float32)
        torch.mul(numbers, scales[:, :, rows] * unit, out=wide)
        torch.add(wide, zeros[:, :, rows], out=piece)
