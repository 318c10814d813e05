"""What happened while a session ran: the records a report is added up from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Moved:
    """``nbytes`` crossed ``link`` (such as ``"nvme->hbm"``) between two host clock readings, in seconds."""

    link: str
    nbytes: int
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Stalled:
    """Compute waited ``seconds`` for ``unit``."""

    unit: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Missed:
    """``unit`` was used when the order did not expect it."""

    unit: str


Event = Moved | Stalled | Missed


class Recorder(Protocol):
    """Takes events; called from any thread, must be cheap and must not raise."""

    def __call__(self, event: Event, /) -> None: ...
