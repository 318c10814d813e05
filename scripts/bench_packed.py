#!/usr/bin/env python
"""Packs a Llama-shaped checkpoint, and decodes it packed and unpacked within the same budgets, streaming everything.

The ways take turns, each process alone below a memory cap (page cache included) with caches dropped first, which needs
root. Then all of int4 in memory, beside llama.cpp's Q4_0 where llama-cpp-python is installed. Prints a table and, last,
one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_streaming import TINY
from benchmark import disk
from benchmark.cap import CapError
from benchmark.child import ChildError, Children
from benchmark.command import nbytes, say
from benchmark.job import Job
from benchmark.llama_cpp import has_llama_cpp
from benchmark.machine import machine
from benchmark.table import Row, as_text
from make_checkpoint import Shape, make_checkpoint

from tierstore.budget import format_nbytes

GOALS = {"int8": (1.8, 0.52), "int4": (3.0, 0.29)}
"""By format: how many times faster than unpacked, and the most bytes as a share of the unpacked ones."""
LLAMA_CPP_GOAL = 0.8
PACKING_GOAL = 0.5
"""Of the disk's write rate, for int8."""
ROUNDS = 2


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
        self._children = Children(cap, timeout_seconds=60 if smoke else chosen.timeout)
        self.hbm: int = self.shape.nbytes() // 4 if smoke else chosen.hbm
        self._job = Job("", str(self._folder), chosen.threads, hbm=self.hbm, groups=1 if smoke else 2)

    def run(self) -> None:
        """Everything, in order."""
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
        if form != "int8" or self._smoke or not disk.has_fio():
            self.rows.append(Row(f"packing {form}, of source bytes", said))
        else:
            share = done["nbytes"] / done["seconds"] / disk.fio_write_rate(self._scratch)
            self.rows.append(Row(f"packing {form}, of source bytes", said))
            goal = f">= {PACKING_GOAL}, or bound by a named step"
            self.rows.append(Row("packing int8: written / disk's write rate", f"{share:.2f}", goal))
        least, share = GOALS.get(form, (0.0, 1.0)), done["nbytes"] / self.shape.nbytes()
        self.rows.append(_at_most(f"{form}: bytes of the store / unpacked", share, least[1]))
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
            self.rows.append(_at_most(f"{form}: bytes streamed a token / unpacked", share, most))

    def _fitting(self, store: Path) -> None:
        """All in memory after packing, beside llama.cpp."""
        roomy = replace(self._job, checkpoint=str(store), hbm=2 * self.shape.nbytes())
        ours = statistics.median(_steady(self._measure("int4, all in memory", job=roomy, kind="tierstore_decode")))
        self.rows.append(Row("int4, all in memory", f"{ours:.4f} s a token"))
        if self._smoke or not has_llama_cpp():
            self.rows.append(Row("llama.cpp Q4_0", "not measured: needs llama-cpp-python and gguf"))
            return
        theirs = statistics.median(self._measure("llama.cpp Q4_0", kind="llama_cpp_decode")["seconds"])
        self.rows.append(Row("llama.cpp Q4_0, all in memory", f"{theirs:.4f} s a token"))
        speed = theirs / ours
        self.rows.append(Row("int4: speed / llama.cpp's", f"{speed:.2f}", f">= {LLAMA_CPP_GOAL}", speed >= 0.8))

    def _measure(self, what: str, *, job: Job | None = None, **changes: Any) -> dict[str, Any]:
        say(what)
        asked = replace(job or self._job, **changes)
        found = self._children.run(asked, capped=asked.hbm == self.hbm, on_pause=lambda: None)
        self.figures.setdefault(what, []).append(found)
        return found


def _steady(found: dict[str, Any]) -> list[float]:
    """Seconds of each pass that found the ring in its steady state."""
    return [seconds for group in found["groups"] for seconds in group[1:] or group]


def _at_most(what: str, share: float, most: float) -> Row:
    return Row(what, f"{share:.3f}", f"<= {most}", share <= most)


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="keep the checkpoint here, and use it when it is there")
    parser.add_argument("--formats", nargs="+", default=["int8", "int4"], help="default: int8 int4")
    parser.add_argument("--cap", type=nbytes, default=4 << 30, help="memory of each process, as 4GiB (the default)")
    parser.add_argument("--no-cap", action="store_true", help="without cgroup and dropped caches: no root is needed")
    parser.add_argument("--hbm", type=nbytes, default=256 << 20, help="budget while streaming (default: 256MiB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for each process (default: 900)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny checkpoint and no cap: does it all run?")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children, cgroups and files are cleaned up
    where = machine()
    with ExitStack() as closing:
        beside = chosen.checkpoint.resolve().parent if chosen.checkpoint else None
        scratch = Path(tempfile.mkdtemp(prefix="tierstore-bench-", dir=beside))
        closing.callback(shutil.rmtree, scratch, ignore_errors=True)
        start = time.perf_counter()
        try:
            bench = Bench(chosen, scratch)
            bench.run()
        except (CapError, ChildError, disk.FioError) as error:
            print(f"bench_packed: {error}", file=sys.stderr)
            return 1
    said = {
        "bench": "packed",
        "machine": where,
        "shape": bench.shape.fingerprint(),
        "hbm_nbytes": bench.hbm,
        "threads": chosen.threads,
        "seconds": time.perf_counter() - start,
        "goals": {row.what: row.met for row in bench.rows if row.met is not None},
        "figures": bench.figures,
    }
    text = f"{as_text(bench.rows)}\n\n{json.dumps(said)}\n"
    if chosen.out:
        chosen.out.write_text(text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
