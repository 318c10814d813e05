"""``offload``: any ``nn.Module`` that is in memory, within a budget, and back as it was found."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from tierstore.backends import Backend, backend_for
from tierstore.binding.binder import Binder, Held, metas_of
from tierstore.binding.grouping import Group
from tierstore.binding.inventory import Entry, Span, find_entries, find_spans
from tierstore.binding.loans import Loans
from tierstore.binding.relocation import Relocated
from tierstore.budget import Budget, Tier, format_nbytes
from tierstore.composing import TYPICAL_LINKS, align_of, cut_module, plan_units
from tierstore.contracts import Store
from tierstore.errors import BudgetError, ModuleError, PlanError
from tierstore.machine import check_budget, check_room, inspect_machine
from tierstore.plan import Plan, build_plan
from tierstore.report.tally import Tally
from tierstore.runtime import Runtime
from tierstore.session import Engaged, Session
from tierstore.stores.memory import MemoryStore
from tierstore.stores.zarr import SpillStore
from tierstore.tensors import Block, TensorSpec, Unit

BUFFER_SHARE = 8
"""Buffers stay in memory while all of them take at most this part (one eighth) of hbm."""


def offload(
    module: nn.Module,
    budget: Budget,
    *,
    store: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    backend: Backend | None = None,
) -> Session:
    """Keep ``module``'s parameters and buffers within ``budget`` while it runs, with the same numbers out.

    What does not fit in ``hbm`` and ``ram`` is written below the directory ``store`` and streamed from
    there. ``device`` computes (default: the current CUDA device, else the CPU). ``backend`` replaces
    what is made for the device, for tests. The module itself is changed, and restored by ``close()``.

    Raises ``PlanError`` with the smallest budget that would do, ``BudgetError``, ``ModuleError`` for
    tensors without values, and ``StoreError`` for a store that cannot be used; the module is then
    untouched.
    """
    if not isinstance(module, nn.Module):
        raise ModuleError(f"offload takes a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(budget, Budget):
        raise BudgetError(f"offload takes a Budget, got {type(budget).__name__}: write Budget(hbm='4GiB', ...)")
    chosen = backend or backend_for(device)
    check_budget(budget, inspect_machine(), chosen.device)
    return _Offloading(module, budget, None if store is None else Path(store), chosen).session()


@dataclass(frozen=True)
class _Prepared:
    """What is decided before the module is first changed: ``fixed_nbytes`` stay in memory beside the plan's units."""

    plan: Plan
    units: tuple[Unit, ...]
    groups: tuple[Group, ...]
    held: tuple[Held, ...]
    staying: tuple[Entry, ...]
    fixed_nbytes: int
    notes: tuple[str, ...]


