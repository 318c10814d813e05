"""What a worker on another machine tells the process of the job, as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tierstore.errors import TierstoreError
from tierstore.jobs.engine import Counts
from tierstore.jobs.ray_errors import error_of, error_table
from tierstore.jobs.rows import BadRow, OpenAIRequest, Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.sampling import Sampling

Wire = dict[str, Any]


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
        table = {
            "worker": self.worker,
            "counts": asdict(self.counts),
            "moved_nbytes": self.moved_nbytes,
            "finished": [_finished_table(each) for each in self.finished],
            "error": None if self.error is None else error_table(self.error),
        }
        return json.dumps(table).encode()

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
