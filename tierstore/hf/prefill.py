"""A long input of a decoder goes through it in chunks, so that activations stay within a bound whatever its length."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tierstore.activation_plan import ActivationPlan, build_activation_plan
from tierstore.binding.forwards import interpose, withdraw
from tierstore.budget import format_nbytes
from tierstore.errors import CapacityError
from tierstore.hf.activations import layer_shape
from tierstore.hf.by_layer import LayerByLayer
from tierstore.hf.chunked_mlp import ChunkedMlps
from tierstore.hf.kv.cache import PagedCache
from tierstore.hf.kv.calls import Call
from tierstore.hf.kv.memory import Bound
from tierstore.hf.splitting import CACHES, Forward, length_of, part_of, positions_in, why_not

if TYPE_CHECKING:
    from tierstore.hf.kv.generating import KvGeneration

JOINED = ("logits", "last_hidden_state")
"""Outputs that have a row for each position."""


class ChunkedPrefill:
    """Bounds the activations of ``module``, a transformers decoder, to ``nbytes``, until ``close()``.

    Whatever calls it, ``generate`` too, an input of more tokens than the bound allows at once is split; each chunk
    goes through the model as a forward of its own and leaves its keys and values in the cache, whichever that is, for
    those behind it. Logits are worked out for the positions that ``logits_to_keep`` asks for, and put together. MLPs
    take fewer tokens at a time than attention does, where that lets chunks be longer.

    The numbers are those of the whole input but for the order in which matrix products add. An input that needs
    chunks and cannot be split exactly raises ``CapacityError``: encoder-decoders, recurrent states, tokens that see
    those behind them, images, ``labels``, outputs of every layer, gradients, masks of unusual shape. A batch of which
    not one token a row fits raises ``PlanError``, and so does a bound that is too small for any.

    Over pages, what a chunk needs is the same whatever was before it. A plain cache needs more with every position:
    columns of the chunk's masks and scores, so that chunks become shorter; the copy of a layer's keys and values when
    they grow, and, for grouped queries under a mask, one that is repeated for every query. All of it counts, so that a
    prompt too long for the bound is refused. Logits of more than one position are a result, and do not. Where weights
    stream, each chunk is a pass over them.

    After an error the cache holds the chunks before it, in all layers.
    """

    def __init__(
        self,
        module: nn.Module,
        nbytes: int,
        kv: KvGeneration | None = None,
        *,
        by_layer: LayerByLayer | None = None,
    ) -> None:
        """``kv`` is what the module generates with, if that is of ours: calls with its caches are split there.

        With ``by_layer``, which is closed with this, all chunks go through a layer before the next one does, unless the
        cache is of pages; hidden states that wait on the device count."""
        self.chunks = 0
        """How many there were so far, of inputs that were split."""
        self._module, self._nbytes, self._kv, self._by_layer = module, nbytes, kv, by_layer
        self._closed = False
        self._forward = Forward(inspect.signature(module.forward).parameters, getattr(module, "config", None))
        self._mlps = ChunkedMlps(module)
        try:
            self._plan(1, 1, None if kv is None else kv.cache)
        except BaseException:
            if by_layer is not None:
                by_layer.close()
            raise
        self._mlps.open()
        self._head = getattr(module, "get_output_embeddings", lambda: None)()
        if self._head is not None:
            interpose(self._head, _on_contiguous)
        interpose(module, self._through, outermost=True)
        if kv is not None:
            kv.add(self._stage)

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know."""
        return self._mlps.notes + (self._by_layer.notes if self._by_layer is not None else ())

    def close(self) -> None:
        """Leave the module as it was found. Idempotent."""
        self._closed = True
        withdraw(self._module, self._through)
        if self._kv is not None:
            self._kv.memory.bound = Bound()
        if self._head is not None:
            withdraw(self._head, _on_contiguous)
        self._mlps.close()
        if self._by_layer is not None:
            self._by_layer.close()

    def _plan(self, batch: int, length: int, cache: Any) -> ActivationPlan:
        paged = isinstance(cache, PagedCache) and getattr(self._module, "_supports_attention_backend", False)
        memory = cache.memory if paged else None
        shape = layer_shape(self._module, chunked_mlp=self._mlps.complete, memory=memory)
        if self._by_layer is not None and not paged:
            waiting = self._by_layer.waiting_nbytes(batch, length, shape)
            shape = replace(shape, fixed_nbytes=shape.fixed_nbytes + waiting)
        context = positions_in(cache) + length
        plan = build_activation_plan(self._nbytes, shape, batch=batch, context=context)
        if memory is not None:
            memory.bound = Bound(plan.block_nbytes, plan.block_nbytes // shape.masked_nbytes)
        return plan

    def _stage(self, go_on: Callable[[Call], Any], call: Call) -> Any:
        if self._closed:
            return go_on(call)
        return self._bounded(lambda **given: go_on(replace(call, given=given)), call.given, partial(go_on, call))

    def _through(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        given = self._forward.read(args, kwargs)
        cache = given.get(self._forward.cache)
        if self._kv is not None and isinstance(cache, PagedCache) and cache.memory is self._kv.memory:
            return forward(*args, **kwargs)  # and so to the stage
        return self._bounded(forward, given, partial(forward, *args, **kwargs))

    def _bounded(self, forward: Callable[..., Any], given: Mapping[str, Any], whole: Callable[[], Any]) -> Any:
        batch, length = length_of(given) or (0, 0)
        if length <= 1:  # also what the forward itself will have to refuse
            return whole()
        plan = self._plan(batch, length, given.get(self._forward.cache))
        self._mlps.tokens = plan.mlp_tokens
        if length <= plan.prefill_tokens:
            return whole()
        if why := self._forward.why_whole(given) or self._why_not_in_chunks(given):
            raise self._refusal(why, length, plan)
        if self._by_layer is not None and not isinstance(given[self._forward.cache], PagedCache):
            return self._layer_by_layer(self._by_layer, forward, given, range(0, length, plan.prefill_tokens))
        return self._in_chunks(forward, given, length, plan)

    def _why_not_in_chunks(self, given: Mapping[str, Any]) -> str:
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        if torch.is_grad_enabled() and any(each.requires_grad for each in (*tensors, *self._module.parameters())):
            return "gradients keep all activations: call it in torch.no_grad()"
        return ""

    def _layer_by_layer(
        self, by_layer: LayerByLayer, forward: Callable[..., Any], given: Mapping[str, Any], starts: range
    ) -> Any:
        joined = _Joined(starts.stop, self._keeps(given) or starts.stop)
        alone = {self._forward.cache: None, "attention_mask": None, "position_ids": None, "use_cache": False}
        ends = []
        for start in starts:
            first, stop = max(start, joined.first), min(start + starts.step, starts.stop)
            if first < stop:
                ends.append((first, stop, {**part_of({**given, **alone}, 0, first, stop), "return_dict": True}))
        kinds: list[Any] = []

        def take(output: Any, start: int, stop: int) -> None:
            kinds.append(type(output))
            joined.take(dict(output), start, stop)

        whole = {**given, "use_cache": True, "return_dict": True}
        cache = by_layer.run(forward, whole, starts, ends, take)
        self.chunks += len(starts)
        name = next(name for name in CACHES if name in kinds[0].__dataclass_fields__)
        return self._as_wanted(kinds[0], {**joined.tensors, name: cache}, given)

    def _in_chunks(
        self, forward: Callable[..., Any], given: Mapping[str, Any], length: int, plan: ActivationPlan
    ) -> Any:
        cache = self._forward.cache
        past = positions_in(given[cache])
        asked, given = given, {**given, "use_cache": True, "return_dict": True}
        keeps = self._keeps(given)
        joined = _Joined(length, keeps or length)
        fields: dict[str, Any] = {}
        made: Any = None
        for start in range(0, length, plan.prefill_tokens):
            stop = min(start + plan.prefill_tokens, length)
            part = part_of(given, past, start, stop)
            if keeps is not None:
                part["logits_to_keep"] = max(stop - max(start, joined.first), 1)
            fields.clear()
            made = forward(**part)
            del part
            fields.update(made)
            given[cache] = self._handed_on(fields, length, plan)
            self.chunks += 1
            joined.take(fields, start, stop)
            kind, made = type(made), None
        return self._as_wanted(kind, {**fields, **joined.tensors}, asked)

    def _keeps(self, given: Mapping[str, Any]) -> int | None:
        """Of how many last positions logits are asked for; 0 for all, None for a forward that gives no choice."""
        return given.get("logits_to_keep") or 0 if "logits_to_keep" in self._forward.parameters else None

    def _as_wanted(self, kind: Any, fields: Mapping[str, Any], asked: Mapping[str, Any]) -> Any:
        """The output as the call that was split asked for it."""
        caches = CACHES if not self._wants(asked, "use_cache") else ()
        output = kind(**{name: value for name, value in fields.items() if name not in caches})
        return output if self._wants(asked, "return_dict") else output.to_tuple()

    def _wants(self, given: Mapping[str, Any], name: str) -> bool:
        value = given.get(name)
        return bool(getattr(self._forward.config, name, True) if value is None else value)

    def _handed_on(self, fields: Mapping[str, Any], length: int, plan: ActivationPlan) -> Any:
        """The cache that one chunk leaves to the next."""
        caches = [fields[name] for name in CACHES if fields.get(name) is not None]
        others = [name for name in fields if name not in (*CACHES, *JOINED)]
        why = "" if caches else "its forward gives no cache back"
        why = why or next(why_not(caches[0]), "") or (f"its forward gives {others[0]}" if others else "")
        if why:
            raise self._refusal(why, length, plan)
        return caches[0]

    def _refusal(self, why: str, length: int, plan: ActivationPlan) -> CapacityError:
        return CapacityError(
            f"{type(self._module).__name__} is given {length} tokens a row, {format_nbytes(self._nbytes)} of "
            f"activations allow {plan.prefill_tokens} at a time, and this input cannot be split, as {why}: give fewer "
            "tokens at once, or raise Budget.activations"
        )


class _Joined:
    """Rows of outputs, put together as chunks bring them: those of logits from position ``first`` on."""

    def __init__(self, length: int, keeps: int) -> None:
        self.first = max(length - keeps, 0)
        self.tensors: dict[str, Tensor] = {}
        self._length = length

    def take(self, fields: dict[str, Any], start: int, stop: int) -> None:
        """Take the rows of a chunk out of its outputs."""
        for name in JOINED:
            rows = fields.pop(name, None)
            first = self.first if name == "logits" else 0
            if rows is None or stop <= first:
                continue
            if start <= first and stop == self._length:
                self.tensors[name] = rows
                continue
            if name not in self.tensors:
                self.tensors[name] = rows.new_empty((rows.shape[0], self._length - first, *rows.shape[2:]))
            at = max(start, first) - first
            self.tensors[name][:, at : at + rows.shape[1]] = rows


def _on_contiguous(forward: Any, hidden: Any, *args: Any, **kwargs: Any) -> Any:
    """torch spreads a weight out over the batch where rows that it is multiplied with do not lie side by side."""
    return forward(hidden.contiguous() if isinstance(hidden, Tensor) else hidden, *args, **kwargs)
