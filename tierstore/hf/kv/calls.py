"""One call of a decoder's forward with a paged cache: its tokens, its mask, and calls for parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from tierstore.hf.kv.state import CacheState
from tierstore.hf.splitting import CACHES, Forward, length_of, part_of

_KNOWN = ("input_ids", "attention_mask", "position_ids", "cache_position", "labels", "logits_to_keep", *CACHES)
"""What is given with tokens, and says no more of the keys than these and a mask do."""


@dataclass(frozen=True)
class Call:
    """``forward`` is called with ``given``, arguments by name, and a cache whose state is ``state``."""

    parameters: Forward
    given: Mapping[str, Any]
    state: CacheState
    forward: Callable[..., Any]

    @property
    def tokens(self) -> Tensor | None:
        """int64 [B, n]; None where something else than tokens at their own positions enters."""
        tokens = self.given.get("input_ids")
        return tokens if isinstance(tokens, Tensor) and tokens.dim() == 2 and self.by_tokens else None

    @property
    def mask(self) -> Tensor | None:
        """The 2-D mask [B, columns], if there is one."""
        mask = self.given.get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    @cached_property
    def by_tokens(self) -> bool:
        """Whether tokens and a mask determine the keys: so they do where nothing else of that kind is given."""
        mask = self.given.get("attention_mask")
        return (mask is None or self.mask is not None) and standard_positions(self) and not self._more_than_tokens

    @property
    def _more_than_tokens(self) -> bool:
        """Whether something is given that keys may depend on too, such as types of tokens, or an image."""
        return any(
            not (isinstance(value, Cache) or value is None or isinstance(value, bool | int | float | str | torch.dtype))
            and not (name.endswith("mm_token_type_ids") and isinstance(value, Tensor) and not bool(value.any()))
            for name, value in self.given.items()
            if name not in _KNOWN
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return (length_of(self.given) or (0, 0))[0]

    @property
    def length(self) -> int:
        """New tokens of each row, padding included."""
        return (length_of(self.given) or (0, 0))[1]

    @property
    def longest(self) -> int:
        """Positions of the longest row when the call is done."""
        rows = self.state.rows
        before = max((row.length for row in rows.rows), default=0)
        if self.mask is None:
            return before + self.length
        return before + int(self.mask[:, -self.length :].sum(1).max())

    @cached_property
    def different_rows(self) -> int:
        """Rows that will have pages of their own."""
        if self.tokens is None or self.state.rows.rows:
            return self.batch
        return len({tuple(row) for row in self.tokens.tolist()})

    @property
    def kept_logits(self) -> int:
        """Of how many last positions logits are wanted; 0 for all."""
        keep = self.given.get("logits_to_keep", 0) if "logits_to_keep" in self.parameters.parameters else 0
        return keep if isinstance(keep, int) else 0

    @cached_property
    def why_whole(self) -> str:
        """Why the call cannot be split; empty where it can be."""
        return self.parameters.why_whole(self.given)

    def part(self, start: int, stop: int) -> Call:
        """The call for tokens ``start`` to ``stop``, when those before are in the cache."""
        past = self.state.rows.columns - start
        given = part_of(self.given, past, start, stop)
        if self.kept_logits:
            given["logits_to_keep"] = max(stop - max(start, self.length - self.kept_logits), 1)
        return replace(self, given=given)

    def parts(self, most: Callable[[], int]) -> Iterator[Call]:
        """Calls of at most ``most()`` tokens each, as it is when the one before is done."""
        start = 0
        while start < self.length:
            stop = min(start + most(), self.length)
            yield self.part(start, stop)
            start = stop

    def joined(self, outputs: Sequence[Any]) -> Any:
        """The output of the whole call, from those of its parts in order."""
        last = outputs[-1]
        for name in ("logits", "last_hidden_state"):
            if getattr(last, name, None) is None:
                continue
            rows = [getattr(output, name) for output in outputs]
            keep = self.kept_logits if name == "logits" else 0
            last[name] = torch.cat(rows, 1)[:, -keep:] if keep else torch.cat(rows, 1)
        return last

    def of_tokens(self, tokens: Tensor, stored: Tensor | None, start: int) -> Call:
        """A call like this one for ``tokens`` [B, n] from column ``start`` on, of which ``stored`` [B, n] are there."""
        names = self.parameters.parameters
        given: dict[str, Any] = {"input_ids": tokens[:, start:].contiguous(), self.parameters.cache: self._cache}
        if stored is not None:
            given["attention_mask"] = stored.to(tokens.device).long()
        if "position_ids" in names:
            given["position_ids"] = expected_positions(tokens, stored)[:, start:]
        given |= {"use_cache": True, "return_dict": True}
        if "logits_to_keep" in names:
            given["logits_to_keep"] = 1
        return replace(self, given=given)

    @property
    def _cache(self) -> Any:
        return self.given[self.parameters.cache]


def expected_positions(tokens: Tensor, stored: Tensor | None) -> Tensor:
    """int64 [B, n]: the position of each column when padding is not counted."""
    if stored is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    return (stored.to(tokens.device).long().cumsum(1) - 1).clamp(min=0)


def standard_positions(call: Call) -> bool:
    """Whether ``position_ids``, if given, are those that tokens and padding say."""
    given, mask = call.given.get("position_ids"), call.mask
    if given is None:
        return mask is None or call.length == 1 or bool(mask.all())
    if not isinstance(given, Tensor) or given.dim() != 2:
        return False
    count = call.length
    total = call.state.rows.columns + count
    if mask is None:
        return bool((given == torch.arange(total - count, total, device=given.device)).all())
    seen = mask[:, :total].bool()
    wanted = expected_positions(seen, seen)[:, -count:]
    return bool(((given == wanted.to(given.device)) | ~seen[:, -count:].to(given.device)).all())
