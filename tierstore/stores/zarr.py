"""The spill store: tensors that exist only in memory, written once below a folder and read back as needed.

What is written is a Zarr v3 group (https://zarr-specs.readthedocs.io/en/latest/v3/core/) with one uncompressed
uint8 array of a single chunk per tensor, so that ``<array>/c/0`` holds its raw bytes and any Zarr reader opens it.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import torch

from tierstore.budget import format_nbytes
from tierstore.contracts import Buffer, ReadRequest
from tierstore.errors import ChecksumError, StoreError, StoreFormatError, StoreFullError
from tierstore.extents import Extent, align_up
from tierstore.stores.checksums import crc32c
from tierstore.stores.durable import CHUNK, store_errors, sync, write_data, write_text
from tierstore.stores.folders import (
    GROUP,
    NEW,
    FolderLock,
    Source,
    Stored,
    StoredArray,
    claim,
    delete_group,
    delete_unfinished,
    find_stored,
    unique_arrays,
    write_group,
)
from tierstore.stores.reader import Reader
from tierstore.stores.workers import PAGE, ReadFence, Workers, buffer_address
from tierstore.tensors import Piece, TensorSpec


class SpillStore:
    """Tensors below ``root``, for as long as this process holds the folder's lock. Made by ``create`` or ``open``.

    ``nbytes`` is what all its files hold now, ``peak_nbytes`` the most they ever did (both with metadata, about
    700 bytes per tensor), ``written_nbytes`` all that was ever written. The first read of each tensor checks its
    CRC32C; ``ChecksumError`` and ``StoreReadError`` come out of the fence.
    """

    tier = "nvme"

    def __init__(
        self, root: Path, stored: Stored, lock: FolderLock, *, made_root: bool, limit_nbytes: int | None, threads: int
    ) -> None:
        self._root, self._lock, self._made_root, self._limit = root, lock, made_root, limit_nbytes
        self._arrays = list(stored.arrays)
        self._number = {array.spec.name: number for number, array in enumerate(self._arrays)}
        self._fingerprint = stored.fingerprint
        self.specs: Mapping[str, TensorSpec] = MappingProxyType({array.spec.name: array.spec for array in self._arrays})
        self.nbytes = self.peak_nbytes = stored.nbytes
        self.written_nbytes = 0
        self._trusted: set[int] = set()
        self._reads: deque[ReadFence] = deque()
        self._reading = threading.Lock()  # held while a tensor's file is exchanged
        self._writing = threading.Lock()
        self._reader = Reader([self._folder(array) / "c" / "0" for array in self._arrays], threads=threads)
        try:
            for array, size in zip(self._arrays, self._reader.sizes, strict=True):
                if size != array.spec.nbytes:
                    raise StoreFormatError(
                        f"{str(self._folder(array) / 'c' / '0')!r} has {size} bytes, {array.spec.nbytes} were written: "
                        f"delete {str(root / GROUP)!r} and try again"
                    )
            self._checker = Workers(1)
        except BaseException:
            self._reader.close()
            raise

    @classmethod
    def create(
        cls,
        root: str | os.PathLike[str],
        tensors: Iterable[tuple[TensorSpec | str, Source]],
        *,
        fingerprint: str,
        limit_nbytes: int | None = None,
        threads: int = 4,
    ) -> SpillStore:
        """Write ``tensors`` below ``root``, which is made where missing; all or nothing.

        Each comes with its spec, or with a name when it is just bytes (then not as a callable). ``fingerprint`` names
        the model: leftovers of the same one are replaced. Raises ``StoreFullError`` before anything is written when
        ``limit_nbytes`` or the disk is too small, ``StoreMismatchError``, ``StoreIncompleteError``, ``StoreBusyError``.
        """
        root = Path(root)
        items = [(_spec_of(entry, source), source) for entry, source in tensors]
        stored = Stored(fingerprint, unique_arrays([spec for spec, _ in items], root))
        _check_limit(root, stored.nbytes, limit_nbytes)
        with store_errors(f"cannot write {format_nbytes(stored.nbytes)} below {str(root)!r}"):
            made_root = claim(root)
            lock: FolderLock | None = None
            mine = False  # whether what stands in the folder is ours to delete
            try:
                lock = FolderLock(root)
                old = find_stored(root, fingerprint)
                _check_disk(root, stored, 0 if old is None else old.nbytes)
                mine = True
                if old is not None:
                    delete_group(root, old.arrays)
                stored = write_group(root, stored, [source for _, source in items])
                store = cls(root, stored, lock, made_root=made_root, limit_nbytes=limit_nbytes, threads=threads)
            except BaseException:
                with suppress(OSError):  # what went wrong first is what to tell
                    if mine:
                        delete_group(root, stored.arrays)
                    if lock is not None:
                        lock.release(delete=lock.made)
                    if made_root:
                        root.rmdir()
                raise
        store.written_nbytes = stored.nbytes
        return store

    @classmethod
    def open(
        cls,
        root: str | os.PathLike[str],
        *,
        fingerprint: str | None = None,
        limit_nbytes: int | None = None,
        threads: int = 4,
    ) -> SpillStore:
        """Use what an earlier process left whole below ``root``; ``fingerprint=None`` takes any model's.

        Raises ``StoreError`` where there is none, ``StoreMismatchError``, ``StoreIncompleteError``,
        ``StoreFormatError``, ``StoreBusyError``."""
        root = Path(root)
        missing = f"{str(root / GROUP)!r} does not exist: no store was left whole there: create it"
        with store_errors(f"cannot open the store below {str(root)!r}"):
            if not root.is_dir():
                raise StoreError(missing)
            claim(root)
            lock = FolderLock(root)
            try:
                stored = find_stored(root, fingerprint)
                if stored is None:
                    raise StoreError(missing)
                delete_unfinished(root / GROUP, stored.arrays)
                return cls(root, stored, lock, made_root=False, limit_nbytes=limit_nbytes, threads=threads)
            except BaseException:
                lock.release(delete=lock.made)
                raise

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The whole of the tensor's own file. Raises ``KeyError``."""
        return (Piece(self._number[name], Extent(0, self.specs[name].nbytes)),)

    def read(self, requests: Sequence[ReadRequest]) -> ReadFence:
        """Start reading; a tensor that was not read before is checked before the fence is done."""
        with self._reading:
            fence = self._reader.read(requests)
            unchecked = {request.file for request in requests} - self._trusted
            if unchecked:
                checked = ReadFence(fence.nbytes, requests)
                self._checker.submit(checked, [_Check(checked, fence, self, unchecked, requests)])
                fence = checked
            while self._reads and self._reads[0].done():
                self._reads.popleft()
            self._reads.append(fence)
        return fence

    def write(self, name: str, data: Buffer) -> None:
        """Replace the bytes of tensor ``name``, durably and all or nothing; waits for reads under way.

        The new bytes stand beside the old ones for a moment: raises ``StoreFullError`` where there is no room for
        both, and then nothing has changed. Raises ``KeyError``, and ``StoreError`` for a buffer of another size."""
        number = self._number[name]
        array = self._arrays[number]
        buffer_address(data, array.spec.nbytes)
        chunk = self._folder(array) / "c" / "0"
        new = chunk.with_name(chunk.name + NEW)
        with self._writing, store_errors(f"cannot replace tensor {name!r} in {str(self._root)!r}"):
            if not self._lock.held:
                raise StoreError("the store is closed: open it again to write")
            self._grow(array.spec.nbytes)
            try:
                crc = write_data(new, data)
                sync([new])
                with self._reading:
                    for fence in self._reads:
                        fence.settle()
                    # Until the exchange is durable either may be found, so both are right.
                    self._describe(number, replace(array, crcs=(*array.crcs, crc)))
                    os.replace(new, chunk)
                    self._trusted.discard(number)
                    self._reader.reopen(number)
            finally:  # either the old bytes are gone or the new ones
                self.nbytes -= array.spec.nbytes
                new.unlink(missing_ok=True)
            sync([chunk.parent])
            self._describe(number, replace(array, crcs=(crc,)))

    def close(self) -> None:
        """End the threads, close the files, let others have the folder; what is written stays. Idempotent."""
        self._reader.close()
        self._checker.close()
        with self._writing:
            self._lock.release()

    def remove(self) -> None:
        """Delete what was written, and close. Files that are not ours stay. Idempotent."""
        self._reader.close()
        self._checker.close()
        with self._writing, store_errors(f"cannot delete the store below {str(self._root)!r}"):
            if not self._lock.held:
                if not os.path.lexists(self._root / GROUP):
                    return
                self._lock = FolderLock(self._root)
                find_stored(self._root, self._fingerprint)  # another process may have had it since
            delete_group(self._root, self._arrays)
            self._lock.release(delete=True)
            self.nbytes = 0
            if self._made_root and not os.listdir(self._root):
                self._root.rmdir()

    def check(self, number: int, requests: Sequence[ReadRequest]) -> None:
        """Trust file ``number`` from now on, or raise ``ChecksumError``. ``requests`` have been read."""
        array = self._arrays[number]
        if number in self._trusted:
            return
        whole = Extent(0, array.spec.nbytes)
        buffers = [request.into for request in requests if request.file == number and request.extent == whole]
        crc = _crc_of(buffers[0]) if buffers else self._crc_on_disk(number)
        if crc not in array.crcs:
            wanted = " or ".join(f"{crc:08x}" for crc in array.crcs)
            raise ChecksumError(
                f"tensor {array.spec.name!r} in {str(self._folder(array) / 'c' / '0')!r}: its {whole.nbytes} "
                f"bytes have CRC32C {crc:08x}, written with {wanted}: the disk or another program changed them: "
                f"delete {str(self._root / GROUP)!r} and store the model again"
            )
        self._trusted.add(number)

    def _crc_on_disk(self, number: int) -> int:
        crc, nbytes = 0, self._arrays[number].spec.nbytes
        part = torch.empty(min(CHUNK, nbytes), dtype=torch.uint8)
        for at in range(0, nbytes, CHUNK):
            into = part[: min(CHUNK, nbytes - at)]
            self._reader.read([ReadRequest(number, Extent(at, into.numel()), into)]).wait()
            crc = _crc_of(into, crc)
        return crc

    def _folder(self, array: StoredArray) -> Path:
        return self._root / GROUP / array.folder

    def _grow(self, nbytes: int) -> None:
        _check_limit(self._root, self.nbytes + nbytes, self._limit)
        self.nbytes += nbytes
        self.written_nbytes += nbytes
        self.peak_nbytes = max(self.peak_nbytes, self.nbytes)

    def _describe(self, number: int, array: StoredArray) -> None:
        path = self._folder(array) / "zarr.json"
        new, document = path.with_name(path.name + NEW), array.document()
        before = self.nbytes
        self._grow(len(document))
        try:
            write_text(new, document)
            sync([new])
            os.replace(new, path)
        except BaseException:
            self.nbytes = before
            new.unlink(missing_ok=True)
            raise
        self.nbytes -= len(self._arrays[number].document())
        self._arrays[number] = array
        sync([path.parent])


