"""Tensors that are in host memory already, behind the same contract as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from tierstore.contracts import Buffer, ReadRequest
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores.workers import ReadFence, Workers, buffer_address, move_bytes
from tierstore.tensors import ITEMSIZE, Piece, TensorSpec

_CHUNK = 16 << 20


@dataclass(slots=True)
class _Copy:
    fence: ReadFence
    dst: int
    src: int
    nbytes: int
    keep: torch.Tensor  # the source stays allocated until copied

    def run(self, scratch: memoryview, address: int) -> None:
        move_bytes(self.dst, self.src, self.nbytes)


class MemoryStore:
    """Contiguous host ``tensors`` by name, kept by reference; each is a file of its own. Reads are copies.

    Raises ``StoreError`` for a tensor that is not contiguous or not in host memory.
    """

    tier = "ram"

    def __init__(self, tensors: Mapping[str, torch.Tensor], *, threads: int = 2) -> None:
        for name, tensor in tensors.items():
            if _dtype_name(tensor) not in ITEMSIZE or tensor.layout is not torch.strided:
                raise StoreError(
                    f"tensor {name!r} has dtype {tensor.dtype} and layout {tensor.layout}: plain and dense is needed, "
                    "store the tensors that it is made of"
                )
            if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg():
                raise StoreError(
                    f"tensor {name!r} is on {tensor.device} with strides {tensor.stride()}: contiguous host memory is "
                    "needed, pass tensor.cpu().contiguous().resolve_conj().resolve_neg()"
                )
        self.specs: Mapping[str, TensorSpec] = MappingProxyType(
            {name: TensorSpec(name, _dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
        )
        self._bytes = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors.values()]
        self._number = {name: number for number, name in enumerate(tensors)}
        self._workers = Workers(threads)
        self._closed = False

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The whole of file number ``n``, for the ``n``-th tensor. Raises ``KeyError``."""
        return (Piece(self._number[name], Extent(0, self.specs[name].nbytes)),)

    def read(self, requests: Sequence[ReadRequest]) -> ReadFence:
        """Start copying. ``StoreReadError`` comes out of the fence when an extent ends beyond its tensor."""
        fence = ReadFence(sum(request.extent.nbytes for request in requests), requests)
        jobs = [job for request in requests for job in self._copies(fence, request)]
        self._workers.submit(fence, jobs)
        return fence

    def write(self, name: str, data: Buffer) -> None:
        """Replace the bytes of tensor ``name`` in place. Raises ``StoreError`` for another size."""
        if self._closed:
            raise StoreError("the store is closed: open it again to write")
        mine = self._bytes[self._number[name]]
        move_bytes(mine.data_ptr(), buffer_address(data, mine.numel()), mine.numel())

    def close(self) -> None:
        """End the threads and let go of the tensors. Idempotent."""
        self._closed = True
        self._workers.close()
        self._bytes.clear()

    def _copies(self, fence: ReadFence, request: ReadRequest) -> list[_Copy | _Beyond]:
        address = buffer_address(request.into, request.extent.nbytes)
        if self._closed:
            raise StoreError("the store is closed: open it again to read")
        if not 0 <= request.file < len(self._bytes):
            raise StoreError(f"file number {request.file} was asked for, the store has {len(self._bytes)}")
        src, extent = self._bytes[request.file], request.extent
        if extent.end > src.numel():
            return [_Beyond(fence, request.file, extent, src.numel())]
        start = src.data_ptr() + extent.offset
        return [
            _Copy(fence, address + at, start + at, min(_CHUNK, extent.nbytes - at), src)
            for at in range(0, extent.nbytes, _CHUNK)
        ]


@dataclass(slots=True)
class _Beyond:
    fence: ReadFence
    file: int
    extent: Extent
    have: int

    def run(self, scratch: memoryview, address: int) -> None:
        got = max(0, self.have - self.extent.offset)
        raise StoreReadError(
            f"reading tensor number {self.file} at byte {self.extent.offset}: wanted {self.extent.nbytes} bytes, "
            f"got {got}: it has {self.have} bytes: ask within the pieces of the store"
        )


def _dtype_name(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
