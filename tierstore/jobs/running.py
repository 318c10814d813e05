"""`run`: a file of prompts becomes a file of results, which can be stopped at any moment and goes on where it was."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tierstore.binding.uninterrupted import Uninterrupted
from tierstore.errors import BudgetError
from tierstore.jobs.answers import Generated
from tierstore.jobs.engine import Counts
from tierstore.jobs.journal import Journal, check_new
from tierstore.jobs.lines import read_object
from tierstore.jobs.opening import model_facts, open_job
from tierstore.jobs.paths import JobPaths
from tierstore.jobs.progress import JobProgress
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.workload import Workload

if TYPE_CHECKING:
    from tierstore.report.report import Report

ENGINES = ("local", "ray")


@dataclass(frozen=True, slots=True)
class JobReport:
    """A job when a run of it ended. ``rows`` are all that the file has; of them ``done_rows`` are done, which includes
    the ``failed_rows``. The other numbers are of this run, as in ``Counts``. ``notes`` say how the batch was chosen,
    ``session`` what moved; None where nothing was left to do, or other processes did it."""

    results: Path
    errors: Path
    rows: int
    done_rows: int
    failed_rows: int
    passes: int
    prompt_tokens: int
    found_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    seconds: float
    notes: tuple[str, ...] = ()
    session: Report | None = None

    def to_json(self) -> str:
        """One line of JSON with every field."""
        table = {each.name: getattr(self, each.name) for each in fields(self)}
        table |= {"results": str(self.results), "errors": str(self.errors)}
        return json.dumps(table | {"session": self.session and json.loads(self.session.to_json())})

    def __str__(self) -> str:
        failed = f", {self.failed_rows} of them failed: see {self.errors}" if self.failed_rows else ""
        lines = [f"{self.done_rows} of {self.rows} rows are done{failed}"]
        if self.passes:
            rate = self.generated_tokens / self.seconds
            lines.append(
                f"{self.passes} passes in {self.seconds:.1f} s: {self.prompt_tokens} tokens of prompts computed, "
                f"{self.found_tokens} found; {self.generated_tokens} generated, {rate:.1f} a second"
            )
        if self.drafted_tokens:
            lines.append(f"{self.accepted_tokens} of {self.drafted_tokens} drafted tokens were right")
        return "\n".join(lines)


class JobInterrupted(KeyboardInterrupt):
    """Ctrl-C: what was finished is written, ``report`` says how much. The same call goes on with the rest."""

    def __init__(self, report: JobReport) -> None:
        super().__init__(f"{report.done_rows} of {report.rows} rows are done and written")
        self.report = report


class Opened(Protocol):
    """What answers a job's rows: ``OpenJob`` in this process, ``RayJob`` in others."""

    @property
    def tokens(self) -> int: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def moved_nbytes(self) -> int: ...
    def answer(
        self, prompts: PromptFile, skip: Callable[[int], bool], missing: Callable[[Row], Sequence[int]]
    ) -> Iterator[list[Finished | Failed]]: ...
    def report(self) -> Report | None: ...


def run(
    prompts: str | os.PathLike[str],
    results: str | os.PathLike[str],
    settings: JobSettings,
    *,
    errors: str | os.PathLike[str] | None = None,
    engine: str = "local",
    workers: int | None = None,
    progress: Callable[[JobProgress], object] | None = None,
    say: Callable[[str], object] | None = None,
) -> JobReport:
    """Answer every row of the file ``prompts``: a line of ``results`` for each text, of ``errors`` (``RESULTS.errors``
    unless named) for each row that has none.

    Each line is durable before the next pass begins, so a job that was killed goes on when it is run again with the
    same settings, with every row exactly once. ``progress`` is told how far it is after each pass, ``say`` how the
    batch was chosen.

    The ``engine`` "ray" has ``workers`` of a Ray cluster do it, each with a model and a budget of its own: None is one
    on each GPU, or on each machine where there is none. "local" does it in this process.

    Raises ``JobInterrupted`` for Ctrl-C; what ``open_job`` or ``open_ray_job`` and the journal raise; and errors of the
    machine. Whatever was finished before is written."""
    if engine not in ENGINES:
        raise BudgetError(f"engine is {engine!r}: choose one of {', '.join(ENGINES)}")
    if workers is not None and (engine != "ray" or workers < 1):
        raise BudgetError(f"workers is {workers}: give at least 1 with the engine ray, or leave it out")
    paths = JobPaths.checked(prompts, results, errors)
    with ExitStack() as closing:
        rows = closing.enter_context(PromptFile(prompts, settings.defaults))
        job = _Job(rows, paths, settings)
        closing.callback(job.close)
        known = _tokens_of(paths.state)
        if known is None:
            check_new(paths)  # opening a model takes long
        else:
            job.begin(known if settings.tokens is None else settings.tokens)
        try:
            if not job.is_done():
                workload = Workload.of(rows.rows(job.skip), rows.samples_total, settings.defaults)
                opened = closing.enter_context(_open(settings, workload, known, engine, workers))
                if say is not None:
                    say("\n".join(opened.notes))
                if known is None:
                    job.begin(opened.tokens)
                job.work(opened, progress)
        except KeyboardInterrupt:
            raise JobInterrupted(job.report()) from None
        return job.report()


