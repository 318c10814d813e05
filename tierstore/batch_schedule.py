"""Who joins a batch, and how many tokens of which sequence go through the model in the next pass: integers only.

Refill is continuous, as in Orca (Yu et al. 2022, OSDI), and prompts go in chunks beside tokens that are generated, as
in Sarathi (Agrawal et al. 2023, arXiv 2308.16369). Whoever joins has pages reserved for the longest that it may become,
so that nobody has to be thrown out again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

__all__ = ["Admission", "Limits", "Part", "Running", "Waiting", "admit", "next_pass", "page_keys", "too_long"]

LOOK_AHEAD = 1024
"""Waiting rows that are looked at: more of them may wait for a prefix that others compute."""


@dataclass(frozen=True, slots=True)
class Limits:
    """A pass has up to ``micro_batches`` of ``tokens`` tokens, for at most ``sequences`` sequences that are under way.

    They have ``pages`` of ``page_tokens`` tokens, of which ``open_pages`` may be open at once. However long it is, a
    sequence holds ``sequence_pages`` between passes at most; None is no bound. Raises ``ValueError``.
    """

    tokens: int
    micro_batches: int
    sequences: int
    page_tokens: int
    pages: int
    open_pages: int
    sequence_pages: int | None = None

    def __post_init__(self) -> None:
        if min(self.tokens, self.micro_batches, self.sequences, self.page_tokens) < 1 or self.open_pages < 1:
            raise ValueError(f"{self}: every limit must be at least 1")

    @property
    def samples(self) -> int:
        """Sequences that can be under way at once: each has a page open."""
        return min(self.sequences, self.open_pages)


@dataclass(frozen=True, slots=True)
class Waiting:
    """A row that waits: ``prompt_tokens`` of it are to be continued by up to ``new_tokens``, ``samples`` times.

    ``keys`` stand for what the prompt's pages hold, as ``page_keys`` gives them; without any, nothing is shared.
    """

    row: int
    prompt_tokens: int
    new_tokens: int
    samples: int = 1
    keys: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Running:
    """A sequence under way that has ``length`` tokens: it generates once these are ``prompt_tokens`` or more.

    ``samples`` sequences will be forked from it, itself counted in, or 1 when that is done; ``row``, ``prompt_tokens``,
    ``new_tokens`` and ``keys`` are those of its row. Its first ``sealed`` tokens can be found by content.
    ``drafts`` tokens would like to be verified beside the next one.
    """

    sequence: int
    row: int
    prompt_tokens: int
    new_tokens: int
    length: int
    samples: int = 1
    keys: tuple[bytes, ...] = ()
    sealed: int = 0
    drafts: int = 0


@dataclass(frozen=True, slots=True)
class Admission:
    """``row`` joins with ``samples`` of its samples: all, or as many as can be under way at once; the others wait on.

    At least ``found`` tokens of its prompt are there already. Where they are not, as pages are lost, it would take more
    pages than it was counted for: it should leave again, and wait without keys.
    """

    row: int
    samples: int
    found: int


@dataclass(frozen=True, slots=True)
class Part:
    """The next ``tokens`` of ``sequence``: of its prompt, or one that was generated and drafted ones behind it."""

    sequence: int
    tokens: int
    prompt: bool


def page_keys(tokens: Sequence[int], page_tokens: int) -> tuple[bytes, ...]:
    """One key for each page that two prompts can share: equal where these tokens, and all before them, are equal.

    The last token is left out, as it must be computed anyway."""
    keys, digest = [], b""
    for start in range(0, len(tokens) - page_tokens, page_tokens):
        digest = hashlib.sha256(digest + array("q", tokens[start : start + page_tokens]).tobytes()).digest()
        keys.append(digest)
    return tuple(keys)


def too_long(row: Waiting, limits: Limits) -> tuple[int, int] | None:
    """For a row that could never run, not even alone: how many tokens it needs, and for how many there are pages."""
    if _pages(row, 1, limits) <= limits.pages:
        return None
    return row.prompt_tokens + row.new_tokens, limits.pages * limits.page_tokens


def admit(running: Sequence[Running], waiting: Iterable[Waiting], limits: Limits) -> list[Admission]:
    """Which of ``waiting`` join those that are ``running``, in order; nobody overtakes a row that lacks room.

    A row whose prompt begins with pages that are being computed right now waits until they are sealed, since it
    can share them then; the other samples of a row that is under way wait until it has ended. These may be overtaken.
    Raises ``ValueError`` for a row that is ``too_long``.
    """
    book, under_way = _Book(running, limits), {each.row for each in running}
    admissions = []
    for row in islice(waiting, LOOK_AHEAD):
        if too_long(row, limits) is not None:
            raise ValueError(f"{row} could never run within {limits}: leave out what is too long")
        if book.samples >= limits.samples:
            break
        if row.row in under_way or not book.pending.isdisjoint(row.keys):
            continue
        samples = min(row.samples, _samples_alone(row, limits))
        if not book.has_room(row, samples):
            break
        admissions.append(Admission(row.row, samples, book.add(row, samples) * limits.page_tokens))
    return admissions


def next_pass(running: Sequence[Running], limits: Limits) -> list[Part]:
    """What goes through the model next, in the order in which it stands in the micro-batches; nothing when none runs.

    ``running`` is in the order of admission. First every sequence that generates gets its next token, then drafted ones
    are added, and what is left goes to prompts, so that the last micro-batch is filled.
    """
    size = limits.page_tokens
    left = limits.tokens * limits.micro_batches
    # each has its last page open, or a first one to write to: what else is open is shared out
    spare = limits.open_pages - sum(each.samples for each in running)
    # a prompt that is longer than a window holds more than was reserved for it, until the pass is over
    free = 0 if limits.sequence_pages is None else _Book(running, limits).free
    generating = [each for each in running if each.length >= each.prompt_tokens][:left]
    left -= len(generating)
    parts = []
    for each in generating:
        more = 0
        if each.drafts and left:
            more = min(each.drafts, each.prompt_tokens + each.new_tokens - each.length - 2, left)
            more = max(0, min(more, _room(each, size, spare) - 1))
            spare -= _opened(each, 1 + more, size)
            left -= more
        parts.append(Part(each.sequence, 1 + more, False))
    for each in running:
        if left and each.length < each.prompt_tokens:
            passes = _passes_window(each, limits)
            room = _room(each, size, min(spare, free) if passes else spare)
            tokens = min(each.prompt_tokens - each.length, left, room)
            opened = _opened(each, tokens, size)
            spare -= opened
            free -= opened if passes else 0
            left -= tokens
            parts.append(Part(each.sequence, tokens, True))
    return parts


def _room(sequence: Running, size: int, spare: int) -> int:
    """Tokens that fit the page that is open, or the first one, and ``spare`` more."""
    return (sequence.samples + max(spare, 0)) * size - sequence.length % size


def _opened(sequence: Running, tokens: int, size: int) -> int:
    """Pages that ``tokens`` open beyond the one that each sample has anyway."""
    return max(0, -(-(sequence.length % size + tokens) // size) - sequence.samples)


def _passes_window(row: Waiting | Running, limits: Limits) -> bool:
    """Whether a row becomes longer than all windows: then it gives back pages, and nothing of it counts as shared."""
    pages = -(-(row.prompt_tokens + row.new_tokens) // limits.page_tokens)
    return limits.sequence_pages is not None and pages > limits.sequence_pages


def _keys(row: Waiting | Running, limits: Limits) -> tuple[bytes, ...]:
    return () if _passes_window(row, limits) else row.keys


def _shared_pages(row: Waiting | Running, limits: Limits) -> int:
    """Full pages of a prompt: all samples share them."""
    return 0 if _passes_window(row, limits) else row.prompt_tokens // limits.page_tokens


def _own_pages(row: Waiting | Running, limits: Limits) -> int:
    """Pages that each sample has for itself."""
    if limits.sequence_pages is not None and _passes_window(row, limits):
        return limits.sequence_pages
    return -(-(row.prompt_tokens + row.new_tokens) // limits.page_tokens) - _shared_pages(row, limits)


def _pages(row: Waiting, samples: int, limits: Limits) -> int:
    return _shared_pages(row, limits) + samples * _own_pages(row, limits)


def _samples_alone(row: Waiting, limits: Limits) -> int:
    """How many samples of a row could be under way together, were it alone."""
    return min(limits.samples, (limits.pages - _shared_pages(row, limits)) // _own_pages(row, limits))


class _Book:
    """What is reserved. A page that prompts share counts once, whoever computed it.

    ``pending`` are keys of pages that are being computed, ``sealed`` of those that can be found by content; ``free``
    pages are left.
    """

    def __init__(self, running: Sequence[Running], limits: Limits) -> None:
        self._limits, size = limits, limits.page_tokens
        self.samples = sum(each.samples for each in running)
        self.pending: set[bytes] = set()
        self._sealed: set[bytes] = set()
        for each in running:
            keys = _keys(each, limits)
            done = each.sealed // size if each.length < each.prompt_tokens else len(keys)
            self._sealed.update(keys[:done])
            self.pending.update(keys[done:])
        self.pending -= self._sealed
        # full pages that no other row can share are still one for all samples of a row
        alone = {each.row: _shared_pages(each, limits) - len(_keys(each, limits)) for each in running}
        own = sum(each.samples * _own_pages(each, limits) for each in running)
        self.free = limits.pages - len(self.pending) - len(self._sealed) - sum(alone.values()) - own

    def has_room(self, row: Waiting, samples: int) -> bool:
        return self.samples + samples <= self._limits.samples and self._needed(row, samples) <= self.free

    def add(self, row: Waiting, samples: int) -> int:
        """Reserve for ``row``; as many of its first pages are there already."""
        self.free -= self._needed(row, samples)
        self.samples += samples
        keys = _keys(row, self._limits)
        found = sum(key in self._sealed for key in keys)
        self.pending.update(keys[found:])
        return found

    def _needed(self, row: Waiting, samples: int) -> int:
        return _pages(row, samples, self._limits) - sum(key in self._sealed for key in _keys(row, self._limits))
