"""Which page holds which position of which sequence: a block table with sharing, in integers only.

A page holds ``page_tokens`` neighbouring positions. Sequences share pages by reference count; a shared page is copied
before a sequence writes to it, and pages whose tokens are known stay findable by content after their sequences end,
until the room is needed. Paging as in vLLM (Kwon et al. 2023, arXiv 2309.06180).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tierstore.errors import CapacityError
from tierstore.page_contents import PageContents

GONE = -1
"""In a block table: a page whose positions are behind the window and were given back."""


@dataclass(frozen=True, slots=True)
class Run:
    """``count`` neighbouring positions of a sequence, from ``position`` on, at token ``at`` of page ``page``."""

    position: int
    page: int
    at: int
    count: int


@dataclass(frozen=True, slots=True)
class PageCopy:
    """The first ``tokens`` of page ``source`` are to be copied to page ``target``."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Appended:
    """What to do for new positions: carry out ``copies`` first, then write ``runs``."""

    copies: tuple[PageCopy, ...]
    runs: tuple[Run, ...]

    @property
    def fresh(self) -> tuple[int, ...]:
        """Pages that these positions are the first to be written to: whatever they held before is over."""
        return tuple(copy.target for copy in self.copies) + tuple(run.page for run in self.runs if not run.at)


@dataclass(frozen=True, slots=True)
class PageUsage:
    """Pages by state, and positions: ``used_tokens`` of those in held pages, ``unused_tokens`` the rest of them.

    A shared page counts once. ``kept_pages`` belong to no sequence and are only findable by content."""

    held_pages: int
    kept_pages: int
    free_pages: int
    used_tokens: int
    unused_tokens: int


@dataclass
class _Sequence:
    length: int = 0
    gone: int = 0  # as many of the first pages are behind the window
    pages: list[int] = field(default_factory=list)

    def copy(self) -> _Sequence:
        return _Sequence(self.length, self.gone, list(self.pages))


