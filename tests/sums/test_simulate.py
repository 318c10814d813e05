"""Laws of the virtual-time replay, each checked from the records it returns."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.budget import Tier
from tierstore.extents import Extent
from tierstore.simulate import Links, Simulation, simulate
from tierstore.tensors import Block, Piece, Unit

LINKS = st.builds(
    Links,
    nvme_bytes_per_second=st.sampled_from([10.0, 100.0, 1000.0]),
    ram_bytes_per_second=st.sampled_from([100.0, 1000.0]),
    latency_seconds=st.sampled_from([0.0, 0.01, 1.0]),
)


def unit(name: str, nbytes: int) -> Unit:
    return Unit(name, (Block("weight", nbytes, 64, (Piece(0, Extent(0, nbytes)),)),))


def close(left: float, right: float) -> bool:
    return left == pytest.approx(right, rel=1e-9, abs=1e-9)


class Case:
    """A placement that the replay accepts, with its own view of what streams."""

    def __init__(
        self,
        sizes: dict[str, int],
        tier: dict[str, Tier],
        order: list[str],
        spare: tuple[int, int],
        unified: bool,
        links: Links,
        compute: dict[str, float],
    ) -> None:
        self.sizes, self.tier, self.order, self.unified = sizes, tier, order, unified
        self.links, self.compute = links, compute
        self.streamed = {n for n, t in tier.items() if t is Tier.NVME or (t is Tier.RAM and not unified)}
        self.ring = max((sizes[name] for name in self.streamed), default=0) + spare[0]
        nvme = [sizes[name] for name, rests in tier.items() if rests is Tier.NVME]
        self.staging = 0 if unified or not nvme else max(nvme) + spare[1]

    def run(self, *, passes: int = 3, ring: int | None = None) -> Simulation:
        return simulate(
            [unit(name, nbytes) for name, nbytes in self.sizes.items()],
            self.order,
            self.tier,
            ring_nbytes=self.ring if ring is None else ring,
            staging_nbytes=self.staging,
            unified=self.unified,
            links=self.links,
            compute_seconds=self.compute,
            passes=passes,
        )


@st.composite
def cases(draw: st.DrawFn, *, repeats: bool = True) -> Case:
    names = [f"u{number}" for number in range(draw(st.integers(1, 8)))]
    sizes = {name: draw(st.integers(0, 100)) for name in names}
    tier = {name: draw(st.sampled_from(list(Tier))) for name in names}
    order = draw(st.lists(st.sampled_from(names), min_size=1, max_size=16)) if repeats else draw(st.permutations(names))
    compute = {name: draw(st.sampled_from([0.0, 0.01, 0.3, 2.0])) for name in names}
    spare = (draw(st.integers(0, 300)), draw(st.integers(0, 200)))
    return Case(sizes, tier, list(order), spare, draw(st.booleans()), draw(LINKS), compute)


@given(case=cases())
def test_every_unit_is_there_at_its_step(case: Case) -> None:
    result = case.run()
    assert [visit.unit for visit in result.visits] == 3 * [name for name, _ in groupby(case.order)]
    last_link = {
        name: "nvme" if case.unified else "ram"  # the link by which it comes to where it is used
        for name in case.sizes
    }
    now = 0.0
    for visit in result.visits:
        arrivals = [f.end for f in result.fetches if f.unit == visit.unit and f.link == last_link[visit.unit]]
        assert any(end <= visit.start for end in arrivals)
        assert close(visit.start, now + visit.stall)
        assert visit.stall >= 0
        assert close(visit.end, visit.start + case.compute[visit.unit])
        now = visit.end


@given(case=cases(repeats=False))
def test_the_ring_is_never_overfull(case: Case) -> None:
    """Add the ring up from the records alone: a unit is there from its issue to the end of its use."""
    result = case.run()
    link = "nvme" if case.unified else "ram"
    changes: list[tuple[float, int, int]] = []
    for fetch in result.fetches:
        if fetch.unit in case.streamed and fetch.link == link:
            end = next(v.end for v in result.visits if (v.unit, v.number) == (fetch.unit, fetch.number))
            changes += [(fetch.issued, 1, fetch.nbytes), (end, 0, -fetch.nbytes)]
    used = peak = 0
    for _, _, change in sorted(changes):
        used += change
        peak = max(peak, used)
    assert used == 0
    assert peak <= case.ring


@given(case=cases())
def test_peaks_stay_within_residents_and_rings(case: Case) -> None:
    result = case.run()
    used = set(case.order)
    resident = {t: sum(case.sizes[n] for n in used if case.tier[n] is t) for t in Tier}
    assert resident[Tier.HBM] <= result.peak_nbytes[Tier.HBM] <= resident[Tier.HBM] + case.ring
    assert resident[Tier.RAM] <= result.peak_nbytes[Tier.RAM] <= resident[Tier.RAM] + case.staging


@given(case=cases(repeats=False))
def test_a_steady_pass_moves_each_streamed_unit_once(case: Case) -> None:
    result = case.run()
    nvme = sum(case.sizes[name] for name in case.order if case.tier[name] is Tier.NVME)
    streamed = sum(case.sizes[name] for name in case.order if name in case.streamed)
    total = sum(case.sizes.values())
    assert result.link_nbytes[0] == {"nvme": total, "ram": 0 if case.unified else total}
    for moved in result.link_nbytes[1:]:
        if case.ring < streamed:
            assert moved == {"nvme": nvme, "ram": 0 if case.unified else streamed}
        else:  # a ring that holds the whole cycle may find the units of the pass before
            assert moved["nvme"] <= nvme
            assert moved["ram"] <= (0 if case.unified else streamed)


@given(case=cases())
def test_bytes_are_those_of_the_fetches(case: Case) -> None:
    result = case.run()
    moved = [Counter(nvme=0, ram=0) for _ in range(3)]
    for fetch in result.fetches:
        assert fetch.nbytes == case.sizes[fetch.unit]
        moved[fetch.number][fetch.link] += fetch.nbytes
    assert list(result.link_nbytes) == moved


@given(case=cases())
def test_time_is_at_least_compute_and_bytes_over_bandwidth(case: Case) -> None:
    result = case.run()
    compute = sum(case.compute[name] for name, _ in groupby(case.order))
    assert all(seconds >= compute or close(seconds, compute) for seconds in result.pass_seconds)
    total = sum(result.pass_seconds)
    assert close(total, result.visits[-1].end)
    for link, rate in (("nvme", case.links.nvme_bytes_per_second), ("ram", case.links.ram_bytes_per_second)):
        least = sum(moved[link] for moved in result.link_nbytes) / rate
        assert total >= least or close(total, least)
    stalled = sum(sum(stalls.values()) for stalls in result.stall_seconds)
    assert close(total, 3 * compute + stalled)


@given(case=cases(), more=st.integers(0, 500))
def test_more_ring_is_never_slower(case: Case, more: int) -> None:
    small, large = case.run(), case.run(ring=case.ring + more)
    for before, after in zip(small.visits, large.visits, strict=True):
        assert after.end <= before.end or close(after.end, before.end)


@given(
    count=st.integers(2, 24),
    keep=st.integers(1, 12),
    ring_units=st.integers(1, 4),
    compute=st.sampled_from([0.1, 0.5, 1.0, 2.0, 5.0]),
)
def test_spread_residents_are_never_slower_than_residents_at_the_front(
    count: int, keep: int, ring_units: int, compute: float
) -> None:
    keep = min(keep, count - 1)
    order = [f"u{number}" for number in range(count)]
    spread = {order[(2 * number + 1) * count // (2 * keep)] for number in range(keep)}
    seconds = []
    for kept in (spread, set(order[:keep])):
        assert len(kept) == keep
        result = simulate(
            [unit(name, 100) for name in order],
            order,
            {name: Tier.HBM if name in kept else Tier.NVME for name in order},
            ring_nbytes=100 * ring_units,
            unified=True,
            links=Links(100.0, 100.0),
            compute_seconds=dict.fromkeys(order, compute),
            passes=6,
        )
        seconds.append(sum(result.pass_seconds[2:]))
    assert seconds[0] <= seconds[1] or close(*seconds)


def test_a_pass_by_hand() -> None:
    """Two units of 100 bytes at 100 bytes a second, half a second of compute each, a ring of one unit."""
    units = [unit("a", 100), unit("b", 100)]
    tier = {"a": Tier.NVME, "b": Tier.NVME}
    compute = {"a": 0.5, "b": 0.5}
    links = Links(100.0, 100.0, 0.25)
    one = simulate(units, "ab", tier, ring_nbytes=100, unified=True, links=links, compute_seconds=compute)
    assert one.pass_seconds == (3.5, 3.5)  # latency, read and compute in turn
    assert one.stall_seconds[1] == {"a": 1.25, "b": 1.25}
    almost = simulate(units, "ab", tier, ring_nbytes=199, unified=True, links=links, compute_seconds=compute)
    assert almost.pass_seconds == one.pass_seconds
    two = simulate(units, "ab", tier, ring_nbytes=200, unified=True, links=links, compute_seconds=compute, passes=4)
    assert [fetch.issued for fetch in two.fetches] == [0.0, 0.0]  # both stay: the next use finds them in the ring
    wide = {"a": Tier.NVME, "b": Tier.NVME, "c": Tier.NVME}
    three = simulate(
        [*units, unit("c", 100)],
        "abc",
        wide,
        ring_nbytes=200,
        unified=True,
        links=links,
        compute_seconds=compute,
        passes=3,
    )
    assert three.pass_seconds[2] == pytest.approx(3.0)  # reading hides compute and latency
    assert three.peak_nbytes == {Tier.HBM: 200, Tier.RAM: 0}


def test_two_hops_overlap() -> None:
    units = [unit(name, 100) for name in "abc"]
    tier = dict.fromkeys("abc", Tier.NVME)
    result = simulate(
        units, "abc", tier, ring_nbytes=200, staging_nbytes=200, unified=False, links=Links(100.0, 200.0), passes=4
    )
    assert result.pass_seconds[3] == pytest.approx(3.0)  # the slower link alone
    assert result.link_nbytes[3] == {"nvme": 300, "ram": 300}
    narrow = simulate(
        units, "abc", tier, ring_nbytes=200, staging_nbytes=100, unified=False, links=Links(100.0, 200.0), passes=4
    )
    assert narrow.pass_seconds[3] == pytest.approx(4.5)  # with staging for one unit the links take turns


def test_impossible_placements_are_refused() -> None:
    units, tier, links = [unit("big", 100)], {"big": Tier.NVME}, Links(1.0, 1.0)
    with pytest.raises(ValueError, match=r"'big'.*ring"):
        simulate(units, ["big"], tier, ring_nbytes=99, unified=True, links=links)
    with pytest.raises(ValueError, match=r"'big'.*staging"):
        simulate(units, ["big"], tier, ring_nbytes=100, staging_nbytes=99, unified=False, links=links)
    with pytest.raises(ValueError, match="bandwidths"):
        Links(0.0, 1.0)
    with pytest.raises(ValueError, match="latency"):
        Links(1.0, 1.0, -1.0)