@dataclass(slots=True)
class _Check:
    """Runs behind a read, on its own thread, and hands its outcome to ``fence``."""

    fence: ReadFence
    read: ReadFence
    store: SpillStore
    files: set[int]
    requests: Sequence[ReadRequest]

    def run(self, scratch: memoryview, address: int) -> None:
        self.read.wait()
        self.fence.started = self.read.started
        for number in self.files:
            self.store.check(number, self.requests)


def _spec_of(entry: TensorSpec | str, source: Source) -> TensorSpec:
    if isinstance(entry, TensorSpec):
        return entry
    if callable(source):
        raise StoreError(f"tensor {entry!r} comes with a callable: give its TensorSpec, so that its size is known")
    return TensorSpec(entry, "uint8", (source.numel(),))


def _check_limit(root: Path, nbytes: int, limit: int | None) -> None:
    if limit is not None and nbytes > limit:
        raise StoreFullError(
            f"the store below {str(root)!r} needs {nbytes} bytes ({format_nbytes(nbytes)}), Budget.nvme allows {limit} "
            f"({format_nbytes(limit)}): raise Budget.nvme to at least {nbytes}"
        )


def _check_disk(root: Path, stored: Stored, old_nbytes: int) -> None:
    # Each tensor takes two files in blocks and two folders of one block.
    need = sum(align_up(array.spec.nbytes, PAGE) + 3 * PAGE for array in stored.arrays)
    free = shutil.disk_usage(root).free + old_nbytes
    if need > free:
        raise StoreFullError(
            f"the store below {str(root)!r} needs {format_nbytes(need)} on disk, {format_nbytes(free)} are free: "
            "free space there, or give another folder as store="
        )


def _crc_of(buffer: Buffer, crc: int = 0) -> int:
    return crc32c(buffer.data_ptr(), buffer.numel(), crc)
