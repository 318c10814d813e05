"""Lets a model generate with a paged cache: ``generate`` and ``forward`` of one instance, until ``close``.

A forward that is given a ``PagedCache`` goes through stages, each ``stage(go_on, call) -> output``: it may change the
call, make several of it, or do something before and after, and calls ``go_on(call)`` for what comes behind. Outermost
first they are: pages found by content need not be computed; a prompt longer than can be written at once goes in
chunks; lost pages are computed anew; and the model runs. A further stage is put in by ``add``, outermost, such as one
that bounds activations. Whoever stands for the module's forward with ``interpose(..., outermost=True)`` after this
does so around all stages.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from tierstore.binding.baton import uninterleaved
from tierstore.binding.forwards import interpose, withdraw
from tierstore.budget import Budget
from tierstore.errors import CapacityError, ModuleError, PageLostError
from tierstore.events import Recorder
from tierstore.hf.kv.attending import attending, attention_configs
from tierstore.hf.kv.attention import ORIGINALS, register
from tierstore.hf.kv.cache import PagedCache
from tierstore.hf.kv.calls import Call, standard_positions
from tierstore.hf.kv.latent import expanding, expanding_attentions
from tierstore.hf.kv.memory import PAGE_TOKENS, KvMemory
from tierstore.hf.kv.shapes import dtype_of, layers_of
from tierstore.hf.kv.standing import StandIn
from tierstore.hf.splitting import CACHES, Forward
from tierstore.kvformats.named import kv_format

if TYPE_CHECKING:
    from tierstore.backends import Backend

GoOn = Callable[[Call], Any]
Stage = Callable[[GoOn, Call], Any]
_UNSET = "hybrid"  # a cache_implementation that transformers takes for none
_TRIES = 8  # so often pages may be lost in one forward, and computed anew


def make_kv(
    module: nn.Module,
    budget: Budget,
    *,
    format: str | None,
    backend: Backend,
    recorder: Recorder,
    folder: Path | None,
    notes: MutableSequence[str],
    page_tokens: int = PAGE_TOKENS,
) -> KvGeneration:
    """A paged KV cache for ``module``, a transformers decoder, with which it generates from now on.

    ``format`` is how pages that are full are kept: "int8", "fp8", ...; None keeps them as they are. ``folder`` is where
    ``budget.kv_nvme`` bytes of pages go. What users should know is added to ``notes``. Raises ``ModuleError`` for
    models with another kind of cache, and for formats that cannot be; ``PlanError`` for a budget that is too small.
    """
    layers, dtype = layers_of(module), dtype_of(module)
    form = kv_format(format, dtype)
    memory = KvMemory(
        layers,
        budget,
        dtype=dtype,
        form=form,
        backend=backend,
        recorder=recorder,
        folder=folder,
        page_tokens=page_tokens,
    )
    try:
        return KvGeneration(module, memory, notes)
    except BaseException:
        memory.close()
        raise


class KvGeneration:
    """``module`` generates with ``cache``, over ``memory``, until ``close``.

    ``generate`` begins anew in ``cache`` unless it is given one, and then in one of its own when ``cache`` is in use.
    """

    def __init__(self, module: nn.Module, memory: KvMemory, notes: MutableSequence[str]) -> None:
        self.module, self.memory = module, memory
        self.cache = PagedCache(memory)
        self._forward = Forward(inspect.signature(module.forward).parameters, getattr(module, "config", None))
        if not self._forward.cache:
            raise ModuleError(f"the forward of {type(module).__name__} takes no cache: load it without kv_hbm")
        self._configs = attention_configs(module)
        self._attention = self._register(notes)
        self._expanding = expanding_attentions(module)
        self._stages: list[Stage] = [self._run, self._recomputing, self._in_chunks, self._reusing]
        self._generating = 0
        self._stand_in = StandIn(module, self._generate)
        interpose(module, self._through, outermost=True)

    def add(self, stage: Stage) -> None:
        """Put a stage around all others."""
        self._stages.append(stage)

    def close(self) -> None:
        """Leave the module as it was found, and release the memory. Idempotent."""
        withdraw(self.module, self._through)
        self._stand_in.close()
        self.memory.close()

    # ---- generate

    def _generate(self, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        name = self._forward.cache
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        defaults = getattr(self.module, "generation_config", None)

        def option(key: str) -> Any:
            values = (kwargs.get(key), getattr(config, key, None), getattr(defaults, key, None))
            return next((value for value in values if value is not None), None)

        given = any(kwargs.get(each) is not None for each in CACHES)
        if given or option("use_cache") is False or option("cache_implementation") not in (None, _UNSET):
            return generate(*args, **kwargs)
        with self.memory.turn:
            cache = self.cache if not self._generating else self.cache.another()
            cache.reset()
            if getattr(config, "is_assistant", False):
                cache.activate_past_recording()
            cache.state.goal = _goal(args, kwargs, option)
            self._generating += 1
        try:
            found = generate(*args, **kwargs, **{name: cache})
        finally:
            with self.memory.turn:
                self._generating -= 1
                cache.state.goal = 0
        with self.memory.turn:
            cache.state.finish()
            cache.state.seal()
        return found

    # ---- forward

    def _through(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = self._forward.read(args, kwargs)
        cache = given.get(self._forward.cache)
        if not isinstance(cache, PagedCache) or cache.memory is not self.memory:
            return forward(*args, **kwargs)
        if given.get("output_attentions") or getattr(self._forward.config, "output_attentions", False):
            raise ModuleError(
                "attention over pages gives no weights: leave output_attentions out, or give another cache"
            )
        call = Call(self._forward, given, cache.state, forward)
        go_on: GoOn = _called
        for stage in self._stages:
            go_on = partial(stage, go_on)
        with self.memory.turn:  # forwards of other threads wait
            rows, columns = call.batch, cache.state.rows.columns + call.length
            try:
                return go_on(call)
            except CapacityError as error:
                if not error.of_pages:
                    raise
                at_once = call.length if call.why_whole else 0
                raise CapacityError(f"{error}{cache.state.enough(rows, columns, at_once)}", of_pages=True) from error

    def _run(self, go_on: GoOn, call: Call) -> Any:
        """The model itself, with attention over pages. A pass that fails never was."""
        state = call.state
        state.announce(call.tokens, call.mask)
        try:
            with self._attending():
                output = go_on(call)
        except BaseException:
            state.abandon()
            raise
        finally:
            state.announce(None, None)
        state.finish()
        if call.length > 1:
            state.seal()
        return output

    def _recomputing(self, go_on: GoOn, call: Call) -> Any:
        """Pages that cannot be brought back are computed anew, from their tokens."""
        for left in reversed(range(_TRIES)):
            try:
                return go_on(call)
            except PageLostError as error:
                state = call.state
                if state.tokens is None or state.tokens.shape[1] < state.rows.columns:
                    raise PageLostError(
                        f"{error}; the cache does not know them, as something else than tokens entered too: reset it "
                        "and generate again, with store= on a disk that gives back what was written to it",
                        cells=error.cells,
                    ) from error
                if not left or not self._again(go_on, call, error.cells):
                    raise
        raise AssertionError("the last try returns or raises")

    def _again(self, go_on: GoOn, call: Call, lost: Sequence[tuple[Any, int]]) -> bool:
        """Whether all that was there until some cells were ``lost`` is there again; all tokens are known."""
        state = call.state
        tokens, stored = cast(Tensor, state.tokens), state.stored
        for _ in range(_TRIES):
            state.rewind(lost)
            lost = ()
            again = call.of_tokens(tokens, stored, state.rows.columns)
            try:
                for part in again.parts(partial(self.memory.columns_at_once, len(tokens))):
                    go_on(part)
                return True
            except PageLostError as other:
                lost = other.cells
        return False

    def _in_chunks(self, go_on: GoOn, call: Call) -> Any:
        """A pass writes to pages that are all open at the same time; a longer input goes in several."""
        if call.length <= 1:
            return go_on(call)
        bound = self.memory.plan.tokens
        if bound is not None and call.longest > bound:
            raise CapacityError(
                f"a sequence of {call.longest} tokens is longer than all KV tiers together, which hold {bound}: "
                f"shorten the prompt, or raise kv_hbm, kv_ram or kv_nvme",
                of_pages=True,
            )
        most = self.memory.columns_at_once(call.different_rows)
        if call.length <= most:
            return go_on(call)
        why = call.why_whole
        if why:
            raise CapacityError(
                f"{call.length} tokens a row are more than the {most} that kv_hbm can take at once, and this input "
                f"cannot go in chunks, as {why}: give fewer tokens at once, or raise kv_hbm",
                of_pages=True,
            )
        start = call.state.rows.columns
        try:
            return call.joined(
                [go_on(part) for part in call.parts(partial(self.memory.columns_at_once, call.different_rows))]
            )
        except BaseException:
            call.state.abandon()
            if call.state.rows.columns > start:
                call.state.crop(start)
            raise

    def _reusing(self, go_on: GoOn, call: Call) -> Any:
        """What all rows begin with and pages still hold is not computed again."""
        keep = call.kept_logits
        if call.tokens is None or not keep or call.length <= keep or call.state.rows.rows or call.why_whole:
            return go_on(call)
        if not standard_positions(call):
            return go_on(call)
        shared = call.state.share(call.tokens, call.mask, call.length - keep)
        if not shared:
            return go_on(call)
        try:
            return go_on(call.part(shared, call.length))
        except BaseException:
            call.state.clear()
            raise

    @contextmanager
    def _attending(self) -> Iterator[None]:
        """Within, the model's attention is the one over pages."""
        if self._attention is None:
            with uninterleaved():  # the memory is written for one forward at a time
                yield
            return
        with attending(self._configs, self._attention), expanding(self._expanding):
            yield

    def _register(self, notes: MutableSequence[str]) -> str | None:
        """The name of attention over pages for this model; None where it has none of its own to stand for."""
        name = type(self.module).__name__
        if not self._configs or not getattr(self.module, "_supports_attention_backend", False):
            notes.append(
                f"{name} computes attention in a way of its own: the keys and values of a layer are gathered for it, "
                f"one layer at a time, which takes memory beside kv_hbm"
            )
            return None
        chosen = str(self._configs[0]._attn_implementation)
        if chosen in ORIGINALS:
            return register(chosen)
        other = "sdpa" if getattr(self.module, "_supports_sdpa", False) else "eager"
        notes.append(f"{name} asks for {chosen} attention: over pages it has the numbers of {other}")
        return register(other)


def _called(call: Call) -> Any:
    return call.forward(**call.given)


def _goal(args: Sequence[Any], kwargs: Mapping[str, Any], option: Callable[[str], Any]) -> int:
    """Tokens that a row of ``generate`` may get to have, prompt and padding included; 0 where nothing says so."""
    prompts = (args[0] if args else None, *(kwargs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")))
    length = max((each.shape[1] for each in prompts if isinstance(each, Tensor) and each.dim() > 1), default=0)
    new = option("max_new_tokens")
    return length + new if new is not None else option("max_length") or 0
