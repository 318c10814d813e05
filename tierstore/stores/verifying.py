"""Reads every byte of a packed store again and says what is wrong with it."""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError
from tierstore.extents import Extent
from tierstore.stores.manifest import Manifest, text_crc32c, unit_name
from tierstore.stores.packed import check_size, read_crcs, wrong_window
from tierstore.stores.packed_files import DATA, DOCUMENT, WINDOW, find_group, read_file, read_manifest
from tierstore.stores.reader import Reader
from tierstore.stores.windows import Windows, spans_of
from tierstore.stores.workers import ReadFence

_CHUNK = 4 * WINDOW
_CHUNKS = 8  # one is checked, the others are being read


def verify(path: str | os.PathLike[str], *, progress: Callable[[int, int], None] | None = None) -> tuple[str, ...]:
    """What is wrong with the packed store in folder ``path``, a line each; empty when it is as it was packed.

    Reads every document, every window past the page cache, and the files beside the weights, and names what does not
    belong among the weights. ``progress`` is told the bytes of unit files looked at so far, and of all. Needs 32 MiB.
    Raises what opening raises where there is no store, or none whose manifest could be compared with the rest."""
    path = Path(path)
    group = find_group(path)
    manifest = read_manifest(group)
    found: list[str] = []
    done = 0
    memory = [torch.frombuffer(mmap.mmap(-1, _CHUNK), dtype=torch.uint8) for _ in range(_CHUNKS)]
    for number, unit in enumerate(manifest.units):
        start = done

        def tell(nbytes: int, start: int = start) -> None:
            if progress is not None:
                progress(start + nbytes, manifest.nbytes)

        try:
            for line in _faults_of_unit(group, manifest, number, memory, tell):
                found.append(line)
        except StoreError as error:
            found.append(str(error))
        done += unit.nbytes
        tell(unit.nbytes)
    return (*found, *_faults_of_files(path, manifest), *_strangers(group, manifest))


def _faults_of_unit(
    group: Path, manifest: Manifest, number: int, memory: Sequence[torch.Tensor], tell: Callable[[int], None]
) -> Iterator[str]:
    unit, file = manifest.units[number], group / unit_name(number) / DATA
    crcs = read_crcs(group, number, unit)
    with closing(Reader([file])) as reader:
        check_size(file, reader.sizes[0], unit)
        windows = Windows(reader.sizes, [crcs], WINDOW)
        free = list(memory)
        reading: deque[tuple[ReadFence, ReadRequest, torch.Tensor]] = deque()

        def looked_at() -> Iterator[str]:
            fence, request, buffer = reading.popleft()
            free.append(buffer)
            try:
                fence.wait()
            except StoreError as error:
                yield str(error)
                return
            spans = spans_of([request])
            for window in windows.unchecked([request]):
                if (wrong := windows.check(window, spans)) is not None:
                    yield wrong_window(unit, file, window[1], *wrong)
            tell(request.extent.end)

        for at in range(0, unit.nbytes, _CHUNK):
            if not free:
                yield from looked_at()
            buffer = free.pop()
            extent = Extent(at, min(_CHUNK, unit.nbytes - at))
            request = ReadRequest(0, extent, buffer[: extent.nbytes])
            reading.append((reader.read([request]), request, buffer))
        while reading:
            yield from looked_at()


def _faults_of_files(path: Path, manifest: Manifest) -> Iterator[str]:
    for name, file in manifest.files.items():
        try:
            content = read_file(path / name, file.nbytes)
        except StoreError as error:
            yield str(error)
            continue
        if (have := (len(content), text_crc32c(content))) != (file.nbytes, file.crc32c):
            yield (
                f"{str(path / name)!r} has {have[0]} bytes of CRC32C {have[1]:08x}, {file.nbytes} of {file.crc32c:08x} "
                "were written: it was changed since: copy it again, or pack again"
            )


def _strangers(group: Path, manifest: Manifest) -> Iterator[str]:
    names = [unit_name(number) for number in range(len(manifest.units))]
    ours = {group / DOCUMENT, *(group / name / file for name in names for file in (DOCUMENT, DATA))}
    folders = {group, *(group / name for name in names), *(group / name / DATA.parent for name in names)}
    for folder, inner, files in os.walk(group):
        for name in sorted(inner + files):
            if (entry := Path(folder, name)) not in ours | folders:
                yield f"{str(entry)!r} does not belong to the store: delete it"
        inner[:] = [name for name in sorted(inner) if Path(folder, name) in folders]
