"""Replays a placement in virtual time: what a pass costs, and where it waits.

The oracle of the planner and of the tests. Units are used in a cycle; the prefetcher asks for the next ones in
order, as soon as the ring has room; a unit's bytes leave the ring when its use ends. A link carries one unit at a
time, and the latency of a unit is hidden while the link still carries the one before.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from math import inf
from typing import NamedTuple

from tierstore.budget import Tier
from tierstore.tensors import Unit


@dataclass(frozen=True, slots=True)
class Links:
    """The links that weights cross: ``nvme`` from disk to host memory, ``ram`` from host memory to the device.

    ``latency_seconds`` passes between asking for a unit and its first byte, on either link.
    """

    nvme_bytes_per_second: float
    ram_bytes_per_second: float
    latency_seconds: float = 0.0

    def __post_init__(self) -> None:
        rates = (self.nvme_bytes_per_second, self.ram_bytes_per_second)
        if not all(0 < rate < inf for rate in rates) or not 0 <= self.latency_seconds < inf:
            raise ValueError(f"links need finite bandwidths > 0 and a finite latency >= 0, got {self}")


class Fetch(NamedTuple):
    """``nbytes`` of ``unit`` cross ``link`` ("nvme" or "ram") for a use in pass ``number``, counted from 0.

    ``issued`` is when the bytes are taken at the far end of the link; seconds from the start of the replay.
    """

    unit: str
    link: str
    number: int
    nbytes: int
    issued: float
    end: float


class Visit(NamedTuple):
    """``unit`` is used from ``start`` to ``end``, after compute waited ``stall`` seconds for it."""

    unit: str
    number: int
    stall: float
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Simulation:
    """What happened. Pass 0 is cold: it also brings the units that stay in HBM and RAM.

    ``link_nbytes`` and ``stall_seconds`` (seconds per unit) are given for each pass, as ``pass_seconds`` is; bytes
    count for the pass that uses them. ``peak_nbytes`` are the most weight bytes that HBM and RAM held at once.
    """

    pass_seconds: tuple[float, ...]
    link_nbytes: tuple[Mapping[str, int], ...]
    stall_seconds: tuple[Mapping[str, float], ...]
    peak_nbytes: Mapping[Tier, int]
    fetches: tuple[Fetch, ...]
    visits: tuple[Visit, ...]


def simulate(
    units: Sequence[Unit],
    order: Sequence[str],
    tier: Mapping[str, Tier],
    *,
    ring_nbytes: int,
    staging_nbytes: int = 0,
    unified: bool,
    links: Links,
    compute_seconds: Mapping[str, float] | None = None,
    passes: int = 2,
) -> Simulation:
    """Replay ``passes`` cycles of ``order``, beginning with empty tiers.

    ``tier`` says where each unit rests. Streamed units cross ``ring_nbytes`` of HBM: from disk when ``unified``;
    otherwise from RAM, those of NVME by way of ``staging_nbytes`` of RAM (a unit that stays in HBM and is larger
    than that comes in parts; without staging it comes unhindered). Units absent from ``compute_seconds`` take no time.

    Raises ``ValueError`` when a streamed unit is larger than the ring or the staging it must pass through.
    """
    replay = _Replay(units, tier, ring_nbytes, staging_nbytes, unified, links)
    compute = compute_seconds or {}
    sequence = [name for name, _ in groupby(order)]
    visits: list[Visit] = []
    ends = [0.0]
    now = 0.0
    for number in range(passes):
        for name in sequence:
            ready = replay.bring(name, number)
            start = max(now, ready)
            end = start + compute.get(name, 0.0)
            replay.leave(name, end)
            visits.append(Visit(name, number, start - now, start, end))
            now = end
        ends.append(now)
    link_nbytes: list[Counter[str]] = [Counter(nvme=0, ram=0) for _ in range(passes)]
    for fetch in replay.fetches:
        link_nbytes[fetch.number][fetch.link] += fetch.nbytes
    stalls: list[dict[str, float]] = [dict.fromkeys(sequence, 0.0) for _ in range(passes)]
    for visit in visits:
        stalls[visit.number][visit.unit] += visit.stall
    return Simulation(
        pass_seconds=tuple(end - start for start, end in pairwise(ends)),
        link_nbytes=tuple(link_nbytes),
        stall_seconds=tuple(stalls),
        peak_nbytes={Tier.HBM: replay.hbm_peak, Tier.RAM: replay.ram_peak},
        fetches=tuple(replay.fetches),
        visits=tuple(visits),
    )


class _Link:
    """Carries one transfer at a time, in the order asked for."""

    def __init__(self, bytes_per_second: float, latency_seconds: float) -> None:
        self._rate = bytes_per_second
        self._latency = latency_seconds
        self._idle_from = 0.0

    def carry(self, nbytes: int, issued: float) -> float:
        """When ``nbytes``, asked for at ``issued``, have arrived."""
        self._idle_from = max(self._idle_from, issued + self._latency) + nbytes / self._rate
        return self._idle_from


class _Ring:
    """Bytes taken and released in the same order. A key taken again while it is there is held once, for both."""

    def __init__(self, nbytes: float) -> None:
        self.used = 0
        self._nbytes = nbytes
        self._sizes: dict[Hashable, int] = {}
        self._claims: Counter[Hashable] = Counter()
        self._releases: deque[tuple[float, Hashable]] = deque()

    def holds(self, key: Hashable, now: float) -> bool:
        """Whether ``key`` is there at ``now``; if so it stays until it is released once more."""
        while self._releases and self._releases[0][0] <= now:
            self._release_next()
        if self._claims[key]:
            self._claims[key] += 1
            return True
        return False

    def take(self, key: Hashable, nbytes: int, now: float) -> float:
        """The first moment, from ``now`` on, with room for ``nbytes``, which are taken then."""
        while self.used + nbytes > self._nbytes:
            now = max(now, self._release_next())
        while self._releases and self._releases[0][0] <= now:
            self._release_next()
        self.used += nbytes
        self._sizes[key] = nbytes
        self._claims[key] += 1
        return now

    def release(self, key: Hashable, at: float) -> None:
        """Note that one use of ``key`` ends at the moment ``at``, which is no earlier than the one noted before."""
        if self._claims[key]:
            self._releases.append((at, key))

    def _release_next(self) -> float:
        at, key = self._releases.popleft()
        self._claims[key] -= 1
        if not self._claims[key]:
            self.used -= self._sizes[key]
        return at


class _Replay:
    """The state of links and tiers while visits are replayed in order."""

    def __init__(
        self,
        units: Sequence[Unit],
        tier: Mapping[str, Tier],
        ring_nbytes: int,
        staging_nbytes: int,
        unified: bool,
        links: Links,
    ) -> None:
        self.fetches: list[Fetch] = []
        self.hbm_peak = 0
        self.ram_peak = 0
        self._nbytes = {unit.name: unit.nbytes for unit in units}
        self._tier = tier
        self._unified = unified
        self._disk = _Link(links.nvme_bytes_per_second, links.latency_seconds)
        self._device = _Link(links.ram_bytes_per_second, links.latency_seconds)
        self._ring = _Ring(ring_nbytes)
        self._staging = _Ring(staging_nbytes or inf)
        self._staging_nbytes = staging_nbytes
        self._kept = {Tier.HBM: 0, Tier.RAM: 0}
        self._ready: dict[str, float] = {}  # when what the ring or HBM holds may be used
        self._in_ram: dict[str, float] = {}  # when what rests in RAM had arrived there
        self._asked_disk = 0.0
        self._asked_upload = 0.0
        for name, rests in tier.items():
            nbytes = self._nbytes[name]
            if self._streams(rests) and nbytes > ring_nbytes:
                raise ValueError(f"unit {name!r} of {nbytes} bytes never fits a ring of {ring_nbytes}")
            if rests is Tier.NVME and not unified and nbytes > staging_nbytes:
                raise ValueError(f"unit {name!r} of {nbytes} bytes never fits {staging_nbytes} of staging")

    def bring(self, name: str, number: int) -> float:
        """Ask for ``name`` as early as its place in the order allows; when it may be used."""
        rests = self._tier[name]
        if self._streams(rests):
            asked = self._asked_disk if self._unified else self._asked_upload
            there = self._ring.holds(name, asked)
        else:
            there = name in self._ready
        if not there:
            self._ready[name] = self._read(name, rests, number) if self._unified else self._upload(name, rests, number)
        return self._ready[name]

    def leave(self, name: str, end: float) -> None:
        """A use of ``name`` ends."""
        self._ring.release(name, end)

    def _streams(self, rests: Tier) -> bool:
        return rests is Tier.NVME or (rests is Tier.RAM and not self._unified)

    def _read(self, name: str, rests: Tier, number: int) -> float:
        """Disk to the place where the host computes with it."""
        nbytes = self._nbytes[name]
        if rests is Tier.NVME:
            return self._from_disk(name, number, self._ring.take(name, nbytes, self._asked_disk))
        self._kept[rests] += nbytes
        return self._from_disk(name, number, self._asked_disk)

    def _upload(self, name: str, rests: Tier, number: int) -> float:
        """Disk to RAM, unless it rests there already; then RAM to the device."""
        nbytes = self._nbytes[name]
        if rests is Tier.RAM:
            if name not in self._in_ram:
                self._kept[rests] += nbytes
                self._in_ram[name] = self._from_disk(name, number, self._asked_disk)
            return self._to_device(name, rests, number, self._in_ram[name])
        key = len(self.fetches)
        part = min(nbytes, self._staging_nbytes or nbytes)
        staged = self._from_disk(name, number, self._staging.take(key, part, self._asked_disk))
        end = self._to_device(name, rests, number, staged)
        self._staging.release(key, end)
        return end

    def _from_disk(self, name: str, number: int, issued: float) -> float:
        nbytes = self._nbytes[name]
        self._asked_disk = issued
        self._note_peaks()
        end = self._disk.carry(nbytes, issued)
        self.fetches.append(Fetch(name, "nvme", number, nbytes, issued, end))
        return end

    def _to_device(self, name: str, rests: Tier, number: int, there: float) -> float:
        nbytes = self._nbytes[name]
        issued = max(self._asked_upload, there)
        if rests is Tier.HBM:
            self._kept[rests] += nbytes
        else:
            issued = self._ring.take(name, nbytes, issued)
        self._asked_upload = issued
        self._note_peaks()
        end = self._device.carry(nbytes, issued)
        self.fetches.append(Fetch(name, "ram", number, nbytes, issued, end))
        return end

    def _note_peaks(self) -> None:
        self.hbm_peak = max(self.hbm_peak, self._kept[Tier.HBM] + self._ring.used)
        staged = self._staging.used if self._staging_nbytes else 0
        self.ram_peak = max(self.ram_peak, self._kept[Tier.RAM] + staged)
