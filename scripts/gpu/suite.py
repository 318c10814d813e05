"""Every test marked ``cuda`` or ``gds``, one process a file: an error of the device spoils the process it is in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpu.child import ROOT
from gpu.settings import Settings

_MARKED = re.compile(r"mark\.(cuda|gds)\b")
_WORDS = ("passed", "failed", "skipped")


def measure(settings: Settings) -> dict[str, Any]:
    """Counts, the names of what failed with the ends of their messages, and why others were skipped."""
    start = time.perf_counter()
    outcomes: dict[str, tuple[str, str]] = {}
    broken: list[str] = []
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if _MARKED.search(path.read_text()))
    if settings.smoke:
        files = [path for path in files if path.name == "test_copies.py"]
    for path in files:
        left = settings.seconds - (time.perf_counter() - start)
        if left < 2:
            broken.append(f"{path.name} was not run: the time was up")
            continue
        found, problem = _run(path, Path(settings.scratch), left)
        outcomes |= found
        if problem:
            broken.append(f"{path.name} {problem}")
    counts = {word: sum(outcome == word for outcome, _ in outcomes.values()) for word in _WORDS}
    reasons = sorted({why.removeprefix("Skipped: ") for outcome, why in outcomes.values() if outcome == "skipped"})
    return {
        **counts,
        "files": [path.name for path in files],
        "broken": broken,
        "failures": {test: why for test, (outcome, why) in outcomes.items() if outcome == "failed"},
        "skip_reasons": reasons,
    }


def _run(path: Path, scratch: Path, seconds: float) -> tuple[dict[str, tuple[str, str]], str]:
    """Outcome and reason by test, and what went wrong with the process itself."""
    lines = scratch / f"{path.stem}.outcomes"
    ini = Path(__file__).with_name("pytest.ini")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda or gds", "-c", str(ini)]
    command += [f"--rootdir={ROOT}", f"--basetemp={scratch / path.stem}", f"--outcomes={lines}", str(path)]
    problem = ""
    try:
        status = subprocess.run(command, cwd=ROOT, timeout=seconds, check=False).returncode
        if status not in (0, 1):  # 1 is that some test failed
            problem = f"ended with status {status}"
    except subprocess.TimeoutExpired:
        problem = f"took more than {seconds:.0f} s and was ended"
    found: dict[str, tuple[str, str]] = {}
    for test, outcome, why in _lines(lines):
        if found.get(test, ("", ""))[0] != "failed":  # a test that passed can still fail in its teardown
            found[test] = (outcome, why)
    for test, (outcome, _) in found.items():
        if outcome == "begun":
            found[test] = ("failed", f"never ended: the process {problem}")
    if not found and not problem:
        problem = "has no such test"
    return found, problem


def _lines(path: Path) -> Iterator[tuple[str, str, str]]:
    if path.exists():
        for line in path.read_text().splitlines():
            test, outcome, why = json.loads(line)
            yield test, outcome, why