class _Job:
    """A run of a job: its journal, and what is under way."""

    def __init__(self, rows: PromptFile, paths: JobPaths, settings: JobSettings) -> None:
        self._rows, self._paths, self._settings = rows, paths, settings
        self._journal: Journal | None = None
        self._opened: Opened | None = None
        self._began = time.perf_counter()
        self._before = 0

    def begin(self, tokens: int) -> None:
        """Open the journal of a job whose micro-batches have ``tokens`` tokens."""
        settings = self._settings
        self._journal = Journal(
            self._paths,
            self._rows,
            model=model_facts(settings.model, self._paths.written),
            settings={
                "tokens": tokens,
                "seed": settings.seed,
                "chat": settings.chat,
                "dtype": None if settings.dtype is None else str(settings.dtype).removeprefix("torch."),
                "kv_format": settings.kv_format,
            },
            model_name=Path(settings.model).name,
        )
        self._before = self._journal.done_rows

    def skip(self, line: int) -> bool:
        """Whether nothing of the row in a line is left to do."""
        return self._journal is not None and self._journal.is_done(line)

    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self._journal is not None and self._journal.done_rows == self._total

    def work(self, opened: Opened, progress: Callable[[JobProgress], object] | None) -> None:
        """Answer what is left."""
        assert self._journal is not None, "begin comes first"
        self._opened, self._began = opened, time.perf_counter()
        for some in opened.answer(self._rows, self.skip, self._journal.missing):
            with Uninterrupted():
                self._write(self._journal, some)
            if progress is not None:
                progress(self._now(self._journal, opened))

    def report(self) -> JobReport:
        """What was done."""
        journal, opened = self._journal, self._opened
        counts = asdict(opened.counts) if opened is not None else dict.fromkeys(_COUNTS, 0)
        return JobReport(
            self._paths.results,
            self._paths.errors,
            self._total,
            0 if journal is None else journal.done_rows,
            0 if journal is None else journal.failed_rows,
            **counts,
            seconds=time.perf_counter() - self._began,
            notes=() if opened is None else opened.notes,
            session=None if opened is None else opened.report(),
        )

    def close(self) -> None:
        """Let other processes have the job. Idempotent."""
        if self._journal is not None:
            self._journal.close()

    @property
    def _total(self) -> int:
        return self._rows.rows_total + self._rows.bad_total

    def _write(self, journal: Journal, some: Iterable[Finished | Failed]) -> None:
        for each in some:
            if isinstance(each, Failed):
                journal.fail(each.row, each.reason)
            else:
                journal.add(each.row, _generated(each))
        journal.commit()

    def _now(self, journal: Journal, opened: Opened) -> JobProgress:
        counts = opened.counts
        return JobProgress(
            done_rows=journal.done_rows,
            total_rows=self._total,
            before_rows=self._before,
            failed_rows=journal.failed_rows,
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            passes=counts.passes,
            moved_nbytes=opened.moved_nbytes,
            seconds=time.perf_counter() - self._began,
        )


def _open(
    settings: JobSettings, workload: Workload, tokens: int | None, engine: str, workers: int | None
) -> AbstractContextManager[Opened]:
    if engine == "local":
        return open_job(settings, workload, tokens=tokens)
    from tierstore.jobs.ray_engine import open_ray_job

    return open_ray_job(settings, workload, tokens=tokens, workers=workers)


_COUNTS = ("passes", "prompt_tokens", "found_tokens", "generated_tokens", "drafted_tokens", "accepted_tokens")


def _generated(each: Finished) -> Generated:
    return Generated(each.index, each.text, each.prompt_tokens, len(each.tokens), each.finish_reason, each.seed)


def _tokens_of(state: Path) -> int | None:
    """Tokens of a micro-batch in the runs of a job before, None where there was none. The journal checks the rest, and
    refuses a state that does not say them, which is 0 here."""
    try:
        raw = state.read_bytes()
    except OSError:
        return None
    with suppress(ValueError, KeyError, TypeError):
        tokens = read_object(raw)["facts"]["settings"]["tokens"]
        return tokens if type(tokens) is int and tokens > 0 else 0
    return 0 if raw else None
