"""Blocks of keys and values for attention in tiles, copied from the pages of a layer wherever they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from tierstore.hf.batch.visits import Look, Visit
from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.room import Room, States
from tierstore.hf.kv.sources import Source, Sources
from tierstore.kernels.paged_attention.tiles import BLOCK_TOKENS


class Blocks:
    """Reads pages of one kind in one pass, into ``scratch`` where they fit it.

    Plain pages keep their dtype, others become float32."""

    def __init__(self, kind: KvKind, scratch: Tensor) -> None:
        self.kind, self._scratch = kind, scratch
        self._sources = Sources(kind, {})
        self._plain = kind.plan.kind.plain
        self._dtype = kind.cells.dtype if self._plain else torch.float32
        self._where: dict[int, Tensor] = {}  # by visit, of each place the number of its page
        self._pages = BLOCK_TOKENS // kind.table.page_tokens

    @property
    def most(self) -> int:
        """How many blocks a visit may have, at least 1."""
        return max(self._room(self._scratch).most // self._pages, 1)

    def read(self, layer: int, visit: Visit) -> Iterator[tuple[Look, Tensor, Tensor]]:
        """Each look of ``visit`` with its keys [tiles, BLOCK_TOKENS, heads, key_dim] and values, until the next visit.

        Where a page is missing they are some number."""
        fits = len(visit.places) <= self._room(self._scratch).most
        into = self._room(self._scratch if fits else None).pages(len(visit.places))
        for source in self._sources.of(layer, visit.closed, visit.unclosed):
            whole = source.whole
            if whole is not None and whole[0].dtype == self._dtype and source.pages == visit.pages:
                at = torch.tensor(source.at, device=self.kind.cells.device)[self._numbers(visit)]
                for states, target in zip(whole, into, strict=True):
                    torch.index_select(states, 0, at, out=target)
            else:
                self._scatter(source, visit, into)
        for look in visit.looks:
            stop = look.first + look.blocks * self._pages
            keys, values = (part[look.first : stop].view(look.blocks, BLOCK_TOKENS, *part.shape[2:]) for part in into)
            tiles = len(look.tiles)
            yield look, keys.expand(tiles, -1, -1, -1), values.expand(tiles, -1, -1, -1)

    def _scatter(self, source: Source, visit: Visit, into: States) -> None:
        """Copy the pages of ``source``, some of the visit's, to all their places."""
        cells = self.kind.cells
        numbers = [pick for pick, page in enumerate(source.pages) for _ in visit.places_of[page]]
        which = torch.tensor(numbers, device=cells.device)
        places = torch.tensor([at for page in source.pages for at in visit.places_of[page]], device=cells.device)
        found = source.whole
        if found is not None:
            which = torch.tensor(source.at, device=cells.device)[which]
        else:
            found = source.take(range(len(source.pages)), self._room(None))
            if source.packed:
                found = cells.form.unrotate_output(found[0]), cells.form.unrotate_output(found[1])
        for states, target in zip(found, into, strict=True):
            target.index_copy_(0, places, states.index_select(0, which).to(self._dtype))

    def _numbers(self, visit: Visit) -> Tensor:
        """int64: of each place which page stands there; where none does, any."""
        found = self._where.get(id(visit))
        if found is None:
            found = self._where[id(visit)] = torch.tensor(visit.places, device=self.kind.cells.device).clamp(min=0)
        return found

    def _room(self, memory: Tensor | None) -> Room:
        cells = self.kind.cells
        return Room(cells.shape, self._dtype, cells.device, memory)
