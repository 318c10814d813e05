"""Batches of rows: a file of prompts in, a file of results out, or a stream of both."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tierstore.sampling import Sampling

if TYPE_CHECKING:
    from tierstore.jobs.progress import JobProgress
    from tierstore.jobs.running import JobInterrupted, JobReport, run
    from tierstore.jobs.settings import JobSettings
    from tierstore.jobs.streaming import Result, stream

__all__ = ["JobInterrupted", "JobProgress", "JobReport", "JobSettings", "Result", "Sampling", "run", "stream"]

_WHERE = {
    "JobInterrupted": "running",
    "JobProgress": "progress",
    "JobReport": "running",
    "JobSettings": "settings",
    "Result": "streaming",
    "run": "running",
    "stream": "streaming",
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for, so that files of rows can be read without it."""
    if name in _WHERE:
        return getattr(import_module(f"tierstore.jobs.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
