"""A long input goes through a decoder layer by layer, all its chunks through one before the next: each weight is
brought once, however many chunks there are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.cache_utils import Cache

from tierstore.activation_plan import LayerShape
from tierstore.binding.forwards import interpose, is_watched, withdraw
from tierstore.errors import ModuleError
from tierstore.hf.kv.attending import attending, attention_configs
from tierstore.hf.kv.attention import ORIGINALS, register
from tierstore.hf.kv.masks import LazyMask
from tierstore.hf.layers import HIDDEN, layers_path
from tierstore.hf.waiting import Waiting, WaitingStates, waiting_for

if TYPE_CHECKING:
    from tierstore.backends import Backend

ALONG = ("position_embeddings", "position_ids", "cache_position")
"""What layers are given for each token, besides hidden states and masks."""


class LayerByLayer:
    """Lets a forward of ``module`` go layer by layer, inside ``run``; until ``close()``.

    The model is called with the whole input, and its layers run on one chunk after another. When the last one is done
    the call ends there, and the model is called with those tokens alone whose logits are wanted, a chunk at a time,
    for what it does behind its layers. To whoever watches the module's forward all of it is one pass.

    Chunks that wait do so on the device, or in host memory of ``backend``. Raises ``ModuleError`` for models without a
    list of layers, those that have an attention of their own, and, when they run, those whose layers are given more
    than is known how to split.
    """

    def __init__(self, module: nn.Module, backend: Backend | None) -> None:
        self._module, self._backend = module, backend
        self._layers = list(module.get_submodule(layers_path(module)).children())
        self._configs = attention_configs(module)
        self._heads = int(self._configs[0].num_attention_heads)
        chosen = str(self._configs[0]._attn_implementation)
        if chosen not in ORIGINALS:
            raise _refused(module, f"attends with {chosen}, not with {' or '.join(ORIGINALS)}")
        if not getattr(module, "_supports_attention_backend", False):
            raise _refused(module, "computes attention in a way of its own")
        self._eager, self._attention = chosen == "eager", register(chosen)
        self._run: _Run | None = None
        self._throughs: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._stand_for(module, self._through_model)
        for number, layer in enumerate(self._layers):
            self._stand_for(layer, partial(self._through_layer, number))
        embeddings = getattr(module, "get_input_embeddings", lambda: None)()
        if embeddings is not None:
            self._stand_for(embeddings, self._through_embeddings)

    def waiting_nbytes(self, batch: int, length: int, shape: LayerShape) -> int:
        """Bytes on the device that do not become fewer with the chunk, for ``length`` positions of ``batch`` rows."""
        kept = 0 if self._backend is not None and not self._backend.engine.unified else shape.hidden
        positions = 4 * 4 * shape.queries // self._heads  # cosines and sines for all, in float32, as they are made
        return batch * length * (kept * shape.dtype_nbytes + positions)

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know."""
        if any(is_watched(part) for layer in self._layers for part in layer.modules() if part is not layer):
            return ("layers are fetched in parts, so that each chunk fetches them again: raise Budget.hbm",)
        return ()

    def run(
        self,
        forward: Callable[..., Any],
        given: Mapping[str, Any],
        chunks: range,
        ends: Sequence[tuple[int, int, Mapping[str, Any]]],
        take: Callable[[Any, int, int], None],
    ) -> Cache | None:
        """Let ``forward`` go layer by layer for ``given``, in chunks from ``chunks.start`` on; the cache it leaves.

        ``take(output, start, stop)`` gets the output for each of ``ends``: tokens ``start`` to ``stop``, which are of
        one chunk, and the arguments for them alone."""
        self._run = run = _Run(chunks, ends, take)
        try:
            with attending(self._configs, self._attention):
                forward(**given)
        finally:
            self._run = None
            if run.waiting is not None:
                run.waiting.close()
        return run.cache

    def close(self) -> None:
        """Leave the modules as they were found. Idempotent."""
        while self._throughs:
            withdraw(*self._throughs.pop())

    def _stand_for(self, module: nn.Module, through: Callable[..., Any]) -> None:
        interpose(module, through)
        self._throughs.append((module, through))

    def _through_model(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return forward(*args, **kwargs)
        try:
            forward(*args, **kwargs)
        except _LastLayerDone:
            pass
        else:
            raise _refused(self._module, "does not use its last layer")
        for start, stop, given in run.ends:
            run.end = (start, stop)
            run.take(forward(**given), start, stop)
        return None

    def _through_embeddings(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run, tokens = self._run, args[0] if len(args) == 1 and not kwargs else None
        first = run is not None and run.waiting is None
        if run is None or not first or not isinstance(tokens, Tensor) or tokens.shape[1:] != (run.length,):
            return forward(*args, **kwargs)
        for number, (start, stop) in enumerate(run.spans):
            self._put(run, number, forward(tokens[:, start:stop]))
        return run.states()

    def _put(self, run: _Run, number: int, chunk: Tensor) -> None:
        if run.waiting is None:
            nbytes = chunk.shape[0] * run.length * chunk.shape[2] * chunk.itemsize
            run.waiting = waiting_for(self._backend, len(run.spans), nbytes)
        run.waiting.put(number, chunk)
        run.like = chunk

    def _through_layer(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        run = self._run
        if run is None:
            return forward(*args, **kwargs)
        given = {**dict(zip(inspect.signature(forward).parameters, args, strict=False)), **kwargs}
        entering = HIDDEN if HIDDEN in given else next(iter(given))
        hidden = given[entering]
        last = index == len(self._layers) - 1
        if run.end is not None:
            return run.given_back(run.ending() if last else hidden)
        run.cache = run.cache or next((each for each in given.values() if isinstance(each, Cache)), None)
        ours = isinstance(hidden, WaitingStates) and hidden.waiting is run.waiting
        for number, span in enumerate(run.spans):
            chunk = run.taken(number) if ours else hidden[:, slice(*span)].contiguous()
            others = {
                name: self._part(run, name, value, index, span) for name, value in given.items() if name != entering
            }
            made = forward(**{entering: chunk}, **others)
            run.as_tuple = isinstance(made, tuple)
            if run.as_tuple and any(isinstance(leaf, Tensor) for leaf in tree_leaves(made[1:])):
                raise _refused(self._module, "has layers that give more than hidden states")
            self._put(run, number, made[0] if run.as_tuple else made)
        if last:
            raise _LastLayerDone
        return run.given_back(run.states())

    def _part(self, run: _Run, name: str, value: Any, index: int, span: tuple[int, int]) -> Any:
        """An argument of a layer for the tokens of ``span``."""
        if isinstance(value, LazyMask):
            return self._mask(value, run.cache, index, *span)
        leaves = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if not leaves:
            return value
        if name not in ALONG:
            raise _refused(self._module, f"has layers that are given {name}")
        return tree_map_only(Tensor, lambda leaf: _along(leaf, run.length, *span), value)

    def _mask(self, mask: LazyMask, cache: Cache | None, index: int, start: int, stop: int) -> Tensor:
        """[B, 1, tokens, keys] for the keys that the layer's cache hands out with those of the tokens."""
        if cache is None:
            raise _refused(self._module, "has layers that are given no cache")
        length, offset = cache.get_mask_sizes(stop - start, index)
        rows = torch.arange(mask.shape[0], device=mask.device)
        keys = torch.arange(offset, offset + length, device=mask.device).expand(len(rows), -1)
        seen = mask.block(rows, slice(start, stop), keys, padded=True)
        if not self._eager:
            return seen
        added = torch.zeros(seen.shape, dtype=mask.dtype, device=mask.device)
        return added.masked_fill_(~seen, torch.finfo(mask.dtype).min)


class _LastLayerDone(Exception):
    """Ends a forward of which the rest is not wanted."""


@dataclass
class _Run:
    """One input on its way; ``end`` are the tokens that the model is called with for what is behind its layers."""

    starts: range
    ends: Sequence[tuple[int, int, Mapping[str, Any]]]
    take: Callable[[Any, int, int], None]
    waiting: Waiting | None = None
    like: Tensor | None = None
    cache: Cache | None = None
    as_tuple: bool = False
    end: tuple[int, int] | None = None

    @property
    def length(self) -> int:
        return self.starts.stop

    @property
    def spans(self) -> list[tuple[int, int]]:
        return [(start, min(start + self.starts.step, self.length)) for start in self.starts]

    def taken(self, number: int) -> Tensor:
        assert self.waiting is not None
        return self.waiting.take(number)

    def states(self) -> WaitingStates:
        """The hidden states of all tokens, as something that the next layer knows."""
        assert self.waiting is not None
        assert self.like is not None
        shape = (self.like.shape[0], self.length, self.like.shape[2])
        return WaitingStates.of(self.waiting, len(self.starts), shape, self.like.dtype, self.like.device)

    def ending(self) -> Tensor:
        """What the last layer gave for the tokens of ``end``."""
        assert self.end is not None
        number, before = divmod(self.end[0], self.starts.step)
        return self.taken(number)[:, before : before + self.end[1] - self.end[0]]

    def given_back(self, hidden: Tensor) -> Any:
        return (hidden,) if self.as_tuple else hidden


def _along(leaf: Tensor, length: int, start: int, stop: int) -> Tensor:
    """``leaf``, [B, L] or [B, L, features], also with dimensions before them, for some tokens."""
    dim = leaf.dim() - 1 if leaf.shape[-1] == length and not leaf.is_floating_point() else leaf.dim() - 2
    return leaf.narrow(dim, start, stop - start)


def _refused(module: nn.Module, what: str) -> ModuleError:
    return ModuleError(
        f"{type(module).__name__} {what}, so that chunks cannot wait between its layers: leave hidden_states out, and "
        "each chunk goes through all layers by itself"
    )
