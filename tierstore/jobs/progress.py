"""How far a job is, as a line on a terminal that changes, or as a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self, TextIO

from tierstore.budget import format_nbytes

if TYPE_CHECKING:
    from rich.live import Live

EVERY_SECONDS = 30.0
"""How often a line is written where the output is no terminal."""


@dataclass(frozen=True, slots=True)
class JobProgress:
    """A job so far. ``done_rows`` has the ``failed_rows`` among them, and the ``before_rows`` that were done when this
    run began; ``total_rows`` is None where it is not known. Tokens, passes, ``moved_nbytes`` of weights and ``seconds``
    are this run's."""

    done_rows: int
    total_rows: int | None
    before_rows: int
    failed_rows: int
    prompt_tokens: int
    generated_tokens: int
    passes: int
    moved_nbytes: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Of this run."""
        return (self.done_rows - self.before_rows) / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Generated ones, of this run."""
        return self.generated_tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """At the rate of rows so far; None before there is one."""
        if self.total_rows is None or self.rows_per_second == 0:
            return None
        return max(self.total_rows - self.done_rows, 0) / self.rows_per_second

    def __str__(self) -> str:
        total = "" if self.total_rows is None else f" of {self.total_rows}"
        failed = f" ({self.failed_rows} failed)" if self.failed_rows else ""
        left = self.seconds_left
        parts = [
            f"{self.done_rows}{total} rows{failed}",
            f"{self.rows_per_second:.2f} rows/s",
            f"{self.tokens_per_second:.1f} tokens/s",
            *([] if left is None else [f"{_duration(left)} left"]),
            f"{format_nbytes(self.moved_nbytes)} moved",
            f"pass {self.passes}",
        ]
        return ", ".join(parts)


class ProgressLine:
    """Shows what it is told. A context manager, at whose end the line of a terminal is gone.

    ``out`` is written to, which is asked whether it is a terminal; ``clock`` gives seconds, for tests.
    """

    def __init__(self, out: TextIO, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._last: JobProgress | str = "opening the checkpoint"
        self._written = clock()
        self._live = _live(out, lambda: str(self._last)) if out.isatty() else None

    def __call__(self, now: JobProgress) -> None:
        """Tell it how far the job is."""
        self._last = now
        if self._live is None and self._clock() - self._written >= EVERY_SECONDS:
            self._written = self._clock()
            print(now, file=self._out, flush=True)

    def say(self, line: str) -> None:
        """A line of its own that stays."""
        if self._live is None:
            print(line, file=self._out, flush=True)
        else:
            self._live.console.print(line, markup=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()


def _live(out: TextIO, line: Callable[[], str]) -> Live:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    # Live asks for the line from a thread of its own, so nothing here has to poll.
    return Live(
        get_renderable=lambda: Text(line(), no_wrap=True, overflow="ellipsis"),
        console=Console(file=out, highlight=False),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )


def _duration(seconds: float) -> str:
    whole = round(seconds)
    hours, minutes, left = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{left:02d}"
