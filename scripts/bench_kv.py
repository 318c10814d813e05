#!/usr/bin/env python
"""Decodes with most of a KV cache on disk, and with all of it in memory; counts what beams and sequences share.

The cache is filled with random keys and values, since what is measured is their way to attention: how near a token
comes to the larger of its compute time and of the time that the disk needs for the bytes. Each token takes turns with a
read of as many bytes and nothing else, and with fio, as a disk that others use too is not equally fast all the time.
Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmark import disk
from benchmark.command import publish, say
from benchmark.filled import Decoder, decode
from benchmark.machine import machine
from benchmark.table import Row, as_text, at_most, goals_of

import tierstore
from tierstore import Budget
from tierstore.budget import format_nbytes

WALL_GOAL = 1.10
BEAM_GOAL = 1.2
BELOW = 0.9
"""The part of the KV cache that is not in HBM."""
STEPS, WARM = 8, 3
SMALL = Decoder(layers=4, kv_heads=2, head_dim=32, hidden=128)
"""What sharing is counted on: pages are the same whatever their size."""


class Bench:
    """Takes the measurements in order and keeps them as rows for people and as figures for programs."""

    def __init__(self, chosen: argparse.Namespace, folder: Path) -> None:
        self.rows: list[Row] = []
        self.figures: dict[str, Any] = {}
        self._smoke: bool = chosen.smoke
        self._folder, self._file = folder, folder / "rate.bin"
        self._format: str | None = chosen.format
        self._tokens: int = 4096 if chosen.smoke else chosen.tokens
        self._prompt = 256 if chosen.smoke else 4096
        torch.set_num_threads(chosen.threads)
        self._device = torch.device("cpu")
        self._decoder = Decoder(4, 8, 16, 128) if chosen.smoke else Decoder(16, 8, 128, 1024)
        self._model: Any = self._decoder.build(self._device)
        self._small: Any = SMALL.build(self._device)

    def run(self) -> None:
        """Everything, in order."""
        raw = self._decoder.kv_nbytes(self._tokens)
        roomy = {"kv_hbm": 2 * raw + (64 << 20)}
        say(f"a KV cache of {self._tokens} tokens")
        with self._session(roomy) as session:
            self._decoder.fill(session.kv, self._tokens, self._device)
            cells = session.report().kv.hbm_nbytes
        tight = {"kv_hbm": int((1 - BELOW) * cells), "kv_nvme": 2 * cells}
        laps = self._laps(cells - tight["kv_hbm"])
        compute, wall, fio = [], [], []
        for _ in range(1 if self._smoke else 3):
            say("decode, all in memory")
            compute += self._decode(roomy)["seconds"]
            say(f"decode, {BELOW:.0%} on disk")
            found = self._decode(tight, laps.run)
            wall += found["seconds"]
            if disk.has_fio() and not self._smoke:
                say("fio")
                fio.append(max(disk.fio_rate([self._file], setting) for setting in disk.SETTINGS[1:6:2]))
        laps.close()
        self.figures |= {"in memory": compute, "on disk": wall, "bytes alone": laps.seconds}
        self.figures |= {"fio_bytes_per_second": fio, "kv": asdict(found["kv"]), "full_pages_nbytes": cells}
        rate = (cells - tight["kv_hbm"]) / statistics.median(laps.seconds)
        rate = max([rate, *([statistics.median(fio)] if fio else [])])
        self._decode_rows(statistics.median(compute), statistics.median(wall), found["read_nbytes"], rate)
        self._sharing_rows()

    @contextmanager
    def _session(self, kv: dict[str, int], model: Any = None) -> Iterator[Any]:
        budget = Budget("4GiB", **kv)
        with tierstore.offload(
            model or self._model, budget, kv_format=self._format, store=self._folder, device="cpu"
        ) as session:
            yield session

    def _decode(self, kv: dict[str, int], between: Callable[[], None] = lambda: None) -> dict[str, Any]:
        with self._session(kv) as session:
            self._decoder.fill(session.kv, self._tokens, self._device)
            return decode(session, _timed, warm=WARM, steps=STEPS, between=between)

    def _decode_rows(self, compute: float, wall: float, read_nbytes: float, rate: float) -> None:
        transfer = read_nbytes / rate
        self.figures |= {"disk_bytes_per_second": rate, "read_nbytes_per_token": read_nbytes}
        self.rows += [
            Row("decode, all in memory", f"{compute:.4f} s a token"),
            Row(f"decode, {BELOW:.0%} on disk", f"{wall:.4f} s a token"),
            Row("read from disk", f"{format_nbytes(read_nbytes)} a token"),
            Row("disk, in turns with it, at its best", f"{format_nbytes(rate)}/s, {transfer:.4f} s for these bytes"),
            at_most("wall / max(compute, transfer)", wall / max(compute, transfer), WALL_GOAL),
        ]

    def _laps(self, nbytes: int) -> disk.Laps:
        """Over a file of its own, written as pages are."""
        with self._file.open("wb") as file:
            for at in range(0, nbytes, 1 << 20):
                file.write(os.urandom(min(1 << 20, nbytes - at)))
            os.fsync(file.fileno())
        return disk.Laps(self._file, nbytes)

    def _sharing_rows(self) -> None:
        """Beams over one prompt, and sequences that end anywhere in a page."""
        prompt = torch.randint(1, 500, (1, self._prompt))
        kv = {"kv_hbm": 1 << 30}
        held = {}
        for beams in (1, 4):
            say(f"{beams} beams over {self._prompt} tokens")
            with self._session(kv, self._small) as session:
                session.module.generate(
                    prompt, attention_mask=torch.ones_like(prompt), num_beams=beams, max_new_tokens=16, do_sample=False
                )
                held[beams] = session.report().kv.held_pages
        self.figures["held_pages"] = held
        self.rows.append(at_most("pages of 4 beams / of 1 sequence", held[4] / held[1], BEAM_GOAL))
        rows = torch.randint(1, 500, (8, 192))
        mask = torch.ones_like(rows)
        for row in range(8):
            mask[row, : 13 * row] = 0  # padded on the left
        with self._session(kv, self._small) as session:
            session.module.generate(rows, attention_mask=mask, max_new_tokens=4, do_sample=False)
            unused = session.report().kv.unused_tokens / 8
        self.rows.append(at_most("unused tokens a sequence / page", unused / 64, 1.0))


def _timed(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384, help="in the cache (default: 16384, 1 GiB in bfloat16)")
    parser.add_argument("--format", help="what full pages are kept in (default: the model's own bfloat16)")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure (default: a temporary one)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny cache, no fio: does it all run?")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    with tempfile.TemporaryDirectory(prefix="tierstore-bench-", dir=chosen.folder) as folder:
        bench = Bench(chosen, Path(folder))
        bench.run()
    said = {
        "machine": machine(),
        "threads": chosen.threads,
        "goals": goals_of(bench.rows),
        "figures": bench.figures,
    }
    publish(as_text(bench.rows), said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
