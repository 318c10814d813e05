"""Nibbles in tiles of 64 rows: the layout of 4-bit codes, which torch's AVX-512 kernel reads without a change."""

from __future__ import annotations

import torch
from torch import Tensor

from tierstore.kernels.int4_matmul.reference import ROWS, nibbles_of

HALF = ROWS // 2
"""Bytes of one column of a tile."""


def to_tile64(nibbles: Tensor) -> Tensor:
    """``nibbles``, uint8 [n, k] below 16 with n a multiple of 64, as tiles: uint8 [n / 64, k * 32].

    Byte ``[b, c * 32 + j]`` holds column ``c`` of row ``64 b + j`` in its low half and of row ``64 b + 32 + j`` in its
    high half, ``j`` below 32.
    """
    n, k = nibbles.shape
    low, high = nibbles.reshape(n // ROWS, 2, HALF, k).transpose(2, 3).unbind(1)
    return torch.bitwise_or(low, high << 4).reshape(n // ROWS, k * HALF)


def from_tile64(tiles: Tensor) -> Tensor:
    """The nibbles of ``to_tile64``, uint8 [n, k]."""
    return nibbles_of(tiles)


def tile_of_columns(columns: Tensor) -> Tensor:
    """One tile, uint8 [k * 32], of int16 nibbles that already stand column by column, [k, 64]."""
    return torch.add(columns[:, :HALF], columns[:, HALF:], alpha=16).to(torch.uint8).reshape(-1)


def to_tile32(tiles: Tensor) -> Tensor:
    """``tiles`` of 64 rows as tiles of 32, uint8 [n / 32, k * 16]: what torch's AVX2 kernel reads.

    Byte ``[b, c * 16 + j]`` holds column ``c`` of row ``32 b + j`` in its low half and of row ``32 b + 16 + j`` in its
    high half, ``j`` below 16.
    """
    blocks, k = tiles.shape[0], tiles.shape[1] // HALF
    first, second = tiles.reshape(blocks, k, 2, HALF // 2).unbind(2)
    upper = (first & 15) | (second << 4)
    lower = (first >> 4) | (second & 240)
    return torch.stack((upper, lower), dim=1).reshape(2 * blocks, k * HALF // 2)
