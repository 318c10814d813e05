"""``offload``: any ``nn.Module`` that is in memory, within a budget, and back as it was found."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn

from tierstore.backends import Backend, backend_for
from tierstore.binding.binder import Binder, Held, metas_of
from tierstore.binding.grouping import Group
from tierstore.binding.inventory import Entry, Span, find_entries, find_spans
from tierstore.binding.loans import Loans
from tierstore.binding.packing import PackedWeights
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
from tierstore.spilling import host_bytes, read_whole, write_spill
from tierstore.stores.memory import MemoryStore
from tierstore.stores.zarr import SpillStore
from tierstore.tensors import Block, Unit

BUFFER_SHARE = 8
"""Buffers stay in memory while all of them take at most this part (one eighth) of hbm."""


def offload(
    module: nn.Module,
    budget: Budget,
    *,
    format: str | None = None,
    formats: Mapping[str, str] | None = None,
    kv_format: str | None = None,
    hidden_states: str | None = None,
    store: str | os.PathLike[str] | None = None,
    device: torch.device | str | None = None,
    backend: Backend | None = None,
) -> Session:
    """Keep ``module``'s parameters and buffers within ``budget`` while it runs, with the same numbers out.

    What does not fit in ``hbm`` and ``ram`` is written below the directory ``store`` and streamed from
    there. ``device`` computes (default: the current CUDA device, else the CPU). ``backend`` replaces
    what is made for the device, for tests. The module itself is changed, and restored by ``close()``.

    With ``format`` ("int8", "int4", "fp8", ...) its weights are packed first, in memory, and everything is
    about the packed bytes; the numbers are then those of a module with the values that the format kept.
    ``formats`` chooses by name: patterns, such as ``{"lm_head*": "bf16", "*experts*": "int4"}``, come before
    ``format``, and "keep" leaves a tensor as it is. Each may be given alone. Packed weights cannot be written
    to or trained. ``close()`` brings their former values back if ``store`` is given, which then has them until
    that; else it leaves the same parameters with the kept values, of which ``report()`` has a note. Packing
    needs memory for both.

    A transformers decoder generates with a KV cache in pages where ``budget`` has ``kv_hbm`` for one; ``kv_format`` and
    ``hidden_states`` are as in ``load``, and pages on disk need ``store``.

    Raises ``PlanError`` with the smallest budget that would do, ``BudgetError``, ``ModuleError`` for
    tensors without values and formats that cannot be, and ``StoreError`` for a store that cannot be used;
    the module is then untouched.
    """
    if not isinstance(module, nn.Module):
        raise ModuleError(f"offload takes a torch.nn.Module, got {type(module).__name__}")
    if not isinstance(budget, Budget):
        raise BudgetError(f"offload takes a Budget, got {type(budget).__name__}: write Budget(hbm='4GiB', ...)")
    if formats is not None and not isinstance(formats, Mapping):
        raise ModuleError(f"formats takes a mapping, got {type(formats).__name__}: write formats={{'head*': 'bf16'}}")
    chosen = backend or backend_for(device)
    check_budget(budget, inspect_machine(), chosen.device)
    root = None if store is None else Path(store)
    if format is None and formats is None:
        session = _Offloading(module, budget, root, chosen).session()
        return session.equip(budget, kv_format=kv_format, hidden_states=hidden_states, backend=chosen, folder=root)
    packed = PackedWeights(module, format, formats or {}, chosen.device, kept=root is not None)
    with ExitStack() as undo:
        undo.callback(packed.take_out, None)
        packed.put_in()
        session = _Offloading(module, budget, root, chosen, packed).session()
        undo.pop_all()
    packed.forget()
    return session.equip(budget, kv_format=kv_format, hidden_states=hidden_states, backend=chosen, folder=root)


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

    def __init__(
        self,
        module: nn.Module,
        budget: Budget,
        root: Path | None,
        backend: Backend,
        packed: PackedWeights | None = None,
    ) -> None:
        self._module = module
        self._budget = budget
        self._root = root
        self._backend = backend
        self._packed = packed
        self._unified = backend.engine.unified
        self._tally = Tally()
        self._entries = find_entries(module)
        self._spans = find_spans(self._entries, in_place=self._unified)

    def session(self) -> Session:
        staying = [entry for entry in self._entries if entry.stays]
        notes = [] if self._packed is None else self._packed.notes()
        notes += [f"{e.name} stays in memory: {e.stays}" for e in staying if e.tensor.numel()]
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
            hbm, ram = plan.ring_nbytes, 0
        else:
            hbm = plan.resident_nbytes[Tier.HBM] + plan.ring_nbytes
            ram = plan.resident_nbytes[Tier.RAM] + plan.staging_nbytes
        kv = self._budget
        check_room(hbm + kv.kv_hbm, ram + kv.kv_ram, inspect_machine(), self._backend.device)

    def _choose_moving(self) -> list[Span]:
        """All spans, but not those of buffers only, while these are small: they may be written at any time."""
        buffers = [s for s in self._spans if not any(_is_weight(entry) for entry in s.entries)]
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
        spill = self._spill(spilled, spans, undo)
        stores: dict[str, Store] = {}
        placed: list[Unit] = []
        memory: MemoryStore | None = None
        if in_memory:
            memory = MemoryStore({b.name: host_bytes(spans[b.name]) for u in in_memory for b in u.blocks})
            undo.callback(memory.close)
        for unit in units:
            store = spill if unit in spilled else memory
            if store is not None and (unit in spilled or unit in in_memory):
                blocks = tuple(Block(b.name, b.nbytes, b.align, store.pieces(b.name)) for b in unit.blocks)
                placed.append(Unit(unit.name, blocks))
                stores[unit.name] = store
        return placed, stores, spill

    def _spill(self, units: Sequence[Unit], spans: Mapping[str, Span], undo: ExitStack) -> SpillStore | None:
        """On disk: the units that stream from there, and what was packed; None for nothing."""
        if self._root is None:
            if units:
                self._refuse_spilling(sum(unit.nbytes for unit in units))
            return None
        blocks = [spans[block.name] for unit in units for block in unit.blocks]
        originals = [] if self._packed is None else list(self._packed.originals())
        if not blocks and not originals:
            return None
        spill = write_spill(self._root, self._entries, blocks, originals, limit_nbytes=self._budget.nvme)
        undo.callback(spill.remove)
        undo.callback(spill.close)
        return spill

    def _refuse_spilling(self, need: int) -> NoReturn:
        have = f"hbm {format_nbytes(self._budget.hbm)} and ram {format_nbytes(self._budget.ram)}"
        raise PlanError(
            f"{format_nbytes(need)} of the module's weights fit neither in {have}: raise Budget.ram by that much, "
            f"or pass store= with a directory that they may be streamed from",
            needed=self._budget.hbm + need,
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
            with ExitStack() as last:  # all of it, whatever fails, from the bottom to the top
                if spill is not None:
                    last.callback(spill.remove)
                last.callback(runtime.close)
                last.callback(loans.close)
                last.callback(self._take_out, spill)
                last.callback(moved.undo)
                binder.unbind(_restorer(runtime))

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
        with ExitStack() as undo:
            spill = self._spill([], {}, undo)

            def finish() -> None:
                try:
                    self._take_out(spill)
                finally:
                    if spill is not None:
                        spill.remove()

            session = Session(
                self._module,
                plan,
                tally=self._tally,
                engaged=None,
                fixed_nbytes={"hbm": hbm, "ram": total - hbm},
                written_nbytes=lambda: spill.peak_nbytes if spill is not None else 0,
                finish=finish,
                notes=notes,
            )
            undo.pop_all()
        return session

    def _take_out(self, spill: SpillStore | None) -> None:
        if self._packed is not None:
            self._packed.take_out(None if spill is None else partial(read_whole, spill))


def _is_weight(entry: Entry) -> bool:
    return isinstance(entry.tensor, nn.Parameter) or bool(entry.part_of)


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


def _planned_block(span: Span) -> Block:
    return Block(span.name, span.nbytes, align_of([entry.tensor for entry in span.entries]), ())


def _nbytes(entry: Entry) -> int:
    try:
        return entry.tensor.untyped_storage().nbytes()
    except (RuntimeError, NotImplementedError):
        return entry.tensor.numel() * entry.tensor.element_size()
