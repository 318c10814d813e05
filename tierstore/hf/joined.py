"""Two safetensors stores as one: the second's files are numbered after the first's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from tierstore.contracts import Fence, ReadRequest
from tierstore.errors import StoreError
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.stores.workers import ReadFence
from tierstore.tensors import Piece, TensorSpec


@dataclass(frozen=True, slots=True)
class BothFence:
    """Complete when both are."""

    one: ReadFence
    other: ReadFence

    @property
    def started(self) -> float:
        """``time.perf_counter`` reading when the first of the two started, in seconds; 0.0 until then."""
        return min((fence.started for fence in (self.one, self.other) if fence.started), default=0.0)

    @property
    def finished(self) -> float:
        """Reading when the last of the two was complete; 0.0 until then."""
        return max(self.one.finished, self.other.finished) if self.done() else 0.0

    def done(self) -> bool:
        """Whether both are complete."""
        return self.one.done() and self.other.done()

    def wait(self) -> None:
        """Block until both are complete; raise what one of them raised."""
        try:
            self.one.wait()
        finally:
            self.other.wait()

    gate = wait


class JoinedStore:
    """Tensors of ``first`` and of ``second``. A name in both is the second's. Closes both."""

    def __init__(self, first: SafetensorsStore, second: SafetensorsStore) -> None:
        self._first, self._second, self._files = first, second, len(first.paths)
        self.specs: Mapping[str, TensorSpec] = {**first.specs, **second.specs}
        self.paths: tuple[Path, ...] = (*first.paths, *second.paths)
        self.tier = first.tier

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where tensor ``name`` lies. Raises ``KeyError``."""
        if name not in self._second.specs:
            return self._first.pieces(name)
        return tuple(replace(piece, file=piece.file + self._files) for piece in self._second.pieces(name))

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading from both; ``StoreReadError`` comes out of the fence."""
        here = [request for request in requests if request.file < self._files]
        there = [
            replace(request, file=request.file - self._files) for request in requests if request.file >= self._files
        ]
        if not there:
            return self._first.read(here)
        second = self._second.read(there)
        if not here:
            return second
        try:
            return BothFence(self._first.read(here), second)
        except BaseException:
            with suppress(StoreError):
                second.wait()  # or it would go on writing to buffers that the caller takes for free
            raise

    def close(self) -> None:
        """Close both. Idempotent."""
        self._first.close()
        self._second.close()
