"""Storages of calls that wait: elsewhere until their turn, in the same objects, with the same bytes; and whose they
are."""

from __future__ import annotations

from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tierstore.backends import Backend
from tierstore.binding.aside import LEAST_PART, Aside, Counted
from tierstore.binding.holdings import Holdings
from tierstore.testing.adversary import AdversaryEngine, adversary
from tierstore.waiting_plan import IN_TRANSIT, WaitingPlan, moves

CPU = torch.device("cpu")
NBYTES = 4096


def device(seed: int) -> tuple[Backend, AdversaryEngine]:
    adverse = adversary(seed)
    return Backend(CPU, adverse.engine, adverse.pool, adverse.pool, adverse.pool), adverse.engine


def state(random: Random, call: int) -> list[Tensor]:
    """What a call holds: some storages, of which one is seen through a view only, and one was made for inference."""
    made = [torch.randn(random.randrange(1, 9), 32) for _ in range(random.randrange(1, 4))]
    with torch.inference_mode():
        made.append(torch.full((3, 64), float(call), dtype=torch.float64))
    return [made[0].t(), *made[1:]]


@pytest.mark.parametrize("seed", range(40))
def test_each_call_finds_what_it_left(seed: int) -> None:
    random = Random(seed)
    calls, on_device = random.randrange(IN_TRANSIT + 1, 12), IN_TRANSIT + random.randrange(3)
    backend, engine = device(seed)
    aside = Aside(backend, WaitingPlan(calls, on_device, NBYTES))
    going = aside.begin(calls)
    assert tuple(going) == moves(calls, on_device)
    moving = [call for call, goes in enumerate(going) if goes]
    states = {call: state(random, call) for call in moving}
    known = {call: [each.clone() for each in states[call]] for call in moving}
    for call in moving:
        aside.leave(call, [each.untyped_storage() for each in states[call]])
    for _ in range(4):
        for at, call in enumerate(moving):
            aside.come(call)
            aside.come(moving[(at + 1) % len(moving)])
            aside.back(call)
            on_the_device = sum(all(each.untyped_storage().nbytes() for each in states[c]) for c in moving)
            assert on_the_device <= IN_TRANSIT
            assert all(map(torch.equal, states[call], known[call]))
            if random.random() < 0.7:
                with torch.inference_mode():
                    for each in states[call]:
                        each.add_(1)
            else:
                states[call] = state(random, call)
            known[call] = [each.clone() for each in states[call]]
            aside.leave(call, [each.untyped_storage() for each in states[call]])
    assert aside.peak_host_nbytes <= aside.plan.host_nbytes == len(moving) * NBYTES
    for call in reversed(moving):  # as calls are ended
        aside.back(call)
        assert all(map(torch.equal, states[call], known[call]))
    assert aside.host_nbytes == 0
    aside.end()
    aside.close()
    aside.close()
    engine.check()


def test_a_turn_that_comes_at_once_does_not_spoil_what_leaves() -> None:
    backend, engine = device(0)
    aside = Aside(backend, WaitingPlan(5, IN_TRANSIT, NBYTES))
    aside.begin(5)
    held = torch.ones(100)
    for number in range(20):
        aside.leave(0, [held.untyped_storage()])
        assert held.untyped_storage().nbytes() == 400
        aside.back(0)
        held.add_(1)
        assert torch.equal(held, torch.full((100,), number + 2.0))
    aside.close()
    engine.check()


