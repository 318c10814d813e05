"""Who holds a unit gives way to who needs the room, when nobody computes with it at the moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tierstore.binding.loans import Loans
from tierstore.binding.turns import Turn
from tierstore.errors import CapacityError
from tierstore.extents import Extent
from tierstore.tensors import Block, Unit


@dataclass
class Memory:
    extent: Extent
    buffer: torch.Tensor


class RoomForOne:
    """Stands for a prefetcher that has room for one unit."""

    def __init__(self) -> None:
        self.users = Counter[str]()
        self._memory = Memory(Extent(0, 64), torch.zeros(64, dtype=torch.uint8))

    def acquire(self, names: Sequence[str]) -> list[Memory]:
        if set(names) | set(+self.users) > set(names):
            raise CapacityError(f"{list(+self.users)} are in use")
        self.users.update(names)
        return [self._memory for _ in names]

    def release(self, names: Sequence[str]) -> None:
        self.users.subtract(names)
        assert min(self.users.values()) >= 0


@pytest.fixture
def room() -> RoomForOne:
    return RoomForOne()


@pytest.fixture
def loans(room: RoomForOne) -> Loans:
    units = {name: Unit(name, (Block(name, 64, 64, ()),)) for name in "ab"}
    stand_in: Any = room
    nothing: Any = None
    return Loans(stand_in, units, lambda unit: {unit.name: 0}, nothing, nothing)


@pytest.mark.parametrize("inside", [1, 2, 4])
def test_forwards_that_wait_inside_of_a_turn_give_way(room: RoomForOne, loans: Loans, inside: int) -> None:
    outer, inner = Turn("a", [], loans), Turn("b", [], loans)
    loans.step_aside = outer.step_aside
    for _ in range(inside):
        outer.enter()
    assert room.users == {"a": inside}
    for _ in range(inside):
        inner.enter()
        assert +room.users == {"b": 1}
        inner.leave(True)
    for _ in range(inside):
        outer.leave(True)
    assert not +room.users
    outer.enter()
    assert +room.users == {"a": 1}
    outer.leave(True)
    assert not +room.users


def test_what_stays_between_uses_gives_way(room: RoomForOne, loans: Loans) -> None:
    turn, other = Turn("a", [], loans), Turn("b", [], loans)
    stay = loans.stay("a")
    assert stay is not None
    for _ in range(2):
        turn.enter()
        turn.leave(True)
        assert +room.users == {"a": 1}
    other.enter()
    assert +room.users == {"b": 1}
    assert loans.stay("a") is None
    stay.end()
    assert +room.users == {"b": 1}
    other.leave(True)
    again = loans.stay("a")
    assert again is not None
    again.end()
    again.end()
    assert not +room.users
