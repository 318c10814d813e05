"""Laws of plans: within the budget, enough for every unit, and as fast as the simulator says."""

from __future__ import annotations

import time
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tierstore.budget import Budget, Tier
from tierstore.errors import PlanError
from tierstore.extents import Extent
from tierstore.plan import Links, Plan, build_plan
from tierstore.simulate import Simulation, simulate
from tierstore.tensors import Block, Piece, Unit

MIB = 1 << 20
DISK = Links(nvme_bytes_per_second=3.2 * 2**30, ram_bytes_per_second=20.0 * 2**30, latency_seconds=1e-4)


def unit(name: str, nbytes: int) -> Unit:
    return Unit(name, (Block("weight", nbytes, 64, (Piece(0, Extent(0, nbytes)),)),))


def layers(count: int, nbytes: int) -> list[Unit]:
    return [unit(f"layer {number}", nbytes) for number in range(count)]


def names(units: list[Unit]) -> list[str]:
    return [each.name for each in units]


class Case:
    def __init__(self, draw: st.DrawFn) -> None:
        count = draw(st.integers(1, 10))
        size = st.one_of(st.integers(0, 1000), st.just(100))
        self.units = [unit(f"u{number}", draw(size)) for number in range(count)]
        self.sizes = {each.name: each.nbytes for each in self.units}
        self.order = draw(st.lists(st.sampled_from(names(self.units)), max_size=20))
        self.unified = draw(st.booleans())
        self.ram = draw(st.sampled_from([0, 50, 500, 1000, 2500, 10_000]))
        self.step = draw(st.one_of(st.none(), st.integers(0, 2500)))
        self.compute = dict.fromkeys(self.sizes, draw(st.sampled_from([0.0, 1.0]))) if draw(st.booleans()) else None
        self.links = draw(st.sampled_from([Links(100.0, 1000.0, 0.1), Links(1000.0, 300.0), Links(1e9, 1e10, 1e-4)]))
        self.total = sum(self.sizes.values())

    def plan(self, hbm: int) -> Plan:
        return build_plan(
            self.units,
            self.order,
            Budget(hbm, self.ram),
            links=self.links,
            compute_seconds=self.compute,
            unified=self.unified,
            largest_step_nbytes=self.step,
        )

    def replay(self, plan: Plan) -> Simulation:
        return simulate(
            self.units,
            plan.order,
            plan.tier,
            ring_nbytes=plan.ring_nbytes,
            staging_nbytes=plan.staging_nbytes,
            unified=plan.unified,
            links=self.links,
            compute_seconds=self.compute,
            passes=3,
        )


CASES = st.composite(Case)()


@settings(deadline=None)
@given(case=CASES, hbm=st.integers(1, 6000))
def test_a_plan_keeps_its_budget_and_can_be_carried_out(case: Case, hbm: int) -> None:
    try:
        plan = case.plan(hbm)
    except PlanError:
        reject()
    held = {tier: sum(case.sizes[n] for n, t in plan.tier.items() if t is tier) for tier in Tier}
    assert plan.resident_nbytes == held
    assert plan.tier.keys() == case.sizes.keys()
    assert held[Tier.HBM] + plan.ring_nbytes <= hbm
    assert held[Tier.RAM] + plan.staging_nbytes <= case.ram
    streamed = {n: t for n, t in plan.tier.items() if t is Tier.NVME or (t is Tier.RAM and not case.unified)}
    assert plan.ring_nbytes >= max((case.sizes[name] for name in streamed), default=0)
    stays = case.total - sum(case.sizes[name] for name in streamed)
    assert plan.share == pytest.approx(stays / case.total if case.total else 1.0)
    if Tier.NVME in streamed.values() and not case.unified:
        assert plan.staging_nbytes >= max(case.sizes[n] for n, t in streamed.items() if t is Tier.NVME)
    else:
        assert plan.staging_nbytes == 0
    if case.step is not None:
        assert plan.ring_nbytes >= min(case.step, sum(case.sizes[name] for name in streamed))
    result = case.replay(plan)
    assert result.peak_nbytes[Tier.HBM] <= hbm
    assert result.peak_nbytes[Tier.RAM] <= case.ram
    assert plan.streamed_nbytes == result.link_nbytes[-1]["nvme" if case.unified else "ram"]
    assert plan.seconds_per_pass >= max(plan.seconds_each.values())
    assert plan.seconds_per_pass >= result.pass_seconds[-1]
    assert plan.seconds_each[plan.bound] == max(plan.seconds_each.values())
    assert plan == case.plan(hbm)


@settings(deadline=None)
@given(case=CASES)
def test_needed_is_the_smallest_budget_that_works(case: Case) -> None:
    try:
        case.plan(1)
    except PlanError as error:
        needed = error.needed
    else:
        needed = 1
    case.plan(needed)
    if needed > 1:
        with pytest.raises(PlanError) as refused:
            case.plan(needed - 1)
        assert refused.value.needed == needed
    if case.unified or case.ram >= max(case.sizes.values()):
        assert needed == max(1, *case.sizes.values(), min(case.step or 0, case.total))
    assert needed <= max(1, case.total)


