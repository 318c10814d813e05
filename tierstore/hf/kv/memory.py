"""The memory of a KV cache: what a budget gives to each kind of layers, shared by all caches of one model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from tierstore.activation_plan import MASKED
from tierstore.budget import Budget
from tierstore.contracts import Pool
from tierstore.errors import BudgetError, SessionClosedError
from tierstore.events import Recorder
from tierstore.hf.kv.beside import Beside
from tierstore.hf.kv.cells import Cells
from tierstore.hf.kv.kinds import KvKind
from tierstore.hf.kv.rows import Rows
from tierstore.hf.kv.shapes import LayerKv, alike
from tierstore.hf.kv.turn import Turn
from tierstore.kvformats.format import KvFormat, KvShape
from tierstore.page_needs import PageNeed, advice, enough_hbm
from tierstore.page_plan import KindPlan, PageKind, PagePlan, build_page_plan
from tierstore.pages import PageTable, PageUsage
from tierstore.paging.pager import Pager
from tierstore.paging.usage import PagerUsage
from tierstore.stores.page_file import PageFile

if TYPE_CHECKING:
    from tierstore.backends import Backend

PAGE_TOKENS = 64
"""Positions of a page."""
_ALIGN = 4096  # what pinned memory and the page file like


@dataclass(frozen=True)
class KvUsage:
    """Pages by state and cells by tier, of each kind of layers; ``layers`` says which these are."""

    layers: tuple[tuple[int, ...], ...]
    pages: tuple[PageUsage, ...]
    cells: tuple[PagerUsage, ...]


@dataclass(frozen=True)
class Bound:
    """What attention over pages takes beside the scratch, at most: ``nbytes`` where it is the model's own, and
    ``masked`` elements of a mask at once where it goes group by group."""

    nbytes: int = maxsize
    masked: int = MASKED


class KvMemory:
    """Frames, page tables and pagers for the layers of one model, within a budget. Used by one thread at a time: the
    one that has ``turn``.

    ``layers`` say what each keeps, ``dtype`` is that of the model's keys and values, ``form`` how closed pages are
    kept. Pages on disk are below ``folder``. Raises ``PlanError`` where ``budget`` is too small, ``ModuleError`` for
    shapes that the format cannot keep, ``BudgetError`` for a ``kv_nvme`` without a folder.
    """

    def __init__(
        self,
        layers: Sequence[LayerKv],
        budget: Budget,
        *,
        dtype: torch.dtype,
        form: KvFormat,
        backend: Backend,
        recorder: Recorder,
        folder: Path | None,
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        self.layers, self.dtype, self.form, self.device = tuple(layers), dtype, form, backend.device
        self.bound = Bound()
        self._backend, self._recorder, self._budget = backend, recorder, budget
        if budget.kv_nvme and folder is None:
            raise BudgetError("Budget.kv_nvme is given and there is no folder for pages on disk: give store=")
        shapes = [_shape_of(kind, page_tokens) for kind in alike(layers)]
        kinds = page_kinds(layers, dtype, form, page_tokens)
        unified = backend.engine.unified
        self.plan: PagePlan = build_page_plan(kinds, budget.kv_hbm, budget.kv_ram, budget.kv_nvme, unified=unified)
        self.turn = Turn(backend.engine)
        """Held during a forward, and whenever rows change."""
        self._dropped: deque[Rows] = deque()
        self._closing = ExitStack()
        self._closed = False
        try:
            self.kinds = tuple(
                self._make_kind(plan, shape, folder) for plan, shape in zip(self.plan.kinds, shapes, strict=True)
            )
            self.scratch = self._memory(backend.device_pool, self.plan.scratch_nbytes)
            self.beside = Beside()
            self._closing.callback(self.beside.close)  # before the memory that it reads
        except BaseException:
            self._closing.close()
            raise
        self.kind_of = {layer: number for number, kind in enumerate(self.kinds) for layer in kind.layers}

    @property
    def tables(self) -> tuple[PageTable, ...]:
        """The page table of each kind."""
        return tuple(kind.table for kind in self.kinds)

    def columns_at_once(self, rows: int) -> int:
        """How many columns one pass may add to each of ``rows`` rows: their pages are open at the same time."""
        return min(kind.columns_at_once(max(rows, 1)) for kind in self.kinds)

    def begin(self) -> None:
        """Before each pass: take back what caches that are gone have left. Raises ``SessionClosedError``."""
        if self._closed:
            raise SessionClosedError("the session of this KV cache is closed: load the model again")
        while self._dropped:
            self._dropped.popleft().clear()
        self.forget_freed()

    def forget_freed(self) -> None:
        """Give back the bytes of pages that nobody holds."""
        for kind in self.kinds:
            kind.forget_freed()

    def drop(self, rows: Rows) -> None:
        """The cache of ``rows`` is gone; from any thread, at any time."""
        self._dropped.append(rows)

    def enough(
        self,
        rows: int,
        tokens: int,
        *,
        whole: bool = False,
        beside: Sequence[int] = (),
        at_once: int = 0,
        budget: Budget | None = None,
    ) -> str:
        """What to say where ``rows`` sequences of up to ``tokens`` tokens find no room, as in ``PageNeed``; empty where
        no ``kv_hbm`` helps. ``budget`` is what the user gave, where that is not what this memory was given."""
        budget, kinds = budget or self._budget, [plan.kind for plan in self.plan.kinds]
        found = enough_hbm(
            kinds,
            PageNeed(rows, tokens, whole, tuple(beside), at_once),
            budget.kv_ram,
            budget.kv_nvme,
            unified=self._backend.engine.unified,
            above=budget.kv_hbm,
        )
        return "" if found is None else advice(found, rows, tokens)

    def usage(self) -> KvUsage:
        """What is stored where."""
        return KvUsage(
            tuple(kind.layers for kind in self.kinds),
            tuple(kind.table.usage() for kind in self.kinds),
            tuple(kind.pager.usage() for kind in self.kinds),
        )

    def close(self) -> None:
        """End every transfer, release the memory and delete the page files, once no thread has ``turn``. Idempotent."""
        with self.turn:
            self._closed = True
            self._closing.close()

    def _make_kind(self, plan: KindPlan, shape: KvShape, folder: Path | None) -> KvKind:
        backend = self._backend
        region = self._memory(backend.device_pool, plan.region_nbytes)
        ring = self._memory(backend.ring_pool, plan.ring_nbytes)
        file = None
        if plan.nvme_slots and folder is not None:
            file = PageFile(folder, cell_nbytes=plan.frame_nbytes, capacity_nbytes=plan.nvme_nbytes)
            self._closing.callback(file.close)
        pager = Pager(
            plan,
            layers=plan.kind.layers,
            region=region,
            ring=ring,
            ram=self._memory(backend.host_pool, plan.ram_nbytes) if plan.ram_frames else None,
            staging=self._memory(backend.host_pool, plan.staging_nbytes) if plan.staging_slots else None,
            file=file,
            engine=backend.engine,
            recorder=self._recorder,
        )
        self._closing.callback(pager.shut)
        table = PageTable(plan.pages, plan.kind.page_tokens)
        return KvKind(plan, table, pager, Cells(plan, shape, self.dtype, self.form, region))

    def _memory(self, make: Callable[[int], Pool], nbytes: int) -> Tensor:
        """``nbytes`` of a pool of their own, until ``close``."""
        pool = make(nbytes)
        self._closing.callback(pool.close)
        lease = pool.lease(nbytes, align=_ALIGN)
        assert lease is not None, f"a pool of {nbytes} bytes gives that many"
        return cast(Tensor, lease.buffer)


def page_kinds(
    layers: Sequence[LayerKv], dtype: torch.dtype, form: KvFormat, page_tokens: int = PAGE_TOKENS
) -> list[PageKind]:
    """The kinds of pages of a model's ``layers``. Raises ``ModuleError`` for shapes that the format cannot keep."""
    return [_page_kind(kind, _shape_of(kind, page_tokens), dtype, form) for kind in alike(layers)]


def _shape_of(kind: Sequence[LayerKv], page_tokens: int) -> KvShape:
    return KvShape(kind[0].heads, kind[0].key_dim, kind[0].value_dim, page_tokens)


def _page_kind(layers: Sequence[LayerKv], shape: KvShape, dtype: torch.dtype, form: KvFormat) -> PageKind:
    return PageKind(
        layers=tuple(each.layer for each in layers),
        window=layers[0].window,
        page_tokens=shape.page_tokens,
        cell_nbytes=form.cell_nbytes(shape, dtype),
        raw_key_nbytes_per_token=shape.heads * shape.key_dim * dtype.itemsize,
        raw_value_nbytes_per_token=shape.heads * shape.value_dim * dtype.itemsize,
        plain=form.plain,
        recent_tokens=form.recent_tokens,
    )
