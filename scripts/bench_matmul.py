#!/usr/bin/env python
"""Times the ways of multiplying with a packed matrix on this CPU, for few rows and for many.

For each format and shape: milliseconds compiled (where llvmlite is installed), with torch's kernel for the format, by
unpacked tiles, with the plain bfloat16 matrix, and up to how many rows each of the first two is faster than those
behind it. The ways take turns, and each figure is a median: of elapsed time, or with one thread of the processor's, in
which other programs hardly show. What ``tierstore.formats.cpu.choose`` knows comes from here. Last comes one line of
JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from benchmark.command import say
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from tierstore.formats.cpu import arithmetic, can_be_packed, choose, int4_tile_rows, packed_product
from tierstore.formats.fast4 import fast_product
from tierstore.formats.format import Format, Parts
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.linear import by_tiles
from tierstore.formats.named import FORMATS, format_named
from tierstore.formats.scratch import Scratch
from tierstore.kernels.machine_code import can_compile

SHAPES = ((8192, 3072), (3072, 8192), (1024, 4096), (512, 512))
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 128)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WAYS = ("fast", "packed", "tiles", "plain")
RIVALS = {"fast": ("packed", "tiles"), "packed": ("tiles",)}
"""Ways that others, which are there without them, are compared with."""
Ways = dict[str, Callable[[], Tensor]]
NAN = float("nan")
AT_LEAST_SECONDS = 0.1
"""Spent on each way of each product, and at least three times."""


class Bench:
    """Takes the measurements in order and keeps them as lines for people and as figures for programs."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.figures: list[dict[str, Any]] = []
        self.lines = [f"{'format':<10}{'matrix':>13}{'rows':>6}{''.join(f'{way:>10}' for way in WAYS)}  chosen"]
        self._chosen = chosen
        self._dtype = DTYPES[chosen.dtype]
        self._seconds = 0.0 if chosen.smoke else AT_LEAST_SECONDS
        self._clock = time.thread_time if chosen.threads == 1 else time.perf_counter
        self._scratch = Scratch()

    def run(self) -> None:
        """Everything that was asked for."""
        for name in self._chosen.formats:
            for n, k in self._chosen.shapes:
                say(f"{name} {n} x {k}")
                self._meeting(format_named(name), n, k)
        self.lines.append(f"scratch: {self._scratch.nbytes / 2**20:.1f} MiB")

    def _meeting(self, form: Format, n: int, k: int) -> None:
        parts, plain = random_parts(form, n, k), torch.randn(n, k).to(self._dtype)
        until: dict[str, int] = {}
        slower: set[str] = set()
        for m in self._chosen.rows:
            took = medians(
                self._ways(torch.randn(m, k).to(self._dtype), form, parts, plain), self._seconds, self._clock
            )
            chosen = choose(form.name, m, n, k, self._dtype, int4_tile_rows(), can_compile())
            for way, rivals in RIVALS.items():
                if way in took and any(took.get(rival, NAN) < took[way] for rival in rivals):
                    slower.add(way)
                elif way in took and way not in slower:
                    until[way] = m
            self.figures.append({"format": form.name, "n": n, "k": k, "rows": m, "chosen": chosen, "ms": took})
            cells = "".join(f"{took.get(way, NAN):>10.3f}" for way in WAYS).replace("nan", "   ")
            self.lines.append(f"{form.name:<10}{f'{n} x {k}':>13}{m:>6}{cells}  {chosen}")
        for way in RIVALS:
            self.lines.append(f"{form.name:<10}{f'{n} x {k}':>13}  {way} is faster up to {until.get(way, 0)} rows")

    def _ways(self, x: Tensor, form: Format, parts: Parts, plain: Tensor) -> Ways:
        m, (n, k) = len(x), plain.shape

        def by_unpacked_tiles() -> Tensor:
            return by_tiles(x, form, parts, n, k, arithmetic(x.dtype, m), self._scratch)

        ways: Ways = {"tiles": by_unpacked_tiles, "plain": lambda: plain_linear(x, plain)}
        if can_compile() and isinstance(form, Int4 | Int8):
            ways["fast"] = lambda: fast_product(x, form, parts, n, k, self._scratch)
        if can_be_packed(form.name, k, x.dtype, int4_tile_rows()):
            ways["packed"] = lambda: packed_product(x, form, parts, n, k, self._scratch)
        return ways


def medians(ways: Ways, seconds: float, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each way; they take turns, so that what else the machine does falls on all."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    began = clock()
    while len(took["tiles"]) < 3 or clock() - began < seconds * len(ways):
        for name, way in ways.items():
            start = clock()
            way()
            took[name].append((clock() - start) * 1e3)
    return {name: round(statistics.median(times), 4) for name, times in took.items()}


def random_parts(form: Format, n: int, k: int) -> dict[str, Tensor]:
    """Parts of no matrix in particular, with bytes that every 8-bit dtype takes for ordinary numbers."""
    parts = {}
    for part in form.parts(n, k):
        dtype = getattr(torch, part.dtype)
        if dtype.itemsize == 1:
            parts[part.name] = torch.randint(48, 80, part.shape, dtype=torch.uint8).view(dtype)
        else:
            parts[part.name] = torch.randn(part.shape).to(dtype)
    return parts


def shape(text: str) -> tuple[int, int]:
    """A matrix such as ``8192x3072``."""
    try:
        n, k = (int(part) for part in text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape: write 8192x3072") from None
    if n < 1 or k < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has no elements")
    return n, k


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS), help="default: all")
    parser.add_argument("--shapes", nargs="+", type=shape, default=SHAPES, help="matrices, as 8192x3072 (n x k)")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows to multiply with, from few to many")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16", help="of what is multiplied")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="two tiny matrices: does it all run?")
    chosen = parser.parse_args()
    if chosen.smoke:
        chosen.shapes, chosen.rows = ((64, 96), (65, 40)), (1, 3)
    return chosen


def main() -> int:
    """Measure, and print what came out."""
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    bench = Bench(chosen)
    with torch.inference_mode():
        bench.run()
    said = {
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": chosen.threads,
        "dtype": chosen.dtype,
        "figures": bench.figures,
    }
    text = "\n".join(bench.lines) + "\n\n" + json.dumps(said)
    print(text)
    if chosen.out:
        chosen.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
