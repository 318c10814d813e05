"""Which samples of which rows are done, for millions of rows in a bit each."""

from __future__ import annotations

from collections.abc import Callable


class Done:
    """For rows in lines 1 to ``lines``; ``samples_of`` says how many samples a row asks for."""

    def __init__(self, lines: int, samples_of: Callable[[int], int]) -> None:
        self._bits = bytearray(lines // 8 + 1)
        self._partial: dict[int, int] = {}  # of rows begun: a bit for each sample
        self._samples_of = samples_of
        self.rows = 0
        """Rows of which everything is done, or that failed."""
        self.samples = 0
        """Samples done."""

    def is_done(self, line: int) -> bool:
        """Whether nothing of a row is left to do."""
        return bool(self._bits[line >> 3] >> (line & 7) & 1)

    def missing(self, line: int) -> tuple[int, ...]:
        """Samples of a row that are left to do."""
        if self.is_done(line):
            return ()
        have = self._partial.get(line, 0)
        return tuple(index for index in range(self._samples_of(line)) if not have >> index & 1)

    def add(self, line: int, index: int) -> bool:
        """A sample is done; False where it was before."""
        have = self._partial.get(line, 0)
        if self.is_done(line) or have >> index & 1:
            return False
        self._partial[line] = have = have | 1 << index
        self.samples += 1
        if have.bit_count() == self._samples_of(line):
            self.finish(line)
        return True

    def finish(self, line: int) -> bool:
        """Nothing of a row is left to do; False where that was so before."""
        if self.is_done(line):
            return False
        self._partial.pop(line, None)
        self._bits[line >> 3] |= 1 << (line & 7)
        self.rows += 1
        return True
