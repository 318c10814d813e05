"""Attention of one query a row over its pages where they lie, as they are packed: by kernels, on CUDA."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tierstore.hf.kv.masks import LazyMask
from tierstore.hf.kv.sources import Places, Source
from tierstore.hf.kv.state import CacheState
from tierstore.kernels.paged_attention.partial import Partial, combine

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""Of models that kernels take."""


def kernels_for(device: torch.device) -> Any:
    """The module of kernels for ``device``, with ``decode`` and ``decode_raw``; None without CUDA or Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return None
    from tierstore.kernels.paged_attention import triton

    return triton


def decodable(state: CacheState, layer: int, query: Tensor, mask: Tensor | None) -> list[int] | None:
    """The first position that each row's one query sees, when it sees all from there on; else, or where there are no
    kernels, None."""
    passing = state.passing_of(layer)
    columns = passing.columns
    if query.shape[2] != 1 or query.dtype not in DTYPES or not columns.trusted or kernels_for(query.device) is None:
        return None
    window = math.inf if mask is None else mask.window if isinstance(mask, LazyMask) else None
    if window is None:
        return None
    first = max(columns.stop - int(window), 0) if window < math.inf else 0
    return [columns.positions_before(row, first) for row in range(query.shape[0])]


def decode(
    state: CacheState, layer: int, query: Tensor, starts: list[int], scale: float, softcap: float | None
) -> Partial:
    """Attention of ``query`` [B, Hq, 1, key_dim] over the positions from ``starts`` on, of each row."""
    kernels, cells = kernels_for(query.device), state.kind_of(layer).cells
    shape, form = cells.shape, cells.form
    total: Partial | None = None
    for source in state.reader(layer).sources(layer):
        places = source.places()
        keys, values, spans = _tables(state, layer, source, places, starts)
        options: dict[str, Any] = {"heads": shape.heads, "value_dim": shape.value_dim, "scale": scale}
        options["softcap"] = softcap
        if source.packed and cells.raw_dtype is None:
            options |= {"kv_format": form.name, "page_tokens": shape.page_tokens}
            found = kernels.decode(form.rotate_query(query), places.buffer, keys, spans, **options)
            found = Partial(form.unrotate_output(found[0]), found[1])
        else:
            dtype = cells.raw_dtype if source.packed else cells.dtype
            options |= {"dtype": dtype, "piece_tokens": places.piece_tokens}
            found = Partial(*kernels.decode_raw(query, places.buffer, keys, values, spans, **options))
        total = found if total is None else combine([total, found])
    assert total is not None, "the query's own token is in a page"
    return total


def _tables(
    state: CacheState, layer: int, source: Source, places: Places, starts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, the bytes at which its pieces start, keys and values, int64 [B, n], and which of the tokens in
    them its query sees, int32 [B, 2]."""
    passing, size = state.passing_of(layer), state.kind_of(layer).cells.shape.page_tokens
    names = passing.closed + passing.unclosed
    number = {page: i for i, page in enumerate(source.pages)}
    rows: list[tuple[list[int], list[int]]] = []
    spans = []
    for row, slots in enumerate(passing.slots):
        start, length = starts[row], passing.columns.lengths[row]
        indices = [
            index
            for index, slot in enumerate(slots, passing.first_index[row])
            if names[slot] in number and (index + 1) * size > start and index * size < length
        ]
        mine = [number[names[slots[index - passing.first_index[row]]]] for index in indices]
        rows.append(tuple([at for i in mine for at in part[i]] for part in (places.keys, places.values)))  # type: ignore[arg-type]
        if indices:
            last = (len(indices) - 1) * size
            spans.append([max(start - indices[0] * size, 0), last + min(length - indices[-1] * size, size)])
        else:
            spans.append([0, 0])
    longest = max(1, *(len(keys) for keys, _ in rows))
    keys, values = ([part + [0] * (longest - len(part)) for part in column] for column in zip(*rows, strict=True))
    device = places.buffer.device
    return (
        torch.tensor(keys, device=device),
        torch.tensor(values, device=device),
        torch.tensor(spans, dtype=torch.int32, device=device),
    )