def test_what_has_no_place_stays() -> None:
    backend, engine = device(0)
    aside = Aside(backend, WaitingPlan(5, IN_TRANSIT, NBYTES))
    assert aside.least_nbytes == NBYTES // LEAST_PART
    assert list(aside.begin(5)) == [True] * 5
    assert list(aside.begin(4)) == [False] * 4  # all have room
    assert sum(aside.begin(9)) == 5  # more than were planned: there are five places
    large, small = torch.ones(NBYTES), torch.ones(NBYTES // 8)
    aside.begin(5)
    for call in range(5):
        aside.leave(call, [large.untyped_storage(), small.untyped_storage()] if call == 0 else [])
    engine.close()
    aside.leave(1, [torch.ones(4).untyped_storage()])
    aside.leave(2, [torch.ones(4).untyped_storage()])
    aside.leave(3, [torch.ones(4).untyped_storage()])
    assert small.untyped_storage().nbytes() == 0
    assert torch.equal(large, torch.ones(NBYTES))
    aside.back(0)
    assert torch.equal(small, torch.ones(NBYTES // 8))
    aside.close()
    engine.check()


def test_counting() -> None:
    counted = Counted()
    assert list(counted.begin(3)) == [True, False, False]
    for nbytes in (100, 300, 64):
        counted.leave(0, [torch.ones(nbytes, dtype=torch.uint8).untyped_storage()])
        counted.come(0)
        counted.back(0)
    counted.end()
    assert (counted.most_nbytes, counted.all_nbytes) == (320, 128 + 320 + 64)


# ---- whose storages


class Keeps(nn.Module):
    """Adds to what it is given, and keeps a tensor for itself and one in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.register_buffer("table", torch.ones(8, 64))
        self.kept: list[Tensor] = []
        self.mine: Tensor | None = None

    def forward(self, x: Tensor, also: Any = None) -> Any:
        if self.mine is None:
            self.mine = x + 1
            self.kept.append(x + 2)
        return x + self.mine, self.kept[0], self.table, self.weight


def one(call: int = 0, **change: Any) -> Holdings:
    given: dict[str, Any] = {"device": CPU, "least_nbytes": 1, "owners": {}, "recall": lambda call: None}
    return Holdings(call, *(given | change).values())


def numbers(holdings: Holdings) -> set[int]:
    return {each._cdata for each in holdings.storages()}


def number(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def within(holdings: Holdings, action: Any) -> Any:
    """``action`` within a forward of the whole module."""
    return holdings.through(nn.Identity(), lambda *args: action())


def test_what_modules_keep_is_not_the_calls() -> None:
    module, holdings = Keeps(), one()
    x = torch.ones(8, 64)
    with torch.no_grad():
        call = partial(holdings.through, module, module.forward, x, also=(x,))
        sums, kept, table, weight = within(holdings, call)
    assert numbers(holdings) == {number(x), number(sums)}
    assert len({number(kept), number(table), number(weight), number(module.mine)}) == 4  # type: ignore[arg-type]
    assert holdings.storages()[0]._cdata in (number(x), number(sums))  # and still so
    del x, call
    assert numbers(holdings) == {number(sums)}


def test_what_a_call_was_given_is_not_its_own() -> None:
    given, holdings, module = torch.ones(8, 8), one(), nn.Identity()
    made = holdings.through(module, lambda x: holdings.through(module, lambda y: y + 1, x), given)
    assert numbers(holdings) == {number(made)}


@pytest.mark.parametrize(
    "odd",
    [
        lambda: torch.ones(8, 8)[2:],  # a part
        lambda: torch.ones(8, 8, dtype=torch.long),
        lambda: torch.ones(1, 8).expand(8, 8),
        lambda: torch.frombuffer(bytearray(256), dtype=torch.float32),  # memory of somebody else
        lambda: torch.ones(8, 8, requires_grad=True) + 0,
        lambda: torch.ones(2),
        lambda: torch.ones(8, 8, device="meta"),
        lambda: torch.ones(8, 8).to_sparse(),
        lambda: None,
    ],
)
def test_what_does_not_move(odd: Any) -> None:
    holdings = one(least_nbytes=64)
    value = odd()
    within(holdings, lambda: holdings.through(nn.Identity(), lambda x: x, value))
    assert holdings.storages() == []


def test_views_keep_what_they_are_of() -> None:
    holdings = one()
    view = within(holdings, lambda: holdings.through(nn.Identity(), lambda: torch.ones(8, 8))).view(4, 16)[:2]
    assert numbers(holdings) == {number(view)}


def test_what_two_calls_see_is_nobodys_and_comes_back() -> None:
    owners: dict[int, Holdings | None] = {}
    recalled: list[int] = []
    first, second = (one(call, owners=owners, recall=recalled.append) for call in range(2))
    shared = within(first, lambda: first.through(nn.Identity(), lambda: torch.ones(8, 8)))
    assert numbers(first) == {number(shared)}
    within(second, lambda: second.through(nn.Identity(), lambda x: x, shared))
    assert recalled == [0]
    assert numbers(first) == numbers(second) == set()
    within(first, lambda: first.through(nn.Identity(), lambda x: x, shared))
    assert recalled == [0]
    assert numbers(first) == set()


def test_storages_that_are_gone_are_forgotten() -> None:
    owners: dict[int, Holdings | None] = {}
    holdings = one(owners=owners)
    for _ in range(100):
        within(holdings, partial(holdings.through, nn.Identity(), lambda: torch.ones(8, 8)))
        assert holdings.storages() == []
    assert not owners
