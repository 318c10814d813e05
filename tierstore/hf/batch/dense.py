"""Sequences of a small model side by side, in one dense cache: the least work for each step of all of them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from tierstore.errors import CapacityError, ModuleError
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.support import why_not_tokens
from tierstore.hf.kv.shapes import LayerKv, dtype_of, layers_of
from tierstore.hf.splitting import Forward

LEAST_SHARED = 16
"""Tokens that a sequence must have in common with another for their keys and values to be copied."""


def why_not_dense(module: nn.Module) -> str:
    """Why ``DenseModel`` cannot compute ``module``; empty where it can."""
    if why := why_not_tokens(module):
        return why
    windows = any(each.window is not None for each in layers_of(module))
    return "its tokens see a window of those before them" if windows else ""


class DenseModel:
    """Up to ``sequences`` sequences of up to ``tokens`` tokens of ``module``, a transformers decoder that is in memory.

    What ``TokenModel`` does, without pages, and in one call of all sequences of a step, each of them a row. A token's
    logits may depend, in their last bits, on what else is in the step. All memory is taken at once: that of
    ``sequences * (tokens + 1)`` tokens.
    """

    def __init__(self, module: nn.Module, *, sequences: int, tokens: int) -> None:
        """Raises ``ModuleError`` for other decoders than ``why_not_dense`` says."""
        if why := why_not_dense(module):
            raise ModuleError(f"{type(module).__name__} cannot compute sequences as rows of a dense cache: {why}")
        self.module = module
        self._most_tokens = tokens
        self._forward = Forward(inspect.signature(module.forward).parameters, module.config)
        self._device, self._dtype = next(module.parameters()).device, dtype_of(module)
        self._now = _Now()
        self._cache = _DenseCache(layers_of(module), self._now, sequences, tokens + 1, self._dtype, self._device)
        self._free = list(range(sequences))
        self._rows: dict[int, int] = {}
        self._tokens: dict[int, list[int]] = {}
        self._next = 0

    def add(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A new sequence that will begin with ``tokens``; how many of them, at most all but one, it has already, copied
        from another one. Raises ``CapacityError``."""
        if not self._free:
            raise CapacityError(f"all {len(self._rows)} rows of the cache are taken: end a sequence")
        self._next += 1
        row = self._free.pop(0)
        shared, source = max(((_common(each, tokens), other) for other, each in self._tokens.items()), default=(0, 0))
        if shared >= LEAST_SHARED:
            self._cache.copy(self._rows[source], row, shared)
        else:
            shared = 0
        self._rows[self._next], self._tokens[self._next] = row, list(tokens[:shared])
        return self._next, shared

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return len(self._tokens[sequence])

    def crop(self, sequence: int, length: int) -> None:
        """Keep the first ``length`` tokens. Raises ``ValueError`` for more than there are."""
        if not 0 <= length <= self.length(sequence):
            raise ValueError(f"sequence {sequence} has {self.length(sequence)} tokens and cannot be cut to {length}")
        del self._tokens[sequence][length:]

    def remove(self, sequence: int) -> None:
        """End a sequence."""
        del self._tokens[sequence]
        self._free.append(self._rows.pop(sequence))
        self._free.sort()

    def step(self, slices: Sequence[Slice]) -> list[Tensor]:
        """Compute the tokens of ``slices``, of different sequences; of each float32 [logits, vocabulary] on the CPU.

        With any error nothing of it happened. Raises ``CapacityError`` for sequences that become too long."""
        starts = [self.length(each.sequence) for each in slices]
        ends = [start + len(each.tokens) for start, each in zip(starts, slices, strict=True)]
        if max(ends, default=0) > self._most_tokens:
            raise CapacityError(f"a sequence of {max(ends)} tokens does not fit: there is room for {self._most_tokens}")
        if not slices:
            return []
        # rows end together, so that the last column has everybody's last token; padding is before, written to a spare
        width = max(len(each.tokens) for each in slices)
        pads = [width - len(each.tokens) for each in slices]
        ids = [[0] * pad + list(each.tokens) for pad, each in zip(pads, slices, strict=True)]
        at = [[-1] * pad + list(range(*span)) for pad, *span in zip(pads, starts, ends, strict=True)]
        positions = torch.tensor(at, device=self._device)
        self._now.point([self._rows[each.sequence] for each in slices], positions, self._most_tokens, max(ends))
        keep = max(each.logits for each in slices)
        given: dict[str, Any] = {
            "input_ids": torch.tensor(ids, device=self._device),
            "position_ids": positions.clamp(min=0),
            "attention_mask": self._mask(positions, max(ends)),
            self._forward.cache: self._cache,
            "use_cache": True,
            "return_dict": True,
        }
        if "logits_to_keep" in self._forward.parameters:
            given["logits_to_keep"] = max(keep, 1)
        with torch.no_grad():
            logits = self.module(**given).logits
            logits = logits[:, logits.shape[1] - keep :].float().cpu()
        for each in slices:
            self._tokens[each.sequence] += each.tokens
        return [rows[len(rows) - each.logits :] for rows, each in zip(logits, slices, strict=True)]

    def close(self) -> None:
        """End all sequences. Idempotent."""
        for sequence in list(self._rows):
            self.remove(sequence)

    def _mask(self, positions: Tensor, columns: int) -> Tensor:
        """[rows, 1, width, columns] to be added to scores: each sees what is not behind it, and padding the first."""
        behind = torch.arange(columns, device=self._device) > positions.clamp(min=0)[:, None, :, None]
        return torch.zeros(behind.shape, dtype=self._dtype, device=self._device).masked_fill_(
            behind, torch.finfo(self._dtype).min
        )


