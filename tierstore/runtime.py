"""The machinery of one session: pools, feeds and the prefetcher that a plan calls for."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import cast

import torch
from torch import Tensor

from tierstore.backends import Backend
from tierstore.binding.slot import Slot
from tierstore.budget import Tier
from tierstore.contracts import Pool, ReadRequest, Store
from tierstore.errors import StoreError
from tierstore.events import Moved, Recorder
from tierstore.extents import Extent, align_up
from tierstore.feeding import make_feeds
from tierstore.ledger import Ledger
from tierstore.plan import Plan
from tierstore.prefetch import Prefetcher
from tierstore.slots import SLOT_ALIGN
from tierstore.tensors import Block, Unit


class Runtime:
    """Brings units from their stores as ``plan`` says, and keeps what is written to them.

    ``stores`` gives each unit's store. Pools and ledgers are separate for what stays (``hbm``,
    ``ram``) and what streams, so that neither can fragment or crowd out the other. Weight bytes are
    bounded exactly; the pools are larger than the bounds by alignment padding only. ``ram`` are the
    bytes of host memory that the plan was made for.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        stores: Mapping[str, Store],
        plan: Plan,
        backend: Backend,
        recorder: Recorder,
        *,
        ram: int,
    ) -> None:
        self.units = {unit.name: unit for unit in units}
        self.plan = plan
        self.backend = backend
        self._stores = stores
        self._unified = backend.engine.unified
        self._recorder = recorder
        self._closing = ExitStack()
        self._blocks: dict[str, tuple[Unit, Block]] = {b.name: (u, b) for u in units for b in u.blocks}
        tiers = plan.tier
        in_place = {Tier.HBM, Tier.RAM} if self._unified else {Tier.HBM}
        self.residents = frozenset(name for name in self.units if tiers[name] in in_place)
        self.hbm_ledger = Ledger(plan.resident_nbytes[Tier.HBM], "hbm")
        self.ram_ledger = Ledger(plan.resident_nbytes[Tier.RAM] + plan.staging_nbytes, "ram")
        self.ring_ledger = Ledger(plan.ring_nbytes, "hbm")
        try:
            self.feed = make_feeds(units, stores, plan, backend, recorder, ram=ram, closing=self._closing)
            self.prefetcher = self._make_prefetcher()
        except BaseException:
            self.close()
            raise

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The most weight bytes that were ever in each memory tier."""
        staged = self.feed.staged
        ram = self.ram_ledger.peak if staged is None else staged.peak_staging_nbytes
        return {"hbm": self.hbm_ledger.peak + self.ring_ledger.peak, "ram": ram}

    def keep(self, unit: str, block: str, data: Tensor) -> None:
        """Store changed bytes of a block where its unit rests. Residents rest where they are."""
        if unit in self.residents:
            return
        host = data.cpu()
        if self.feed.staged is not None and self.plan.tier[unit] is Tier.RAM:
            self.feed.staged.write(self.units[unit], block, host)
            return
        write = getattr(self._stores[unit], "write", None)
        if write is None:
            raise StoreError(
                f"{block} was written to while it streams from a checkpoint, which is never changed: give the weights "
                f"room to stay with a larger Budget.hbm, or load the model into memory and use tierstore.offload"
            )
        write(block, host)

    def read_rows(self, block: str, row_nbytes: int, rows: Sequence[int], into: Tensor) -> None:
        """Fill ``into`` (on the compute device) with rows of a block, straight from its store."""
        unit, spec = self._blocks[block]
        host = into if self._unified else torch.empty(into.numel(), dtype=torch.uint8)
        requests: list[ReadRequest] = []
        for index, row in enumerate(rows):
            requests += _requests(
                spec, row * row_nbytes, row_nbytes, host[index * row_nbytes : (index + 1) * row_nbytes]
            )
        start = time.perf_counter()
        store = self._stores[unit.name]
        store.read(requests).wait()
        if host is not into:
            into.copy_(host)
        self._recorder(Moved(f"{store.tier}->hbm", into.numel(), start, time.perf_counter()))

    def can_read_rows(self, block: str) -> bool:
        """Whether single rows can be read from the block's store."""
        unit = self._blocks[block][0].name
        return unit not in self.residents and self.plan.tier[unit] is Tier.NVME

    def fill(self) -> None:
        """Bring every resident in, and what rests in pinned memory; close the stores that nothing needs any more."""
        for name in sorted(self.residents):
            self.prefetcher.resident(name)
        if self.feed.staged is not None:
            for unit in self.units.values():
                if self.plan.tier[unit.name] is Tier.RAM:
                    self.feed.staged.kept(unit, unit.blocks[0].name)
        streamed = {id(self._stores[name]) for name in self.units if self.plan.tier[name] is Tier.NVME}
        for store in self._stores.values():
            if id(store) not in streamed:
                store.close()

    def read_block(self, block: str) -> Tensor:
        """A copy of a block's true bytes in host memory: 1-D uint8."""
        unit, spec = self._blocks[block]
        memory = torch.empty(spec.nbytes, dtype=torch.uint8)
        if unit.name in self.residents:
            slot = self.slot(unit.name)
            memory.copy_(slot.block_bytes(block, spec.nbytes))
        elif self.feed.staged is not None and self.plan.tier[unit.name] is Tier.RAM:
            memory.copy_(self.feed.staged.kept(unit, block))
        else:
            self._stores[unit.name].read(_requests(spec, 0, spec.nbytes, memory)).wait()
        return memory

    def slot(self, unit: str) -> Slot:
        """The memory of a resident unit, which it keeps."""
        lease = self.prefetcher.resident(unit)
        return Slot(cast(Tensor, lease.buffer), self.feed.offsets(self.units[unit]))

    def close(self) -> None:
        """End transfers and threads, then release memory and stores. Idempotent."""
        self._closing.close()

    def _make_prefetcher(self) -> Prefetcher:
        pools: dict[str, Pool] = {}
        ledgers: dict[str, Ledger] = {}
        for tier, ledger in ((Tier.HBM, self.hbm_ledger), (Tier.RAM, self.ram_ledger)):
            names = [n for n in self.residents if self.plan.tier[n] is tier]
            nbytes = sum(align_up(self.feed.slot_nbytes(self.units[n]), SLOT_ALIGN) for n in names)
            pool = self._made(self.backend.device_pool(nbytes))
            pools.update(dict.fromkeys(names, pool))
            ledgers.update(dict.fromkeys(names, ledger))
        streamed = [u for n, u in self.units.items() if n not in self.residents]
        prefetcher = Prefetcher(
            self.units,
            [name for name in self.plan.order if name in self.units],
            self.residents,
            feed=self.feed,
            pools=pools,
            ledgers=ledgers,
            ring=self._made(self.backend.ring_pool(self._ring_capacity(streamed))),
            ledger=self.ring_ledger,
            mark=self.backend.engine.mark,
            recorder=self._recorder,
        )
        self._closing.callback(prefetcher.close)
        return prefetcher

    def _made(self, pool: Pool) -> Pool:
        self._closing.callback(pool.close)
        return pool

    def _ring_capacity(self, streamed: Sequence[Unit]) -> int:
        """Ring bytes with the padding of as many units as fit: the ledger bounds weights, this bounds memory."""
        paddings = sorted((align_up(self.feed.slot_nbytes(u), SLOT_ALIGN) - u.nbytes for u in streamed), reverse=True)
        sizes = sorted(u.nbytes for u in streamed)
        count, total = 0, 0
        for nbytes in sizes:
            total += nbytes
            if total > self.plan.ring_nbytes:
                break
            count += 1
        return self.plan.ring_nbytes + sum(paddings[: count + 1])


def _requests(block: Block, start: int, nbytes: int, into: Tensor) -> list[ReadRequest]:
    """Reads of bytes ``[start, start + nbytes)`` of a block into ``into``."""
    requests: list[ReadRequest] = []
    for piece in block.pieces:
        first = max(start, piece.at)
        last = min(start + nbytes, piece.at + piece.extent.nbytes)
        if first < last:
            extent = Extent(piece.extent.offset + first - piece.at, last - first)
            requests.append(ReadRequest(piece.file, extent, into[first - start : last - start]))
    return requests
