"""A transformers ``Cache`` whose keys and values stand in pages."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import transformers.cache_utils
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from tierstore.hf.kv.memory import KvMemory, KvUsage
from tierstore.hf.kv.state import CacheState


class PagedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """What transformers asks of one layer of a ``PagedCache``."""

    is_compileable = False
    is_croppable = True
    is_initialized = True

    def __init__(self, state: CacheState, layer: int, window: int | None) -> None:
        self.keys = self.values = None
        self._state, self._layer = state, layer
        self.is_sliding = window is not None
        if window is not None:
            self.sliding_window = window

    @property
    def record_past(self) -> bool:
        """Whether windows keep what ``crop`` may go back to."""
        return self._state.recording

    @record_past.setter
    def record_past(self, value: bool) -> None:
        self._state.recording = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return self._state.update(key_states, value_states, self._layer)

    def get_seq_length(self) -> int:
        return self._state.columns_of(self._layer)

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Keys that are handed out with so many queries, once given as their columns, and the column of the first."""
        past = self.get_seq_length()
        first = self._state.first_column(self._layer, past)
        return past - first + (query_length if isinstance(query_length, int) else len(query_length)), first

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its former name

    def reset(self) -> None:
        self._state.clear()


class PagedCache(Cache):
    """Keys and values in pages of ``memory``. A drop-in for ``DynamicCache``; dropping it frees its pages. Threads that
    use several caches over one memory take turns, forward by forward.

    Rows that are alike share pages; ``reorder_cache`` moves no bytes; pages behind a sliding window are given back,
    but while ``activate_past_recording`` waits for a ``crop``. Of the forwards of a module that ``KvGeneration`` wraps
    it knows tokens and masks: padding is then not stored, and pages are found by content.
    """

    def __init__(self, memory: KvMemory) -> None:
        self.memory, self.state = memory, CacheState(memory)
        windows = {each.layer: each.window for each in memory.layers}
        super().__init__(
            layers=[
                PagedLayer(self.state, layer, windows[layer]) if layer in windows else _nothing()
                for layer in range(max(windows) + 1)
            ]
        )
        weakref.finalize(self, memory.drop, self.state.rows).atexit = False

    @property
    def is_linear(self) -> list[bool]:
        """Of each layer, that it keeps no recurrent state."""
        return [False] * len(self.layers)

    @property
    def sequences(self) -> tuple[int, ...]:
        """Positions of each row, padding left out."""
        return tuple(row.length for row in self.state.rows.rows)

    def another(self) -> PagedCache:
        """A further empty cache over the same memory."""
        return PagedCache(self.memory)

    def usage(self) -> KvUsage:
        """What is stored where, by all caches over this memory."""
        return self.memory.usage()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens of a layer, keys [B, heads, n, key_dim] and values; returns handles to all that its
        queries may see, which act as tensors.

        Raises ``CapacityError`` where the pages do not fit, with nothing changed, and ``ModuleError`` for keys and
        values of another shape or dtype than the config says, or with gradients."""
        return self.state.update(key_states, value_states, layer_idx)

    def reset(self) -> None:
        """Begin anew. What was stored stays findable by content as long as nothing else needs the room."""
        with self.memory.turn:
            self.state.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each row become what row ``beam_idx[i]`` was: no bytes move."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in this order."""
        chosen = indices.tolist()
        with self.memory.turn:
            if self.state.rows.rows:
                self.state.select(chosen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row ``repeats`` times, side by side: they share their pages."""
        with self.memory.turn:
            if self.state.rows.rows:
                self.state.select([row for row in range(len(self.state.rows)) for _ in range(repeats)])

    def crop(self, tokens_to_remove: int) -> None:
        """Take ``-tokens_to_remove`` columns off the end. A positive number is how many stay, as it once was."""
        with self.memory.turn:
            columns, by = self.state.rows.columns, tokens_to_remove
            self.state.crop(min(by, columns) if by > 0 else max(columns + by, 0))

    def activate_past_recording(self) -> None:
        """Keep what is behind the windows until the next ``crop``."""
        self.state.recording = True

    @contextmanager
    def pause(self, rows: int | Sequence[int] | None = None) -> Iterator[None]:
        """A long pause: the pages of ``rows`` (None is all) go down, and come back when the ``with`` block ends.

        Raises ``IndexError`` for a row that is not there."""
        with self.memory.turn:
            count = len(self.state.rows)
            chosen = range(count) if rows is None else [rows] if isinstance(rows, int) else rows
            for row in chosen:
                if not -count <= row < count:
                    raise IndexError(f"the cache has {count} rows and none of number {row}: pause those that it has")
            pages = self.state.pages_of(chosen)
            for kind, each in zip(self.memory.kinds, pages, strict=True):
                kind.pager.pause(each)
        try:
            yield
        finally:
            with self.memory.turn:
                for kind, each in zip(self.memory.kinds, pages, strict=True):
                    kind.pager.resume(each)


def _nothing() -> Any:
    """Of a layer that keeps nothing, since it reads what another one keeps."""
    return cast(Any, transformers.cache_utils).DummyLayer()
