"""The one place that owns a module's offloading: it composes, reports and closes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

from torch import nn

from tierstore.backends import Backend
from tierstore.binding.aside import Aside, Waits
from tierstore.binding.baton import Baton
from tierstore.binding.binder import Binder
from tierstore.binding.passes import Passes
from tierstore.binding.uninterrupted import Uninterrupted
from tierstore.budget import Budget, Tier
from tierstore.composing import TYPICAL_LINKS
from tierstore.errors import BudgetError, SessionClosedError
from tierstore.generation import Generation, make_generation
from tierstore.machine import check_room, inspect_machine
from tierstore.plan import Links, Plan, remeasure
from tierstore.report.report import Report
from tierstore.report.tally import Tally
from tierstore.report.waiting import WaitingReport
from tierstore.runtime import Runtime
from tierstore.tensors import Unit
from tierstore.waiting_plan import WaitingPlan

if TYPE_CHECKING:
    from tierstore.hf.kv.cache import PagedCache

T = TypeVar("T")


class Engaged:
    """What is at work while a session has weights to move: machinery, ghosts and pass watching."""

    def __init__(
        self, module: nn.Module, runtime: Runtime, binder: Binder, tally: Tally, units: Sequence[Unit]
    ) -> None:
        self.runtime = runtime
        self.binder = binder
        self.passes = 0
        self._module = module
        self._tally = tally
        self._planned = tuple(units)  # also what stays in place and never moves
        self._pass_began = 0.0
        self._stalled_before = 0.0
        self._compute_seconds: float | None = None
        self._unsettled = set(runtime.residents)
        self._watch = Passes(module, self._begin_pass, self._end_pass)

    def settle(self) -> None:
        """Give every resident that has arrived its memory for good."""
        arrived = {name for name in self._unsettled if self.runtime.prefetcher.holds(name)}
        if arrived:
            self.binder.settle(arrived, self.runtime.slot)
            self._unsettled -= arrived
        if not self._unsettled:
            self.runtime.prefetcher.settle()

    def measured_plan(self) -> Plan:
        """The plan with the rates and the compute time seen so far; as it was made, before a second pass is over."""
        plan = self.runtime.plan
        if self._compute_seconds is None:
            return plan
        ordered = set(plan.order)
        units = [u for u in self._planned if u.name in ordered or plan.tier[u.name] is not Tier.NVME]
        rate = self._compute_seconds / max(sum(unit.nbytes for unit in units), 1)
        links = _measured_links(self._tally)
        moving = replace(plan, tier={unit.name: plan.tier[unit.name] for unit in units})
        compute = {unit.name: unit.nbytes * rate for unit in units}
        measured = remeasure(moving, units, links=links, compute_seconds=compute)
        return replace(measured, tier=plan.tier)

    def together(self, calls: Sequence[Callable[[], T]], waits: Waits | None) -> list[T]:
        """What ``calls`` give, which take turns at the units that stream."""
        stations = self.binder.stations(self._module) if len(calls) > 1 else {}
        if not stations:
            return [call() for call in calls]
        device = self.runtime.backend.device
        loans, settled = self.binder.loans, self.binder.settled
        return Baton(self._module, stations, settled, loans, self._watch, device, waits).run(calls)

    def stop(self) -> None:
        """Stop watching passes. Idempotent."""
        self._watch.close()

    def _begin_pass(self) -> None:
        self._pass_began = time.perf_counter()
        self._stalled_before = self._tally.stalled_seconds

    def _end_pass(self, whole: bool) -> None:
        if not whole:
            self.runtime.prefetcher.drop_pass()
            return
        if self.passes:  # the first pass learns, and brings residents
            waited = self._tally.stalled_seconds - self._stalled_before
            self._compute_seconds = max(time.perf_counter() - self._pass_began - waited, 1e-9)
        self.passes += 1
        self.runtime.prefetcher.end_pass()
        if self._unsettled:
            self.settle()


class Session:
    """An offloaded module. A context manager; ``close()`` does the same, once.

    ``module`` is the module to run, ``plan`` where its weights are and what bounds its speed (with the
    rates measured while running, once there are any).
    ``kv`` is its KV cache where the budget has bytes for one.
    ``checkpoint_path`` is the directory a loaded model came from, None for a module given in memory.
    """

    def __init__(
        self,
        module: nn.Module,
        plan: Plan,
        *,
        tally: Tally,
        engaged: Engaged | None,
        fixed_nbytes: Mapping[str, int],
        written_nbytes: Callable[[], int],
        finish: Callable[[], None],
        notes: Sequence[str] = (),
        checkpoint_path: Path | None = None,
    ) -> None:
        self.module = module
        self._generation: Generation | None = None
        self._aside: Aside | None = None
        self._plan = plan
        self.checkpoint_path = checkpoint_path
        self._tally = tally
        self._engaged = engaged
        self._fixed_nbytes = fixed_nbytes
        self._written_nbytes = written_nbytes
        self._finish: Callable[[], None] | None = finish
        self._notes = tuple(notes)
        self._started = time.perf_counter()
        self._ended: float | None = None
        self._last_peaks: dict[str, int] = {}

    def equip(
        self,
        budget: Budget,
        *,
        kv_format: str | None,
        hidden_states: str | None,
        backend: Backend,
        folder: Path | None,
    ) -> Self:
        """Add what ``budget`` has for generation: a KV cache, and a bound on activations. Pages go below ``folder``.

        Where that cannot be, the session is closed and the error raised."""
        try:
            self._generation = make_generation(
                self.module,
                budget,
                kv_format=kv_format,
                hidden_states=hidden_states,
                backend=backend,
                recorder=self._tally,
                folder=folder,
            )
        except BaseException:
            self.close()
            raise
        return self

    @property
    def plan(self) -> Plan:
        """Where the weights are and what bounds the speed."""
        return self._engaged.measured_plan() if self._engaged is not None else self._plan

    @property
    def links(self) -> Links:
        """What each link has carried a second, as measured so far; typical rates where nothing has moved yet."""
        return _measured_links(self._tally)

    @property
    def kv(self) -> PagedCache:
        """The KV cache that the module generates with: a transformers ``Cache`` over pages.

        Raises ``BudgetError`` where the budget gave it no bytes."""
        if self._generation is None or self._generation.kv is None:
            raise BudgetError("this session has no KV cache of its own: give it bytes with Budget(..., kv_hbm='4GiB')")
        return self._generation.kv

    def report(self) -> Report:
        """What happened so far; also after ``close()``. Cheap enough to poll."""
        return self._tally.report(
            peak_bytes=self._peaks(),
            resident_share=self._plan.share,
            passes=self._engaged.passes if self._engaged else 0,
            seconds=(self._ended or time.perf_counter()) - self._started,
            notes=self._notes if self._generation is None else (*self._notes, *self._generation.notes),
            kv=None if self._generation is None else self._generation.report(),
            waiting=None if self._aside is None else _waiting_report(self._aside),
        )

    def progress(self) -> tuple[int, int]:
        """Units passed in the pass under way, and units in a pass; (0, 0) when nothing has to move."""
        if self._engaged is None:
            return 0, 0
        return self._engaged.runtime.prefetcher.progress

    def together(self, calls: Sequence[Callable[[], T]], *, waits: Waits | None = None) -> list[T]:
        """What each of ``calls`` gives, in their order; each is a forward of ``module``, or several.

        They take turns in this thread: every unit of weights that is fetched serves all calls before the next one is,
        so that a pass over the weights is moved once, however many calls there are. Where nothing has to move they run
        one after the other. Grad mode, inference mode, autocast and context variables are each call's own, as they
        are here when it begins; random numbers are drawn from torch's one generator, by whoever is at it. Calls that
        use caches of ``kv``, or a bound on activations with waiting hidden states, go through the module one by one.

        ``waits``, such as an ``Aside``, may move elsewhere what a call has in its forward while it waits: for calls
        that share no tensors but those of the module. One thread at a time uses it.

        The first error that a call raises ends all others, where they wait, and is raised. Raises
        ``SessionClosedError``, and ``DeviceError`` where the package greenlet is missing.
        """
        if self._finish is None:
            raise SessionClosedError("the session is closed: call the module itself, or open another session")
        return [call() for call in calls] if self._engaged is None else self._engaged.together(calls, waits)

    def set_aside(self, plan: WaitingPlan) -> Aside:
        """Host memory for what calls of ``together`` hold while they wait, as ``plan`` says, until the session is
        closed. Once only.

        Raises ``BudgetError`` where the machine has less, ``CapacityError`` where the system refuses it,
        ``SessionClosedError``, and ``ValueError`` where no weight has to move, so that no call waits."""
        if self._finish is None:
            raise SessionClosedError("the session is closed: open another one")
        if self._engaged is None or self._aside is not None:
            raise ValueError("no call waits in this session" if self._engaged is None else "there is one already")
        backend = self._engaged.runtime.backend
        check_room(0, plan.host_nbytes, inspect_machine(), backend.device)
        self._aside = Aside(backend, plan)
        return self._aside

    def close(self) -> None:
        """End every transfer and thread and leave the module as it was found. Idempotent.

        Weights that ``offload`` packed are plain again: with the values they had, or without ``store=`` with those that
        their format kept. A module from ``load`` keeps its shapes; using its weights raises ``SessionClosedError``.
        """
        with Uninterrupted():
            self._close()

    def _close(self) -> None:
        if self._finish is None:
            return
        self._last_peaks = self._peaks()
        finish, self._finish = self._finish, None
        self._ended = time.perf_counter()
        if self._engaged is not None:
            self._engaged.stop()
        try:
            with ExitStack() as closing:
                if self._generation is not None:
                    closing.callback(self._generation.close)
                if self._aside is not None:
                    closing.callback(self._aside.close)
        finally:
            finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _peaks(self) -> dict[str, int]:
        if self._finish is None:
            return self._last_peaks
        moving = self._engaged.runtime.peak_bytes if self._engaged else {"hbm": 0, "ram": 0}
        peaks = {tier: self._fixed_nbytes[tier] + moving[tier] for tier in ("hbm", "ram")}
        return {**peaks, "nvme": self._written_nbytes()}


def _measured_links(tally: Tally) -> Links:
    rates = tally.rates()
    return Links(
        nvme_bytes_per_second=rates.get("nvme", TYPICAL_LINKS.nvme_bytes_per_second),
        ram_bytes_per_second=rates.get("ram", TYPICAL_LINKS.ram_bytes_per_second),
    )


def _waiting_report(aside: Aside) -> WaitingReport:
    return WaitingReport(aside.plan.host_nbytes, aside.peak_host_nbytes, aside.moved_nbytes)
