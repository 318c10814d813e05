#!/usr/bin/env python
"""Generates in batches with a checkpoint larger than a memory cap, and says how near to the processor's limit it comes.

Accelerate's disk offload is measured beside; then drafted tokens, with a small model streamed from disk.

Each process runs alone, that of a checkpoint below the cap (page cache included) with caches dropped first. Needs root
for that. Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_streaming import HEADROOM_NBYTES, TINY
from benchmark.child import ChildError, Children
from benchmark.command import measured, nbytes, parser_for, publish, say
from benchmark.job import Job
from benchmark.machine import machine
from benchmark.table import Row, as_text, goals_of
from benchmark.words import make_words
from make_checkpoint import Shape, make_checkpoint
from quantization.checkpoint import checkpoint_of
from quantization.texts import topics

from tierstore.budget import format_nbytes

LINEAR_GOAL, BOUND_GOAL, ACCELERATE_GOAL, PREDICTED_GOAL, DRAFTED_GOAL = 0.9, 0.85, 3.0, 0.15, 1.8
PARTS = ("batch", "accelerate", "drafts")
SIZES, SMOKE_SIZES = (1, 8, 32), (2,)
ACCELERATE_SIZES, SMOKE_ACCELERATE_SIZES = (16, 48), (2,)
PROMPT_TOKENS = 2
"""Few, so that what is measured is how texts are generated."""
DRAFT_CACHE_NBYTES = 16 << 20
"""What the draft model may take beside its weights, so that the large one has as much as without it."""


class Bench:
    """Takes the measurements in order and keeps them as rows for people and as figures for programs."""

    def __init__(self, chosen: argparse.Namespace, scratch: Path) -> None:
        smoke: bool = chosen.smoke
        self.shape = TINY if smoke else Shape()
        self.rows: list[Row] = []
        self.figures: dict[str, Any] = {}
        self.failed = False
        self._parts: list[str] = chosen.parts
        self._chosen, self._smoke, self._scratch = chosen, smoke, scratch
        self._folder: Path = chosen.checkpoint or scratch / "checkpoint"
        self._sizes = SMOKE_SIZES if smoke else tuple(chosen.sizes)
        cap = None if smoke or chosen.no_cap else chosen.cap
        self._children = Children(cap, timeout_seconds=60 if smoke else chosen.timeout, quick=smoke)
        both = self.shape.nbytes() // 2 if smoke else chosen.hbm or chosen.cap - HEADROOM_NBYTES
        self._kv_hbm = 4 << 20 if smoke else chosen.kv_hbm
        self.hbm = both if smoke else both - self._kv_hbm
        self._job = Job("", str(self._folder), chosen.threads, hbm=self.hbm, kv_hbm=self._kv_hbm)
        self._job = replace(self._job, steps=8 if smoke else chosen.tokens, length=PROMPT_TOKENS)

    def run(self) -> None:
        """Everything that was asked for."""
        with self._children:
            if {"batch", "accelerate"}.intersection(self._parts):
                say(f"checkpoint of {format_nbytes(self.shape.nbytes())} in {self._folder}")
                make_checkpoint(self._folder, self.shape)
                make_words(self._folder, self.shape.vocab)
            if "batch" in self._parts:
                self._batches()
            if "accelerate" in self._parts:
                self._accelerate()
            if "drafts" in self._parts:
                self._drafts()

    def _batches(self) -> None:
        rates: dict[int, float] = {}
        for size in self._sizes:
            found = self._measure(f"batch of {size}", kind="batch", capped=True, rows=size)
            rates[size], whole = _steady(found, size), _whole(found)
            planned = size * self._job.steps / found["plan"]["seconds"]
            off = abs(planned / whole - 1)
            said = (
                f"{rates[size]:.2f} tokens/s; {whole:.2f} with prompts and tail, {planned:.2f} planned ({off:.0%} off)"
            )
            self.rows.append(Row(f"batch of {size}", said, f"<= {PREDICTED_GOAL:.0%} off", off <= PREDICTED_GOAL))
        largest = max(rates)
        hbm = 2 * self.shape.nbytes()
        resident = self._measure("everything in memory", kind="batch", capped=False, rows=largest, hbm=hbm)
        bound = _steady(resident, largest)
        self.figures["rates"] = rates | {"resident": bound}
        first = min(rates)
        for size, rate in rates.items():
            linear = min(rates[first] * size / first, bound)
            share = rate / linear
            what = f"batch of {size}: of {size // first} x the rate of {first}, or of the compute-bound rate"
            self.rows.append(Row(what, f"{share:.2f}", f">= {LINEAR_GOAL}", share >= LINEAR_GOAL))
        share = max(rates.values()) / bound
        what = f"best rate / compute-bound rate of {bound:.2f} tokens/s (batch of {largest} in memory)"
        self.rows.append(Row(what, f"{share:.2f}", f">= {BOUND_GOAL}", share >= BOUND_GOAL))

    def _accelerate(self) -> None:
        found: dict[int, float] = {}
        for size in SMOKE_ACCELERATE_SIZES if self._smoke else ACCELERATE_SIZES:
            try:
                what = f"Accelerate, batch of {size}"
                done = self._measure(what, kind="accelerate_batch", capped=True, rows=size, steps=4, length=2)
                found[size] = done["tokens_per_second"]
                self.rows.append(Row(f"Accelerate disk offload, batch of {size}", f"{found[size]:.2f} tokens/s"))
            except ChildError as error:
                self.rows.append(Row(f"Accelerate disk offload, batch of {size}", str(error).splitlines()[0]))
                break
        ours = {size: rate for size, rate in self.figures.get("rates", {}).items() if size != "resident"}
        if found and ours:
            ratio = max(ours.values()) / max(found.values())
            goal = f">= {ACCELERATE_GOAL}"
            self.rows.append(
                Row("tierstore / Accelerate, best of each", f"{ratio:.2f}", goal, ratio >= ACCELERATE_GOAL)
            )

    def _drafts(self) -> None:
        checkpoint = checkpoint_of("bench_batch", argparse.Namespace(checkpoint=None, smoke=self._smoke), self._scratch)
        prompts = self._scratch / "prompts.jsonl"
        if self._smoke:
            prompts.write_text(json.dumps({"id": 0, "prompt": "one two one two "}) + "\n")
        else:
            _write_prompts(prompts, self._chosen.prompts)
        ways = {"off": ("off", 0), "auto": ("auto", 0)}
        if not self._smoke:
            draft, nbytes = self._packed(checkpoint)
            ways["auto with a draft model"] = (f"auto:{draft}", nbytes + DRAFT_CACHE_NBYTES)
        done: dict[str, dict[str, Any]] = {}
        for name, (way, beside) in ways.items():
            done[name] = self._measure(
                f"drafts {name}",
                kind="speculate",
                capped=False,
                checkpoint=str(checkpoint),
                form=way,
                out=str(prompts),
                steps=8 if self._smoke else self._chosen.drafted,
                hbm=self._chosen.draft_hbm + beside,
                kv_hbm=8 << 20 if self._smoke else 128 << 20,
            )
        plain = done["off"]
        for name, found in done.items():
            ratio = found["tokens_per_second"] / plain["tokens_per_second"]
            right = f"{found['accepted_tokens']} of {found['drafted_tokens']} drafted tokens were right"
            said = f"{found['tokens_per_second']:.2f} tokens/s, {ratio:.2f} x; {right}"
            goal = ("", None) if name == "off" else (f">= {DRAFTED_GOAL} x", ratio >= DRAFTED_GOAL)
            self.rows.append(Row(f"one text at a time, drafts {name}", said, *goal))
            same = found["texts"] == plain["texts"]
            if name != "off":
                self.rows.append(Row(f"drafts {name}: texts equal", "yes" if same else "no", "yes", same))

    def _packed(self, checkpoint: Path) -> tuple[Path, int]:
        """The model as it drafts for itself, and its bytes."""
        out = self._scratch / "draft"
        given = {"checkpoint": str(checkpoint), "form": "int4", "out": str(out)}
        found = self._measure("pack the draft model", kind="pack_draft", capped=False, **given)
        return out, found["nbytes"]

    def _measure(self, what: str, *, capped: bool, **changes: Any) -> dict[str, Any]:
        say(what)
        found = self._children.run(replace(self._job, **changes), capped=capped, on_pause=lambda: None)
        self.figures[what] = found
        return found


def _steady(found: dict[str, Any], size: int) -> float:
    """Tokens per second while all sequences generate, from the median of such passes."""
    passes = [after[0] - before[0] for before, after in pairwise(found["moments"]) if after[1] - before[1] == size]
    if not passes:
        raise ChildError(f"a batch of {size} had no pass in which all of its sequences generate: raise --tokens")
    return float(size / statistics.median(passes))


def _whole(found: dict[str, Any]) -> float:
    seconds, tokens, _ = found["moments"][-1]
    return float(tokens / seconds)


def _write_prompts(file: Path, count: int) -> None:
    """The first sentences of English texts that ship with Python, each to be summed up or gone on with."""
    lines = []
    for number, text in zip(range(count), _paragraphs(), strict=False):
        asked = f"{text}\n\nRepeat the most important sentence of this text, then explain it."
        lines.append(json.dumps({"id": number, "messages": [{"role": "user", "content": asked}]}))
    file.write_text("".join(f"{line}\n" for line in lines))


def _paragraphs() -> list[str]:
    return [each[:600] for topic in topics().split("\n\n\n") if len(each := " ".join(topic.split())) > 300]


def arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = parser_for(__doc__, timeout=600)
    parser.add_argument("--hbm", type=nbytes, help="of weights and KV together (default: the cap - 700 MiB)")
    parser.add_argument("--kv-hbm", type=nbytes, default=512 << 20, help="of KV in that (default: 512MiB)")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="batches (default: 1 8 32)")
    parser.add_argument("--tokens", type=int, default=24, help="of each text (default: 24)")
    parser.add_argument("--prompts", type=int, default=3, help="whose texts are drafted (default: 3)")
    parser.add_argument("--drafted", type=int, default=96, help="tokens of each of these texts (default: 96)")
    parser.add_argument("--draft-hbm", type=nbytes, default=64 << 20, help="of weights then (default: 64MiB)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    where = machine()
    done = measured("bench_batch", chosen, Bench)
    if done is None:
        return 1
    bench, seconds = done
    said = {
        "bench": "batch",
        "machine": where,
        "shape": bench.shape.fingerprint(),
        "hbm_nbytes": bench.hbm,
        "cap_nbytes": None if chosen.smoke or chosen.no_cap else chosen.cap,
        "threads": chosen.threads,
        "seconds": seconds,
        "goals": goals_of(bench.rows),
        "figures": bench.figures,
    }
    publish(as_text(bench.rows), said, chosen.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
