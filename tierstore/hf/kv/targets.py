"""Where the new tokens of a pass go, in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.moving import offsets_of, sent


class Targets:
    """Tokens [B, n] go to token ``at`` of piece ``pieces`` of ``pages``, where the pieces of the first page come first.
    Of a single token they may be numbers. In every layer of ``kind`` pages stay open until they were written to."""

    def __init__(self, kind: KvKind, pages: Sequence[int], pieces: Tensor | int, at: Tensor | int) -> None:
        self._kind, self._pages, self._pieces, self._at = kind, pages, pieces, at

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write ``keys`` [B, n, heads, key_dim] and ``values`` of the tokens: with kernels in one launch."""
        cells = self._kind.cells
        if not self._pages:
            return
        if cells.movers is not None and isinstance(self._pieces, Tensor):
            cells.movers.scatter(keys, values, cells.region, self._offsets[layer], self._pieces, self._at)
        else:
            frames = [self._kind.pager.frames(layer, page) for page in self._pages]
            cells.write(frames, self._pieces, self._at, keys, values)

    @cached_property
    def _offsets(self) -> dict[int, Tensor]:
        """Of each layer int64 [2, pieces], the bytes at which pieces start: one copy to the device for all of them."""
        pager, cells, layers = self._kind.pager, self._kind.cells, self._kind.layers
        frames = [[pager.frames(layer, page) for page in self._pages] for layer in layers]
        starts = [offsets_of(*cells.offsets_of(each)) for each in frames]
        return dict(zip(layers, sent(torch.tensor(starts, device="cpu"), cells.device), strict=True))
