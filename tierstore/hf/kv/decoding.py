"""Attention of one query a row over its pages where they lie: by kernels, compiled by Triton or, on a CPU, llvmlite."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tierstore.hf.kv.beside import Task
from tierstore.hf.kv.masks import LazyMask
from tierstore.hf.kv.moving import sent
from tierstore.hf.kv.reading import NOBODY, Reader
from tierstore.hf.kv.sources import Places
from tierstore.hf.kv.state import CacheState
from tierstore.kernels.cards import runs_triton
from tierstore.kernels.machine_code import can_compile
from tierstore.kernels.paged_attention.partial import Partial, combine

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of models that kernels take."""
_WAVES = 64
"""So many parts wait to be added up at once."""


def kernels_for(device: torch.device) -> Any:
    """The module of kernels for ``device``, as ``paged_attention.triton`` is one; None where nothing is there to
    compile them."""
    if runs_triton(device):
        from tierstore.kernels.paged_attention import triton

        return triton
    if device.type == "cpu" and can_compile():
        from tierstore.kernels.paged_attention import compiled

        return compiled
    return None


def decodable(state: CacheState, layer: int, query: Tensor, mask: Tensor | None) -> list[int] | None:
    """The first position that each row's one query sees, when it sees all from there on; else, or where there are no
    kernels for its pages, None."""
    passing = state.passing_of(layer)
    columns = passing.columns
    if query.shape[2] != 1 or query.dtype not in DTYPES or not columns.trusted:
        return None
    kernels, cells = kernels_for(query.device), state.kind_of(layer).cells
    if kernels is None or not kernels.fits(cells.shape.key_dim, cells.shape.value_dim):
        return None
    window = math.inf if mask is None else mask.window if isinstance(mask, LazyMask) else None
    if window is None:
        return None
    first = max(columns.stop - int(window), 0) if window < math.inf else 0
    return [columns.positions_before(row, first) for row in range(query.shape[0])]


def preferred(state: CacheState, layer: int, query: Tensor, mask: Tensor | None) -> bool:
    """Whether kernels answer even where pages could be gathered. On a CPU these give the numbers of the plain model."""
    kernels = kernels_for(query.device)
    return kernels is not None and kernels.PREFERRED and decodable(state, layer, query, mask) is not None


def decode(
    state: CacheState, layer: int, query: Tensor, starts: list[int], scale: float, softcap: float | None
) -> Partial:
    """Attention of ``query`` [B, Hq, 1, key_dim] over the positions from ``starts`` on, of each row."""
    kernels, cells, beside = kernels_for(query.device), state.kind_of(layer).cells, state.memory.beside
    reader, lengths = state.reader(layer), state.passing_of(layer).columns.lengths
    shape, form = cells.shape, cells.form
    options: dict[str, Any] = {"heads": shape.heads, "value_dim": shape.value_dim, "scale": scale, "softcap": softcap}
    plain, packed = _Parts(kernels), _Parts(kernels)
    rotated: Tensor | None = None
    for source in reader.sources(layer):
        places = source.places()
        tables = _tables(reader, source.pages, places, shape.page_tokens, starts, lengths)
        if source.packed and cells.raw_dtype is None:
            if rotated is None:
                rotated = form.rotate_query(query if query.is_cuda else query.float())
            how = options | {"kv_format": form.name, "page_tokens": shape.page_tokens}
            parts, call = packed, partial(kernels.decode, rotated, places.buffer, tables.keys, tables.spans, **how)
        else:
            how = options | {"dtype": cells.raw_dtype if source.packed else cells.dtype}
            how["piece_tokens"] = places.piece_tokens
            parts, call = plain, partial(kernels.decode_raw, query, places.buffer, *tables, **how)
        if kernels.BESIDE and source.readers is not None:
            task = beside.start(partial(call, threads=1))
            source.readers.append(task)
            parts.add(task)
        else:
            parts.add(call())
    found = [Partial(form.unrotate_output(part.out), part.lse) for part in packed.whole()] + plain.whole()
    assert found, "the query's own token is in a page"
    return combine(found)


class _Parts:
    """What kernels found in pages that came, or are about to find, until all have come."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._whole: list[Partial] = []
        self._parts: list[Any] = []

    def add(self, part: Any) -> None:
        self._parts.append(part)
        if len(self._parts) == _WAVES:
            self._whole, self._parts = self.whole(), []

    def whole(self) -> list[Partial]:
        """All of it as one part; none if there was nothing."""
        parts = [part.result() if isinstance(part, Task) else part for part in self._parts]
        found = self._whole + ([self._kernels.combine(parts)] if parts else [])
        return [combine(found)] if found else []


class _Tables(NamedTuple):
    """Of each row, the bytes at which its pieces start, keys and values, int64 [B, n], and which of the tokens in them
    its query sees, int32 [B, 2]."""

    keys: Tensor
    values: Tensor
    spans: Tensor


def _tables(
    reader: Reader, names: Sequence[int], places: Places, size: int, starts: Sequence[int], lengths: Sequence[int]
) -> _Tables:
    mine: list[list[tuple[int, int]]] = [[] for _ in starts]
    readers = reader.readers
    for number, page in enumerate(names):
        who, index = readers.get(page, NOBODY)
        for row in who:
            if (index + 1) * size > starts[row] and index * size < lengths[row]:
                mine[row].append((index, number))
    longest = max(1, *map(len, mine)) * len(places.keys[0])
    keys, values, spans = array("q"), array("q"), array("i")
    for row, pages in enumerate(mine):
        pages.sort()
        for table, part in ((keys, places.keys), (values, places.values)):
            table.extend([at for _, i in pages for at in part[i]])
            table.extend([0] * ((row + 1) * longest - len(table)))
        if pages:
            (first, _), (end, _) = pages[0], pages[-1]
            last = (len(pages) - 1) * size
            spans.extend((max(starts[row] - first * size, 0), last + min(lengths[row] - end * size, size)))
        else:
            spans.extend((0, 0))
    return _Tables(*(_tensor(numbers, len(mine), places.buffer.device) for numbers in (keys, values, spans)))


def _tensor(numbers: array[int], rows: int, device: torch.device) -> Tensor:
    """Numbers of so many rows, in an integer dtype as wide; ``torch.tensor`` takes ten times as long."""
    dtype = torch.int64 if numbers.itemsize == 8 else torch.int32
    return sent(torch.frombuffer(numbers, dtype=dtype).view(rows, -1), device)
