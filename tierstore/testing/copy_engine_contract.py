"""What every ``CopyEngine`` must do. Derive, override the fixtures, and pytest runs the rest."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from random import Random
from threading import Event, Thread

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.contracts import CopyEngine, Fence

NBYTES = 4096


class HostFence:
    """A fence that another thread completes."""

    def __init__(self, error: Exception | None = None) -> None:
        self._over = Event()
        self._error = error

    def complete(self) -> None:
        """The work is over."""
        self._over.set()

    def done(self) -> bool:
        """Whether it is."""
        return self._over.is_set()

    def wait(self) -> None:
        """Block until it is."""
        assert self._over.wait(timeout=20), "nobody completed the fence"
        if self._error is not None:
            raise self._error

    gate = wait


class CopyEngineContract:
    """Laws of ``CopyEngine``."""

    @pytest.fixture
    def engine(self) -> Iterator[CopyEngine]:
        """The engine; closed after the test."""
        raise NotImplementedError("override engine")

    @pytest.fixture
    def device(self) -> torch.device:
        """Where the engine's compute runs."""
        return torch.device("cpu")

    def up(self, engine: CopyEngine, src: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, Fence]:
        """``src`` on its way to new memory of ``device``."""
        there = torch.zeros(src.numel(), dtype=torch.uint8, device=device)
        return there, engine.copy([(src, there)], after=[engine.mark()])

    def test_bytes_arrive_in_both_directions(self, engine: CopyEngine, device: torch.device) -> None:
        host = noise(NBYTES)
        there, fence = self.up(engine, host, device)
        back = torch.zeros(NBYTES, dtype=torch.uint8)
        down = engine.copy([(there, back)], after=[fence])
        down.wait()
        assert torch.equal(back, host)
        assert fence.done()

    def test_compute_after_gate_sees_the_bytes(self, engine: CopyEngine, device: torch.device) -> None:
        for value in range(1, 20):
            there, fence = self.up(engine, torch.full((NBYTES,), value, dtype=torch.uint8), device)
            fence.gate()
            assert int(there.int().sum()) == value * NBYTES

    def test_a_slot_is_overwritten_only_after_compute_read_it(self, engine: CopyEngine, device: torch.device) -> None:
        slot, sums = torch.zeros(NBYTES, dtype=torch.uint8, device=device), list[torch.Tensor]()
        end = engine.mark()
        for value in range(1, 20):
            fence = engine.copy([(torch.full((NBYTES,), value, dtype=torch.uint8), slot)], after=[end])
            fence.gate()
            sums.append(slot.int().sum())
            end = engine.mark()
        assert [int(total) for total in sums] == [value * NBYTES for value in range(1, 20)]

    def test_many_pairs_are_one_copy(self, engine: CopyEngine, device: torch.device) -> None:
        host = noise(NBYTES)
        there = torch.zeros(NBYTES, dtype=torch.uint8, device=device)
        cuts = [0, 1, 7, 64, 1000, 1000, NBYTES]
        pairs = [(host[a:b], there[a:b]) for a, b in pairwise(cuts)]
        engine.copy(pairs, after=[engine.mark()]).wait()
        assert torch.equal(there.cpu(), host)

    def test_a_copy_of_nothing_is_complete_in_time(self, engine: CopyEngine, device: torch.device) -> None:
        empty = torch.zeros(0, dtype=torch.uint8)
        pairs: list[Sequence[tuple[torch.Tensor, torch.Tensor]]] = [[], [(empty, empty.to(device))]]
        for nothing in pairs:
            fence = engine.copy(nothing)
            fence.gate()
            fence.wait()
            assert fence.done()

    def test_sizes_must_agree(self, engine: CopyEngine, device: torch.device) -> None:
        with pytest.raises(ValueError, match="same size"):
            engine.copy([(noise(8), torch.zeros(9, dtype=torch.uint8, device=device))])

    def test_fences_can_be_asked_often_and_from_any_thread(self, engine: CopyEngine, device: torch.device) -> None:
        there, fence = self.up(engine, noise(NBYTES), device)
        mark = engine.mark()
        failures: list[BaseException] = []

        def ask() -> None:
            try:
                for each in (fence, mark):
                    each.gate()
                    each.wait()
                    each.wait()
                    assert each.done()
            except BaseException as error:
                failures.append(error)

        threads = [Thread(target=ask, name=f"asker-{n}") for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert failures == []
        assert int(there.sum()) >= 0

    def test_fences_of_the_host_are_waited_for(self, engine: CopyEngine, device: torch.device) -> None:
        read = HostFence()
        src, there = torch.zeros(NBYTES, dtype=torch.uint8), torch.zeros(NBYTES, dtype=torch.uint8, device=device)
        ready = engine.mark()

        def fill() -> None:
            src.fill_(9)
            read.complete()

        filling = Thread(target=fill, name="filler")
        filling.start()
        engine.copy([(src, there)], after=[ready, read]).wait()
        filling.join(timeout=20)
        assert bool((there == 9).all())

    def test_a_failed_fence_stops_the_copy(self, engine: CopyEngine, device: torch.device) -> None:
        lost = HostFence(OSError("lost"))
        lost.complete()
        src, there = noise(NBYTES), torch.zeros(NBYTES, dtype=torch.uint8, device=device)
        engine.mark().wait()
        with pytest.raises(OSError, match="lost"):
            engine.copy([(src, there)], after=[lost]).wait()
        assert not bool(there.any())

    def test_fences_come_and_go_without_end(self, engine: CopyEngine, device: torch.device) -> None:
        """More than are made ahead, some held, some dropped before they are complete."""
        host, there, held = [noise(64, seed) for seed in range(300)], list[torch.Tensor](), dict[int, Fence]()
        for number, src in enumerate(host):
            buffer, fence = self.up(engine, src, device)
            there.append(buffer)  # memory outlives what writes to it, whoever holds the fence
            if number % 3:
                held[number] = fence
            elif number % 2:
                fence.gate()
            del fence
        gc.collect()
        for number, fence in held.items():
            fence.wait()
            assert torch.equal(there[number].cpu(), host[number])
        engine.close()
        assert all(torch.equal(buffer.cpu(), src) for buffer, src in zip(there, host, strict=True))

    def test_random_streaming_is_exact(self, engine: CopyEngine, device: torch.device) -> None:
        @settings(deadline=None, max_examples=20)
        @given(seed=st.integers(0, 2**32 - 1))
        def law(seed: int) -> None:
            stream_pages(engine, device, Random(seed))

        law()

    def test_close_is_idempotent_and_ends_what_was_issued(self, engine: CopyEngine, device: torch.device) -> None:
        host = noise(NBYTES)
        there, fence = self.up(engine, host, device)
        engine.close()
        engine.close()
        fence.wait()
        assert torch.equal(there.cpu(), host)


def noise(nbytes: int, seed: int = 0) -> torch.Tensor:
    """Random bytes on the host, uint8 of shape ``(nbytes,)``."""
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def stream_pages(engine: CopyEngine, device: torch.device, random: Random) -> None:
    """Pages go up, are changed there, and come down again, through fewer slots than pages; every byte is checked."""
    slots = [torch.zeros(256, dtype=torch.uint8, device=device) for _ in range(3)]
    pages = [noise(256, random.randrange(1000)) for _ in range(8)]
    truth = [page.clone() for page in pages]
    free: list[Fence] = [engine.mark() for _ in slots]  # after which a slot may be written
    rests: list[list[Fence]] = [[] for _ in pages]  # after which a page on the host may be read or written
    check: list[tuple[torch.Tensor, torch.Tensor]] = []
    for _ in range(40):
        slot, page = random.randrange(len(slots)), random.randrange(len(pages))
        up = engine.copy([(pages[page], slots[slot])], after=[free[slot], *rests[page]])
        up.gate()
        check.append((slots[slot].clone(), truth[page].clone()))
        if random.random() < 0.5:
            free[slot], rests[page] = engine.mark(), [up]
            continue
        slots[slot].add_(1)
        truth[page].add_(1)
        down = engine.copy([(slots[slot], pages[page])], after=[engine.mark(), up])
        free[slot], rests[page] = down, [down]
        if random.random() < 0.3:
            down.wait()
            assert torch.equal(pages[page], truth[page])
    for fence in [*free, *(fence for rest in rests for fence in rest)]:
        fence.wait()
    assert all(torch.equal(page, true) for page, true in zip(pages, truth, strict=True))
    assert all(torch.equal(seen.cpu(), true) for seen, true in check)
