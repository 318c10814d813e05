"""What is shown of a job that runs, and how often."""

from __future__ import annotations

import io
from dataclasses import replace

from tierstore.jobs.progress import EVERY_SECONDS, JobProgress, ProgressLine

NOW = JobProgress(
    done_rows=30,
    total_rows=130,
    before_rows=10,
    failed_rows=2,
    prompt_tokens=7,
    generated_tokens=500,
    passes=12,
    moved_nbytes=3 << 30,
    seconds=40.0,
)


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_says_it_all() -> None:
    assert str(NOW) == ("30 of 130 rows (2 failed), 0.50 rows/s, 12.5 tokens/s, 0:03:20 left, 3.00 GiB moved, pass 12")
    assert NOW.seconds_left == 200


def test_what_is_not_known_is_not_said() -> None:
    began = replace(NOW, done_rows=10, total_rows=None, failed_rows=0, generated_tokens=0, seconds=0.0)
    assert str(began) == "10 rows, 0.00 rows/s, 0.0 tokens/s, 3.00 GiB moved, pass 12"
    assert replace(began, total_rows=20).seconds_left is None


def test_without_a_terminal_a_line_comes_now_and_then() -> None:
    out, clock = io.StringIO(), Clock()
    with ProgressLine(out, clock=clock) as line:
        line.say("the plan")
        for second in range(int(2.5 * EVERY_SECONDS)):
            clock.seconds = second
            line(replace(NOW, passes=second))
    first, *others = out.getvalue().splitlines()
    assert first == "the plan"
    assert [other.rpartition(" ")[2] for other in others] == ["30", "60"]


def test_on_a_terminal_the_line_goes_away_and_what_is_said_stays() -> None:
    out = Terminal()
    with ProgressLine(out) as line:
        line(NOW)
        line.say("the [plan]")
    shown = out.getvalue()
    assert "30 of 130 rows" in shown
    assert "the [plan]" in shown.splitlines()[0] + shown
    assert shown.rstrip("\x1b[?25h").endswith(("\x1b[2K", "\r", "\x1b[1A\x1b[2K"))
