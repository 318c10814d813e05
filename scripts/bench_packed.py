#!/usr/bin/env python
"""Packs a Llama-shaped checkpoint, and decodes it packed and unpacked within the same budgets, streaming everything.

The ways take turns, each process alone below a memory cap (page cache included) with caches dropped first, which needs
root. Then all of int4 in memory, beside llama.cpp's Q4_0 where llama-cpp-python is installed. Prints a table and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_streaming import TINY
from benchmark import disk
from benchmark.child import Children
from benchmark.command import measured, nbytes, parser_for, publish, say
from benchmark.job import Job
from benchmark.llama_cpp import has_llama_cpp
from benchmark.machine import machine
from benchmark.table import Row, as_text, at_most, goals_of
from make_checkpoint import Shape, make_checkpoint

from tierstore.budget import format_nbytes

GOALS = {"int8": (1.8, 0.52), "int4": (3.0, 0.29)}
"""By format: how many times faster than unpacked, and the most bytes as a share of the unpacked ones."""
LLAMA_CPP_GOAL = 0.8
PACKING_GOAL = 0.5
"""Of the disk's write rate, for int8."""
ROUNDS, FITTING_ROUNDS = 2, 5


class Bench:
    """Takes the measurements in order and keeps them as rows for people and as figures for programs."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        smoke: bool = chosen.smoke
        self.shape = TINY if smoke else Shape()
        self.rows: list[Row] = []
        self.figures: dict[str, Any] = {}
        self._formats: list[str] = chosen.formats
        self._folder: Path = chosen.checkpoint or scratch / "checkpoint"
        self._scratch = scratch
        self._smoke = smoke
        cap = None if smoke or chosen.no_cap else chosen.cap
        self._children = Children(cap, timeout_seconds=60 if smoke else chosen.timeout, quick=smoke)
        self.hbm: int = self.shape.nbytes() // 4 if smoke else chosen.hbm
        self._job = Job("", str(self._folder), chosen.threads, hbm=self.hbm, groups=1 if smoke else 2)

    def run(self) -> None:
        """Everything, in order."""
        with self._children:
            say(f"checkpoint of {format_nbytes(self.shape.nbytes())} in {self._folder}")
            make_checkpoint(self._folder, self.shape)
            stores = {form: self._packed(form) for form in self._formats}
            ways = {"unpacked": self._folder, **stores}
            found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
            for _ in range(1 if self._smoke else ROUNDS):
                for way, folder in ways.items():
                    found[way].append(self._measure(f"decode {way}", kind="tierstore_decode", checkpoint=str(folder)))
            self._decode_rows(found)
            if "int4" in stores:
                self._fitting(stores["int4"])

    def _packed(self, form: str) -> Path:
        out = self._scratch / form
        done = self._measure(f"pack {form}", kind="pack", form=form, out=str(out))
        rate = done["source_nbytes"] / done["seconds"]
        said = f"{rate / 1e6:.0f} MB/s, bound by {done['bound']}"
        self.rows.append(Row(f"packing {form}, of source bytes", said))
        if form == "int8" and disk.has_fio() and not self._smoke:
            share = done["nbytes"] / done["seconds"] / disk.fio_write_rate(self._scratch)
            goal = f">= {PACKING_GOAL}, or bound by a named step"
            self.rows.append(Row("packing int8: written / disk's write rate", f"{share:.2f}", goal))
        _, most = GOALS.get(form, (0.0, 1.0))
        share = done["nbytes"] / self.shape.nbytes()
        self.rows.append(at_most(f"{form}: bytes of the store / unpacked", share, most))
        return out

    def _decode_rows(self, found: dict[str, list[dict[str, Any]]]) -> None:
        seconds = {way: statistics.median(s for run in runs for s in _steady(run)) for way, runs in found.items()}
        for way, runs in found.items():
            streamed = runs[0]["streamed_nbytes"]
            self.rows.append(Row(f"decode {way}", f"{seconds[way]:.3f} s a token, {format_nbytes(streamed)} streamed"))
        unpacked = found["unpacked"][0]["streamed_nbytes"]
        for form in self._formats:
            faster, most = GOALS.get(form, (0.0, 1.0))
            ratio = seconds["unpacked"] / seconds[form]
            self.rows.append(Row(f"{form}: times faster", f"{ratio:.2f}", f">= {faster}", ratio >= faster))
            share = found[form][0]["streamed_nbytes"] / unpacked
            self.rows.append(at_most(f"{form}: bytes streamed a token / unpacked", share, most))

    def _fitting(self, store: Path) -> None:
        """All in memory after packing, beside llama.cpp."""
        hbm, steps = 2 * self.shape.nbytes(), 2 if self._smoke else 16
        ours = replace(self._job, kind="tierstore_decode", checkpoint=str(store), hbm=hbm, steps=steps)
        ways = {"int4, all in memory": ours}
        if not self._smoke and has_llama_cpp():
            file = str(self._scratch / "model.gguf")
            self._measure("write llama.cpp's file", kind="llama_cpp_pack", out=file)
            ways["llama.cpp Q4_0, all in memory"] = replace(ours, kind="llama_cpp_decode", checkpoint=file)
        found: dict[str, list[list[float]]] = {way: [] for way in ways}
        for _ in range(1 if self._smoke else FITTING_ROUNDS):
            for way, job in ways.items():
                done = self._measure(way, job=job)
                found[way].append(_steady(done) if "groups" in done else done["seconds"])
        for way, rounds in found.items():
            median = statistics.median(seconds for times in rounds for seconds in times)
            self.rows.append(Row(way, f"{median:.4f} s a token"))
        if len(ways) == 1:
            self.rows.append(Row("llama.cpp Q4_0", "not measured: needs llama-cpp-python and gguf"))
            return
        ours_each, theirs_each = ([statistics.median(times) for times in each] for each in found.values())
        speed = statistics.median(theirs / mine for mine, theirs in zip(ours_each, theirs_each, strict=True))
        self.rows.append(
            Row(
                "int4: speed / llama.cpp's, median of turns",
                f"{speed:.3f}",
                f">= {LLAMA_CPP_GOAL}",
                speed >= LLAMA_CPP_GOAL,
            )
        )

    def _measure(self, what: str, *, job: Job | None = None, **changes: Any) -> dict[str, Any]:
        say(what)
        asked = replace(job or self._job, **changes)
        found = self._children.run(asked, capped=asked.hbm == self.hbm, on_pause=lambda: None)
        self.figures.setdefault(what, []).append(found)
        return found


def _steady(found: dict[str, Any]) -> list[float]:
    """Seconds of each pass that found the ring in its steady state."""
    return [seconds for group in found["groups"] for seconds in group[1:] or group]


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = parser_for(__doc__, timeout=900)
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"], help="default: int8 int4")
    parser.add_argument("--hbm", type=nbytes, default=256 << 20, help="budget while streaming (default: 256MiB)")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    where = machine()
    done = measured("bench_packed", chosen, Bench)
    if done is None:
        return 1
    bench, seconds = done
    said = {
        "bench": "packed",
        "machine": where,
        "shape": bench.shape.fingerprint(),
        "hbm_nbytes": bench.hbm,
        "threads": chosen.threads,
        "seconds": seconds,
        "goals": goals_of(bench.rows),
        "figures": bench.figures,
    }
    publish(as_text(bench.rows), said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
