"""Measures, in a few hundredths of a second, what a plan for a large model should know."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tierstore.contracts import ReadRequest, Store
from tierstore.extents import Extent
from tierstore.formats.format import Format
from tierstore.formats.linear import linear
from tierstore.formats.scratch import Scratch
from tierstore.pools.host import HostPool
from tierstore.simulate import Links

SAMPLE_NBYTES = 32 << 20
"""Bytes read to time a store: enough for four reads in flight, little beside a model worth measuring for."""

COMPUTE_NBYTES = 4 << 20
COMPUTE_RUNS = 12
BLOCK = 64
"""Rows that every format packs without padding."""

SLOWEST_COMPUTE = 2e9
"""Weight bytes per second that any machine computes with, and as many weights where they are packed: less was measured
while others held the processor, and a plan that believed it would leave no room for reading ahead."""


def measure_store(store: Store, typical: Links) -> Links:
    """``typical`` with the store's own read rate, from one read of up to 32 MiB of its largest tensor."""
    name = max(store.specs, key=lambda n: store.specs[n].nbytes, default=None)
    if name is None:
        return typical
    piece = max(store.pieces(name), key=lambda p: p.extent.nbytes)
    nbytes = min(SAMPLE_NBYTES, piece.extent.nbytes)
    pool = HostPool(nbytes + 4096, huge_pages=True)
    try:
        lease = pool.lease(nbytes, align=4096)
        if not nbytes or lease is None:
            return typical
        lease.buffer.zero_()  # memory is first touched here, not while the disk is timed
        start = time.perf_counter()
        store.read([ReadRequest(piece.file, Extent(piece.extent.offset, nbytes), lease.buffer)]).wait()
        seconds = time.perf_counter() - start
    finally:
        pool.close()
    return Links(nbytes / seconds, typical.ram_bytes_per_second, typical.latency_seconds)


def measure_compute(dtype: torch.dtype, device: torch.device, form: Format | None = None) -> float:
    """Weight bytes per second that a one-row matrix product computes with on ``device``: packed ones where the
    weights are packed as ``form``, of which fewer carry as many weights and each takes longer."""
    columns = 2048
    with torch.no_grad():
        row = torch.ones(1, columns, device=device).to(dtype)
        if form is None:
            rows = COMPUTE_NBYTES // (columns * dtype.itemsize)
            nbytes = rows * columns * dtype.itemsize
            weight = torch.ones(rows, columns, device=device).to(dtype)
            product: Callable[[], Tensor] = partial(F.linear, row, weight)
        else:
            specs = form.parts(BLOCK, columns)
            rows = max(COMPUTE_NBYTES // sum(spec.nbytes for spec in specs), 1) * BLOCK
            specs = form.parts(rows, columns)
            nbytes = sum(spec.nbytes for spec in specs)
            parts = {s.name: torch.ones(s.shape, device=device).to(getattr(torch, s.dtype)) for s in specs}
            product = partial(linear, row, form, parts, rows, columns, None, Scratch())
        seconds = []
        for _ in range(COMPUTE_RUNS):  # the fastest: others may be using the machine
            start = time.perf_counter()
            product().sum().item()
            seconds.append(time.perf_counter() - start)
    slowest = SLOWEST_COMPUTE * nbytes / (rows * columns * dtype.itemsize)
    return max(nbytes / min(seconds), slowest)
