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

_CACHED_NBYTES = 4 << 20
"""So many bytes of keys and values stay in the caches of a CPU until they are read again."""


class Blocks:
    """Reads pages of one kind in one pass, into ``scratch`` where they fit it.

    Plain pages keep their dtype, others become float32."""

    def __init__(self, kind: KvKind, scratch: Tensor) -> None:
        cells = self._cells = kind.cells
        self._dtype = cells.dtype if kind.plan.kind.plain else torch.float32
        self._room = Room(cells.shape, self._dtype, cells.device, scratch)
        self._more = Room(cells.shape, self._dtype, cells.device)
        self._sources = Sources(kind, {})
        self._numbers: dict[int, Tensor] = {}  # by visit, of each place the number of its page
        self._pages = BLOCK_TOKENS // kind.table.page_tokens

    @property
    def most(self) -> int:
        """How many blocks a visit may have, at least 1."""
        return max(self._room.most // self._pages, 1)

    @property
    def few(self) -> int:
        """How many blocks are copied at once where pages lie, at least 1."""
        if self._cells.device.type != "cpu":
            return self.most
        return max(_CACHED_NBYTES // (self._pages * self._cells.page_nbytes), 1)

    def read(self, layer: int, visit: Visit) -> Iterator[tuple[Look, Tensor, Tensor]]:
        """Each look of ``visit`` with its keys [tiles, BLOCK_TOKENS, heads, key_dim] and values, until the next one.

        Where a page is missing they are some number."""
        sources = self._sources.of(layer, visit.closed, visit.unclosed)
        source = next(sources)
        if source.whole is not None and source.whole[0].dtype == self._dtype and source.pages == visit.pages:
            yield from self._look_by_look(source, source.whole, visit)
            for _ in sources:
                raise AssertionError("all pages were in the first source")
            return
        into = self._room_for(len(visit.places))
        self._scatter(source, visit, into)
        for source in sources:
            self._scatter(source, visit, into)
        for look in visit.looks:
            pages = slice(look.first, look.first + look.blocks * self._pages)
            yield look, _shown(look, into[0][pages]), _shown(look, into[1][pages])

    def _look_by_look(self, source: Source, whole: States, visit: Visit) -> Iterator[tuple[Look, Tensor, Tensor]]:
        """A few blocks at a time, which caches keep until they are read."""
        numbers = self._numbers.get(id(visit))
        if numbers is None:
            numbers = torch.tensor(visit.places, device=self._cells.device).clamp(min=0)
            self._numbers[id(visit)] = numbers
        at = torch.tensor(source.at, device=self._cells.device)[numbers]
        for look in visit.looks:
            count = look.blocks * self._pages
            keys, values = self._room_for(count)
            mine = at[look.first : look.first + count]
            torch.index_select(whole[0], 0, mine, out=keys)
            torch.index_select(whole[1], 0, mine, out=values)
            yield look, _shown(look, keys), _shown(look, values)

    def _scatter(self, source: Source, visit: Visit, into: States) -> None:
        """Copy the pages of ``source``, some of the visit's, to all their places."""
        device = self._cells.device
        numbers = [pick for pick, page in enumerate(source.pages) for _ in visit.places_of[page]]
        which = torch.tensor(numbers, device=device)
        places = torch.tensor([at for page in source.pages for at in visit.places_of[page]], device=device)
        found = source.whole
        if found is not None:
            which = torch.tensor(source.at, device=device)[which]
        else:
            found = source.take(range(len(source.pages)), self._more)
            if source.packed:
                unrotate = self._cells.form.unrotate_output
                found = unrotate(found[0]), unrotate(found[1])
        for states, target in zip(found, into, strict=True):
            target.index_copy_(0, places, states.index_select(0, which).to(self._dtype))

    def _room_for(self, pages: int) -> States:
        return (self._room if pages <= self._room.most else self._more).pages(pages)


def _shown(look: Look, pages: Tensor) -> Tensor:
    """The blocks of a look, for each of its tiles."""
    blocks = pages.view(look.blocks, BLOCK_TOKENS, *pages.shape[2:])
    return blocks.expand(len(look.tiles), -1, -1, -1) if look.shared else blocks