class _Now:
    """Where the tokens of the step under way go, and what is read."""

    rows: slice | Tensor
    into: Tensor
    columns: int

    def point(self, rows: Sequence[int], positions: Tensor, spare: int, columns: int) -> None:
        """``positions`` [rows, width], of which those of padding are -1 and go to column ``spare``."""
        number = torch.tensor(rows, device=positions.device)
        together = list(rows) == list(range(rows[0], rows[0] + len(rows)))
        self.rows = slice(rows[0], rows[0] + len(rows)) if together else number
        self.into = (number[:, None] * (spare + 1) + torch.where(positions < 0, spare, positions)).flatten()
        self.columns = columns


class _DenseLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Keys [sequences, tokens, heads, key_dim] and values of one layer."""

    is_compileable = is_sliding = is_croppable = False
    is_initialized = True

    def __init__(self, now: _Now, keys: Tensor, values: Tensor) -> None:
        self.keys = self.values = None
        self.held = keys, values
        self._now = now

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the memory is there."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        now = self._now
        found = []
        for held, new in zip(self.held, (key_states, value_states), strict=True):
            held.flatten(0, 1).index_copy_(0, now.into, new.transpose(1, 2).flatten(0, 1))
            found.append(held[now.rows, : now.columns].transpose(1, 2))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self._now.columns, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its former name


class _DenseCache(Cache):
    """The layers of a ``DenseModel``."""

    def __init__(
        self, kept: Sequence[LayerKv], now: _Now, sequences: int, tokens: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shapes = {each.layer: (each.heads, each.key_dim, each.value_dim) for each in kept}
        self._mine: list[_DenseLayer] = []
        for layer in range(max(shapes) + 1):
            heads, *widths = shapes.get(layer, (0, 0, 0))
            parts = (torch.zeros(sequences, tokens, heads, width, dtype=dtype, device=device) for width in widths)
            self._mine.append(_DenseLayer(now, *parts))
        super().__init__(layers=list(self._mine))

    def copy(self, source: int, target: int, tokens: int) -> None:
        """The first ``tokens`` of one row become those of another."""
        for layer in self._mine:
            for held in layer.held:
                held[target, :tokens] = held[source, :tokens]


def _common(tokens: Sequence[int], others: Sequence[int]) -> int:
    """How many tokens both begin with, at most all but one of ``others``."""
    most = min(len(tokens), len(others) - 1)
    return next((at for at in range(most) if tokens[at] != others[at]), max(most, 0))
