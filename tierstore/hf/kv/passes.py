"""One forward pass over the rows of a cache: new tokens go to pages, and pages that are full and old are closed.

What is the same in all layers of a kind is worked out once a pass; a layer looks up its frames and copies bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.moving import places_of
from tierstore.hf.kv.rows import Growth, Row, Rows
from tierstore.hf.kv.targets import Targets
from tierstore.pages import GONE, PageCopy


class Columns:
    """The columns of a batch, which positions they are, and which of them are new: those from ``start`` on.

    ``stored`` is bool [B, stop], or None when every row stores every column. ``lengths`` are the rows' positions,
    ``before`` those at old columns. ``trusted``: the mask hides just what is not stored, apart from what its function
    hides.
    """

    def __init__(
        self, rows: Rows, start: int, stop: int, stored: Tensor | None, trusted: bool, device: torch.device
    ) -> None:
        self.start, self.stop, self.stored, self.trusted, self.device = start, stop, stored, trusted, device
        self.lengths = [row.length for row in rows.rows]
        self.before = [row.before(start) for row in rows.rows]
        self._spans = [Row([], list(row.spans)) for row in rows.rows]

    def positions_before(self, row: int, column: int) -> int:
        """Positions of a row at columns before ``column``."""
        return self._spans[row].before(column)

    @cached_property
    def positions(self) -> Tensor:
        """int64 [B or 1, stop]: the position at each column; at columns that are not stored, that of the last before
        them, or -1."""
        if self.stored is None:
            return torch.arange(self.stop, device=self.device)[None]
        return self.stored.cumsum(1) - 1

    @cached_property
    def column_of(self) -> Tensor:
        """int64 [B or 1, positions + 1]: the column of each position; a last one stands for those beyond the row."""
        if self.stored is None:
            return torch.arange(self.stop + 1, device=self.device)[None]
        target = torch.where(self.stored, self.positions, self.stop)
        columns = torch.arange(self.stop, device=self.device).expand(target.shape)
        return torch.zeros(len(target), self.stop + 1, dtype=torch.long, device=self.device).scatter(1, target, columns)


class KindPass:
    """The pages of one kind in one pass. ``first`` is the first column whose keys are handed to attention.

    ``closed`` and ``unclosed`` are the pages that rows read, each once; ``slots[r]`` numbers those of row ``r`` from
    its page index ``first_index[r]`` on, in the order ``closed + unclosed``.
    """

    def __init__(self, kind: KvKind, number: int, rows: Rows, columns: Columns, growth: Growth, first: int) -> None:
        self.kind, self.columns, self.first = kind, columns, first
        self.masks: dict[Hashable, tuple[Tensor, Tensor]] = {}
        """Masks, and what they say of groups of pages: the same in all layers with the same mask."""
        self._places: dict[int, tuple[Tensor, Tensor]] = {}
        self._copies: list[PageCopy] = []
        self._blank: list[int] = []
        self._leaders = growth.leaders
        self._open_pages(number, rows, growth)
        size = kind.table.page_tokens
        tables = [rows.pages(r, number) for r in range(len(rows))]
        self.first_index = [row.before(first) // size for row in rows.rows]
        needed = dict.fromkeys(
            page
            for table, index in zip(tables, self.first_index, strict=True)
            for page in table[index:]
            if page != GONE
        )
        self.closed = tuple(page for page in needed if page not in kind.open)
        self.unclosed = tuple(page for page in needed if page in kind.open)
        slot_of = {page: slot for slot, page in enumerate(self.closed + self.unclosed)}
        self.slots = [
            [slot_of[page] for page in table[index:]] for table, index in zip(tables, self.first_index, strict=True)
        ]
        self.straight = self._find_straight(rows)
        self.to_close = self._find_to_close(tables)
        self._to_blank = [page for page in self._blank if page in slot_of]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write the new tokens of a layer: ``keys`` [B, heads, n, key_dim] and ``values``."""
        kind, pager = self.kind, self.kind.pager
        for page in self._to_blank:  # attention reads whole pages, and what it masks has to be a number
            kind.cells.fill([pager.frames(layer, page)], 0, 0)
        for copy in self._copies:
            kind.cells.fill([pager.frames(layer, copy.target)], *kind.read_page(layer, copy.source))
        targets, which = self._targets
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if which is not None:
            keys, values = keys[which][None], values[which][None]
        targets.write(layer, keys, values)

    def close(self, layer: int) -> None:
        """Pack the pages of ``layer`` that are full, and far enough behind the end."""
        if self.to_close:
            self.kind.close(layer, self.to_close)

    def finish(self) -> None:
        """The pass is over: what a layer has not closed yet is closed now."""
        if self.to_close:
            for layer in self.kind.layers:
                self.kind.close(layer, self.to_close)
            self.kind.open.difference_update(self.to_close)

    @cached_property
    def slot_of(self) -> Tensor:
        """int64 [B, Lk]: the slot of the page that has each column from ``first`` on."""
        longest = max(1, *map(len, self.slots))
        table = torch.tensor([[*row, *[0] * (longest - len(row))] for row in self.slots], device=self.columns.device)
        index = self._position // self.kind.table.page_tokens - self._first_index
        return table.gather(1, index.expand(len(table), -1))

    @cached_property
    def token_of(self) -> Tensor:
        """int64 [B or 1, Lk]: which token of its page each column is."""
        return self._position % self.kind.table.page_tokens

    def places(self, piece_tokens: int) -> tuple[Tensor, Tensor]:
        """Of each column from ``first`` on its piece, of so many tokens, and its place in that, int64 [B, Lk]: of the
        pieces of ``closed + unclosed`` in order. Columns that are not stored are in a piece after the last one."""
        found = self._places.get(piece_tokens)
        if found is None:
            size = self.kind.table.page_tokens
            pieces, at = places_of(self.slot_of, self.token_of, size, piece_tokens)
            if self.columns.stored is not None:
                last = len(self.closed + self.unclosed) * (size // piece_tokens)
                pieces = pieces.masked_fill(~self.columns.stored[:, self.first :], last)
            found = self._places[piece_tokens] = pieces, at
        return found

    @cached_property
    def _position(self) -> Tensor:
        """Of columns that are not stored: a position that is, so that what is read there is a number."""
        return self.columns.positions[:, self.first :].maximum(self._first_index * self.kind.table.page_tokens)

    @cached_property
    def _first_index(self) -> Tensor:
        if not any(self.first_index):
            return torch.zeros(1, 1, dtype=torch.long, device=self.columns.device)
        return torch.tensor(self.first_index, device=self.columns.device)[:, None]

    @cached_property
    def _targets(self) -> tuple[Targets, tuple[Tensor, ...] | None]:
        """Where the new tokens go; and of those that are written their rows and numbers, None for all of all rows."""
        columns, count = self.columns, self.columns.stop - self.columns.start
        piece = self.kind.cells.piece_tokens
        names = self.closed + self.unclosed
        if count == 1 == len(self.slots) and columns.stored is None and self.kind.cells.movers is None:
            token = (columns.stop - 1) % self.kind.table.page_tokens
            return Targets(self.kind, [names[self.slots[0][-1]]], token // piece, token % piece), None
        slots = self.slot_of[:, -count:]
        tokens = self.token_of[:, -count:].expand(slots.shape)
        leading = [r == leader for r, leader in enumerate(self._leaders)]
        which: tuple[Tensor, ...] | None = None
        if columns.stored is not None or not all(leading):
            there = torch.tensor(leading, device=columns.device)[:, None].expand(slots.shape)
            if columns.stored is not None:
                there = there & columns.stored[:, -count:]
            if not bool(there.all()):
                which = there.nonzero(as_tuple=True)
                slots, tokens = slots[which][None], tokens[which][None]
        used = torch.unique(slots).tolist() if slots.numel() > 1 else slots.flatten().tolist()
        place = torch.zeros(max(len(names), 1), dtype=torch.long, device=columns.device)
        if used:
            place[used] = torch.arange(len(used), device=columns.device)
        pieces, at = places_of(place[slots], tokens, self.kind.table.page_tokens, piece)
        return Targets(self.kind, [names[slot] for slot in used], pieces, at), which

    def _open_pages(self, number: int, rows: Rows, growth: Growth) -> None:
        kind, size = self.kind, self.kind.table.page_tokens
        kind.forget_freed()
        for r, appended in growth.appended[number].items():
            self._copies += appended.copies
            for copy in appended.copies:
                kind.open_new(copy.target)
            copied = {copy.target for copy in appended.copies}
            for run in appended.runs:
                if run.at == 0:
                    kind.open_new(run.page)
                elif run.page not in kind.writable and run.page not in copied:
                    kind.open_again(run.page)
            if appended.runs and rows.rows[r].length % size and appended.runs[-1].at == 0:
                self._blank.append(appended.runs[-1].page)

    def _find_straight(self, rows: Rows) -> list[tuple[int, int, int]] | None:
        """Of each row: how many columns from ``first`` on are before its tokens, the first position that is there, and
        its length; None where columns behind tokens are not stored."""
        found = []
        for row, length in zip(rows.rows, self.columns.lengths, strict=True):
            start = row.spans[0][0] if row.spans else self.columns.stop
            if len(row.spans) > 1 or start + length != self.columns.stop:
                return None
            found.append((max(start - self.first, 0), row.before(self.first), length))
        return found

    def _find_to_close(self, tables: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        recent, size = self.kind.cells.form.recent_tokens, self.kind.table.page_tokens
        found: dict[int, None] = {}
        for table, length in zip(tables, self.columns.lengths, strict=True):
            index = max(length - recent, 0) // size - 1
            while index >= 0 and table[index] in self.kind.open:
                found[table[index]] = None
                index -= 1
        return tuple(found)
