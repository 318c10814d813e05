"""Decides where each unit rests, and how much of HBM and RAM is a ring that streams.

Units are used in a cycle, so the resident set is fixed: a cache that evicts the least recently used would evict
just what is needed next. Residents are spread evenly through the order, so that the link never waits while a
row of residents computes. How large the ring should be, rather than the resident set, is asked of ``simulate``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from tierstore.budget import Budget, Tier, format_nbytes
from tierstore.errors import PlanError
from tierstore.moves import Move
from tierstore.simulate import Links, simulate
from tierstore.tensors import Unit

__all__ = ["Links", "Plan", "build_plan", "remeasure"]

RING_NBYTES = 32 << 20
"""Bytes in flight behind the unit in use that keep a link busy when units are small."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Where each unit rests, for a known order and budget. All sizes are weight bytes.

    ``tier``: HBM is resident on the compute device for good; RAM rests in host memory, and is used in place when
    ``unified``, else uploaded from pinned memory in each pass; NVME is read from disk in each pass.
    ``ring_nbytes`` of ``hbm`` stream; ``staging_nbytes`` of ``ram`` are the pinned ring between disk and device.
    ``streamed_nbytes`` come to the ring in each pass; ``share`` of all weight bytes never do.
    ``seconds_per_pass`` is the simulator's figure; ``seconds_each`` what "compute", "nvme" and "ram" take alone,
    and ``bound`` is the longest of them.
    """

    order: tuple[str, ...]
    tier: Mapping[str, Tier]
    unified: bool
    ring_nbytes: int
    staging_nbytes: int
    resident_nbytes: Mapping[Tier, int]
    streamed_nbytes: int
    share: float
    seconds_per_pass: float
    seconds_each: Mapping[str, float]
    bound: str

    def moves(self, units: Sequence[Unit]) -> tuple[Move, ...]:
        """What crosses a link in each pass, in order of first use; ``units`` are those the plan was made for."""
        sizes = {unit.name: unit.nbytes for unit in units}
        hops: dict[Tier, tuple[Tier, ...]] = {Tier.HBM: (), Tier.RAM: () if self.unified else (Tier.RAM, Tier.HBM)}
        hops[Tier.NVME] = (Tier.NVME, Tier.HBM) if self.unified else (Tier.NVME, Tier.RAM, Tier.HBM)
        return tuple(
            Move(name, src, dst, sizes[name])
            for name in dict.fromkeys(self.order)
            for src, dst in pairwise(hops[self.tier[name]])
        )

    def explain(self) -> str:
        """What is where and what bounds the speed, in a few lines for people."""
        counts = Counter(self.tier.values())
        lines = [
            f"{len(self.tier)} units, {format_nbytes(sum(self.resident_nbytes.values()))} of weights; "
            f"{self.share:.0%} of the bytes stay where they are used"
        ]
        rings = {Tier.HBM: self.ring_nbytes, Tier.RAM: self.staging_nbytes, Tier.NVME: 0}
        for tier in Tier:
            ring = f", and a ring of {format_nbytes(rings[tier])}" if rings[tier] else ""
            lines.append(f"  {tier:<5}{format_nbytes(self.resident_nbytes[tier])} in {counts[tier]} units{ring}")
        if not self.streamed_nbytes:
            lines.append("nothing streams: a pass takes what its compute takes")
        else:
            each = ", ".join(f"{what} {seconds:.4g} s" for what, seconds in self.seconds_each.items() if seconds)
            lines += [
                f"a pass takes about {self.seconds_per_pass:.4g} s, bound by {self.bound} (alone: {each})",
                f"each pass streams {format_nbytes(self.streamed_nbytes)}: only fewer bytes (a larger budget, "
                "quantised weights) or more tokens per pass (a larger batch, speculation) go past bytes / bandwidth",
            ]
        return "\n".join(lines)


def build_plan(
    units: Sequence[Unit],
    order: Sequence[str],
    budget: Budget,
    *,
    links: Links,
    compute_seconds: Mapping[str, float] | None = None,
    unified: bool,
    largest_step_nbytes: int | None = None,
) -> Plan:
    """The fastest placement found within ``budget``, as a pure function of its arguments.

    ``order`` is one pass; an empty one stands for the units as given. ``compute_seconds`` are seconds per visit; what
    is absent is taken to compute at four times the speed of the link while rings are chosen, and as 0 in the figures.
    ``largest_step_nbytes`` are the weight bytes that one operation needs at once, if more than one unit.

    Raises ``PlanError`` when ``hbm`` is below the largest unit or step; its ``needed`` is then exactly that. Unless
    ``unified``, a unit larger than ``ram`` cannot be staged, so it has to stay in ``hbm`` and ``needed`` counts it in.
    Raises ``ValueError`` for an order that names other units, or units that share a name.
    """
    sizes = {unit.name: unit.nbytes for unit in units}
    if len(sizes) != len(units):
        raise ValueError("two units share a name")
    sequence = tuple(name for name, _ in groupby(order)) or tuple(sizes)
    if unknown := set(sequence) - sizes.keys():
        raise ValueError(f"the order names {min(unknown)!r}, which is not among the units")
    compute = {name: compute_seconds[name] for name in sizes if name in compute_seconds} if compute_seconds else {}

    if sum(sizes.values()) <= budget.hbm:
        fastest = _Placement(dict.fromkeys(sizes, Tier.HBM), 0, 0)
    else:
        pinned = set() if unified else {name for name, nbytes in sizes.items() if nbytes > budget.ram}
        step = largest_step_nbytes or 0
        _refuse_what_cannot_fit(sizes, budget, pinned, step)
        rate = links.nvme_bytes_per_second if unified else links.ram_bytes_per_second
        guess = {name: nbytes / (4 * rate) for name, nbytes in sizes.items()} | compute
        cover = max(RING_NBYTES, int(2 * links.latency_seconds * rate))

        def cost(placement: _Placement) -> tuple[float, int]:
            return _replay(units, sequence, placement, unified, links, guess, passes=2)[0], placement.ring_nbytes

        fastest = min(_placements(sizes, Counter(sequence), budget, unified, pinned, step, cover), key=cost)
    return _describe(units, sequence, fastest, unified, links, compute)


def remeasure(
    plan: Plan, units: Sequence[Unit], *, links: Links, compute_seconds: Mapping[str, float] | None = None
) -> Plan:
    """The same placement, with the figures that ``links`` and ``compute_seconds`` (per visit) give for it.

    ``units`` are those that ``plan`` was made for.
    """
    placement = _Placement(dict(plan.tier), plan.ring_nbytes, plan.staging_nbytes)
    return _describe(units, plan.order, placement, plan.unified, links, dict(compute_seconds or {}))


@dataclass(frozen=True, slots=True)
class _Placement:
    tier: dict[str, Tier]
    ring_nbytes: int
    staging_nbytes: int


def _refuse_what_cannot_fit(sizes: Mapping[str, int], budget: Budget, pinned: set[str], step: int) -> None:
    """Raise ``PlanError`` when not even the smallest ring fits beside the units that must be resident."""
    rest = {name: nbytes for name, nbytes in sizes.items() if name not in pinned}
    largest = max(rest, key=rest.__getitem__, default="")
    ring = _smallest_ring(rest, step)
    needed = _total(sizes, pinned) + ring
    if needed <= budget.hbm:
        return
    have = f"Budget.hbm is {format_nbytes(budget.hbm)}"
    advice = f"raise Budget.hbm to {needed} bytes ({format_nbytes(needed)}) or more"
    if pinned:
        biggest = max(sorted(pinned), key=sizes.__getitem__)
        staged = f"raise Budget.ram to {sizes[biggest]} bytes ({format_nbytes(sizes[biggest])}) or more"
        ring = _smallest_ring(sizes, step)
        if ring > budget.hbm:
            staged += f" and Budget.hbm to {ring} bytes ({format_nbytes(ring)}) or more"
        raise PlanError(
            f"unit {biggest!r} of {format_nbytes(sizes[biggest])} cannot come from disk through Budget.ram of "
            f"{format_nbytes(budget.ram)}, which leaves {len(pinned)} units to keep in hbm, and {have}: "
            f"{staged}, or {advice}",
            needed=needed,
        )
    if ring > rest[largest]:
        what = f"one step needs {format_nbytes(ring)} of hbm at once"
    else:
        what = f"unit {largest!r} needs {format_nbytes(ring)} of hbm"
    raise PlanError(f"{what}, {have}: {advice}", needed=needed)


def _placements(
    sizes: Mapping[str, int],
    uses: Mapping[str, int],
    budget: Budget,
    unified: bool,
    pinned: set[str],
    step: int,
    cover: int,
) -> Iterator[_Placement]:
    """Candidates, each within the budget: residents of HBM beside rings of several sizes, then those of RAM.

    ``uses`` counts the visits of a pass, in the order of first use. ``cover`` bytes in flight keep a link busy.
    """
    names = [*uses, *(name for name in sizes if name not in uses)]
    for kept in _kept_sets(sizes, budget.hbm, pinned, step):
        rest = [name for name in names if name not in kept]
        room = budget.hbm - _total(sizes, kept)
        low = _smallest_ring({name: sizes[name] for name in rest}, step)
        second = sorted(sizes[name] for name in rest)[-2:][0]
        rings = {min(room, low + more) for more in (0, second, max(second, cover), max(2 * second, cover))}
        for ring in sorted(rings):
            in_hbm = kept | _residents(rest, sizes, uses, room - ring)
            outside = [name for name in rest if name not in in_hbm]
            largest = max((sizes[name] for name in outside), default=0)
            if unified or _total(sizes, outside) <= budget.ram:
                stagings = {0}
            else:
                stagings = {largest, min(budget.ram, largest + max(largest, cover))}
            for staging in sorted(stagings):
                in_ram = _residents(outside, sizes, uses, budget.ram - staging)
                tier = {
                    name: Tier.HBM if name in in_hbm else Tier.RAM if name in in_ram else Tier.NVME for name in sizes
                }
                streamed = [name for name in outside if not (unified and name in in_ram)]
                yield _Placement(tier, min(ring, _total(sizes, streamed)), staging)


def _kept_sets(sizes: Mapping[str, int], hbm: int, pinned: set[str], step: int) -> Iterator[set[str]]:
    """Sets to keep in HBM whatever else: the pinned, then also the outliers, which would need a ring of their size."""
    yield pinned
    rest = {name: nbytes for name, nbytes in sizes.items() if name not in pinned}
    limit = max(rest.values(), default=0)
    for nbytes in sorted(set(rest.values()), reverse=True):
        if 2 * nbytes > limit:
            continue
        kept = pinned | {name for name in rest if rest[name] > nbytes}
        ring = _smallest_ring({name: rest[name] for name in rest if name not in kept}, step)
        if _total(sizes, kept) + ring > hbm:
            return
        yield kept
        limit = nbytes


def _residents(names: Sequence[str], sizes: Mapping[str, int], uses: Mapping[str, int], room: int) -> set[str]:
    """Those of ``names``, in order of use, that fill ``room`` bytes best."""
    chosen: set[str] = set()
    # Small units first: they cost overhead rather than bytes.
    small, total = 0, _total(sizes, names)
    for name in sorted(names, key=sizes.__getitem__):
        if 4 * len(names) * sizes[name] >= total or 10 * (small + sizes[name]) > room:
            break
        chosen.add(name)
        small += sizes[name]
    left = room - small
    # A unit used more often in a pass saves as many times its bytes.
    for count in sorted({uses.get(name, 0) for name in names}, reverse=True):
        group = [name for name in names if uses.get(name, 0) == count and name not in chosen]
        picked = _spread(group, sizes, left)
        chosen |= picked
        left -= _total(sizes, picked)
    for name in sorted(set(names) - chosen, key=lambda name: (-sizes[name], name)):
        if sizes[name] <= left:
            chosen.add(name)
            left -= sizes[name]
    return chosen


def _spread(names: Sequence[str], sizes: Mapping[str, int], room: int) -> set[str]:
    """As many of ``names`` as fit, evenly: after each name the bytes picked are nearest to their share so far.

    This is error diffusion in one dimension, as Bresenham's line is.
    """
    total = _total(sizes, names)
    goal = min(room, total)
    picked: set[str] = set()
    # The second round aims at the bytes that the first one could really fill, which spaces them evenly to the end.
    for _ in range(2):
        picked, passed, held = set(), 0, 0
        for name in names:
            passed += sizes[name]
            if held + sizes[name] <= room and (2 * held + sizes[name]) * total <= 2 * goal * passed:
                picked.add(name)
                held += sizes[name]
        goal = held
    return picked


def _smallest_ring(rest: Mapping[str, int], step: int) -> int:
    """What must be free for units ``rest``: the largest one, or a step of several."""
    return max(max(rest.values(), default=0), min(step, sum(rest.values())))


def _total(sizes: Mapping[str, int], names: Iterable[str]) -> int:
    return sum(sizes[name] for name in names)


def _replay(
    units: Sequence[Unit],
    sequence: Sequence[str],
    placement: _Placement,
    unified: bool,
    links: Links,
    compute: Mapping[str, float],
    passes: int,
) -> tuple[float, dict[str, int], dict[str, float]]:
    """A steady pass: its seconds, the bytes over each link, and the seconds that each thing takes alone."""
    replay = simulate(
        units,
        sequence,
        placement.tier,
        ring_nbytes=placement.ring_nbytes,
        staging_nbytes=placement.staging_nbytes,
        unified=unified,
        links=links,
        compute_seconds=compute,
        passes=passes,
    )
    moved = dict(replay.link_nbytes[-1])
    alone = {
        "compute": sum(compute.get(name, 0.0) for name in sequence),
        "nvme": moved["nvme"] / links.nvme_bytes_per_second,
        "ram": moved["ram"] / links.ram_bytes_per_second,
    }
    # A single pass can be shorter than its bytes take, when the pass before left the ring full.
    return max(replay.pass_seconds[-1], *alone.values()), moved, alone


def _describe(
    units: Sequence[Unit],
    sequence: tuple[str, ...],
    placement: _Placement,
    unified: bool,
    links: Links,
    compute: Mapping[str, float],
) -> Plan:
    seconds, moved, alone = _replay(units, sequence, placement, unified, links, compute, passes=3)
    resident = dict.fromkeys(Tier, 0)
    for unit in units:
        resident[placement.tier[unit.name]] += unit.nbytes
    stays = resident[Tier.HBM] + (resident[Tier.RAM] if unified else 0)
    total = sum(resident.values())
    return Plan(
        order=sequence,
        tier=placement.tier,
        unified=unified,
        ring_nbytes=placement.ring_nbytes,
        staging_nbytes=placement.staging_nbytes,
        resident_nbytes=resident,
        streamed_nbytes=moved["nvme" if unified else "ram"],
        share=stays / total if total else 1.0,
        seconds_per_pass=seconds,
        seconds_each=alone,
        bound=max(alone, key=alone.__getitem__),
    )
