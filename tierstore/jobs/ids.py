"""Which line has which id, for millions of ids in few bytes."""

from __future__ import annotations

from array import array
from hashlib import blake2b

Id = str | int
_LINE_BITS = 40
_MOST_LINES = 1 << _LINE_BITS


class IdLines:
    """Ids and the line, below 2**40, that had each first.

    A table with open addressing (Knuth, TAOCP 6.4, linear probing) of 16 bytes a place, at most two thirds of them
    taken: 24 to 48 bytes an id. Ids are held as 88 bits of their BLAKE2b: among 10 million, two that differ are taken
    for the same with a probability of 2e-13."""

    def __init__(self) -> None:
        self._count = 0
        self._mask = (1 << 10) - 1
        self._hashes = array("Q", bytes(8 << 10))
        self._lines = array("Q", bytes(8 << 10))  # 24 more bits of the hash, then the line; 0 where nobody is

    def add(self, id: Id, line: int) -> int:
        """The line that has ``id``: ``line``, unless another was first."""
        if not 0 < line < _MOST_LINES:
            raise ValueError(f"line {line}: from 1 to {_MOST_LINES - 1} are possible")
        first, tag = _hash(id)
        place = self._place(first, tag)
        if (there := self._lines[place]) != 0:
            return there & (_MOST_LINES - 1)
        self._hashes[place], self._lines[place] = first, tag | line
        self._count += 1
        if self._count * 3 > self._mask * 2:
            self._grow()
        return line

    def find(self, id: Id) -> int | None:
        """The line that has ``id``."""
        return self._lines[self._place(*_hash(id))] & (_MOST_LINES - 1) or None

    def __len__(self) -> int:
        return self._count

    def _place(self, first: int, tag: int) -> int:
        place, hashes, lines, mask = first & self._mask, self._hashes, self._lines, self._mask
        while lines[place] and not (hashes[place] == first and lines[place] >> _LINE_BITS == tag >> _LINE_BITS):
            place = (place + 1) & mask
        return place

    def _grow(self) -> None:
        hashes, lines = self._hashes, self._lines
        self._mask = mask = self._mask * 2 + 1
        self._hashes, self._lines = array("Q", bytes(8 * (mask + 1))), array("Q", bytes(8 * (mask + 1)))
        for first, line in zip(hashes, lines, strict=True):
            if line:
                place = first & mask
                while self._lines[place]:
                    place = (place + 1) & mask
                self._hashes[place], self._lines[place] = first, line


def _hash(id: Id) -> tuple[int, int]:
    """64 bits, and 24 more at the top of a word."""
    kind = b"s" if isinstance(id, str) else b"i"  # 7 and "7" are two ids
    digest = blake2b(str(id).encode("utf-8", "surrogatepass"), digest_size=11, person=kind).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little") << _LINE_BITS
