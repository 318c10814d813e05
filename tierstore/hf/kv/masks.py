"""Attention masks that are evaluated block by block, never whole, unless a model asks for the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from tierstore.hf.kv.lazy import LazyTensor

MaskFunction = Callable[..., Tensor]
"""Whether the query at a column of a row may see the key at a column: of indices that broadcast, as transformers
calls it: ``function(row, head, query column, key column)``."""


class LazyMask(LazyTensor):
    """What a mask function of transformers was asked for: a mask [B, 1, Lq, Lk] over columns of the batch.

    Rows, queries and keys are named by their columns, counted from the first one that the batch ever had.
    """

    function: MaskFunction
    padding: Tensor | None  # bool [B, columns], False where nothing may be seen
    key_offset: int
    window: float | None
    """How many columns a query sees, its own the last, padding aside: infinity for all; None where it is another
    pattern."""

    @classmethod
    def of(cls, original: str, arguments: Mapping[str, Any]) -> LazyMask:
        """The mask that the function registered as ``original`` makes of ``arguments``."""
        columns = arguments.get("cache_position")  # what transformers once gave instead of the queries' numbers
        if columns is None:
            queries, query_offset, device = (arguments[name] for name in ("q_length", "q_offset", "device"))
        else:
            queries, query_offset, device = len(columns), int(columns[0]), columns.device
        shape = (arguments["batch_size"], 1, queries, arguments["kv_length"])
        dtype = torch.bool if original == "sdpa" else arguments.get("dtype", torch.float32)
        mask = cls.shaped(shape, dtype, torch.device(device))
        mask.function = arguments["mask_function"]
        mask.key_offset = arguments["kv_offset"]
        mask._query_offset = query_offset
        mask._by_vmap = arguments.get("use_vmap", False)
        mask.window = _window(arguments)
        mask._make = lambda **changes: ALL_MASK_ATTENTION_FUNCTIONS[original](**{**arguments, **changes})
        mask._whole = ()
        columns = mask.key_offset + shape[3]
        padding = arguments["attention_mask"]
        if padding is not None and padding.shape[1] < columns:
            padding = pad(padding, (0, columns - padding.shape[1]))
        mask.padding = padding
        return mask

    _query_offset: int
    _by_vmap: bool
    _make: Callable[..., Tensor | None]
    _whole: tuple[Tensor | None, ...]

    def whole(self) -> Tensor | None:
        """What the original function gives, which may be None where the attention needs no mask."""
        if not self._whole:
            self._whole = (self._make(),)
        return self._whole[0]

    def computed(self) -> Tensor:
        found = self.whole()
        if found is None:
            found = cast(Tensor, self._make(allow_is_causal_skip=False, allow_is_bidirectional_skip=False))
            self._whole = (None, found)
        return found if len(self._whole) == 1 else cast(Tensor, self._whole[1])

    def block(self, rows: Tensor, queries: slice, keys: Tensor, *, padded: bool) -> Tensor:
        """bool [S, 1, queries, N]: whether the queries of ``rows`` [S] see the keys at columns ``keys`` [S, N].

        ``queries`` are counted from the first one of this mask. ``padded`` asks for what padding hides too.
        """
        columns = torch.arange(queries.start, queries.stop, device=keys.device) + self._query_offset
        if self._by_vmap:
            seen = torch.stack([self._vmapped(row, columns, there) for row, there in zip(rows, keys, strict=True)])
            seen = seen.unsqueeze(1)
        else:
            row, head = rows.view(-1, 1, 1, 1), rows.new_zeros(())
            seen = self.function(row, head, columns.view(1, 1, -1, 1), keys[:, None, None, :])
            seen = seen.expand(len(rows), 1, len(columns), keys.shape[1])
        if padded and self.padding is not None:
            seen = seen & self.padding[rows[:, None], keys][:, None, None, :]
        return seen

    def _vmapped(self, row: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """Functions that users gave may do more with an index than broadcast it."""
        by_key = torch.vmap(self.function, in_dims=(None, None, None, 0))
        by_query = torch.vmap(by_key, in_dims=(None, None, 0, None))
        with TransformGetItemToIndex():
            return by_query(row, row.new_zeros(()), queries, keys)


def _window(arguments: Mapping[str, Any]) -> float | None:
    if cast(Any, arguments["mask_function"]) is causal_mask_function:
        return math.inf
    config, local = arguments.get("config"), arguments.get("local_size")
    plain = arguments.get("allow_is_causal_skip", False) and not arguments.get("use_vmap", False)
    chunks = getattr(config, "attention_chunk_size", None) is not None
    return local if plain and not chunks and local == getattr(config, "sliding_window", None) else None


def lazily(original: str) -> Callable[..., LazyMask]:
    """A mask function for transformers that puts off what the one registered as ``original`` does."""
    return lambda **arguments: LazyMask.of(original, arguments)
