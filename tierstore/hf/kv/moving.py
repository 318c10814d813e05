"""Tokens of pages that are not packed, moved by kernels on CUDA: keys and values of a layer in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tierstore.kernels.cards import runs_triton


def movers_for(device: torch.device) -> Any:
    """The module of kernels for ``device``, with ``scatter`` and ``gather``; None where it runs none: then torch's
    copies are faster, or all there is."""
    if not runs_triton(device):
        return None
    from tierstore.kernels.paged_attention import raw

    return raw


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """What the host worked out, on ``device``. From memory that is not pinned a card takes nothing before all that was
    issued is over, and the host would wait: layer by layer, with nothing to compute in between."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def offsets_of(*pages: Sequence[Sequence[int]]) -> list[list[int]]:
    """The bytes at which the pieces of some pages start, in a row: of their keys, and in another of their values."""
    return [[at for page in part for at in page] for part in pages]


def places_of(slots: Tensor, tokens: Tensor, page_tokens: int, piece_tokens: int) -> tuple[Tensor, Tensor]:
    """The piece of each of ``tokens`` [B or 1, n] of pages number ``slots`` [B, n], and its place in that."""
    pieces = slots * (page_tokens // piece_tokens) + tokens // piece_tokens
    return pieces, (tokens % piece_tokens).expand(pieces.shape).contiguous()
