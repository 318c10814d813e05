"""Adds events up to a report as they happen; keeps sums, never the events."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from operator import itemgetter
from threading import Lock

from tierstore.events import Event, Missed, Moved, Stalled
from tierstore.report.kv import KvReport
from tierstore.report.report import LinkReport, Report
from tierstore.report.waiting import WaitingReport

_OPEN_SPANS = 64


class BusyTime:
    """Length of the union of intervals that arrive in about the order in which they end.

    The newest spans are kept apart and merged as intervals arrive; older ones are only summed. The
    result is exact unless an interval begins before more than 64 idle gaps that are already known:
    what it covers before them is then left out.
    """

    __slots__ = ("_settled", "_settled_until", "_spans")

    def __init__(self) -> None:
        self._settled = 0.0
        self._settled_until = float("-inf")
        self._spans: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> None:
        """Add ``[start, end]``, in seconds of one clock."""
        start = max(start, self._settled_until)
        if end <= start:
            return
        spans = self._spans
        first = bisect_left(spans, start, key=itemgetter(1))
        last = bisect_right(spans, end, key=itemgetter(0))
        if first < last:
            start, end = min(start, spans[first][0]), max(end, spans[last - 1][1])
        spans[first:last] = [(start, end)]
        if len(spans) > _OPEN_SPANS:
            oldest_start, self._settled_until = spans.pop(0)
            self._settled += self._settled_until - oldest_start

    @property
    def seconds(self) -> float:
        """Time covered by at least one interval."""
        return self._settled + sum(end - start for start, end in self._spans)


class _Link:
    __slots__ = ("busy", "moves", "nbytes")

    def __init__(self) -> None:
        self.busy = BusyTime()
        self.moves = 0
        self.nbytes = 0


class Tally:
    """A ``Recorder``: call it with events from any thread, ask for a ``Report`` at any time.

    Memory grows with the number of links and of units that stalled, not with the number of events.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._links: dict[str, _Link] = {}
        self._stalls: dict[str, float] = {}
        self._stalled = 0.0
        self._misses = 0

    def __call__(self, event: Event, /) -> None:
        with self._lock:
            match event:
                case Moved():
                    link = self._links.get(event.link)
                    if link is None:
                        link = self._links[event.link] = _Link()
                    link.nbytes += event.nbytes
                    link.moves += 1
                    link.busy.add(event.start, event.end)
                case Stalled():
                    self._stalled += event.seconds
                    self._stalls[event.unit] = self._stalls.get(event.unit, 0.0) + event.seconds
                case Missed():
                    self._misses += 1

    @property
    def stalled_seconds(self) -> float:
        """Seconds that compute has waited so far, for all units."""
        return self._stalled

    def rates(self) -> dict[str, float]:
        """Bytes per second of busy time, by the tier that a link starts from; where several do, the slowest."""
        with self._lock:
            found: dict[str, float] = {}
            for name, link in self._links.items():
                if link.busy.seconds > 0:
                    tier = name.partition("->")[0]
                    found[tier] = min(found.get(tier, float("inf")), link.nbytes / link.busy.seconds)
            return found

    def report(
        self,
        *,
        peak_bytes: Mapping[str, int],
        resident_share: float,
        passes: int,
        seconds: float,
        notes: Sequence[str] = (),
        kv: KvReport | None = None,
        waiting: WaitingReport | None = None,
    ) -> Report:
        """The events so far, beside what only the session knows; fields as in ``Report``."""
        with self._lock:
            links = {
                name: LinkReport(nbytes=link.nbytes, seconds=link.busy.seconds, moves=link.moves)
                for name, link in self._links.items()
            }
            return Report(
                peak_bytes=dict(peak_bytes),
                links=links,
                stall_seconds=dict(self._stalls),
                misses=self._misses,
                resident_share=resident_share,
                passes=passes,
                seconds=seconds,
                notes=tuple(notes),
                kv=kv,
                waiting=waiting,
            )
