"""Every test marked ``cuda`` or ``gds``, each file in processes of its own, which a device that fails spoils.

Most of the time kernels are compiled, each by one core. So processes run side by side, and share the tests of a file.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from gpu.child import ROOT
from gpu.settings import Settings
from tierstore.machine import inspect_machine

MARKS = ("cuda", "gds")
PROCESSES, SHARES = 8, 4
"""At most so many side by side, and so many for a file."""
HBM, RAM, CORES = 2 << 30, 4 << 30, 2
"""What each of several processes has: bytes and cores."""
_WORDS = ("passed", "failed", "skipped")
_NO_TESTS = 5
"""How pytest ends when it found none."""

Outcomes = dict[str, tuple[str, str]]


def measure(settings: Settings) -> dict[str, Any]:
    """Counts, the names of what failed with the ends of their messages, and why others were skipped."""
    until = time.perf_counter() + settings.seconds
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if has_marks(path.read_text())]
    files.sort(key=lambda path: -path.stat().st_size)  # what may take long begins first
    if settings.smoke:
        files = [path for path in files if path.name == "test_copies.py"]
    processes = 1 if settings.smoke else _processes()
    shares = min(processes, SHARES)

    def run(task: tuple[Path, int]) -> tuple[Outcomes, str]:
        path, share = task
        left = until - time.perf_counter()
        if left < 2:
            return {}, "was not run: the time was up"
        return _run(path, Path(settings.scratch), left, share, shares)

    tasks = [*product(files, range(shares))]
    with ThreadPoolExecutor(processes) as threads:
        found = [*zip(tasks, threads.map(run, tasks), strict=True)]
    outcomes = {test: outcome for _, (some, _) in found for test, outcome in some.items()}
    broken = [f"{path.name} {problem}" for (path, _), (_, problem) in found if problem]
    told = {path for (path, _), (some, problem) in found if some or problem}
    broken += [f"{path.name} has no such test" for path in files if path not in told]
    counts = {word: sum(outcome == word for outcome, _ in outcomes.values()) for word in _WORDS}
    reasons = sorted({why.removeprefix("Skipped: ") for outcome, why in outcomes.values() if outcome == "skipped"})
    return {
        **counts,
        "files": sorted(path.name for path in files),
        "processes": processes,
        "broken": broken,
        "failures": {test: why for test, (outcome, why) in outcomes.items() if outcome == "failed"},
        "skip_reasons": reasons,
    }


def has_marks(source: str) -> bool:
    """Whether a file of tests has some for a GPU: what it only quotes is none."""
    return any(
        isinstance(node, ast.Attribute) and node.attr in MARKS and ast.unparse(node.value).endswith("mark")
        for node in ast.walk(ast.parse(source))
    )


def _processes() -> int:
    machine = inspect_machine()
    hbm = min((gpu.free_nbytes for gpu in machine.gpus), default=0)
    cores = len(os.sched_getaffinity(0))
    return max(1, min(PROCESSES, cores // CORES, machine.ram_available_nbytes // RAM, hbm // HBM))


def _run(path: Path, scratch: Path, seconds: float, share: int = 0, shares: int = 1) -> tuple[Outcomes, str]:
    """Of a share of the file's tests the outcome and reason by test, and what went wrong with the process itself."""
    name = f"{path.stem}-{share}"
    lines = scratch / f"{name}.outcomes"
    ini = Path(__file__).with_name("pytest.ini")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda or gds", "-c", str(ini)]
    command += [f"--rootdir={ROOT}", f"--basetemp={scratch / name}", f"--outcomes={lines}"]
    command += [f"--share={share}", f"--shares={shares}", str(path)]
    problem = ""
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        if status not in (0, 1, _NO_TESTS):  # 1 is that some test failed
            problem = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        problem = f"took more than {seconds:.0f} s and was ended"
    found: Outcomes = {}
    for test, outcome, why in _lines(lines):
        if found.get(test, ("", ""))[0] != "failed":  # a test that passed can still fail in its teardown
            found[test] = (outcome, why)
    for test, (outcome, _) in found.items():
        if outcome == "begun":
            found[test] = ("failed", f"never ended: the process {problem}")
    return found, problem


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    if path.exists():
        for line in path.read_text().splitlines():
            test, outcome, why = json.loads(line)
            yield test, outcome, why
