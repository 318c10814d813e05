"""The rows of a batch as sequences of pages: which columns of the batch each row stores, in integers only.

A *column* is a place in the batch's tensors, padding included; a *position* counts the tokens of one row that are
stored. Columns that the 2-D mask hides when they come are not stored: padding takes no room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from tierstore.errors import CapacityError
from tierstore.pages import Appended, PageTable


@dataclass
class Row:
    """One row: its sequence in the table of each kind, and its stored columns as ``(first, count)``, in order."""

    sequences: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions."""
        return sum(count for _, count in self.spans)

    def before(self, column: int) -> int:
        """Positions at columns before ``column``."""
        return sum(min(count, max(column - first, 0)) for first, count in self.spans)

    def column(self, position: int) -> int:
        """The column of a position that is stored."""
        for first, count in self.spans:
            if position < count:
                return first + position
            position -= count
        raise ValueError("a position beyond the end")

    def extended(self, column: int, stored: Sequence[bool] | int) -> list[tuple[int, int]]:
        """The spans with new columns from ``column`` on: ``stored`` says which, or how many, all of them."""
        spans = list(self.spans)
        for at, count in [(column, stored)] if isinstance(stored, int) else _runs(column, stored):
            if spans and sum(spans[-1]) == at:
                spans[-1] = (spans[-1][0], spans[-1][1] + count)
            elif count:
                spans.append((at, count))
        return spans

    def cropped(self, columns: int) -> list[tuple[int, int]]:
        """The spans before column ``columns``."""
        return [(first, min(count, columns - first)) for first, count in self.spans if first < columns]


@dataclass(frozen=True)
class Growth:
    """What a pass added: ``leaders[r]`` is the row that writes for row ``r`` (rows that are the same write once), and
    ``appended[kind]`` what each leader's table says, by row."""

    leaders: tuple[int, ...]
    appended: tuple[dict[int, Appended], ...]


