"""Turns: one thread at a time, and compute of one stream after that of the stream before."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import get_ident

import pytest
import torch

from tests.hf.paged import decoder, generated, paged, prompt
from tierstore.backends import backend_for
from tierstore.contracts import Fence
from tierstore.copies.cpu import CpuCopyEngine
from tierstore.errors import DeviceError
from tierstore.hf.kv.turn import Turn


class Streams(CpuCopyEngine):
    """An engine where each thread has a stream: notes whose work is marked, and who waits for whose."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []
        self.broken = False

    def mark(self) -> Fence:
        if self.broken:
            raise DeviceError("it fell off the bus")
        self.seen.append(("marks", get_ident(), 0))
        return Mark(self, get_ident())


class Mark:
    def __init__(self, streams: Streams, of: int) -> None:
        self._streams, self._of = streams, of

    def done(self) -> bool:
        return False

    def wait(self) -> None:
        raise AssertionError("the host need not wait")

    def gate(self) -> None:
        if self._streams.broken:
            raise DeviceError("it fell off the bus")
        self._streams.seen.append(("waits for", get_ident(), self._of))


def take(turn: Turn, times: int = 1) -> int:
    for _ in range(times):
        turn.acquire()
    for _ in range(times):
        turn.release()
    return get_ident()


def test_what_the_next_one_computes_comes_after() -> None:
    streams = Streams()
    turn = Turn(streams)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        first = one.submit(take, turn, 3).result()
        second = other.submit(take, turn).result()
    assert streams.seen == [("marks", first, 0), ("waits for", second, first), ("marks", second, 0)]


def test_it_is_one_threads_turn() -> None:
    turn = Turn(CpuCopyEngine())
    with ThreadPoolExecutor(1) as other, turn, turn:
        assert not other.submit(turn.acquire, blocking=False).result()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(take, turn).result()


def test_a_device_that_failed_ends_no_turn_badly() -> None:
    streams = Streams()
    turn = Turn(streams)
    take(turn)
    streams.broken = True
    with turn:
        pass
    with ThreadPoolExecutor(1) as other:
        assert other.submit(take, turn).result()


@pytest.mark.cuda
def test_threads_with_streams_of_their_own() -> None:
    model, asked = decoder("LlamaForCausalLM").cuda(), [prompt(45, seed=seed).cuda() for seed in range(4)]
    want = [generated(model, new=4, input_ids=each)[0] for each in asked]
    torch.cuda.synchronize()

    def work(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            assert torch.equal(generated(model, new=4, input_ids=asked[number])[0], want[number])

    with paged(model, backend=backend_for("cuda"), kv_hbm=1 << 20), ThreadPoolExecutor(4) as threads:
        for _ in range(3):
            list(threads.map(work, range(4)))
