"""What the commands of the benches have in common."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeVar

from benchmark import disk
from benchmark.cap import CapError
from benchmark.child import ChildError
from tierstore.budget import parse_nbytes
from tierstore.errors import BudgetError


class Runs(Protocol):
    """A bench that takes its measurements in order."""

    def run(self) -> None: ...


_Bench = TypeVar("_Bench", bound=Runs)


def nbytes(text: str) -> int:
    """The bytes that an argument such as ``4GiB`` means."""
    try:
        return parse_nbytes(text)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def say(what: str) -> None:
    """Tell whoever watches what is under way."""
    print(f"{time.strftime('%H:%M:%S')} {what} ...", file=sys.stderr, flush=True)


def parser_for(description: str | None, *, timeout: float) -> argparse.ArgumentParser:
    """Of a bench whose processes run below a memory cap, with the arguments that all of these take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="keep the checkpoint here, and use it when it is there")
    parser.add_argument("--cap", type=nbytes, default=4 << 30, help="memory of each process, as 4GiB (the default)")
    parser.add_argument("--no-cap", action="store_true", help="without cgroup and dropped caches: no root is needed")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of torch (default: every core)")
    parser.add_argument(
        "--timeout", type=float, default=timeout, help=f"seconds for each process (default: {timeout:g})"
    )
    parser.add_argument("--out", type=Path, help="write table and JSON here too")
    parser.add_argument("--smoke", action="store_true", help="a tiny checkpoint, no cap, no fio: does it all run?")
    return parser


def measured(
    name: str, chosen: argparse.Namespace, make: Callable[[argparse.Namespace, Path], _Bench]
) -> tuple[_Bench, float] | None:
    """The bench after its run, in a folder of its own beside the checkpoint, and the seconds it took; None where that
    failed, as was said then."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children, cgroups and files are cleaned up
    beside = chosen.checkpoint.resolve().parent if chosen.checkpoint else None
    with tempfile.TemporaryDirectory(prefix="tierstore-bench-", dir=beside) as scratch:
        start = time.perf_counter()
        try:
            bench = make(chosen, Path(scratch))
            bench.run()
        except (CapError, ChildError, disk.FioError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return None
        return bench, time.perf_counter() - start


def publish(tables: str, said: Mapping[str, Any], out: Path | None) -> None:
    """Print the tables and, last, one line of JSON; and write them to ``out``."""
    text = f"{tables}\n\n{json.dumps(said)}\n"
    if out:
        out.write_text(text)
    print(text, end="")