class Rows:
    """Rows over the page tables of some kinds. Every change is whole or, with an error, none."""

    def __init__(self, tables: Sequence[PageTable]) -> None:
        self.columns = 0
        self.rows: list[Row] = []
        self._tables = tuple(tables)

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, count: int) -> None:
        """New rows without positions."""
        self.rows += [Row([table.add() for table in self._tables]) for _ in range(count)]

    def pages(self, row: int, kind: int) -> tuple[int, ...]:
        """The block table of a row."""
        return self._tables[kind].pages(self.rows[row].sequences[kind])

    def append(self, count: int, stored: Sequence[Sequence[bool]] | None, tokens: Sequence[Hashable] | None) -> Growth:
        """``count`` more columns, of which each row stores those that ``stored`` says, or all.

        Rows that are the same until now and get the same ``tokens`` share their pages; None says that none is known.
        Raises ``CapacityError``.
        """
        spans = [row.extended(self.columns, count if stored is None else stored[r]) for r, row in enumerate(self.rows)]
        leaders = self._leaders(spans, tokens)
        followers = [r for r, leader in enumerate(leaders) if leader != r]
        for r in followers:
            self._remove(self.rows[r])
        try:
            self._check_room(spans, leaders)
            appended = tuple(
                {
                    r: table.append(self.rows[r].sequences[kind], _total(spans[r]) - self.rows[r].length)
                    for r in sorted(set(leaders))
                }
                for kind, table in enumerate(self._tables)
            )
            for r in set(leaders):
                self.rows[r].spans = spans[r]
            self.columns += count
        finally:
            for r in followers:
                self.rows[r] = self._fork(self.rows[leaders[r]])
        return Growth(tuple(leaders), appended)

    def crop(self, columns: int) -> None:
        """Keep the columns before ``columns`` only."""
        for row in self.rows:
            spans = row.cropped(columns)
            for kind, table in enumerate(self._tables):
                table.crop(row.sequences[kind], _total(spans))
            row.spans = spans
        self.columns = min(columns, self.columns)

    def select(self, sources: Sequence[int]) -> None:
        """Let row ``i`` become what row ``sources[i]`` was: no bytes move."""
        if len(sources) == len(self.rows):  # beams, at every token: costs what differs, not all pages
            for kind, table in enumerate(self._tables):
                own = [row.sequences[kind] for row in self.rows]
                table.reorder(own, [own[source] for source in sources])
            spans = [list(self.rows[source].spans) for source in sources]
            self.rows = [Row(row.sequences, each) for row, each in zip(self.rows, spans, strict=True)]
            return
        olds, self.rows = self.rows, [self._fork(self.rows[source]) for source in sources]
        for row in olds:
            self._remove(row)

    def share(self, tokens: Sequence[Sequence[int]], columns: int, most: int) -> int:
        """Let empty rows share pages that hold the beginning of their ``tokens``, which end at column ``columns``.

        Returns how many columns all rows have then, at most ``most``."""
        found = []
        for row, known in zip(self.rows, tokens, strict=True):
            each = [table.share_prefix(row.sequences[kind], known) for kind, table in enumerate(self._tables)]
            found.append(columns - len(known) + min(each, default=0))
        common = min([*found, most])
        for row, known in zip(self.rows, tokens, strict=True):
            first = columns - len(known)
            length = max(common - first, 0)
            for kind, table in enumerate(self._tables):
                table.crop(row.sequences[kind], length)
            row.spans = [(first, length)] if length else []
        self.columns = common
        return common

    def seal(self, row: int, tokens: Sequence[int]) -> None:
        """Let the pages of a row be found by its ``tokens``."""
        for kind, table in enumerate(self._tables):
            table.seal(self.rows[row].sequences[kind], tokens)

    def drop_before(self, kind: int, column: int) -> None:
        """Give back pages that hold only positions at columns before ``column``."""
        for row in self.rows:
            self._tables[kind].drop_before(row.sequences[kind], row.before(column))

    def clear(self) -> None:
        """End all rows."""
        for row in self.rows:
            self._remove(row)
        self.rows, self.columns = [], 0

    def _fork(self, row: Row) -> Row:
        sequences = [table.fork(number) for table, number in zip(self._tables, row.sequences, strict=True)]
        return Row(sequences, list(row.spans))

    def _remove(self, row: Row) -> None:
        for table, number in zip(self._tables, row.sequences, strict=True):
            table.remove(number)

    def _leaders(self, spans: Sequence[Sequence[tuple[int, int]]], tokens: Sequence[Hashable] | None) -> list[int]:
        if tokens is None:
            return list(range(len(self.rows)))
        first: dict[Hashable, int] = {}
        kinds = range(len(self._tables))
        return [
            first.setdefault((tokens[r], tuple(spans[r]), *(self.pages(r, kind) for kind in kinds)), r)
            for r in range(len(self.rows))
        ]

    def _check_room(self, spans: Sequence[Sequence[tuple[int, int]]], leaders: Sequence[int]) -> None:
        """Before any table changes, so that none has to be changed back."""
        for kind, table in enumerate(self._tables):
            needed, writers = 0, Counter[int]()
            for r in set(leaders):
                pages, length = self.pages(r, kind), self.rows[r].length
                grown = _total(spans[r])
                needed += -(-grown // table.page_tokens) - len(pages)
                if grown > length and length % table.page_tokens:
                    writers[pages[-1]] += 1
            # each writes to a copy, but for the last one that holds the page
            needed += sum(min(count, max(table.users(page) - 1, 0)) for page, count in writers.items())
            if needed > table.available:
                raise CapacityError(
                    f"{len(set(leaders))} sequences of up to {max(map(_total, spans))} tokens need {needed} more pages "
                    f"of {table.page_tokens} tokens, {table.available} of {table.capacity} are available: shorten the "
                    f"prompt, give fewer rows, end other sequences, or raise the KV budget (kv_hbm, kv_ram, kv_nvme)",
                    of_pages=True,
                )


def _total(spans: Sequence[tuple[int, int]]) -> int:
    return sum(count for _, count in spans)


def _runs(column: int, stored: Sequence[bool]) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    for at, here in enumerate(stored, column):
        if here and runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        elif here:
            runs.append((at, 1))
    return runs
