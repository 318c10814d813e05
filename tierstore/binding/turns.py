"""A unit's turn: while the modules it serves run, its weights stand in them as plain tensors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import RLock, get_ident
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.binding.bound import bind, can_bind, take_gradient, was_written
from tierstore.binding.forwards import unwatch, watch
from tierstore.binding.inventory import Location
from tierstore.binding.loans import Loans
from tierstore.binding.slot import Slot, storage_users
from tierstore.binding.views import View
from tierstore.errors import CapacityError

_SLOTS_KEPT = 32


@dataclass(frozen=True)
class Seat:
    """A ghost, its view of the unit, and the places in modules that hold it."""

    ghost: Tensor
    view: View
    locations: tuple[Location, ...]


@dataclass
class _Bound:
    """The bound tensors over one slot, made once; ``users`` and ``references`` are those of its own."""

    slot: Slot
    tensors: list[Tensor]
    versions: list[int]
    users: int = 0
    references: int = 0

    def escaped(self, *, seated: int = 0) -> bool:
        """Whether somebody else holds a bound tensor, or a view of the slot; ``seated`` places in modules may."""
        return self.slot.users() > self.users or self._references() > self.references + seated

    def settle(self) -> None:
        """Take the present owners as the ones that are expected."""
        self.users, self.references = self.slot.users(), self._references()

    def _references(self) -> int:
        return sum(map(sys.getrefcount, self.tensors))


class Turn:
    """Takes a unit while any of its modules runs.

    The first turn, and every turn with gradients, leaves the ghosts in place: it finds out whether
    views of the weights outlive the turn. If none do, later turns put plain tensors over the slot in
    the ghosts' places. A view that escapes then (a branch not taken before) keeps its slot until it
    dies, and the unit stays with ghosts from then on.
    """

    def __init__(self, unit: str, seats: Sequence[Seat], loans: Loans) -> None:
        self.unit = unit
        self._seats = [seat for seat in seats if can_bind(seat.ghost)]
        self._places = sum(len(seat.locations) for seat in self._seats)
        self._loans = loans
        self._depth = 0
        self._threads: list[int] = []  # inside now
        self._nested = 0  # uses inside the first one
        self._pinned = False
        self._placed: _Bound | None = None
        self._plain = False
        self._escapes = False
        self._bound: dict[int, _Bound] = {}
        self._detained: list[_Bound] = []
        self._storages = list({s._cdata: s for s in (seat.view.meta.untyped_storage() for seat in seats)}.values())
        self._quiet_users = [storage_users(s) for s in self._storages]
        self._modules: list[nn.Module] = []
        self._lock = RLock()

    def watch(self, modules: Sequence[nn.Module]) -> None:
        """Let the forward of ``modules`` be the turn."""
        for module in modules:
            watch(module, self)
            self._modules.append(module)

    @property
    def modules(self) -> Sequence[nn.Module]:
        """Those whose forward is the turn."""
        return tuple(self._modules)

    def unwatch(self) -> None:
        """See no more forwards, and end a turn that is under way."""
        while self._modules:
            unwatch(self._modules.pop(), self)
        with self._lock:
            while self._depth:
                self.leave(whole=False)

    def enter(self) -> None:
        with self._lock:
            self._threads.append(get_ident())
            if self._depth:
                self._depth += 1
                if self._pinned:
                    self._loans.detain(self.unit)  # each use ends where its own thread's compute does
                    self._nested += 1
                if self._placed is not None and torch.is_grad_enabled():
                    self._take_back()  # a graph would keep the slot
                return
            self._free_detained()
            try:
                slot = self._loans.acquire([self.unit], self._threads)[0]
            except CapacityError:  # beside what is in use: each operation finds room for itself, or says what it lacks
                self._depth = 1
                return
            self._pinned = True
            self._depth = 1
            if self._plain and self._seats and not torch.is_grad_enabled() and not self._autocasts():
                self._place(slot)

    def leave(self, whole: bool) -> None:
        with self._lock:
            if not self._depth:
                return
            self._depth -= 1
            with suppress(ValueError):
                self._threads.remove(get_ident())
            if self._depth:
                if self._nested:
                    self._nested -= 1
                    self._loans.let_go(self.unit)
                return
            try:
                if self._placed is not None:
                    self._take_back()
                elif not torch.is_grad_enabled() and not self._escapes:
                    self._escapes = self._ghost_views_live()
                    self._plain = not self._escapes
            finally:
                self._unpin()

    def step_aside(self) -> bool:
        """Give up the memory for an operation that needs it, if nobody sees it right now; whether it did."""
        if not self._lock.acquire(blocking=False):  # another thread is at it: waiting for each other would be for ever
            return False
        try:
            self._free_detained()
            if not self._pinned or (self._nested and set(self._threads) != {get_ident()}):
                return False
            if self._placed is not None:
                if self._placed.escaped(seated=self._places):
                    return False
                self._take_back()
            for _ in range(self._nested):
                self._loans.let_go(self.unit)
            self._nested = 0
            self._unpin()
            return True
        finally:
            self._lock.release()

    def _autocasts(self) -> bool:
        """Whether torch would keep the tensors that it casts in a cache of its own, which outlives the turn."""
        return any(torch.is_autocast_enabled(kind) for kind in {seat.view.device.type for seat in self._seats})

    def _unpin(self) -> None:
        if self._pinned:
            self._pinned = False
            self._loans.release([self.unit], self._threads)

    def _place(self, slot: Slot) -> None:
        bound = self._bound.get(slot.key)
        if bound is None:
            if len(self._bound) >= _SLOTS_KEPT:
                self._bound.clear()
            bound = self._bound[slot.key] = self._make(slot)
        for seat, tensor in zip(self._seats, bound.tensors, strict=True):
            if tensor.requires_grad != seat.ghost.requires_grad:
                tensor.requires_grad_(seat.ghost.requires_grad)
            for location in seat.locations:
                container: Any = location.container
                if _at(container, location.key) is seat.ghost:
                    container[location.key] = tensor
        self._placed = bound

    def _make(self, slot: Slot) -> _Bound:
        with torch.inference_mode(False), torch.no_grad():
            tensors = [bind(slot.tensor(seat.view.block, seat.view.meta), seat.ghost) for seat in self._seats]
        bound = _Bound(slot, tensors, [tensor._version for tensor in tensors])
        del tensors
        bound.settle()
        return bound

    def _take_back(self) -> None:
        bound, self._placed = self._placed, None
        assert bound is not None
        written: dict[str, None] = {}
        for index, (seat, tensor) in enumerate(zip(self._seats, bound.tensors, strict=True)):
            for location in seat.locations:
                container: Any = location.container
                if _at(container, location.key) is tensor:
                    container[location.key] = seat.ghost
            if tensor.requires_grad != seat.ghost.requires_grad:
                seat.ghost.requires_grad_(tensor.requires_grad)
            if tensor.grad is not None:
                take_gradient(tensor, seat.ghost)
            if was_written(tensor, bound.versions[index]):
                bound.versions[index] = tensor._version
                written[seat.view.block] = None
        del tensor
        if bound.escaped():
            # someone kept a view of the slot: its memory stays theirs until they drop it
            self._loans.detain(self.unit)
            self._detained.append(bound)
            self._plain, self._escapes = False, True
        for block in written:
            self._loans.keep(block, bound.slot)

    def _free_detained(self) -> None:
        for bound in [b for b in self._detained if not b.escaped()]:
            self._detained.remove(bound)
            self._loans.let_go(self.unit)

    def _ghost_views_live(self) -> bool:
        return any(storage_users(s) > n for s, n in zip(self._storages, self._quiet_users, strict=True))


def _at(container: Any, key: Any) -> Any:
    try:
        return container[key]
    except LookupError:
        return None
