"""What a session adds to a model that generates: a paged KV cache, and bounded activations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from tierstore.backends import Backend
from tierstore.budget import Budget
from tierstore.errors import BudgetError, DeviceError
from tierstore.events import Recorder
from tierstore.report.kv import KvReport

if TYPE_CHECKING:
    from tierstore.hf.kv.cache import PagedCache
    from tierstore.hf.kv.memory import KvUsage


WAITING = ("keep", "offload")
"""Where the hidden states of chunks wait between layers: on the compute device, or in host memory."""


class Generation:
    """``kv`` is the cache that the model generates with, None where the budget has no bytes for one."""

    def __init__(self, kv: PagedCache | None, notes: Callable[[], tuple[str, ...]], finish: Callable[[], None]) -> None:
        self.kv = kv
        self._notes = notes
        self._finish = finish
        self._closed = False
        self._last: KvReport | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What users should know."""
        return self._notes()

    def report(self) -> KvReport | None:
        """The cache in numbers; after ``close`` as it last was."""
        if self.kv is not None and not self._closed:
            self._last = as_report(self.kv.usage())
        return self._last

    def close(self) -> None:
        """Leave the model's ``forward`` and ``generate`` as they were; release pages. Idempotent."""
        self.report()
        self._closed = True
        self._finish()


def make_generation(
    module: nn.Module,
    budget: Budget,
    *,
    kv_format: str | None,
    hidden_states: str | None,
    backend: Backend,
    recorder: Recorder,
    folder: Path | None,
) -> Generation | None:
    """What ``budget`` asks for: ``kv_hbm`` a paged cache, ``activations`` chunks; None for neither.

    ``hidden_states`` is as in ``load``. Raises ``BudgetError`` for a ``kv_format`` without a cache, for
    ``hidden_states`` that cannot be had beside the rest, and what ``make_kv`` and ``ChunkedPrefill`` raise."""
    if kv_format is not None and not budget.kv_hbm:
        raise BudgetError(f"kv_format is {kv_format!r} and Budget.kv_hbm is 0: give the KV cache bytes of its own")
    _check_hidden_states(hidden_states, budget)
    if not budget.kv_hbm and budget.activations is None and hidden_states is None:
        return None
    try:
        from tierstore.hf.by_layer import LayerByLayer
        from tierstore.hf.kv.generating import make_kv
        from tierstore.hf.prefill import ChunkedPrefill
        from tierstore.hf.recomputing import RecomputedLayers
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tierstore"):
            raise
        raise DeviceError(
            f"a KV cache needs the package {error.name}, which is not installed: pip install 'tierstore[hf]'"
        ) from error
    notes: list[str] = []
    paged, prefill = None, None
    with ExitStack() as closing:
        if hidden_states == "recompute":
            closing.callback(RecomputedLayers(module).close)
        if budget.kv_hbm:
            paged = make_kv(
                module,
                budget,
                format=kv_format,
                backend=backend,
                recorder=recorder,
                folder=folder if budget.kv_nvme else None,
                notes=notes,
            )
            closing.callback(paged.close)
        if budget.activations is not None:
            by_layer = None
            if hidden_states in WAITING:
                by_layer = LayerByLayer(module, backend if hidden_states == "offload" else None)
            prefill = ChunkedPrefill(module, budget.activations, paged, by_layer=by_layer)
            closing.callback(prefill.close)
        finish = closing.pop_all().close
    kv = None if paged is None else paged.cache
    return Generation(kv, lambda: (*notes, *(prefill.notes if prefill is not None else ())), finish)


def _check_hidden_states(chosen: str | None, budget: Budget) -> None:
    if chosen not in (None, "recompute", *WAITING):
        raise BudgetError(f"hidden_states is {chosen!r}: choose 'keep', 'offload' or 'recompute', or leave it out")
    if chosen in WAITING and budget.activations is None:
        raise BudgetError(f"hidden_states={chosen!r} is about chunks of long inputs: set Budget.activations too")
    if chosen in WAITING and budget.kv_hbm:
        raise BudgetError(
            f"hidden_states={chosen!r} takes all chunks through a layer before the next one, and pages are written "
            "chunk by chunk: set Budget.kv_hbm to 0, or leave hidden_states out"
        )


def as_report(usage: KvUsage) -> KvReport:
    """All kinds of layers together."""
    pages, cells = usage.pages, usage.cells
    return KvReport(
        held_pages=sum(each.held_pages for each in pages),
        kept_pages=sum(each.kept_pages for each in pages),
        free_pages=sum(each.free_pages for each in pages),
        tokens=max(each.used_tokens for each in pages),
        unused_tokens=sum(each.unused_tokens for each in pages),
        hbm_nbytes=sum(each.hbm_nbytes for each in cells),
        ram_nbytes=sum(each.ram_nbytes for each in cells),
        nvme_nbytes=sum(each.nvme_nbytes for each in cells),
        written_nbytes=sum(each.written_nbytes for each in cells),
        read_nbytes=sum(each.read_nbytes for each in cells),
        misses=sum(each.misses for each in cells),
        lost_cells=sum(each.lost_cells for each in cells),
        stall_seconds=sum(each.stall_seconds for each in cells),
    )
