"""Files of prompts and journals over them, for the tests of jobs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tierstore.jobs.answers import Generated
from tierstore.jobs.journal import Journal
from tierstore.jobs.lines import Line
from tierstore.jobs.paths import JobPaths
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import BadRow, Row, parse_row
from tierstore.sampling import Sampling

DEFAULTS = Sampling()


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    """A JSON Lines file; rows that are bytes are written as they are."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def request(custom_id: Any, body: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """An OpenAI batch request."""
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}]} if body is None else body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | more


def parsed(raw: bytes | dict[str, Any], number: int = 1) -> Row | BadRow | None:
    line = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    return parse_row(Line(number, 0, line, True), DEFAULTS)


def good(raw: bytes | dict[str, Any], number: int = 1) -> Row:
    row = parsed(raw, number)
    assert isinstance(row, Row), row
    return row


def text_of(row: Row, index: int) -> Generated:
    """What a model that knows no chance says."""
    return Generated(index, f"text {row.id} {index} é", 3, 4, "stop", row.line)


@contextmanager
def opened(prompts: Path, results: Path, *, errors: Path | None = None, **change: Any) -> Iterator[Journal]:
    """A journal; ``change`` takes the place of its arguments."""
    facts: dict[str, Any] = {"model": {"config": "abc"}, "settings": {"seed": 1, "kv": None}, "model_name": "tiny"}
    with (
        PromptFile(prompts, change.pop("defaults", DEFAULTS)) as file,
        Journal(JobPaths.checked(prompts, results, errors), file, **facts | change) as journal,
    ):
        yield journal


def finish(journal: Journal, prompts: Path, *, each: int = 1, most: int = 1 << 30) -> int:
    """Answer up to ``most`` samples that are left, committing after ``each``; how many that were."""
    done = 0
    with PromptFile(prompts, DEFAULTS) as file:
        for row in file.rows(journal.is_done):
            if isinstance(row, BadRow):
                journal.fail(row)
                continue
            for index in journal.missing(row):
                if done == most:
                    return done
                journal.add(row, text_of(row, index))
                done += 1
                if done % each == 0:
                    journal.commit()
    journal.commit()
    return done


def answers(results: Path) -> dict[tuple[Any, int], Any]:
    """Lines of results by id and index. Fails where one is there twice, or is no JSON."""
    found: dict[tuple[Any, int], Any] = {}
    raw = results.read_bytes()
    assert raw == b"" or raw.endswith(b"\n")
    for line in raw.splitlines():
        table = json.loads(line)
        key = (table.get("custom_id", table.get("id")), table.get("index", 0))
        assert key not in found, key
        found[key] = table
    return found
