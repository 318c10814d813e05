"""Slower, failing, counting: as told, and no more."""

from __future__ import annotations

import threading

import pytest
import torch

from tierstore.contracts import ReadRequest
from tierstore.errors import StoreError, StoreReadError
from tierstore.extents import Extent
from tierstore.stores.memory import MemoryStore
from tierstore.stores.wrappers import CountingStore, FailingStore, SlowStore


def memory() -> MemoryStore:
    return MemoryStore({"a": torch.arange(100, dtype=torch.uint8), "b": torch.arange(50, dtype=torch.uint8)})


def request(file: int, offset: int, nbytes: int) -> ReadRequest:
    return ReadRequest(file, Extent(offset, nbytes), torch.empty(nbytes, dtype=torch.uint8))


def test_a_slow_link_is_shared_in_order() -> None:
    now = 5.0

    def wait(event: threading.Event, seconds: float) -> bool:
        nonlocal now
        now += seconds
        return event.is_set()

    store = SlowStore(memory(), 10.0, clock=lambda: now, wait=wait)
    first, second = store.read([request(0, 0, 100)]), store.read([request(1, 0, 25), request(1, 0, 25)])
    second.wait()
    assert first.done()
    assert now == 5.0 + 15.0
    store.read([request(1, 0, 10)]).wait()
    assert now == 5.0 + 15.0 + 1.0
    store.close()


def test_a_slow_read_takes_its_time() -> None:
    from time import perf_counter

    store = SlowStore(memory(), 2000.0)
    start = perf_counter()
    fence = store.read([request(0, 0, 100)])
    asked = perf_counter()
    fence.wait()
    assert perf_counter() - start >= 0.05
    assert asked - start < 0.05
    store.close()


def test_close_does_not_wait_for_a_slow_link() -> None:
    store = SlowStore(memory(), 1e-6)
    fences = [store.read([request(0, 0, 100)]) for _ in range(3)]
    store.close()
    for fence in fences:
        with pytest.raises(StoreReadError, match="closed"):
            fence.wait()


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_a_link_needs_a_speed(speed: float) -> None:
    inner = memory()
    with pytest.raises(StoreError, match="speed above 0"):
        SlowStore(inner, speed)
    inner.close()


def test_a_failing_store_fails_where_told() -> None:
    store = FailingStore(memory(), lambda request: request.file == 1)
    good = request(0, 0, 100)
    store.read([good]).wait()
    assert torch.equal(torch.as_tensor(good.into), torch.arange(100, dtype=torch.uint8))
    fence = store.read([good, request(1, 7, 3)])
    for _ in range(2):
        with pytest.raises(StoreReadError, match="file number 1 at byte 7: wanted 3, got 0"):
            fence.wait()
    with pytest.raises(StoreReadError):
        fence.gate()
    assert fence.done()
    store.close()


def test_a_counting_store_counts() -> None:
    store = CountingStore(memory())
    store.read([request(0, 90, 10), request(1, 0, 50)]).wait()
    store.read([request(0, 0, 1)]).wait()
    store.read([]).wait()
    assert (store.reads, store.requests, store.nbytes) == (3, 3, 61)
    assert store.by_file == {0: 11, 1: 50}
    assert store.by_name == {"a": 11, "b": 50}
    store.close()
    with pytest.raises(StoreError):
        store.read([request(0, 0, 1)])
    assert store.reads == 3
