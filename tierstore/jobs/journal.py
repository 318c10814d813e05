"""Which samples of which rows are done: each is written once, however often the job is killed and run again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tierstore.errors import StoreFormatError, StoreMismatchError
from tierstore.jobs.answers import Generated, JobName, error_line, native_line, openai_line
from tierstore.jobs.done import Done
from tierstore.jobs.job_state import JobState
from tierstore.jobs.line_file import LineFile, file_errors
from tierstore.jobs.paths import JobPaths
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import BadRow, Row


class Journal:
    """The results of ``prompts``, in the files ``paths``.

    ``model`` and ``settings`` are all else that the texts depend on, as tables that JSON can say: with others the job
    cannot go on. Sampling defaults are among them already (those of ``prompts``). ``model_name`` is for answers in
    OpenAI's shape. What is added counts as done at once for ``missing`` and ``is_done``, and is durable when ``commit``
    returns; only what is durable is found by the next process.

    Raises ``StoreMismatchError`` where files belong to another job, ``StoreBusyError`` while another process works at
    this one, ``StoreFormatError`` where they are damaged, ``StoreFullError``, ``StoreError``. For one thread."""

    def __init__(
        self,
        paths: JobPaths,
        prompts: PromptFile,
        *,
        model: Mapping[str, Any],
        settings: Mapping[str, Any],
        model_name: str,
    ) -> None:
        self.paths = paths
        self._prompts = prompts
        self._done = Done(prompts.lines, prompts.samples_of)
        self._gathered: dict[int, dict[int, Generated]] = {}  # of OpenAI requests that are not done
        self.failed_rows = 0
        """Rows that failed."""
        names = ", ".join(repr(str(path)) for path in (paths.results, paths.errors, paths.state))
        anew = f"to start anew delete {names}, or give another file for the results"
        facts = {
            "prompts": {"nbytes": prompts.nbytes, "sha256": prompts.sha256},
            "errors": os.path.relpath(paths.errors, paths.results.parent),  # all may move to another folder
            "model": model,
            "settings": settings,
            "defaults": {name: getattr(prompts.defaults, name) for name in prompts.defaults.__dataclass_fields__},
        }
        check_new(paths)
        self._state = JobState(paths.state, facts, anew=anew)
        self._results: LineFile | None = None
        self._errors: LineFile | None = None
        try:
            self._results = LineFile(paths.results, self._take_result)
            self._errors = LineFile(paths.errors, self._take_error)
        except BaseException:
            self.close()
            raise
        fingerprint = sha256(f"{prompts.sha256} {self._state.created}".encode()).hexdigest()
        self.job = JobName(fingerprint, self._state.created, model_name)

    @property
    def done_rows(self) -> int:
        """Rows that are done: all their samples are, or they failed."""
        return self._done.rows

    @property
    def done_samples(self) -> int:
        """Sequences that are done."""
        return self._done.samples

    def is_done(self, line: int) -> bool:
        """Whether nothing of the row in a line is left to do: for ``PromptFile.rows(skip=...)``."""
        return self._done.is_done(line)

    def missing(self, row: Row) -> tuple[int, ...]:
        """Indexes of the samples of a row that are left to do.

        A killed job forgets the samples of an OpenAI request of which some were not done: its one line has them all."""
        have = self._gathered.get(row.line, ())
        return tuple(index for index in self._done.missing(row.line) if index not in have)

    def add(self, row: Row, generated: Generated) -> None:
        """A sample of a row is done. Raises ``ValueError`` where it was before, or is none of the row's."""
        if generated.index not in self.missing(row):
            raise ValueError(f"sample {generated.index} of the row in line {row.line} is done already, or none of its")
        if row.openai is None:
            self._file(self._results).add(native_line(row, generated))
            self._done.add(row.line, generated.index)
            return
        gathered = self._gathered.setdefault(row.line, {})
        gathered[generated.index] = generated
        if len(gathered) == row.sampling.n:
            self._file(self._results).add(openai_line(row, list(gathered.values()), self.job))
            del self._gathered[row.line]
            for index in range(row.sampling.n):
                self._done.add(row.line, index)

    def fail(self, row: Row | BadRow, reason: str | None = None) -> None:
        """A row has no answer, or not all of its samples, for a ``reason``; that of a bad row is its own.

        Raises ``ValueError`` where it is done."""
        why = reason if reason is not None else row.reason if isinstance(row, BadRow) else "no reason was given"
        if not self._done.finish(row.line):
            raise ValueError(f"the row in line {row.line} is done already")
        self._gathered.pop(row.line, None)
        self.failed_rows += 1
        self._file(self._errors).add(error_line(row, why, self.job))

    def commit(self) -> int:
        """Make durable what was added; how many lines that were.

        Raises ``StoreFullError`` or ``StoreError``: then no line is half-written, and it may be tried again."""
        return self._file(self._results).commit() + self._file(self._errors).commit()

    def close(self) -> None:
        """Let other processes have the job. What was added and not committed is forgotten. Idempotent."""
        for file in (self._results, self._errors):
            if file is not None:
                file.close()
        self._results = self._errors = None
        self._state.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _file(self, file: LineFile | None) -> LineFile:
        if file is None:
            raise ValueError("the journal is closed")
        return file

    def _take_result(self, table: dict[str, Any], number: int) -> None:
        openai = "custom_id" in table
        id = table.get("custom_id" if openai else "id")
        line = self._prompts.line_of(id) if isinstance(id, str) or type(id) is int else None
        count = 0 if line is None else self._prompts.samples_of(line)
        index = table.get("index", 0)
        if (
            line is None
            or type(index) is not int
            or not 0 <= index < count
            or ("index" in table) != (count > 1 and not openai)
        ):
            raise self._not_ours(
                self.paths.results, number, f"the prompts have no row {id!r:.100} with a sample {index!r:.20}"
            )
        for sample in range(count) if openai else (index,):
            if not self._done.add(line, sample):
                raise StoreFormatError(
                    f"line {number} of {str(self.paths.results)!r} answers the row {id!r:.100} again: delete one of "
                    "the two lines and run the job again"
                )

    def _take_error(self, table: dict[str, Any], number: int) -> None:
        error = table.get("error")
        line = error.get("line") if isinstance(error, dict) else table.get("line")
        if type(line) is not int or not 0 < line <= self._prompts.lines:
            raise self._not_ours(self.paths.errors, number, "it names no line of the prompts")
        if not self._done.finish(line):
            raise StoreFormatError(
                f"line {number} of {str(self.paths.errors)!r} is about line {line} of the prompts, which is done "
                "already: delete it and run the job again"
            )
        self.failed_rows += 1

    def _not_ours(self, path: Path, number: int, why: str) -> StoreMismatchError:
        return StoreMismatchError(
            f"line {number} of {str(path)!r} was not written by this job: {why}: nothing was touched: delete that "
            "line where the others are this job's, or give another file"
        )


def check_new(paths: JobPaths) -> None:
    """Raise ``StoreMismatchError`` where results are there without the job that they are of."""
    with file_errors("looking for what an earlier run left"):
        if _nbytes(paths.state):
            return
        for path in (paths.results, paths.errors):
            if _nbytes(path):
                raise StoreMismatchError(
                    f"{str(path)!r} holds something already, and the state of a job, {str(paths.state)!r}, is not there"
                    ": nothing was touched: give another file, or move that one away"
                )


def _nbytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
