"""``load``: a checkpoint that never exists in memory as a whole."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tierstore.backends import Backend, backend_for
from tierstore.binding.binder import Binder, Held, become_real, metas_of
from tierstore.binding.inventory import Entry, find_entries
from tierstore.binding.loans import Loans
from tierstore.budget import Budget, Tier
from tierstore.composing import TYPICAL_COMPUTE, TYPICAL_LINKS, align_of, cut_module, plan_units
from tierstore.contracts import Store
from tierstore.errors import BudgetError, DeviceError
from tierstore.formats.format import Format
from tierstore.machine import check_budget, check_room, inspect_machine
from tierstore.measuring import measure_compute, measure_store
from tierstore.report.tally import Tally
from tierstore.runtime import Runtime
from tierstore.session import Engaged, Session
from tierstore.stores.packed import is_packed
from tierstore.tensors import Block, Unit

if TYPE_CHECKING:
    from tierstore.hf.checkpoint import Checkpoint

MEASURED_FROM = 1 << 30
"""Models from this size on are worth the time that measuring disk and compute takes before the plan is made."""


def load(
    path: str | os.PathLike[str],
    budget: Budget,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_format: str | None = None,
    hidden_states: str | None = None,
    store: str | os.PathLike[str] | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    backend: Backend | None = None,
) -> Session:
    """A transformers checkpoint, run from where its bytes lie: safetensors shards, a ``.gguf`` file, or a packed store.

    ``device`` computes (default: the current CUDA device, else the CPU); ``dtype`` None is the
    checkpoint's own, and a packed store has no other. Only weights that need arithmetic (a cast, a
    permutation) are written, once, below ``store``. ``model_class`` replaces the class that the
    checkpoint's config names. Code from the checkpoint runs only with ``trust_remote_code``.
    ``backend`` replaces what is made for the device, for tests.

    With ``Budget(kv_hbm=...)`` the model generates with a KV cache in pages, ``session.kv``. ``kv_format``
    ("int8", "int4", "fp8", ...) is what full pages are kept in, None the model's own dtype. Pages on disk
    are below ``store``, or else beside the checkpoint, while the session lasts.

    With ``Budget(activations=...)`` a long input goes through the model in chunks, each of them a pass over the
    weights. With ``hidden_states`` "keep" or "offload" all chunks go through a layer before the next one is fetched,
    in one pass; until then their hidden states wait on the device, or in host memory. "recompute" is for gradients:
    of each layer only the input is kept, and the rest computed again.

    Raises ``PlanError`` with the smallest budget that would do, ``BudgetError``, ``CheckpointError``
    and ``StoreError``; nothing is left open then.
    """
    return load_divided(
        path,
        budget,
        lambda checkpoint, chosen: budget,
        device=device,
        dtype=dtype,
        kv_format=kv_format,
        hidden_states=hidden_states,
        store=store,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        backend=backend,
    )


def load_divided(
    path: str | os.PathLike[str],
    budget: Budget,
    divide: Callable[[Checkpoint, Backend], Budget],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    kv_format: str | None = None,
    hidden_states: str | None = None,
    store: str | os.PathLike[str] | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    backend: Backend | None = None,
) -> Session:
    """As ``load``, within what ``divide`` makes of ``budget`` when it knows checkpoint and device: the same bytes,
    shared out in another way. What it raises comes out."""
    if not isinstance(budget, Budget):
        raise BudgetError(f"load takes a Budget, got {type(budget).__name__}: write Budget(hbm='4GiB', ...)")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DeviceError(f"dtype {dtype!r} is no dtype of torch: write one such as bfloat16, float16 or float32")
    chosen = backend or backend_for(device)
    check_budget(budget, inspect_machine(), chosen.device)
    checkpoint = _opened(
        path,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        store_dir=None if store is None else Path(store),
        nvme=budget.nvme,
        device=chosen.device,
    )
    with ExitStack() as undo:
        undo.callback(checkpoint.store.close)
        budget = divide(checkpoint, chosen)
        session = _engage(checkpoint, budget, chosen)
        undo.pop_all()
    folder = checkpoint.path if store is None else Path(store)
    return session.equip(budget, kv_format=kv_format, hidden_states=hidden_states, backend=chosen, folder=folder)


def _opened(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None,
    model_class: type | None,
    trust_remote_code: bool,
    store_dir: Path | None,
    nvme: int | None,
    device: torch.device,
) -> Checkpoint:
    try:
        from tierstore.hf.checkpoint import open_checkpoint
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("tierstore"):
            raise
        raise DeviceError(
            f"load needs the package {error.name}, which is not installed: pip install 'tierstore[hf]'"
        ) from error
    if is_packed(path):
        from tierstore.hf.packed import open_packed

        return open_packed(
            path, dtype=dtype, model_class=model_class, trust_remote_code=trust_remote_code, device=device
        )
    return open_checkpoint(
        path,
        dtype=dtype,
        model_class=model_class,
        trust_remote_code=trust_remote_code,
        store_dir=store_dir,
        nvme=nvme,
    )


def _engage(checkpoint: Checkpoint, budget: Budget, backend: Backend) -> Session:
    module = checkpoint.module
    tally = Tally()
    entries = find_entries(module, elsewhere={*checkpoint.pieces, *checkpoint.ready, *checkpoint.packed})
    fixed = _place_ready(entries, checkpoint.ready, backend.device)
    held, blocks = _blocks_of(entries, checkpoint, backend.device)
    cut = cut_module(module, held, {n: b.nbytes for n, b in blocks.items()}, max(budget.hbm - fixed, 0))
    units = [Unit(group.name, tuple(blocks[b] for b in group.blocks)) for group in cut.groups]
    large = sum(unit.nbytes for unit in units) > max(budget.hbm, MEASURED_FROM)
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    form = _usual_format(checkpoint)
    plan = plan_units(
        units,
        cut,
        budget.hbm,
        budget.ram,
        fixed_nbytes=fixed,
        unified=backend.engine.unified,
        look_up=True,
        links=measure_store(checkpoint.store, TYPICAL_LINKS) if large else TYPICAL_LINKS,
        compute_bytes_per_second=measure_compute(dtype, backend.device, form) if large else TYPICAL_COMPUTE,
    )
    pinned = 0 if backend.engine.unified else plan.staging_nbytes
    check_room(
        fixed + plan.resident_nbytes[Tier.HBM] + plan.ring_nbytes + budget.kv_hbm,
        plan.resident_nbytes[Tier.RAM] + pinned + budget.kv_ram,
        inspect_machine(),
        backend.device,
    )
    with ExitStack() as undo:
        stores = {unit.name: checkpoint.store for unit in units}
        runtime = Runtime(units, stores, plan, backend, tally, ram=budget.ram)
        undo.callback(runtime.close)
        loans = Loans(runtime.prefetcher, runtime.units, runtime.feed.offsets, runtime.keep, runtime)
        binder = Binder(held, cut.groups, loans, backend.device)
        binder.bind()
        engaged = Engaged(module, runtime, binder, tally, units)
        runtime.prefetcher.start()
        undo.pop_all()
    return Session(
        module,
        plan,
        tally=tally,
        engaged=engaged,
        fixed_nbytes={"hbm": fixed, "ram": 0},
        written_nbytes=lambda: checkpoint.written_nbytes,
        finish=_finisher(binder, loans, runtime, checkpoint.store),
        notes=checkpoint.notes,
        checkpoint_path=checkpoint.path,
    )


def _usual_format(checkpoint: Checkpoint) -> Format | None:
    """That of most bytes; None where they are plain."""
    nbytes: Counter[Format | None] = Counter()
    for name, pieces in checkpoint.pieces.items():
        form = checkpoint.packed.get(name.rpartition(".")[0])
        nbytes[form] += sum(piece.extent.nbytes for piece in pieces)
    return max(nbytes, key=nbytes.__getitem__, default=None)


def _finisher(binder: Binder, loans: Loans, runtime: Runtime, store: Store) -> Callable[[], None]:
    def finish() -> None:
        try:
            binder.retire()
        finally:
            loans.close()
            runtime.close()
            store.close()  # the runtime's, unless no weight is left in it to move

    return finish


def _place_ready(entries: Collection[Entry], ready: Mapping[str, Tensor], device: torch.device) -> int:
    """Put the computed tensors, which are in memory, into the module; their bytes."""
    placed = 0
    for entry in entries:
        if entry.name in ready:
            value = ready[entry.name].to(device)
            become_real(entry.tensor, value)
            placed += value.numel() * value.element_size()
    return placed


def _blocks_of(
    entries: Collection[Entry], checkpoint: Checkpoint, device: torch.device
) -> tuple[list[Held], dict[str, Block]]:
    """One block per stored tensor, which is contiguous."""
    stored = [entry for entry in entries if entry.name in checkpoint.pieces]
    sizes = {entry.name: entry.tensor.numel() * entry.tensor.element_size() for entry in stored}
    storages = metas_of(sizes)
    held: list[Held] = []
    blocks: dict[str, Block] = {}
    for entry in stored:
        tensor = entry.tensor
        meta = torch.empty(0, dtype=tensor.dtype, device="meta")
        meta.set_(storages[entry.name], 0, tensor.size(), torch.empty(tensor.size(), device="meta").stride())
        held.append(Held(entry, entry.name, meta, device))
        blocks[entry.name] = Block(
            entry.name, sizes[entry.name], align_of([tensor]), tuple(checkpoint.pieces[entry.name])
        )
    return held, blocks
