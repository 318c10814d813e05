#!/usr/bin/env python
"""Measures the peak of activations while prompts of several lengths go through a model, whole and in chunks.

The model is a tiny Llama with random weights in float32; its cache is transformers' own, or one in pages, all in hbm.
Counted are the bytes of all tensors that live at once, but for weights, the prompt, keys and values in the cache, and
what the cache in pages has taken for good: the copying of a cache that grows is counted. Prints a table and, last, one
line of JSON.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmark.command import nbytes, publish, say
from benchmark.live import LiveBytes
from benchmark.table import Row, as_text, at_most, goals_of
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import Cache, DynamicCache

import tierstore
from tierstore.budget import Budget, format_nbytes
from tierstore.hf.prefill import ChunkedPrefill

LENGTHS, SMOKE_LENGTHS = (8192, 16384, 32768), (512, 1024, 2048)
PAGED = "in chunks, paged"
FLAT = 1.05
"""The peak of the longest prompt may be this many times that of the shortest."""


def make_model() -> Any:
    """A Llama of two layers with grouped queries."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max(LENGTHS),
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def tensors_of(cache: Cache) -> Iterator[Tensor]:
    """The keys and values that a cache holds now."""
    layer: Any
    for layer in cache.layers:
        yield from (tensor for tensor in (layer.keys, layer.values) if isinstance(tensor, Tensor))


class Bench:
    """Takes the measurements in order and keeps them by way and length."""

    def __init__(self, model: Any, lengths: Sequence[int], bound: int) -> None:
        self.figures: dict[str, dict[int, dict[str, Any]]] = {}
        self._model, self._lengths, self._bound = model, lengths, bound

    def run(self) -> None:
        """Measure every way."""
        self._measure("whole")
        with closing(ChunkedPrefill(self._model, self._bound)):
            self._measure("in chunks")
        kv_nbytes = 2 * self._kv_nbytes(max(self._lengths))
        with tierstore.offload(
            self._model, Budget("1GiB", kv_hbm=kv_nbytes, activations=self._bound), device="cpu"
        ) as session:
            self._measure(PAGED, session.kv)

    def _measure(self, way: str, cache: Any = None) -> None:
        for length in self._lengths:
            say(f"{way}, {length} tokens")
            if cache is not None:
                cache.reset()
            self.figures.setdefault(way, {})[length] = self._one(length, cache)

    def _kv_nbytes(self, length: int) -> int:
        config = self._model.config
        heads = config.num_hidden_layers * config.num_key_value_heads
        return int(length * heads * 2 * config.head_dim * self._model.dtype.itemsize)

    def _one(self, length: int, paged: Any) -> dict[str, Any]:
        size = self._model.config.vocab_size
        prompt = torch.randint(size, (1, length), generator=torch.Generator().manual_seed(length))
        cache = paged or DynamicCache(config=self._model.config)
        start = time.perf_counter()
        with torch.no_grad(), LiveBytes(lambda: tensors_of(cache)) as live:
            token = self._model(prompt, cache=cache, logits_to_keep=1).logits[0, -1].argmax()
        return {"peak_nbytes": live.peak, "token": int(token), "seconds": time.perf_counter() - start}


def rows_of(figures: dict[str, dict[int, dict[str, Any]]], bound: int) -> list[Row]:
    """What was measured, and what was to be reached."""
    rows = []
    whole = figures["whole"]
    for way, found in figures.items():
        peaks = [one["peak_nbytes"] for one in found.values()]
        rows += [
            Row(f"{way}: peak at {length} tokens", format_nbytes(one["peak_nbytes"])) for length, one in found.items()
        ]
        grows = f"{way}: longest by shortest"
        rows.append(
            at_most(grows, peaks[-1] / peaks[0], FLAT) if way == PAGED else Row(grows, f"{peaks[-1] / peaks[0]:.3f}")
        )
        if way == "whole":
            continue
        most = max(peaks)
        rows.append(Row(f"{way}: highest peak", format_nbytes(most), f"<= {format_nbytes(bound)}", most <= bound))
        same = all(one["token"] == whole[length]["token"] for length, one in found.items())
        rows.append(Row(f"{way}: next token equal", str(same), "True", same))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bound", type=nbytes, default=32 << 20, help="of activations (default: 32MiB)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="short prompts: does it all run?")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    start = time.perf_counter()
    bench = Bench(make_model(), SMOKE_LENGTHS if chosen.smoke else LENGTHS, chosen.bound)
    bench.run()
    rows = rows_of(bench.figures, chosen.bound)
    said = {
        "bench": "activations",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "bound_nbytes": chosen.bound,
        "threads": chosen.threads,
        "seconds": time.perf_counter() - start,
        "goals": goals_of(rows),
        "figures": bench.figures,
    }
    publish(as_text(rows), said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
