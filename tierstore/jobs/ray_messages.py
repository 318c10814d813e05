"""What the process of a job and its workers on other machines tell each other, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tierstore import errors
from tierstore.errors import CapacityError, DeviceError, PageLostError, PlanError, TierstoreError
from tierstore.jobs.engine import Counts
from tierstore.jobs.lines import Line
from tierstore.jobs.rows import BadRow, OpenAIRequest, Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.sampling import Sampling

Wire = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Chunk:
    """Lines of a file of prompts for a worker to answer, or the ``error`` why there are none."""

    lines: Sequence[Line] = ()
    error: TierstoreError | None = None

    def to_bytes(self) -> bytes:
        """For ``from_bytes``. The lines are UTF-8, as those of rows that can be answered are."""
        lines = [[line.number, (line.raw or b"").decode()] for line in self.lines]
        return _dump({"lines": lines, "error": None if self.error is None else error_table(self.error)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> Chunk:
        """What ``to_bytes`` made, but where the lines stand in their file."""
        table = json.loads(raw)
        lines = [Line(number, 0, text.encode(), True) for number, text in table["lines"]]
        return cls(lines, table["error"] and error_of(table["error"]))


@dataclass(frozen=True, slots=True)
class Message:
    """What is ``finished`` since the last message of the process ``worker``, and what that did so far in all. With an
    ``error`` it can go on no more. Rows come without prompts."""

    worker: str
    counts: Counts
    moved_nbytes: int
    finished: Sequence[Finished | Failed] = ()
    error: TierstoreError | None = None

    def to_bytes(self) -> bytes:
        """For ``from_bytes``."""
        return _dump(
            {
                "worker": self.worker,
                "counts": asdict(self.counts),
                "moved_nbytes": self.moved_nbytes,
                "finished": [_finished_table(each) for each in self.finished],
                "error": None if self.error is None else error_table(self.error),
            }
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Message:
        """What ``to_bytes`` made."""
        table = json.loads(raw)
        return cls(
            table["worker"],
            Counts(**table["counts"]),
            table["moved_nbytes"],
            [_finished_of(each) for each in table["finished"]],
            table["error"] and error_of(table["error"]),
        )


def error_table(error: BaseException, where: str = "") -> Wire:
    """An error that came up in a worker ``where``, for ``error_of``."""
    text = str(error) or type(error).__name__
    kind = type(error).__name__ if isinstance(error, TierstoreError) else ""
    if not kind:
        kind = CapacityError.__name__ if _is_out_of_memory(error) else DeviceError.__name__
        text = f"{type(error).__name__}: {text}"
    return {"kind": kind, "text": f"{where}{text}", "needed": getattr(error, "needed", 0)}


def error_of(table: Wire) -> TierstoreError:
    """The error again, of its class; one that is none of ours has become a ``CapacityError`` or ``DeviceError``."""
    kind, text = getattr(errors, table["kind"]), table["text"]
    if kind is PlanError:
        return PlanError(text, needed=table["needed"])
    if kind is PageLostError:
        return PageLostError(text, cells=())
    error: TierstoreError = kind(text)
    return error


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's is no MemoryError


def _finished_table(each: Finished | Failed) -> Wire:
    if isinstance(each, Failed):
        if isinstance(each.row, BadRow):
            return {"bad": asdict(each.row), "reason": each.reason}
        return {"row": _row_table(each.row), "reason": each.reason}
    return {
        "row": _row_table(each.row),
        "index": each.index,
        "tokens": each.tokens,
        "text": each.text,
        "finish_reason": each.finish_reason,
        "prompt_tokens": each.prompt_tokens,
        "seed": each.seed,
    }


def _finished_of(table: Wire) -> Finished | Failed:
    if "bad" in table:
        return Failed(BadRow(**table["bad"]), table["reason"])
    row = _row_of(table.pop("row"))
    if "reason" in table:
        return Failed(row, table["reason"])
    return Finished(row, **table | {"tokens": tuple(table["tokens"])})


def _row_table(row: Row) -> Wire:
    return asdict(replace(row, prompt=None, messages=None))


def _row_of(table: Wire) -> Row:
    sampling = Sampling(**table["sampling"] | {"stop": tuple(table["sampling"]["stop"])})
    openai = None if table["openai"] is None else OpenAIRequest(**table["openai"])
    return Row(**table | {"sampling": sampling, "openai": openai})


def _dump(table: Wire) -> bytes:
    return json.dumps(table).encode()