@given(case=CASES, spare=st.integers(0, 100))
def test_what_fits_is_resident(case: Case, spare: int) -> None:
    plan = case.plan(max(1, case.total + spare))
    assert set(plan.tier.values()) == {Tier.HBM}
    assert (plan.ring_nbytes, plan.staging_nbytes, plan.streamed_nbytes, plan.share) == (0, 0, 0, 1.0)
    assert plan.bound == "compute"


@given(count=st.integers(2, 60), kept=st.integers(0, 59), odd=st.sampled_from([0, MIB // 2, MIB - 1]))
def test_residents_of_equal_size_are_spread_evenly(count: int, kept: int, odd: int) -> None:
    units = layers(count, MIB)
    hbm = max(1, min(kept, count - 1)) * MIB + odd
    plan = build_plan(units, names(units), Budget(hbm), links=DISK, unified=True)
    streamed = [name for name in plan.order if plan.tier[name] is Tier.NVME]
    assert 0 <= hbm - plan.resident_nbytes[Tier.HBM] - plan.ring_nbytes < MIB
    residents = [index for index, name in enumerate(plan.order) if plan.tier[name] is Tier.HBM]
    if residents:
        gaps = [(b - a - 1) % count for a, b in zip(residents, residents[1:] + residents[:1], strict=True)]
        if len(residents) == 1:
            gaps = [count - 1]
        assert max(gaps) - min(gaps) <= 1
        assert sum(gaps) == len(streamed)


def test_unit_used_twice_counts_once_and_stays() -> None:
    units = [unit("tied", 100 * MIB), *layers(10, 100 * MIB)]
    order = ["tied", *names(units[1:]), "tied", "layer 3"]
    plan = build_plan(units, order, Budget(400 * MIB), links=DISK, unified=True)
    assert plan.tier["tied"] is Tier.HBM
    assert plan.tier["layer 3"] is Tier.HBM
    assert sum(plan.resident_nbytes.values()) == 1100 * MIB


def test_small_units_stay_because_they_cost_overhead_not_bytes() -> None:
    units = [each for n in range(10) for each in (unit(f"norm {n}", 6144), unit(f"layer {n}", 100 * MIB))]
    plan = build_plan(units, names(units), Budget(400 * MIB), links=DISK, unified=True)
    assert all(plan.tier[f"norm {n}"] is Tier.HBM for n in range(10))


def test_small_units_do_not_crowd_out_large_ones() -> None:
    units = [*layers(4, 100 * MIB), *(unit(f"small {n}", MIB * 3 // 10) for n in range(300))]
    compute = dict.fromkeys(names(units), 0.0)
    plan = build_plan(units, names(units), Budget(250 * MIB), links=DISK, compute_seconds=compute, unified=True)
    assert plan.ring_nbytes == 100 * MIB
    assert any(plan.tier[f"layer {n}"] is Tier.HBM for n in range(4))


def test_an_outlier_stays_where_streaming_it_would_need_a_ring_of_its_size() -> None:
    units = [unit("embedding", 1000 * MIB), *layers(20, 100 * MIB)]
    plan = build_plan(units, names(units), Budget(1500 * MIB), links=DISK, unified=True)
    assert plan.tier["embedding"] is Tier.HBM
    assert plan.ring_nbytes < 1000 * MIB
    tight = build_plan(units, names(units), Budget(1000 * MIB), links=DISK, unified=True)
    assert tight.tier["embedding"] is Tier.NVME
    assert tight.ring_nbytes == 1000 * MIB


def test_units_that_the_order_leaves_out_come_last_but_fit() -> None:
    units = layers(6, 100)
    order = names(units)[:4]
    plan = build_plan(units, order, Budget(300), links=DISK, unified=True)
    assert plan.tier["layer 4"] is plan.tier["layer 5"] is Tier.NVME
    assert plan.ring_nbytes >= 100
    big = [*units, unit("unused", 250)]
    with pytest.raises(PlanError, match="'unused'") as refused:
        build_plan(big, order, Budget(200), links=DISK, unified=True)
    assert refused.value.needed == 250


def test_ram_is_used_in_place_when_unified_and_uploaded_otherwise() -> None:
    units = layers(10, 100 * MIB)
    budget = Budget(300 * MIB, 1000 * MIB)
    unified = build_plan(units, names(units), budget, links=DISK, unified=True)
    assert (unified.share, unified.streamed_nbytes, unified.ring_nbytes) == (1.0, 0, 0)
    apart = build_plan(units, names(units), budget, links=DISK, unified=False)
    assert apart.resident_nbytes[Tier.NVME] == apart.staging_nbytes == 0
    assert apart.streamed_nbytes == apart.resident_nbytes[Tier.RAM] > 0
    assert apart.bound == "ram"


def test_ram_keeps_room_for_staging_when_something_comes_from_disk() -> None:
    units = layers(10, 100 * MIB)
    plan = build_plan(units, names(units), Budget(200 * MIB, 400 * MIB), links=DISK, unified=False)
    assert plan.staging_nbytes >= 100 * MIB
    assert 200 * MIB <= plan.resident_nbytes[Tier.RAM] <= 400 * MIB - plan.staging_nbytes
    assert plan.bound == "nvme"
    roomy = build_plan(layers(30, 100 * MIB), [], Budget(200 * MIB, 1000 * MIB), links=DISK, unified=False)
    assert roomy.staging_nbytes >= 200 * MIB
    assert roomy.seconds_per_pass <= 1.05 * roomy.seconds_each["nvme"]  # both hops at once


def test_many_small_units_get_a_ring_that_covers_the_latency() -> None:
    units = layers(200, MIB)
    slow_start = Links(DISK.nvme_bytes_per_second, DISK.ram_bytes_per_second, latency_seconds=0.003)
    plan = build_plan(units, names(units), Budget(100 * MIB), links=slow_start, unified=True)
    assert plan.ring_nbytes >= 8 * MIB
    assert plan.seconds_per_pass <= 1.1 * plan.seconds_each["nvme"]


def test_a_ring_that_hides_compute_beats_one_resident_more() -> None:
    units = layers(20, 100 * MIB)
    compute = dict.fromkeys(names(units), 0.03)  # as long as a unit takes to come
    plan = build_plan(units, names(units), Budget(400 * MIB), links=DISK, compute_seconds=compute, unified=True)
    assert plan.ring_nbytes > 100 * MIB
    assert plan.seconds_per_pass <= 1.1 * max(plan.seconds_each.values())


def test_errors_name_the_thing_the_need_the_have_and_the_next_step() -> None:
    units = [unit("layer 0", 100), unit("layer 12", 300 * MIB)]
    with pytest.raises(PlanError) as refused:
        build_plan(units, names(units), Budget(200 * MIB), links=DISK, unified=True)
    for words in ("'layer 12'", "300.00 MiB", "Budget.hbm is 200.00 MiB", f"raise Budget.hbm to {300 * MIB} bytes"):
        assert words in str(refused.value)
    with pytest.raises(PlanError, match="one step needs 300"):
        build_plan(layers(4, 100), [], Budget(200), links=DISK, unified=True, largest_step_nbytes=300)
    with pytest.raises(PlanError, match=r"'layer 0'.*Budget\.ram of 0 B.*raise Budget\.ram to 100 bytes") as no_ram:
        build_plan(layers(4, 100), [], Budget(200), links=DISK, unified=False)
    assert no_ram.value.needed == 400
    build_plan(layers(4, 100), [], Budget(200, 100), links=DISK, unified=False)
    with pytest.raises(PlanError, match=r"Budget\.ram to 100 bytes .* and Budget\.hbm to 100 bytes .*, or"):
        build_plan(layers(4, 100), [], Budget(50, 99), links=DISK, unified=False)
    build_plan(layers(4, 100), [], Budget(100, 100), links=DISK, unified=False)


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match="'ghost'"):
        build_plan(layers(2, 10), ["ghost"], Budget(100), links=DISK, unified=True)
    with pytest.raises(ValueError, match="share a name"):
        build_plan([unit("a", 1), unit("a", 2)], ["a"], Budget(100), links=DISK, unified=True)


def test_no_units_is_a_plan() -> None:
    plan = build_plan([], [], Budget(1), links=DISK, unified=False)
    assert (plan.order, plan.tier, plan.share) == ((), {}, 1.0)
    assert "nothing streams" in plan.explain()


def test_explain_says_what_is_where_and_what_bounds_the_speed() -> None:
    units = layers(10, 100 * MIB)
    plan = build_plan(units, names(units), Budget(400 * MIB, 300 * MIB), links=DISK, unified=False)
    text = plan.explain()
    assert "10 units" in text
    assert "bound by nvme" in text
    assert "only fewer bytes" in text
    assert "more tokens per pass" in text
    assert max(map(len, text.splitlines())) < 200
    with pytest.raises(FrozenInstanceError):
        plan.share = 0.5  # type: ignore[misc]


def test_planning_is_quick() -> None:
    units = [unit(f"u{number}", (50 + number % 7) * MIB) for number in range(300)]
    best = 1.0
    for _ in range(3):
        start = time.process_time()
        build_plan(units, names(units), Budget("3GiB", "4GiB"), links=DISK, unified=False)
        best = min(best, time.process_time() - start)
    assert best < 0.2  # about 0.03 on one core; the bound leaves room for a busy machine
