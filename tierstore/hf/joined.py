"""Two stores as one: the second's files are numbered after the first's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tierstore.contracts import Fence, ReadRequest, Store
from tierstore.tensors import Piece, TensorSpec


@dataclass(frozen=True)
class BothFence:
    """Complete when both are."""

    one: Fence
    other: Fence

    def done(self) -> bool:
        """Whether both are complete."""
        return self.one.done() and self.other.done()

    def wait(self) -> None:
        """Block until both are complete; raise what the first or else the second raised."""
        try:
            self.one.wait()
        finally:
            self.other.wait()

    gate = wait


class JoinedStore:
    """Tensors of ``first`` (of ``files`` files) and of ``second``. A name in both is the second's. Closes both."""

    def __init__(self, first: Store, files: int, second: Store) -> None:
        self._first, self._files, self._second = first, files, second
        self.specs: Mapping[str, TensorSpec] = {**first.specs, **second.specs}
        self.tier = first.tier

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where tensor ``name`` lies. Raises ``KeyError``."""
        if name not in self._second.specs:
            return self._first.pieces(name)
        return tuple(replace(piece, file=piece.file + self._files) for piece in self._second.pieces(name))

    def read(self, requests: Sequence[ReadRequest]) -> Fence:
        """Start reading from both."""
        here = [request for request in requests if request.file < self._files]
        there = [
            replace(request, file=request.file - self._files) for request in requests if request.file >= self._files
        ]
        if not there:
            return self._first.read(here)
        if not here:
            return self._second.read(there)
        return BothFence(self._first.read(here), self._second.read(there))

    def close(self) -> None:
        """Close both. Idempotent."""
        self._first.close()
        self._second.close()
