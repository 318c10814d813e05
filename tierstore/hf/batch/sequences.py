"""Sequences over the page tables of all kinds of layers: every change is whole or, with an error, none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from tierstore.errors import CapacityError
from tierstore.hf.kv.kinds import KvKind
from tierstore.pages import GONE, Appended


@dataclass
class Tokens:
    """One sequence: its number in the table of each kind, its positions, and how many of the first ones were computed
    as a prompt's, in tiles of their shape."""

    numbers: list[int]
    length: int = 0
    prompt: int = 0


class Growth:
    """New positions of some sequences, until ``settle`` says that they stay or ``undo`` that they never were.

    ``appended[kind]`` says what the table does for each sequence, in the order in which they were given."""

    def __init__(self, kinds: Sequence[KvKind], grown: Iterable[tuple[Tokens, int, bool]]) -> None:
        """Of each sequence how many positions it gets, and whether these are a prompt's. Raises ``CapacityError``."""
        self._kinds = kinds
        self._before: list[tuple[Tokens, Tokens, list[int | None]]] = []
        self.appended: list[list[Appended]] = [[] for _ in kinds]
        try:
            for sequence, count, prompt in grown:
                self._grow(sequence, count, prompt)
        except BaseException:
            self.undo()
            raise

    def settle(self) -> None:
        """The positions are written."""
        for _, _, spares in self._before:
            for kind, spare in zip(self._kinds, spares, strict=True):
                if spare is not None:
                    kind.table.remove(spare)
        self._before.clear()

    def undo(self) -> None:
        """The sequences are as they were."""
        for sequence, before, spares in reversed(self._before):
            for index, (kind, spare) in enumerate(zip(self._kinds, spares, strict=True)):
                if spare is None:
                    kind.table.crop(before.numbers[index], before.length)
                else:
                    kind.table.remove(before.numbers[index])
                    before.numbers[index] = spare
            sequence.numbers, sequence.length, sequence.prompt = before.numbers, before.length, before.prompt
        self._before.clear()

    def _grow(self, sequence: Tokens, count: int, prompt: bool) -> None:
        spares: list[int | None] = [None] * len(self._kinds)
        self._before.append((sequence, replace(sequence, numbers=list(sequence.numbers)), spares))
        for index, (kind, number) in enumerate(zip(self._kinds, sequence.numbers, strict=True)):
            table = kind.table
            if sequence.length % table.page_tokens and table.shared(table.pages(number)[-1]):
                spares[index] = table.fork(number)  # it gets a copy of its last page, and may have to go back
            self.appended[index].append(table.append(number, count))
        if prompt and sequence.prompt == sequence.length:
            sequence.prompt += count
        sequence.length += count


class Sequences:
    """The sequences of one model, by number. Raises ``KeyError`` for a number that is none."""

    def __init__(self, kinds: Sequence[KvKind]) -> None:
        self._kinds = tuple(kinds)
        self._known: dict[int, Tokens] = {}
        self._next = 0

    def __getitem__(self, number: int) -> Tokens:
        return self._known[number]

    def __iter__(self) -> Iterator[int]:
        return iter(tuple(self._known))

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence that shares the pages which hold the beginning of ``tokens``; how many positions it has."""
        numbers = [kind.table.add() for kind in self._kinds]
        tables = [(kind.table, number) for kind, number in zip(self._kinds, numbers, strict=True)]
        shared = min(table.share_prefix(number, tokens) for table, number in tables)
        for table, number in tables:
            table.crop(number, shared)
        added = self._named(Tokens(numbers, shared, shared))
        self.pass_window(added, 0)
        return added, shared

    def fork(self, number: int) -> int:
        """A new sequence with the same positions: no page is copied before one of the two writes to it."""
        found = self._known[number]
        numbers = [kind.table.fork(each) for kind, each in zip(self._kinds, found.numbers, strict=True)]
        return self._named(replace(found, numbers=numbers))

    def crop(self, number: int, length: int) -> None:
        """Keep the first ``length`` positions. Raises ``ValueError`` for what a window has let go of."""
        found = self._known[number]
        if not 0 <= length <= found.length:
            raise ValueError(f"sequence {number} has {found.length} positions and cannot be cut to {length}")
        for kind, each in zip(self._kinds, found.numbers, strict=True):
            first = 0 if kind.window is None else max(length - kind.window + 1, 0)
            pages = kind.table.pages(each)[first // kind.table.page_tokens :]
            if length and pages and pages[0] == GONE:
                raise ValueError(
                    f"sequence {number} cannot go back from {found.length} positions to {length}: pages that the "
                    f"window of {kind.window} tokens needs then are given back"
                )
        for kind, each in zip(self._kinds, found.numbers, strict=True):
            kind.table.crop(each, length)
        found.length, found.prompt = length, min(found.prompt, length)

    def seal(self, number: int, tokens: Sequence[int]) -> None:
        """Let full pages be found by ``tokens``, as far as they were computed as a prompt: so their numbers are those
        that whoever finds them would compute."""
        found = self._known[number]
        if len(tokens) > found.length:
            raise ValueError(f"sequence {number} has {found.length} positions, {len(tokens)} tokens were named")
        for kind, each in zip(self._kinds, found.numbers, strict=True):
            kind.table.seal(each, tokens[: found.prompt])

    def pass_window(self, number: int, margin: int) -> None:
        """Give back pages that no query sees which comes at most ``margin`` positions before the end."""
        found = self._known[number]
        for kind, each in zip(self._kinds, found.numbers, strict=True):
            if kind.window is not None:
                kind.table.drop_before(each, max(found.length - margin - kind.window + 1, 0))

    def remove(self, number: int) -> None:
        """End a sequence. What can be found by content stays, closed, while there is room."""
        found = self._known.pop(number)
        for kind, each in zip(self._kinds, found.numbers, strict=True):
            full = kind.table.pages(each)[: found.prompt // kind.table.page_tokens]
            pages = [page for page in full if page in kind.open and not kind.table.shared(page)]
            with suppress(CapacityError):  # then they stay open
                for layer in kind.layers:
                    kind.close(layer, pages)
                kind.open.difference_update(pages)
            kind.table.remove(each)

    def holding(self, pages: Iterable[tuple[int, int]]) -> tuple[int, ...]:
        """The sequences that hold any of ``(kind, page)``."""
        wanted = set(pages)
        return tuple(
            number
            for number, found in self._known.items()
            if any((k, p) in wanted for k, each in enumerate(found.numbers) for p in self._kinds[k].table.pages(each))
        )

    def _named(self, sequence: Tokens) -> int:
        self._next += 1
        self._known[self._next - 1] = sequence
        return self._next - 1
