"""Runs one part in a process of its own, which may crash, hang or be killed without harm to the others."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.settings import Part, Settings

ROOT = Path(__file__).resolve().parents[2]
STAND_INS = Path(__file__).resolve().parent / "stand_ins"
GRACE_SECONDS = 5.0
"""Between the time at which a part should end by itself and the one at which it is killed."""


def run_part(part: Part, settings: Settings) -> dict[str, Any]:
    """The part's figures, with ``seconds``; or ``error``, in words, and the ``log``'s end."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=settings.scratch) as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        told = replace(settings, scratch=folder)
        with log.open("w") as said:
            child = subprocess.Popen(
                [sys.executable, "-m", "gpu.child", part.module, json.dumps(asdict(told)), str(result)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                env=environment(folder),
                start_new_session=True,
            )
            try:
                status: int | None = child.wait(settings.seconds + GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # also what it started
                child.wait()
        found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
        if status != 0 or not found:
            found |= {"error": _why(status, settings.seconds), "log": log.read_text(errors="replace")[-6000:]}
    return found | {"seconds": round(time.perf_counter() - start, 2)}


def environment(scratch: str) -> dict[str, str]:
    """What child processes see: the source tree, stand-ins for what is not installed, and no network."""
    missing = [name for name in ("psutil", "hypothesis") if find_spec(name) is None]
    paths = [str(ROOT), str(ROOT / "scripts"), *(str(STAND_INS / name) for name in missing)]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "TMPDIR": scratch,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
    }


def save(path: Path, figures: Any) -> None:
    """Written whole or not at all: the process may be killed meanwhile."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(figures))
    unfinished.replace(path)


def _why(status: int | None, seconds: float) -> str:
    if status is None:
        return f"took more than {seconds:.0f} s and was ended"
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def main() -> None:
    module, told, result = sys.argv[1:]
    figures = importlib.import_module(f"gpu.{module}").measure(Settings(**json.loads(told)))
    save(Path(result), figures)
    sys.stdout.flush()
    os._exit(0)  # figures are safe: what unloading a driver may do is not


if __name__ == "__main__":
    main()
