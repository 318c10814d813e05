"""Sums of events, and how they read."""

from __future__ import annotations

import json
import threading

from hypothesis import given
from hypothesis import strategies as st

from tierstore.events import Missed, Moved, Stalled
from tierstore.report.report import LinkReport, Report
from tierstore.report.tally import BusyTime, Tally
from tierstore.report.waiting import WaitingReport

moments = st.integers(0, 200)
intervals = st.lists(st.tuples(moments, moments).map(lambda pair: (min(pair), max(pair))), max_size=60)


def covered(spans: list[tuple[int, int]]) -> int:
    """Length of the union of integer intervals, counted second by second."""
    return len({second for start, end in spans for second in range(start, end)})


def busy(spans: list[tuple[int, int]]) -> float:
    time = BusyTime()
    for start, end in spans:
        time.add(start, end)
    return time.seconds


def small_report() -> Report:
    tally = Tally()
    tally(Moved("nvme->hbm", 3 << 30, 0.0, 1.0))
    tally(Moved("nvme->hbm", 1 << 30, 0.5, 2.0))
    tally(Moved("ram->hbm", 5, 0.0, 0.0))
    tally(Stalled("layers.0", 0.25))
    tally(Stalled("layers.0", 0.25))
    tally(Missed("head"))
    return tally.report(
        peak_bytes={"hbm": 4 << 30, "ram": 0, "nvme": 0},
        resident_share=0.25,
        passes=2,
        seconds=3.0,
        notes=["O_DIRECT refused: buffered reads"],
    )


@given(intervals)
def test_busy_time_is_the_union_of_the_intervals(spans: list[tuple[int, int]]) -> None:
    assert busy(spans) == covered(spans)


@given(st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 40)), max_size=400))
def test_busy_time_is_exact_over_many_gaps_when_moves_end_in_order(starts: list[tuple[int, int]]) -> None:
    spans = sorted(((start, start + length) for start, length in starts), key=lambda span: span[1])
    assert busy(spans) == covered(spans)


def test_busy_time_keeps_a_bounded_number_of_spans() -> None:
    time = BusyTime()
    for start in range(0, 100_000, 2):
        time.add(start, start + 1)
    assert time.seconds == 50_000
    assert len(time._spans) <= 64
    time.add(0, 100_000)  # begins before the gaps that are still known: those alone are filled
    assert 50_000 < time.seconds < 51_000


def test_report_adds_up() -> None:
    report = small_report()
    assert report.links["nvme->hbm"] == LinkReport(nbytes=4 << 30, seconds=2.0, moves=2)
    assert report.links["nvme->hbm"].bytes_per_second == 2 << 30
    assert report.links["ram->hbm"].bytes_per_second == 0
    assert report.bytes_moved == (4 << 30) + 5
    assert report.stall_seconds == {"layers.0": 0.5}
    assert report.misses == 1


def test_report_reads_as_a_table() -> None:
    assert str(small_report()).splitlines() == [
        "3.00 s, 2 passes, 25.0% of the weight bytes resident",
        "",
        "tier      peak",
        "hbm   4.00 GiB",
        "ram        0 B",
        "nvme       0 B",
        "",
        "link          moved    busy        rate  moves",
        "nvme->hbm  4.00 GiB  2.00 s  2.00 GiB/s      2",
        "ram->hbm        5 B  0.00 s       0 B/s      1",
        "",
        "compute waited 0.50 s, most for layers.0 0.500 s",
        "misses: 1",
        "note: O_DIRECT refused: buffered reads",
    ]


def test_empty_report_says_that_nothing_moved() -> None:
    report = Tally().report(peak_bytes={"hbm": 0}, resident_share=1.0, passes=0, seconds=0.0)
    assert report.bytes_moved == 0
    assert "no bytes moved" in str(report)


def test_json_is_one_line_with_every_number() -> None:
    text = small_report().to_json()
    assert "\n" not in text
    assert json.loads(text) == {
        "peak_bytes": {"hbm": 4 << 30, "ram": 0, "nvme": 0},
        "links": {
            "nvme->hbm": {"nbytes": 4 << 30, "seconds": 2.0, "moves": 2, "bytes_per_second": float(2 << 30)},
            "ram->hbm": {"nbytes": 5, "seconds": 0.0, "moves": 1, "bytes_per_second": 0.0},
        },
        "stall_seconds": {"layers.0": 0.5},
        "misses": 1,
        "resident_share": 0.25,
        "passes": 2,
        "seconds": 3.0,
        "notes": ["O_DIRECT refused: buffered reads"],
        "kv": None,
        "waiting": None,
        "bytes_moved": (4 << 30) + 5,
    }


def test_what_waits_in_host_memory_is_reported() -> None:
    waiting = WaitingReport(host_nbytes=4 << 20, peak_nbytes=3 << 20, moved_nbytes=1 << 30)
    report = Tally().report(peak_bytes={"hbm": 0}, resident_share=0.0, passes=1, seconds=1.0, waiting=waiting)
    assert "hidden states: up to 3.00 MiB waited in 4.00 MiB of ram, 1.00 GiB moved" in str(report)
    assert json.loads(report.to_json())["waiting"] == {
        "host_nbytes": 4 << 20,
        "peak_nbytes": 3 << 20,
        "moved_nbytes": 1 << 30,
    }
    assert report.bytes_moved == 0


def test_tally_loses_no_event_of_any_thread() -> None:
    tally, threads, events = Tally(), 4, 500

    def record() -> None:
        for at in range(events):
            tally(Moved("nvme->ram", 1, at, at + 1))
            tally(Stalled("u", 1.0))
            tally(Missed("u"))

    workers = [threading.Thread(target=record) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    report = tally.report(peak_bytes={}, resident_share=0.0, passes=0, seconds=0.0)
    assert report.links["nvme->ram"] == LinkReport(nbytes=threads * events, seconds=events, moves=threads * events)
    assert report.stall_seconds == {"u": float(threads * events)}
    assert report.misses == threads * events