class _Offloading:
    """The steps of ``offload``; the module is first changed by ``_engage``, when all else has succeeded."""

    def __init__(self, module: nn.Module, budget: Budget, root: Path | None, backend: Backend) -> None:
        self._module = module
        self._budget = budget
        self._root = root
        self._backend = backend
        self._unified = backend.engine.unified
        self._tally = Tally()
        self._entries = find_entries(module)
        self._spans = find_spans(self._entries, in_place=self._unified)

    def session(self) -> Session:
        staying = [entry for entry in self._entries if entry.stays]
        notes = [f"{e.name} stays in memory: {e.stays}" for e in staying if e.tensor.numel()]
        moving = self._choose_moving()
        chosen = {id(span) for span in moving}
        fixed = sum(map(_nbytes, staying)) + sum(s.nbytes for s in self._spans if id(s) not in chosen)
        total = fixed + sum(span.nbytes for span in moving)
        if self._unified and total <= self._budget.hbm + self._budget.ram:
            return self._untouched(total, notes)
        held = self._views(moving)
        nbytes = {span.name: span.nbytes for span in moving}
        cut = cut_module(self._module, held, nbytes, max(self._budget.hbm - fixed, 0))
        spans = {span.name: span for span in moving}
        units = [Unit(g.name, tuple(_planned_block(spans[b]) for b in g.blocks)) for g in cut.groups]
        plan = plan_units(
            units,
            cut,
            self._budget.hbm,
            self._budget.ram,
            fixed_nbytes=fixed,
            unified=self._unified,
            look_up=self._root is not None,
        )
        self._check_room(plan)
        with ExitStack() as undo:
            placed, stores, spill = self._store(units, spans, plan, undo)
            runtime = Runtime(placed, stores, plan, self._backend, self._tally, ram=self._budget.ram)
            undo.callback(runtime.close)
            kept = {block.name for unit in placed for block in unit.blocks}
            bound = [item for item in held if item.block in kept]
            resting = [e for span in self._spans if id(span) not in chosen for e in span.entries]
            prepared = _Prepared(
                plan, tuple(units), cut.groups, tuple(bound), (*staying, *resting), fixed, tuple(notes)
            )
            session = self._engage(runtime, prepared, spill)
            undo.pop_all()
        return session

    def _check_room(self, plan: Plan) -> None:
        """What compute reads in place is in memory already; the rest is taken before the module's own is freed."""
        if self._unified:
            check_room(plan.ring_nbytes, 0, inspect_machine(), self._backend.device)
        else:
            hbm = plan.resident_nbytes[Tier.HBM] + plan.ring_nbytes
            ram = plan.resident_nbytes[Tier.RAM] + plan.staging_nbytes
            check_room(hbm, ram, inspect_machine(), self._backend.device)

    def _choose_moving(self) -> list[Span]:
        """All spans, but not those of buffers only, while these are small: they may be written at any time."""
        buffers = [s for s in self._spans if not any(isinstance(e.tensor, nn.Parameter) for e in s.entries)]
        room = self._budget.hbm // BUFFER_SHARE
        small: set[int] = set()
        for span in sorted(buffers, key=lambda s: s.nbytes):
            room -= span.nbytes
            if room < 0:
                break
            small.add(id(span))
        return [span for span in self._spans if id(span) not in small]

    def _views(self, moving: Sequence[Span]) -> list[Held]:
        storages = metas_of({span.name: span.nbytes for span in moving})
        return [
            Held(entry, span.name, span.meta(entry, storages[span.name]), entry.tensor.device)
            for span in moving
            for entry in span.entries
        ]

    def _store(
        self, units: Sequence[Unit], spans: dict[str, Span], plan: Plan, undo: ExitStack
    ) -> tuple[list[Unit], dict[str, Store], SpillStore | None]:
        """Where each unit that must move rests. With unified memory, what stays is not touched at all."""
        spilled = [u for u in units if plan.tier[u.name] is Tier.NVME]
        in_memory = [] if self._unified else [u for u in units if plan.tier[u.name] is not Tier.NVME]
        spill: SpillStore | None = None
        stores: dict[str, Store] = {}
        placed: list[Unit] = []
        if spilled:
            spill = self._spill(spilled, spans)
            undo.callback(spill.remove)
            undo.callback(spill.close)
        memory: MemoryStore | None = None
        if in_memory:
            memory = MemoryStore({b.name: _host_bytes(spans[b.name]) for u in in_memory for b in u.blocks})
            undo.callback(memory.close)
        for unit in units:
            store = spill if unit in spilled else memory
            if store is not None and (unit in spilled or unit in in_memory):
                blocks = tuple(Block(b.name, b.nbytes, b.align, store.pieces(b.name)) for b in unit.blocks)
                placed.append(Unit(unit.name, blocks))
                stores[unit.name] = store
        return placed, stores, spill

    def _spill(self, units: Sequence[Unit], spans: dict[str, Span]) -> SpillStore:
        need = sum(unit.nbytes for unit in units)
        if self._root is None:
            have = f"hbm {format_nbytes(self._budget.hbm)} and ram {format_nbytes(self._budget.ram)}"
            raise PlanError(
                f"{format_nbytes(need)} of the module's weights fit neither in {have}: raise Budget.ram by that much, "
                f"or pass store= with a directory that they may be streamed from",
                needed=self._budget.hbm + need,
            )
        tensors = (
            (TensorSpec(b.name, "uint8", (b.nbytes,)), partial(_host_bytes, spans[b.name]))  # one at a time in RAM
            for unit in units
            for b in unit.blocks
        )
        return SpillStore.create(
            self._root, tensors, fingerprint=_fingerprint(self._entries), limit_nbytes=self._budget.nvme
        )

    def _engage(self, runtime: Runtime, prepared: _Prepared, spill: SpillStore | None) -> Session:
        plan, held = prepared.plan, prepared.held
        loans = Loans(runtime.prefetcher, runtime.units, runtime.feed.offsets, runtime.keep, runtime)
        binder = Binder(held, [g for g in prepared.groups if g.name in runtime.units], loans, self._backend.device)
        moved = Relocated([e.tensor for e in prepared.staying], self._backend.device)
        if not self._unified:
            runtime.fill()
        binder.bind()
        engaged = Engaged(self._module, runtime, binder, self._tally, prepared.units)
        if not self._unified:
            engaged.settle()
        runtime.prefetcher.start()
        in_place = plan.resident_nbytes if self._unified else {}

        def finish() -> None:
            try:
                binder.unbind(_restorer(runtime))
            finally:
                moved.undo()
                loans.close()
                runtime.close()
                if spill is not None:
                    spill.remove()

        return Session(
            self._module,
            plan,
            tally=self._tally,
            engaged=engaged,
            fixed_nbytes={"hbm": prepared.fixed_nbytes + in_place.get(Tier.HBM, 0), "ram": in_place.get(Tier.RAM, 0)},
            written_nbytes=lambda: spill.peak_nbytes if spill is not None else 0,
            finish=finish,
            notes=prepared.notes,
        )

    def _untouched(self, total: int, notes: list[str]) -> Session:
        """Everything fits where compute reads it: the module is left alone and runs at its own speed."""
        units = [Unit(span.name, (_planned_block(span),)) for span in self._spans]
        hbm = min(total, self._budget.hbm)
        plan = build_plan(units, (), self._budget, links=TYPICAL_LINKS, unified=True)
        return Session(
            self._module,
            plan,
            tally=self._tally,
            engaged=None,
            fixed_nbytes={"hbm": hbm, "ram": total - hbm},
            written_nbytes=lambda: 0,
            finish=lambda: None,
            notes=notes,
        )


def _restorer(runtime: Runtime) -> Callable[[Held], Tensor]:
    """Gives each tensor its memory back; tensors that shared a block share it again."""
    blocks: dict[str, Tensor] = {}

    def restore(item: Held) -> Tensor:
        memory = blocks.get(item.block)
        if memory is None:
            memory = blocks[item.block] = runtime.read_block(item.block)
        if memory.device != item.device:
            memory = blocks[item.block] = memory.to(item.device)
        empty = torch.empty(0, dtype=item.meta.dtype, device=item.device)
        return empty.set_(memory.untyped_storage(), item.meta.storage_offset(), item.meta.size(), item.meta.stride())

    return restore


def _host_bytes(span: Span) -> Tensor:
    return span.read().cpu()


def _planned_block(span: Span) -> Block:
    return Block(span.name, span.nbytes, align_of([entry.tensor for entry in span.entries]), ())


def _nbytes(entry: Entry) -> int:
    try:
        return entry.tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return entry.tensor.numel() * entry.tensor.element_size()


def _fingerprint(entries: Sequence[Entry]) -> str:
    """Which model this is: names, dtypes and shapes."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(f"{entry.name} {entry.tensor.dtype} {tuple(entry.tensor.shape)}\n".encode())
    return digest.hexdigest()
