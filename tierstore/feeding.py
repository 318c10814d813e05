"""Chooses how each unit of a plan reaches the compute device, and makes what brings it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from tierstore.backends import Backend
from tierstore.budget import Tier
from tierstore.contracts import Feed, Fence, Lease, Store
from tierstore.events import Recorder
from tierstore.extents import align_up
from tierstore.feeds.direct import DirectFeed
from tierstore.feeds.gds import GdsFeed
from tierstore.feeds.staged import StagedFeed
from tierstore.plan import Plan
from tierstore.slots import SLOT_ALIGN, lay_out
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.tensors import Unit

TRANSFER_NBYTES = (64 << 10, 16 << 20)
"""Least and most host memory that residents pass through on their way to a device, where nothing streams from disk."""


class Feeds:
    """Each unit's own feed, as one. ``staged`` is the one that also holds what rests in pinned memory, if any."""

    def __init__(self, by_unit: Mapping[str, Feed], staged: StagedFeed | None) -> None:
        self._by_unit = by_unit
        self.staged = staged

    def slot_nbytes(self, unit: Unit) -> int:
        """Bytes a lease for ``unit`` must have, padding included."""
        return self._by_unit[unit.name].slot_nbytes(unit)

    def offsets(self, unit: Unit) -> Mapping[str, int]:
        """Byte offset of each block within a lease for ``unit``."""
        return self._by_unit[unit.name].offsets(unit)

    def bring(self, unit: Unit, lease: Lease) -> Fence:
        """Start filling ``lease``, after ``lease.after``."""
        return self._by_unit[unit.name].bring(unit, lease)


def make_feeds(
    units: Sequence[Unit],
    stores: Mapping[str, Store],
    plan: Plan,
    backend: Backend,
    recorder: Recorder,
    *,
    ram: int,
    closing: ExitStack,
) -> Feeds:
    """The feeds for ``units``; ``closing`` is to end them, and the stores that they read.

    Memory that compute reads in place is read into directly. A device gets a checkpoint's shards straight from
    disk where GPUDirect Storage is real, and everything else through pinned memory, of at most ``ram`` bytes.
    """
    distinct = list({id(store): store for store in stores.values()}.values())
    for store in distinct:
        closing.callback(store.close)
    if not distinct:
        return Feeds({}, None)
    if backend.engine.unified:
        (store,) = distinct  # what computes from host memory and rests there is never moved
        direct = DirectFeed(store, recorder)
        closing.callback(direct.close)
        return Feeds(dict.fromkeys((unit.name for unit in units), direct), None)
    by_unit: dict[str, Feed] = {}
    for store in distinct:
        reads = backend.device_reads(store.paths) if isinstance(store, SafetensorsStore) else None
        if reads is not None:
            closing.callback(reads.close)
            gds = GdsFeed(reads, recorder)
            closing.callback(gds.close)
            mine = [unit.name for unit in units if stores[unit.name] is store]
            by_unit.update(dict.fromkeys((name for name in mine if plan.tier[name] is not Tier.RAM), gds))
    staged = [unit for unit in units if unit.name not in by_unit]
    closing.callback(backend.engine.close)
    if not staged:
        return Feeds(by_unit, None)
    keep = [unit for unit in staged if plan.tier[unit.name] is Tier.RAM]
    least, most = TRANSFER_NBYTES
    spare = ram - plan.resident_nbytes[Tier.RAM]
    ring = plan.staging_nbytes or (min(max(spare, least), most) if len(keep) < len(staged) else 0)
    pool = backend.host_pool(sum(align_up(lay_out(unit).nbytes, SLOT_ALIGN) for unit in keep) + ring)
    closing.callback(pool.close)
    feed = StagedFeed(stores, pool, backend.engine, recorder, keep=keep)
    closing.callback(feed.close)
    return Feeds({**dict.fromkeys((unit.name for unit in staged), feed), **by_unit}, feed)
