"""What micro-batches hold while they wait goes to host memory and comes back in time: the same bits, on a device that
does every copy as late as it may, and no more device memory for more micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

import tierstore
from tests.hf.paged import decoder
from tierstore import Budget, Session
from tierstore.backends import Backend
from tierstore.binding.aside import Aside, Counted, Waits
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.tokens import TokenModel
from tierstore.testing.adversary import AdversaryEngine, adversary
from tierstore.waiting_plan import IN_TRANSIT, WaitingPlan

MODELS = ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPT2LMHeadModel")
TOKENS = 16
PLACE = 1 << 16
"""Ample for what a micro-batch of these models holds."""


def device(seed: int) -> tuple[Backend, AdversaryEngine]:
    adverse = adversary(seed)
    return Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool), adverse.engine


@contextmanager
def opened(name: str, seed: int = 0) -> Iterator[tuple[Session, Backend]]:
    """A model of which little fits, on an adversary that is asked for faults at the end."""
    model, (backend, engine) = decoder(name), device(seed)
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters())
    ram, kv = 2 * nbytes, 1 << 24
    with tierstore.offload(model, Budget(nbytes // 2, ram, kv_hbm=kv), backend=backend) as session:
        assert session.plan.streamed_nbytes
        yield session, backend
    engine.check()


def prompts(count: int) -> list[list[int]]:
    """Ragged ones that fill ``count`` micro-batches, with a sequence in several of them."""
    lengths = [TOKENS * count - sum(range(1, 6)), 1, 2, 3, 4, 5]
    return [[(7 * at + 3 * length) % 90 + 3 for at in range(length)] for length in lengths]


def passes(session: Session, waits: Waits | None, count: int) -> list[Tensor]:
    """Logits of prompts that take ``count`` micro-batches, and of two tokens behind each of them."""
    model = TokenModel(session.module, session.kv.memory, partial(session.together, waits=waits), tokens=TOKENS)
    try:
        numbers = [model.add(prompt)[0] for prompt in prompts(count)]
        slices = [Slice(n, tuple(p), len(p), prompt=True) for n, p in zip(numbers, prompts(count), strict=True)]
        found = model.step(slices)
        found += model.step([Slice(n, (5, 6), 2, prompt=False) for n in numbers])
        return found
    finally:
        model.close()


def plan(micro_batches: int, on_device: int) -> WaitingPlan:
    return WaitingPlan(micro_batches, on_device, PLACE)


class Watched:
    """Tells ``aside`` what it wants to know, and counts bytes on the device that waiting calls hold."""

    least_nbytes = 1

    def __init__(self, aside: Aside | None) -> None:
        self._aside = aside
        self._seen: dict[int, StorageWeakRef] = {}
        self._moving: Sequence[bool] = ()
        self.peak_nbytes = 0

    def begin(self, calls: int) -> Sequence[bool]:
        self._moving = (False,) * calls if self._aside is None else self._aside.begin(calls)
        return (True,) * calls

    def leave(self, call: int, storages: Sequence[UntypedStorage]) -> None:
        for each in storages:
            self._seen.setdefault(each._cdata, StorageWeakRef(each))  # type: ignore[no-untyped-call]
        self._count()
        if self._aside is not None and self._moving[call]:
            self._aside.leave(call, storages)

    def come(self, call: int) -> None:
        if self._aside is not None:
            self._aside.come(call)
        self._count()

    def back(self, call: int) -> None:
        if self._aside is not None:
            self._aside.back(call)
        self._count()

    def end(self) -> None:
        if self._aside is not None:
            self._aside.end()
        self._seen.clear()

    def _count(self) -> None:
        alive = [UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._seen.values()]
        self.peak_nbytes = max(self.peak_nbytes, sum(each.nbytes() for each in alive if each is not None))


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for seed in (1, 2) for name in MODELS])
def test_the_same_bits(name: str, seed: int) -> None:
    with opened(name, seed) as (session, backend):
        want = passes(session, None, 6)
        for on_device in (IN_TRANSIT, IN_TRANSIT + 1):
            with closing(Aside(backend, plan(6, on_device))) as aside:
                assert all(map(torch.equal, passes(session, aside, 6), want))
                assert aside.moved_nbytes > 0
                assert aside.host_nbytes == 0
                assert 0 < aside.peak_host_nbytes <= aside.plan.host_nbytes
        with closing(Aside(backend, plan(6, 6))) as aside:
            assert all(map(torch.equal, passes(session, aside, 6), want))
            assert aside.moved_nbytes == 0


@pytest.mark.parametrize("name", MODELS[:2])
def test_more_micro_batches_take_no_more_of_the_device(name: str) -> None:
    with opened(name) as (session, backend):
        found = {}
        for count in (6, 16):
            with closing(Aside(backend, plan(count, 5))) as aside:
                watched, plain = Watched(aside), Watched(None)
                want = passes(session, plain, count)
                assert all(map(torch.equal, passes(session, watched, count), want))
            found[count] = (watched.peak_nbytes, plain.peak_nbytes)
        assert found[16][0] == found[6][0] < found[6][1]
        assert found[16][1] * 6 == found[6][1] * 16


def test_what_is_held_is_measured() -> None:
    """At every wait, a layer's input, and what lives beside it: counted by hand for one decoder."""
    with opened("LlamaForCausalLM") as (session, _):
        counted = Counted()
        passes(session, counted, 2)
        config: Any = session.module.config
        width = max(config.intermediate_size, config.num_attention_heads * config.hidden_size // 4)
        hidden = TOKENS * config.hidden_size * 4
        assert 3 * hidden <= counted.most_nbytes <= 6 * hidden + 2 * TOKENS * width * 4
        assert counted.all_nbytes >= config.num_hidden_layers * hidden


@pytest.mark.parametrize("at", [1, 4, 6])
def test_an_error_in_the_middle_of_a_pass(at: int) -> None:
    with opened("LlamaForCausalLM") as (session, backend), closing(Aside(backend, plan(6, IN_TRANSIT))) as aside:
        want = passes(session, None, 6)
        seen = 0

        def fail(*_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == at:
                raise ValueError("wrong")

        module: Any = session.module
        handle = module.model.layers[1].self_attn.register_forward_pre_hook(fail)
        for _ in range(2):
            seen = 0
            with pytest.raises(ValueError, match="wrong"):
                passes(session, aside, 6)
            assert aside.host_nbytes == 0
            assert not aside._away
            assert not aside._leaving
        handle.remove()
        assert all(map(torch.equal, passes(session, aside, 6), want))
