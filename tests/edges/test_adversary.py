"""The adversary lets correct doers pass and catches each kind of broken one."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch

from tierstore.contracts import Fence
from tierstore.copies.cpu import DONE
from tierstore.testing.adversary import Adversary, AdversaryEngine, adversary
from tierstore.testing.poison import POISON, PoisonLease, PoisonPool

SEEDS = range(12)
SLOT, UNITS = 256, 6


def weights() -> list[torch.Tensor]:
    return [torch.full((SLOT,), unit + 1, dtype=torch.uint8) for unit in range(UNITS)]


def take(pool: PoisonPool) -> PoisonLease:
    lease = pool.lease(SLOT)
    assert lease is not None
    return lease


def stream(
    device: Adversary,
    *,
    passes: int = 3,
    gate: bool = True,
    order_after: bool = True,
    mark_after_use: bool = True,
    compute: Callable[[torch.Tensor], int] = lambda weight: int(weight.sum()),
) -> list[int]:
    """Two slots that stream ``UNITS`` units, one ahead; each flag off is one way to be broken."""
    engine, pool = device.engine, PoisonPool(2 * SLOT, device.engine)
    host, results = weights(), list[int]()
    order = [unit for _ in range(passes) for unit in range(UNITS)]

    def bring(unit: int) -> tuple[PoisonLease, Fence]:
        lease = take(pool)
        return lease, engine.copy([(host[unit], lease.buffer)], after=lease.after if order_after else ())

    coming = bring(order[0])
    for following in [*order[1:], None]:
        lease, fence = coming
        if following is not None:
            coming = bring(following)
        if gate:
            fence.gate()
        end = engine.mark() if not mark_after_use else None
        if end is not None:
            lease.give_back(end)
        results.append(compute(lease.buffer))
        if end is None:
            lease.give_back(engine.mark())
    pool.close()
    return results


RIGHT = [int(weight.sum()) for weight in weights()] * 3


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("discrete", [True, False])
def test_correct_streaming_is_right(seed: int, discrete: bool) -> None:
    device = adversary(seed, discrete=discrete)
    assert stream(device) == RIGHT
    device.engine.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_missing_gate_computes_with_poison(seed: int) -> None:
    results = stream(adversary(seed), gate=False)
    assert results != RIGHT
    assert SLOT * POISON in results


@pytest.mark.parametrize("seed", SEEDS)
def test_slot_reused_before_its_reader_is_through(seed: int) -> None:
    device = adversary(seed)
    with pytest.raises(AssertionError, match=r"still (leased|written|computed with)"):
        stream(device, order_after=False)
    with pytest.raises(AssertionError, match="is not in its `after`"):
        device.engine.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_give_back_before_use_computes_with_poison(seed: int) -> None:
    results = stream(adversary(seed), mark_after_use=False)
    assert results == [SLOT * POISON] * len(RIGHT)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_mark_of_another_thread_does_not_count(seed: int) -> None:
    """Compute reads the slot here; a fence taken where nothing was computed says nothing about it."""
    from threading import Thread

    device, elsewhere = adversary(seed), list[Fence]()
    pool = PoisonPool(SLOT, device.engine)
    first = take(pool)
    copy = device.engine.copy([(weights()[0], first.buffer)], after=first.after)
    copy.gate()
    thread = Thread(target=lambda: elsewhere.append(device.engine.mark()))
    thread.start()
    thread.join()
    first.give_back(elsewhere[0])
    second = take(pool)
    fence = device.engine.copy([(weights()[1], second.buffer)], after=second.after)
    with pytest.raises(AssertionError, match=r"still (written|computed with)"):
        fence.wait()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("waited", [True, False])
def test_given_back_without_a_mark(seed: int, waited: bool) -> None:
    """The copy is long complete; the compute that was let in by its gate may not be."""
    device = adversary(seed)
    pool = PoisonPool(SLOT, device.engine)
    first = take(pool)
    copy = device.engine.copy([(weights()[0], first.buffer)], after=first.after)
    copy.gate()
    if waited:
        copy.wait()
    first.give_back(copy)
    second = take(pool)
    with pytest.raises(AssertionError, match="still computed with"):
        device.engine.copy([(weights()[1], second.buffer)], after=second.after).wait()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_lease_that_was_never_used_may_end_with_its_copy(seed: int) -> None:
    device = adversary(seed)
    pool = PoisonPool(SLOT, device.engine)
    for weight in weights():
        lease = take(pool)
        lease.give_back(device.engine.copy([(weight, lease.buffer)], after=lease.after))
    device.engine.check()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_compute_that_was_waited_for_is_over(seed: int) -> None:
    device = adversary(seed)
    pool = PoisonPool(SLOT, device.engine)
    for weight in weights():
        lease = take(pool)
        device.engine.copy([(weight, lease.buffer)], after=lease.after).gate()
        assert torch.equal(lease.buffer, weight)
        device.engine.mark().wait()
        lease.give_back(DONE)
    device.engine.check()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_staging_overwritten_before_the_upload(seed: int) -> None:
    device = adversary(seed)
    pool, staging = PoisonPool(SLOT, device.engine), torch.ones(SLOT, dtype=torch.uint8)
    lease = take(pool)
    fence = device.engine.copy([(staging, lease.buffer)], after=lease.after)
    staging.fill_(2)
    with pytest.raises(AssertionError, match="source was written"):
        fence.wait()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_download_read_before_its_fence_is_poison(seed: int) -> None:
    device = adversary(seed)
    pool, host = PoisonPool(SLOT, device.engine), torch.zeros(SLOT, dtype=torch.uint8)
    lease = take(pool)
    lease.buffer.fill_(5)
    fence = device.engine.copy([(lease.buffer, host)])
    lease.give_back(fence)
    assert bool((host == POISON).all())
    fence.wait()
    assert bool((host == 5).all())
    assert bool((take(pool).buffer == POISON).all())
    device.engine.check()
    pool.close()


@pytest.mark.parametrize("seed", SEEDS)
def test_download_then_upload_into_the_same_slot(seed: int) -> None:
    """KV out, weights in: right with the fence, a race without it."""
    for listed in (True, False):
        device = adversary(seed)
        pool, host = PoisonPool(SLOT, device.engine), torch.zeros(SLOT, dtype=torch.uint8)
        lease = take(pool)
        lease.buffer.fill_(5)
        down = device.engine.copy([(lease.buffer, host)])
        lease.give_back(down)
        again = take(pool)
        up = device.engine.copy([(weights()[0], again.buffer)], after=again.after if listed else ())
        if not listed:
            with pytest.raises(AssertionError, match="still read"):
                up.wait()
            continue
        up.wait()
        assert torch.equal(again.buffer, weights()[0])
        assert bool((host == 5).all())
        device.engine.check()


@pytest.mark.parametrize("seed", SEEDS)
def test_reading_in_place_without_waiting_is_seen(seed: int) -> None:
    """Unified memory: no copy to check, so the lease itself is."""
    for waits in (True, False):
        device = adversary(seed, discrete=False)
        pool = PoisonPool(SLOT, device.engine)
        take(pool).give_back(device.engine.mark())
        lease = take(pool)
        if waits:
            for fence in lease.after:
                fence.wait()
        lease.buffer.fill_(1)
        lease.give_back(device.engine.mark())
        if waits:
            device.engine.check()
        else:
            with pytest.raises(AssertionError, match="before its earlier users"):
                device.engine.check()


def test_orders_differ_between_seeds() -> None:
    """Independent copies happen in more than one order, and never before they must."""
    orders = set()
    for seed in range(40):
        engine, happened = AdversaryEngine(seed), list[int]()
        targets = [torch.zeros(8, dtype=torch.uint8) for _ in range(4)]
        fences = [engine.copy([(torch.full((8,), n, dtype=torch.uint8), to)]) for n, to in enumerate(targets)]
        for number in Random(seed).sample(range(4), 4):
            fences[number].gate()
            happened += [n for n, to in enumerate(targets) if bool((to == n).all()) and n not in happened]
            assert number in happened
        orders.add(tuple(happened))
    assert len(orders) > 5


def test_nothing_is_done_until_someone_insists() -> None:
    engine = AdversaryEngine(1)
    to = torch.zeros(8, dtype=torch.uint8)
    copy = engine.copy([(torch.ones(8, dtype=torch.uint8), to)])
    mark = engine.mark()
    later = engine.copy([(to, torch.zeros(8, dtype=torch.uint8))], after=[copy, mark])
    assert not any(fence.done() for fence in (copy, mark, later))
    assert bool((to == POISON).all())
    later.wait()
    assert all(fence.done() for fence in (copy, mark, later))
    assert bool((to == 1).all())
    engine.check()


def test_fences_of_others_are_waited_for() -> None:
    engine = AdversaryEngine(1)
    copy = engine.copy([(torch.ones(8, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8))], after=[DONE])
    copy.wait()
    assert copy.done()


def test_sizes_must_agree() -> None:
    with pytest.raises(ValueError, match="8 bytes to 4"):
        AdversaryEngine(0).copy([(torch.ones(8, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8))])