class PageTable:
    """The pages of sequences, each a number that ``add`` gives. Every change is whole or, with an error, none.

    Raises ``KeyError`` for a sequence that does not exist, ``ValueError`` for positions that do not, and
    ``CapacityError`` where more pages are needed than are free or kept.
    """

    def __init__(self, pages: int, page_tokens: int) -> None:
        if pages < 0 or page_tokens < 1:
            raise ValueError(f"{pages} pages of {page_tokens} tokens: at least 0 pages of at least 1 token are needed")
        self.page_tokens = page_tokens
        self.capacity = pages
        self._users: list[int] = []  # of the pages that were ever used: a disk may have room for millions
        self._free: list[int] = []
        self._freed: dict[int, None] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._next = 0
        self._contents = PageContents(page_tokens)
        self._kept: OrderedDict[int, None] = OrderedDict()

    # ---- sequences

    def add(self) -> int:
        """A new sequence without positions."""
        number = self._next
        self._next += 1
        self._sequences[number] = _Sequence()
        return number

    def fork(self, sequence: int) -> int:
        """A new sequence with the same positions, which it shares: no page is copied before one of them writes."""
        found = self._sequences[sequence]
        number = self.add()
        self._sequences[number] = found.copy()
        self._take(found.pages)
        return number

    def reorder(self, sequences: Sequence[int], sources: Sequence[int]) -> None:
        """Let each of ``sequences`` become what ``sources[i]`` was, as beam search chooses: no bytes move."""
        before = [self._sequences[source] for source in sources]
        after = [found.copy() for found in before]
        olds = [self._sequences[number] for number in sequences]
        if len(olds) != len(after) or len(set(sequences)) != len(sequences):
            raise ValueError(f"{len(sequences)} sequences and {len(sources)} sources: one source each is needed, once")
        same = [_same_pages(old.pages, found.pages) for old, found in zip(olds, after, strict=True)]
        for found, start in zip(after, same, strict=True):
            self._take(found.pages[start:])
        for number, old, found, start in zip(sequences, olds, after, same, strict=True):
            self._give_back(old.pages[start:])
            self._sequences[number] = found

    def remove(self, sequence: int) -> None:
        """End a sequence; its pages are free, or kept where their content is known."""
        self._give_back(self._sequences.pop(sequence).pages)

    def length(self, sequence: int) -> int:
        """Positions of a sequence, those behind the window included."""
        return self._sequences[sequence].length

    def pages(self, sequence: int) -> tuple[int, ...]:
        """The block table: the page of positions ``[i * page_tokens, (i + 1) * page_tokens)``, or ``GONE``."""
        return tuple(self._sequences[sequence].pages)

    # ---- positions

    def append(self, sequence: int, count: int) -> Appended:
        """Room for ``count`` more positions."""
        found = self._sequences[sequence]
        if count < 0:
            raise ValueError(f"{count} positions cannot be appended: use crop to take some away")
        used = found.length % self.page_tokens
        last = found.pages[-1] if used else GONE
        copied = bool(count) and last != GONE and self._users[last] > 1
        needed = -(-(found.length + count) // self.page_tokens) - len(found.pages)
        fresh = self._fresh(needed + copied, sequence)
        copies: tuple[PageCopy, ...] = ()
        if copied:
            copies = (PageCopy(last, fresh[0], used),)
            self._give_back([last])
            found.pages[-1] = fresh.pop(0)
        elif count and last != GONE:
            self._contents.forget(last)  # a page that was cut back by crop is no longer what it was found by
        found.pages += fresh
        runs = tuple(self._runs(found, found.length, found.length + count))
        found.length += count
        return Appended(copies, runs)

    def crop(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` positions only, as speculation does when it rolls back."""
        found = self._sequences[sequence]
        if not 0 <= length <= found.length:
            raise ValueError(f"sequence {sequence} has {found.length} positions and cannot be cut to {length}")
        keep = -(-length // self.page_tokens)
        if length % self.page_tokens and found.pages[keep - 1] == GONE:
            raise ValueError(f"position {length - 1} of sequence {sequence} is behind the window: its page is gone")
        self._give_back(found.pages[keep:])
        del found.pages[keep:]
        found.length, found.gone = length, min(found.gone, keep)

    def drop_before(self, sequence: int, position: int) -> None:
        """Give back the pages that hold only positions before ``position``: a sliding window has passed them."""
        found = self._sequences[sequence]
        for index in range(found.gone, min(position, found.length) // self.page_tokens):
            self._give_back([found.pages[index]])
            found.pages[index] = GONE
            found.gone = index + 1

    def runs(self, sequence: int, start: int = 0, stop: int | None = None) -> tuple[Run, ...]:
        """Where positions ``[start, stop)`` are; those behind the window are left out."""
        found = self._sequences[sequence]
        stop = found.length if stop is None else stop
        if not 0 <= start <= stop <= found.length:
            raise ValueError(f"sequence {sequence} has {found.length} positions, not [{start}, {stop})")
        return tuple(run for run in self._runs(found, start, stop) if run.page != GONE)

    # ---- pages found by content

    def seal(self, sequence: int, tokens: Sequence[int]) -> None:
        """Say which ``tokens`` stand at the sequence's first positions, so that its full pages are found by them."""
        found = self._sequences[sequence]
        if len(tokens) > found.length:
            raise ValueError(f"sequence {sequence} has {found.length} positions, {len(tokens)} tokens were named")
        self._contents.name(found.pages, tokens)

    def share_prefix(self, sequence: int, tokens: Sequence[int]) -> int:
        """Let an empty sequence share the pages that hold the beginning of ``tokens``; how many positions it has then.

        At least one token is left out, so that a model has something to compute the next one from."""
        found = self._sequences[sequence]
        if found.length:
            raise ValueError(f"sequence {sequence} has {found.length} positions already: share a prefix before any")
        pages = list(self._contents.find(tokens[:-1]))
        self._take(pages)
        found.pages += pages
        found.length += len(pages) * self.page_tokens
        return found.length

    def forget(self, page: int) -> None:
        """Never find ``page`` by content again: its bytes are lost. Sequences that hold it keep it."""
        self._contents.forget(page)
        if page in self._kept:
            del self._kept[page]
            self._release(page)

    # ---- room

    @property
    def available(self) -> int:
        """Pages that can be had: free ones, and kept ones that nobody holds."""
        return self._unheld + len(self._kept)

    def users(self, page: int) -> int:
        """How many sequences hold ``page``."""
        return self._users[page] if 0 <= page < len(self._users) else 0

    def shared(self, page: int) -> bool:
        """Whether several sequences hold ``page``."""
        return self.users(page) > 1

    def reclaim(self, count: int) -> int:
        """Give up the ``count`` pages that were kept for the longest time, or all that are kept; how many it were."""
        if count < 0:
            raise ValueError(f"{count} pages cannot be reclaimed: give 0 or more")
        count = min(count, len(self._kept))
        for _ in range(count):
            self._give_up_oldest()
        return count

    def take_freed(self) -> tuple[int, ...]:
        """Pages that nobody holds and nothing finds any more, since the last call: their bytes may be dropped.

        In the order in which they became free. A page that was used anew since then is not among them."""
        freed = tuple(self._freed)
        self._freed.clear()
        return freed

    def usage(self) -> PageUsage:
        """How the pages are used now."""
        used: dict[int, int] = {}
        for found in list(self._sequences.values()):  # a copy: whoever watches a model asks from another thread
            for index, page in enumerate(found.pages):
                if page != GONE:
                    tokens = min(found.length - index * self.page_tokens, self.page_tokens)
                    used[page] = max(used.get(page, 0), tokens)
        tokens = sum(used.values())
        return PageUsage(len(used), len(self._kept), self._unheld, tokens, len(used) * self.page_tokens - tokens)

    def _fresh(self, count: int, sequence: int) -> list[int]:
        """Pages to write to: free ones, then those kept for the longest time."""
        if count > self.available:
            raise CapacityError(
                f"sequence {sequence} needs {count} more pages of {self.page_tokens} tokens, {self.available} of "
                f"{self.capacity} are available: end other sequences, shorten the prompt, or raise the budget for KV",
                of_pages=True,
            )
        pages = []
        for _ in range(count):
            if not self._unheld:
                self._give_up_oldest()
            if self._free:
                pages.append(self._free.pop())
                self._freed.pop(pages[-1], None)
            else:
                pages.append(len(self._users))
                self._users.append(0)
        self._take(pages)
        return pages

    @property
    def _unheld(self) -> int:
        """Pages that are free: those that were given back, and those that were never used."""
        return len(self._free) + self.capacity - len(self._users)

    def _give_up_oldest(self) -> None:
        oldest, _ = self._kept.popitem(last=False)
        self._contents.forget(oldest)
        self._release(oldest)

    def _release(self, page: int) -> None:
        self._free.append(page)
        self._freed[page] = None

    def _take(self, pages: Iterable[int]) -> None:
        for page in pages:
            if page != GONE:
                self._users[page] += 1
                self._kept.pop(page, None)

    def _give_back(self, pages: Sequence[int]) -> None:
        """The last pages first: a prefix is worth more the shorter it is."""
        for page in reversed(pages):
            if page == GONE:
                continue
            self._users[page] -= 1
            if not self._users[page]:
                if page in self._contents:
                    self._kept[page] = None
                else:
                    self._release(page)

    def _runs(self, found: _Sequence, start: int, stop: int) -> Iterable[Run]:
        while start < stop:
            at = start % self.page_tokens
            count = min(self.page_tokens - at, stop - start)
            yield Run(start, found.pages[start // self.page_tokens], at, count)
            start += count


def _same_pages(first: Sequence[int], second: Sequence[int]) -> int:
    """How many pages both begin with."""
    length = min(len(first), len(second))
    return next((index for index in range(length) if first[index] != second[index]), length)
