#!/usr/bin/env python
"""Runs a Llama-shaped checkpoint larger than a memory cap, and says how near to the machine's limits it comes.

Each process runs alone below the cap (page cache included) with caches dropped first. Needs root for that. Prints a
table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmark import disk, verdicts
from benchmark.child import ChildError, Children
from benchmark.command import measured, nbytes, parser_for, publish, say
from benchmark.job import Job
from benchmark.machine import machine
from benchmark.table import Row, as_text, goals_of
from make_checkpoint import Shape, make_checkpoint

from tierstore.budget import format_nbytes

HEADROOM_NBYTES = 700 << 20
"""Of the cap, for Python, torch and activations."""
TINY = Shape(hidden=256, layers=6, ffn=512, heads=4, kv_heads=2, vocab=1024, shard_nbytes=4 << 20)
FITTING = Shape(hidden=768, layers=6, ffn=2048, heads=12, kv_heads=4, vocab=8192)
FITS_SECONDS = 15
PARTS = ("decode", "prefill", "accelerate", "fits")


class Bench:
    """Takes the measurements in order and keeps them as rows for people and as figures for programs."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        smoke: bool = chosen.smoke
        self.shape = TINY if smoke else Shape()
        self.parts: list[str] = chosen.parts
        self.rows: list[Row] = []
        self.figures: dict[str, Any] = {}
        self.failed = False
        self._smoke = smoke
        self._scratch = scratch
        self._folder: Path = chosen.checkpoint or scratch / "checkpoint"
        cap = None if smoke or chosen.no_cap else chosen.cap
        self._children = Children(cap, timeout_seconds=60 if smoke else chosen.timeout, quick=smoke)
        self.hbm = self.shape.nbytes() // 2 if smoke else chosen.hbm or chosen.cap - HEADROOM_NBYTES
        self._job = Job("", str(self._folder), threads=chosen.threads, hbm=self.hbm, groups=chosen.groups)
        self._fio = disk.has_fio() and not smoke
        self._setting: disk.Setting | None = None

    def run(self) -> None:
        """Everything that was asked for."""
        with self._children:
            say(f"checkpoint of {format_nbytes(self.shape.nbytes())} in {self._folder}")
            make_checkpoint(self._folder, self.shape)
            if {"decode", "prefill", "accelerate"}.intersection(self.parts):
                self._decode()
            if "fits" in self.parts:
                self._try(self._fits)

    def _try(self, part: Callable[[], None]) -> None:
        """A part that fails leaves a row, and the figures of the others stand."""
        try:
            part()
        except ChildError as error:
            print(f"bench_streaming: {error}", file=sys.stderr)
            self.rows.append(Row("FAILED", str(error).splitlines()[0], "", False))
            self.failed = True

    def _decode(self) -> None:
        decode = self._measure("tierstore_decode", capped=True)
        goal = decode["streamed_nbytes"] / decode["rates"][-1] if "prefill" in self.parts else 0.0
        resident = self._measure("resident", seconds=goal)
        how = f"fio {self._setting}" if self._setting else "tierstore's own reader (not fio)"
        spread = f"{min(decode['rates']) / 2**30:.2f} to {max(decode['rates']) / 2**30:.2f} GiB/s"
        self.rows.append(Row(f"disk beside the decoding: {how}", spread))
        self.rows += verdicts.decode_rows(decode, resident, self.shape.nbytes(), self.hbm)
        if "prefill" in self.parts:
            self._try(lambda: self._prefill(resident))
        if "accelerate" in self.parts:
            self._accelerate(decode, resident)

    def _prefill(self, resident: dict[str, Any]) -> None:
        found = self._measure("tierstore_prefill", capped=True, length=resident["length"], steps=3, groups=3)
        self.rows += verdicts.prefill_rows(found, resident)

    def _accelerate(self, decode: dict[str, Any], resident: dict[str, Any]) -> None:
        try:
            found = self._measure("accelerate_decode", capped=True)
        except ChildError as error:
            found = self.figures["accelerate_decode"] = {"error": str(error)}
        self.rows += verdicts.accelerate_rows(found, decode, resident)

    def _fits(self) -> None:
        folder = self._scratch / "fitting"
        shape = TINY if self._smoke else FITTING
        make_checkpoint(folder, shape)
        seconds = 1 if self._smoke else FITS_SECONDS
        found = self._measure("fits", checkpoint=str(folder), hbm=2 * shape.nbytes(), seconds=seconds)
        self.rows += verdicts.fits_rows(found)

    def _measure(self, kind: str, *, capped: bool = False, **changes: Any) -> dict[str, Any]:
        """What a job found, and ``rates``: the disk's whenever the job paused."""
        say(kind.replace("_", " "))
        rates: list[float] = []
        job = replace(self._job, kind=kind, **changes)
        found = self._children.run(job, capped=capped, on_pause=lambda: rates.append(self._rate()))
        self.figures[kind] = found | {"rates": rates}
        return found | {"rates": rates}

    def _rate(self) -> float:
        """The disk's rate now, bytes per second."""
        files = sorted(self._folder.glob("*.safetensors"))
        if not self._fio:
            return disk.reader_rate(files, rounds=2 if self._smoke else 8)
        if self._setting is None:
            say("fio's settings")
            self._setting, means = disk.best_setting(files)
            self.figures["fio"] = {str(setting): rate for setting, rate in means.items()}
        return disk.fio_rate(files, self._setting)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = parser_for(__doc__, timeout=150)
    parser.add_argument("--hbm", type=nbytes, help="budget of tierstore and Accelerate (default: the cap - 700 MiB)")
    parser.add_argument("--groups", type=int, default=4, help="of 4 passes, the disk measured between (default: 4)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    where = machine()
    done = measured("bench_streaming", chosen, Bench)
    if done is None:
        return 1
    bench, seconds = done
    said = {
        "bench": "streaming",
        "machine": where,
        "shape": bench.shape.fingerprint(),
        "checkpoint_nbytes": bench.shape.nbytes(),
        "hbm_nbytes": bench.hbm,
        "cap_nbytes": None if chosen.smoke or chosen.no_cap else chosen.cap,
        "threads": chosen.threads,
        "seconds": seconds,
        "goals": goals_of(bench.rows),
        "figures": bench.figures,
    }
    publish(as_text(bench.rows), said, chosen.out)
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
