"""The layers of one kind: their page table, their pager, their cells, and which pages are open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor

from tierstore.errors import CapacityError
from tierstore.hf.kv.cells import Cells
from tierstore.hf.kv.room import Room
from tierstore.page_plan import KindPlan
from tierstore.pages import PageTable
from tierstore.paging.pager import Pager


@dataclass
class KvKind:
    """``open`` are pages that some layer has not closed yet, ``writable`` those that are open in all layers."""

    plan: KindPlan
    table: PageTable
    pager: Pager
    cells: Cells
    open: set[int] = field(default_factory=set)
    writable: set[int] = field(default_factory=set)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers, as the model numbers them."""
        return self.plan.kind.layers

    @property
    def window(self) -> int | None:
        """How many tokens a query sees; None is all."""
        return self.plan.kind.window

    def columns_at_once(self, rows: int) -> int:
        """How many columns one pass may add to each of ``rows`` rows, beside what is open already; at least 1."""
        plan, size = self.plan, self.table.page_tokens
        pages = (plan.open_pages - len(self.open)) // rows
        if pages > 0:
            return pages * size
        most = plan.frames // (len(self.layers) * plan.open.frames)
        return size if most >= plan.kind.sequence_open_pages * rows else 1

    def forget_freed(self) -> None:
        """Give back what held the bytes of pages that nobody holds any more."""
        freed = self.table.take_freed()
        if freed:
            self.open.difference_update(freed)
            self.writable.difference_update(freed)
            self.pager.free(freed)

    def open_new(self, page: int) -> None:
        """Frames for a page that will be written to. Raises ``CapacityError``."""
        try:
            self.pager.open(page)
        except CapacityError:
            if not self.table.reclaim(self.table.usage().kept_pages):
                raise
            self.forget_freed()  # what was only kept to be found by content gives way
            self.pager.open(page)
        self.open.add(page)
        self.writable.add(page)

    def open_again(self, page: int) -> None:
        """A page that was closed, in some layers at least, is open in all, with what it held."""
        closed = [layer for layer in self.layers if not self.pager.is_open(layer, page)]
        held = {layer: self.read_closed(layer, (page,)) for layer in closed}
        if closed:
            self.pager.reopen(page)
        for layer, (keys, values) in held.items():
            self.cells.fill([self.pager.frames(layer, page)], keys, values)
            self.pager.reopened(layer, page)
        self.open.add(page)
        self.writable.add(page)

    def close(self, layer: int, pages: Iterable[int]) -> None:
        """Pack the pages that are still open in ``layer``, and let them go down."""
        here = [page for page in pages if page in self.open and self.pager.is_open(layer, page)]
        if not here:
            return
        self.writable.difference_update(here)
        targets = [self.pager.close(layer, page) for page in here]
        if not self.plan.kind.plain:
            self.cells.pack([self.pager.frames(layer, page) for page in here], targets)
        for page in here:
            self.pager.closed(layer, page)

    def read_page(self, layer: int, page: int) -> tuple[Tensor, Tensor]:
        """A copy of a page, open or closed: keys [1, page_tokens, heads, key_dim] and values."""
        if page in self.open and self.pager.is_open(layer, page):
            cells = self.cells
            return cells.open_pages(
                [self.pager.frames(layer, page)], Room(cells.shape, cells.dtype, cells.device).pages(1)
            )
        return self.read_closed(layer, (page,))

    def read_closed(self, layer: int, pages: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A copy of one closed page."""
        for wave in self.pager.waves(layer, pages):
            keys, values = self.cells.unpack(cast(Tensor, wave.buffer), wave.offsets, self.cells.dtype)
            unrotate = self.cells.form.unrotate_output
            found = unrotate(keys).clone(), unrotate(values).clone()
        return found
