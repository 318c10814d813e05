"""Calls of any module whose tensors go to host memory while they wait: works in place, shared tensors, errors and
interrupts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tierstore
from tests.session.test_waiting import device
from tierstore import Budget, Session, errors
from tierstore.backends import Backend
from tierstore.binding.aside import Aside
from tierstore.waiting_plan import WaitingPlan


class Careful(nn.Module):
    """Looks at what it holds whatever happens, keeps a tensor that is made once for all calls, and adds to another in
    place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self.scaled = nn.Identity()
        self.scale: Tensor | None = None
        self.seen: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = self.scaled(torch.full((3, 64), 0.5))
        y = self.layers[0](x) * self.scale
        whole = y.clone()
        try:
            for layer in self.layers[1:]:
                y += layer(y)
                y *= self.scale
                whole = y.clone()
            return y  # type: ignore[no-any-return]
        finally:
            self.seen.append(torch.equal(y, whole))


@contextmanager
def careful(seed: int) -> Iterator[tuple[Careful, Session, Backend]]:
    torch.manual_seed(0)
    module = Careful()
    backend, engine = device(seed)
    with tierstore.offload(module, Budget(40_000, 1 << 20), backend=backend) as session:
        yield module, session, backend
    engine.check()


def inputs(count: int) -> list[Tensor]:
    return [torch.randn(3, 64, generator=torch.Generator().manual_seed(number)) for number in range(count)]


def through(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_module_that_works_in_place(seed: int) -> None:
    with careful(seed) as (module, session, backend), closing(Aside(backend, WaitingPlan(9, 4, 4096))) as aside:
        calls = [partial(through, module, x) for x in inputs(9)]
        with torch.no_grad():
            want = [call() for call in calls]
            module.scale = None
            for _ in range(3):
                assert all(map(torch.equal, session.together(calls, waits=aside), want))
            with torch.inference_mode():
                assert all(map(torch.equal, session.together(calls, waits=aside), want))
        assert aside.moved_nbytes > 0
        moved = aside.moved_nbytes
        assert all(map(torch.equal, session.together(calls, waits=aside), want))
        assert aside.moved_nbytes == moved  # what gradients are made of stays
        assert all(module.seen)


class Passes(nn.Module):
    """A tensor of the first call goes through a module in the last ones; only a closure keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        kept: list[Tensor] = []

        def shared(x: Tensor, y: Tensor) -> Tensor:
            kept.extend([y] if not kept else [])
            return kept[0] if len(x) > 10 else y

        self.shared, self.forget, self.own = shared, kept.clear, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x).relu()
        for layer in self.layers[1:]:
            y = self.own(y)
            y = layer(y) + self.own(self.shared(x, y)).sum(0)
        return y  # type: ignore[no-any-return]


@pytest.mark.parametrize("on_device", [4, 6, 7])
def test_what_calls_share_by_way_of_a_module(on_device: int) -> None:
    torch.manual_seed(0)
    module = Passes()
    backend, engine = device(7)
    with (
        tierstore.offload(module, Budget(40_000, 1 << 20), backend=backend) as session,
        closing(Aside(backend, WaitingPlan(9, on_device, 1 << 14))) as aside,
        torch.no_grad(),
    ):
        calls = [partial(through, module, torch.cat([x] * (1 + n))) for n, x in enumerate(inputs(9))]
        want = session.together(calls)
        for _ in range(3):
            module.forget()
            assert all(map(torch.equal, session.together(calls, waits=aside), want))
        assert aside.moved_nbytes > 0
        module.forget()
    engine.check()


def test_calls_that_are_ended_find_what_they_hold() -> None:
    with careful(4) as (module, session, backend), closing(Aside(backend, WaitingPlan(8, 4, 4096))) as aside:
        x = inputs(8)

        def call(number: int) -> Tensor:
            y = through(module, x[number])
            if number == 3:
                raise ValueError("wrong")
            return y

        with torch.no_grad():
            want = [through(module, each) for each in x]
            for error_in in (partial(call, 3), partial(through, module, torch.ones(1, 65))):
                module.seen.clear()
                calls: list[Any] = [partial(through, module, each) for each in x]
                calls[3] = error_in
                with pytest.raises((ValueError, RuntimeError), match=r"wrong|shape"):
                    session.together(calls, waits=aside)
                assert module.seen
                assert all(module.seen)
                assert aside.host_nbytes == 0
                assert not aside._away
            calls = [partial(through, module, each) for each in x]
            assert all(map(torch.equal, session.together(calls, waits=aside), want))


def test_interrupted_anywhere(alarm: None) -> None:
    random, interrupted = Random(5), 0
    with (
        careful(5) as (module, session, backend),
        closing(Aside(backend, WaitingPlan(8, 4, 4096))) as aside,
        torch.no_grad(),
    ):
        calls = [partial(through, module, x) for x in inputs(8)]
        want = session.together(calls)
        for _ in range(20):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-3, 3e-2))
                for _ in range(50):
                    session.together(calls, waits=aside)
            except KeyboardInterrupt:
                interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert not aside._away
            assert all(map(torch.equal, session.together(calls, waits=aside), want))
    assert interrupted > 10


def test_a_session_owns_the_memory() -> None:
    with careful(6) as (module, session, _):
        assert session.report().waiting is None
        with pytest.raises(errors.BudgetError, match=r"Budget\.ram ask for"):
            session.set_aside(WaitingPlan(1 << 20, 4, 1 << 40))
        aside = session.set_aside(WaitingPlan(8, 4, 4096))
        with pytest.raises(ValueError, match="one already"):
            session.set_aside(WaitingPlan(8, 4, 4096))
        with torch.no_grad():
            session.together([partial(through, module, x) for x in inputs(8)], waits=aside)
        moved, report = session.report().bytes_moved, session.report().waiting
        assert report is not None
        assert report.host_nbytes == 8 * 4096
        assert 0 < report.peak_nbytes <= report.host_nbytes
        assert report.moved_nbytes == aside.moved_nbytes
        assert "hidden states: up to" in str(session.report())
        assert moved == sum(link.nbytes for link in session.report().links.values())
    with pytest.raises(errors.SessionClosedError):
        session.set_aside(WaitingPlan(8, 4, 4096))
    still = tierstore.offload(nn.Linear(4, 4), Budget("1MiB"), device="cpu")
    with still, pytest.raises(ValueError, match="no call waits"):
        still.set_aside(WaitingPlan(8, 4, 4096))
