"""Several forwards of one module take turns at its units: each unit serves all of them before the next is fetched.

Every call runs in a greenlet of the caller's thread. Before the forward of a module that uses another unit than the
present one it hands the baton back, and goes on when that unit is served. Units of one thread only: OpenMP gives
every thread of the system a team of its own, and a change of teams costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from tierstore.binding.aside import Waits
from tierstore.binding.forwards import interpose, withdraw
from tierstore.binding.holdings import Holdings
from tierstore.binding.loans import Loans, Stay
from tierstore.binding.passes import Passes
from tierstore.binding.thread_state import ThreadState, stacked
from tierstore.binding.uninterrupted import Uninterrupted
from tierstore.errors import DeviceError

T = TypeVar("T")

PASS = ""
"""Stands for a unit where calls wait for each other before a forward of the whole module."""

_keeping: ContextVar[object] = ContextVar("tierstore_keeping", default=None)


@contextmanager
def uninterleaved() -> Iterator[None]:
    """Within, a forward that takes turns with others goes on alone: it changes what the others must not see changed."""
    token = _keeping.set(object())
    try:
        yield
    finally:
        _keeping.reset(token)


@dataclass(eq=False)
class _Call(Generic[T]):
    """A call: its greenlet, what torch kept for it when it last gave the baton back, and what it waits for.
    ``holdings`` is what it holds, known where that of some call ``moves`` while it waits."""

    greenlet: Any
    state: ThreadState
    number: int
    moves: bool
    holdings: Holdings | None
    waits: str = PASS
    ended: bool = False
    result: list[T] | None = None


class Baton:
    """Lets calls of forwards of ``root`` take turns.

    ``stations`` are the modules before which calls wait for each other, each with its unit, in the order in which units
    are used; units in ``settled``, which may become more, are not waited for. To ``passes`` all of it is one pass, and
    one more whenever all calls that have not ended begin another forward of ``root``.

    A unit serves the calls in their order. Of several units that calls wait for, as with experts, the first behind the
    present one is next. While a unit is served it stays in memory, unless something else needs the room. ``waits`` is
    told what waiting calls hold, and may move it elsewhere until they go on.
    """

    def __init__(
        self,
        root: nn.Module,
        stations: Mapping[nn.Module, str],
        settled: Set[str],
        loans: Loans,
        passes: Passes,
        device: torch.device,
        waits: Waits | None = None,
    ) -> None:
        self._root, self._loans, self._passes, self._device = root, loans, passes, device
        self._waits = waits
        self._stations, self._settled = stations, settled
        self._ranks = {unit: rank for rank, unit in enumerate(dict.fromkeys(stations.values()))}
        self._calls: list[_Call[Any]] = []
        self._call_of: dict[Any, _Call[Any]] = {}
        self._throughs: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._serves = PASS
        self._used = False  # whether a unit was, in the pass under way
        self._stay: Stay | None = None
        self._entered = self._ending = self._over = False
        self._own = self._present = ThreadState.of(device)
        self._stacked = stacked()
        self._keeping = _keeping.get()

    def run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """What each of ``calls`` gives. Once only.

        The first error that a call raises ends all others, by a ``GreenletExit`` where they wait, and is raised.
        Raises ``DeviceError`` without the package greenlet.
        """
        new, self._getcurrent, self._exit = _greenlets()
        whole = False
        try:
            with Uninterrupted():
                self._passes.enter()
                self._entered = True
            moves = self._waits.begin(len(calls)) if self._waits is not None else (False,) * len(calls)
            owners: dict[int, Holdings | None] | None = {} if any(moves) else None
            for number, call in enumerate(calls):
                made: _Call[T] = _Call(None, self._own, number, moves[number], self._holdings(number, owners))
                made.greenlet = new(partial(_answer, made, call))
                made.greenlet.gr_context = copy_context()
                self._calls.append(made)
                self._call_of[made.greenlet] = made
            self._stand_for(self._root, self._at_root, outermost=False)
            for module, unit in self._stations.items():
                self._stand_for(module, partial(self._at_unit, unit), outermost=True)
            for module in self._root.modules() if any(moves) else ():
                self._stand_for(module, partial(self._noted, module), outermost=True)
            while waiting := [each for each in self._calls if not each.ended]:
                self._serve(self._next(waiting), waiting)
            whole = True
            return [each.result[0] for each in self._calls if each.result is not None]
        finally:
            failed: BaseException | None = None
            while not self._over:  # in here, as a handler of signals may run wherever a function begins
                try:
                    with Uninterrupted():
                        self._end(whole)
                except BaseException as error:
                    failed = failed or error
            if failed is not None and (whole or not isinstance(failed, Exception)):  # else there is an error already
                try:
                    raise failed
                finally:
                    del failed

    def _holdings(self, call: int, owners: dict[int, Holdings | None] | None) -> Holdings | None:
        if self._waits is None or owners is None:
            return None
        return Holdings(call, self._device, self._waits.least_nbytes, owners, self._waits.back)

    # ---- who goes on

    def _next(self, waiting: Sequence[_Call[Any]]) -> str:
        units = {call.waits for call in waiting} - {PASS}
        here = self._ranks.get(self._serves, -1)
        return min(units, key=lambda unit: (self._ranks[unit] - here) % len(self._ranks), default=PASS)

    def _serve(self, unit: str, waiting: Sequence[_Call[Any]]) -> None:
        with Uninterrupted():
            self._leave_unit()
            if unit != PASS:
                self._stay = self._loans.stay(unit)
            elif self._used:
                self._begin_pass()
            self._serves = unit
        self._sweep([call for call in waiting if call.waits == unit])

    def _sweep(self, calls: Sequence[_Call[Any]], *error: type[BaseException]) -> None:
        """Let calls go on, one after the other; then the thread is as it was."""
        try:
            with torch.inference_mode(self._own.inference):  # at its end all but the types of autocast is as before
                self._own.resume()
                self._present = self._own
                for call, following in zip(calls, [*calls[1:], *calls[:1]], strict=True):
                    self._come(call, following)
                    self._resume(call, *error)
        finally:
            self._own.resume()

    def _come(self, *calls: _Call[Any]) -> None:
        """Let what these calls hold be brought back, one call ahead of compute."""
        for call in calls:
            if self._waits is not None and call.moves:
                with Uninterrupted():
                    self._waits.come(call.number)

    def _resume(self, call: _Call[Any], *error: type[BaseException]) -> None:
        """Let a call go on until it waits again, or ends, with the thread as it was when the call was left."""
        present = self._present
        if call.state.inference != present.inference:
            with torch.inference_mode(call.state.inference):
                call.state.resume()
                self._go_on(call, *error)
            present.resume()
        else:
            if call.state != present:
                call.state.resume()
            self._go_on(call, *error)
            self._present = call.state

    def _go_on(self, call: _Call[Any], *error: type[BaseException]) -> None:
        try:
            left = call.greenlet.throw(*error) if error else call.greenlet.switch()
            call.state = ThreadState.of(self._device)
        finally:
            call.ended = call.greenlet.dead
        if call.ended and call.result is None and not self._ending:
            try:
                raise left  # a ``GreenletExit`` of its own, which greenlets give back
            finally:
                del left

    def _begin_pass(self) -> None:
        self._used = False
        self._passes.next()

    def _leave_unit(self) -> None:
        stay, self._stay = self._stay, None
        if stay is not None:
            stay.end()

    def _end(self, whole: bool) -> None:
        """End what has not ended, last call first; then nothing of it is left. To be called again after an error."""
        self._ending = True
        for call in reversed(self._calls):
            if call.greenlet:  # has begun, and not ended
                with suppress(BaseException):  # there is an error already
                    self._sweep([call], self._exit)
        self._leave_unit()
        while self._throughs:
            withdraw(*self._throughs.pop())
        while self._calls:
            self._calls.pop().greenlet = None
        self._call_of.clear()
        if self._waits is not None:
            self._waits.end()
        if self._entered:
            self._entered = False
            self._passes.leave(whole)
        self._over = True

    # ---- within calls

    def _stand_for(self, module: nn.Module, through: Callable[..., Any], *, outermost: bool) -> None:
        with Uninterrupted():
            interpose(module, through, outermost=outermost)
            self._throughs.append((module, through))

    def _at_unit(self, unit: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if unit != self._serves and unit not in self._settled:
            self._wait(unit)
        self._used = True
        return forward(*args, **kwargs)

    def _at_root(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        waited = self._serves != PASS and self._wait(PASS)
        if self._used and not waited and self._alone():
            with Uninterrupted():
                self._begin_pass()
        return forward(*args, **kwargs)

    def _wait(self, unit: str) -> bool:
        """Give the baton back until ``unit`` is served; False at once where that cannot be."""
        greenlet = self._getcurrent()
        call = self._call_of.get(greenlet)
        if call is None or self._ending or _keeping.get() is not self._keeping or stacked() != self._stacked:
            return False
        call.waits = unit
        if call.holdings is None or self._waits is None:
            greenlet.parent.switch()
            return True
        try:
            with Uninterrupted():
                self._set_aside(call, call.holdings, self._waits)
            greenlet.parent.switch()
        finally:  # also where it ends, as whatever it does then may need what it holds
            with Uninterrupted():
                self._waits.back(call.number)
        return True

    def _set_aside(self, call: _Call[Any], holdings: Holdings, waits: Waits) -> None:
        storages = holdings.storages()  # of all calls, so that none keeps account of what is gone
        if call.moves and ThreadState.of(self._device).stream == self._own.stream:
            waits.leave(call.number, storages)

    def _noted(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._call_of.get(self._getcurrent())
        if call is None or call.holdings is None:
            return forward(*args, **kwargs)
        return call.holdings.through(module, forward, *args, **kwargs)

    def _alone(self) -> bool:
        """Whether it is a call that goes on, and all others that have not ended wait for a pass."""
        call = self._call_of.get(self._getcurrent())
        return call is not None and all(each.ended or each is call or each.waits == PASS for each in self._calls)


def _answer(made: _Call[T], call: Callable[[], T]) -> None:
    made.result = [call()]


def _greenlets() -> tuple[Any, Callable[[], Any], type[BaseException]]:
    try:
        from greenlet import GreenletExit, getcurrent, greenlet
    except ImportError as error:
        raise DeviceError(
            "several forwards at a time need the package greenlet, which is not installed: pip install 'tierstore[hf]'"
        ) from error
    return greenlet, getcurrent, GreenletExit
