"""The pages of one kind of layers that a pass writes to: opened before it, written layer by layer, closed when full."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tierstore.hf.batch.stream import MicroBatch
from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.targets import Targets
from tierstore.pages import Appended


class Writing:
    """Pages of ``kind`` in one pass. ``tables`` are the pages of each slice's sequence, new ones included; the first
    ``sure[i]`` positions of each will stay, so that pages which they fill may be closed.

    Raises ``CapacityError`` where pages cannot be opened, and ``PageLostError`` where one that was closed is lost."""

    def __init__(
        self, kind: KvKind, tables: Sequence[Sequence[int]], appended: Sequence[Appended], sure: Sequence[int]
    ) -> None:
        self.kind, self._tables = kind, tables
        self._copies = [copy for each in appended for copy in each.copies]
        self._copied: set[int] = set()
        kind.forget_freed()
        for each in appended:
            self._open(each)
        self._to_close = self._full(sure)

    def targets(self, micro_batch: MicroBatch) -> Targets:
        """Where the tokens of ``micro_batch`` go."""
        size, piece = self.kind.table.page_tokens, self.kind.cells.piece_tokens
        places: dict[int, int] = {}
        pieces: list[int] = []
        for part in micro_batch.parts:
            table = self._tables[part.slice]
            for position in range(part.position, part.position + len(part.tokens)):
                place = places.setdefault(table[position // size], len(places))
                pieces.append(place * (size // piece) + position % size // piece)
        at = [position % piece for position in micro_batch.positions]
        device = self.kind.cells.device
        where = (torch.tensor([numbers], device=device) for numbers in (pieces, at))
        return Targets(self.kind, tuple(places), *where)

    def write(self, layer: int, targets: Targets, keys: Tensor, values: Tensor) -> None:
        """Write ``keys`` [1, n, heads, key_dim] and ``values`` of the n tokens that ``targets`` are about."""
        kind, pager = self.kind, self.kind.pager
        if layer not in self._copied:
            for copy in self._copies:
                kind.cells.fill([pager.frames(layer, copy.target)], *kind.read_page(layer, copy.source))
            self._copied.add(layer)
        targets.write(layer, keys, values)

    def close(self, layer: int) -> None:
        """All attention of ``layer`` was issued: pack what is full."""
        if self._to_close:
            self.kind.close(layer, self._to_close)

    def finish(self) -> None:
        """The pass is over: what is full is closed in every layer."""
        for layer in self.kind.layers:
            self.close(layer)
        self.kind.open.difference_update(self._to_close)

    def _open(self, appended: Appended) -> None:
        copied = {copy.target for copy in appended.copies}
        for page in copied:
            self.kind.open_new(page)
        for run in appended.runs:
            if run.at == 0:
                self.kind.open_new(run.page)
            elif run.page not in self.kind.writable and run.page not in copied:
                self.kind.open_again(run.page)

    def _full(self, sure: Sequence[int]) -> tuple[int, ...]:
        recent, size = self.kind.cells.form.recent_tokens, self.kind.table.page_tokens
        found: dict[int, None] = {}
        for table, length in zip(self._tables, sure, strict=True):
            index = max(length - recent, 0) // size - 1
            while index >= 0 and table[index] in self.kind.open:
                found[table[index]] = None
                index -= 1
        return tuple(found)
