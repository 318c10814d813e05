"""What a job on Ray is made of, without a cluster: shares, chunks, messages, a worker's thread, and rounds."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.made import DEFAULTS, request, write_rows
from tests.jobs.test_engine import check, engine_of, row_of
from tests.jobs.toy import ToyModel
from tierstore import errors
from tierstore.budget import Budget
from tierstore.errors import BudgetError, CapacityError, DeviceError, PlanError, StoreMismatchError, TierstoreError
from tierstore.jobs import JobSettings, run
from tierstore.jobs.engine import Counts, Engine
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.ray_errors import error_of, error_table
from tierstore.jobs.ray_messages import Message
from tierstore.jobs.ray_spread import CHUNKS, Spread, spread
from tierstore.jobs.ray_worker import Answering
from tierstore.jobs.rows import BadRow, Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.jobs.workload import Workload

pytest.importorskip("ray")


@given(
    nodes=st.lists(st.fixed_dictionaries({"CPU": st.integers(0, 9)}), min_size=1, max_size=5), workers=st.integers(1, 9)
)
def test_workers_on_cpus_get_the_largest_share_that_fits(nodes: list[dict[str, float]], workers: int) -> None:
    def fit(share: int) -> bool:
        return sum(int(node["CPU"]) // share for node in nodes) >= workers

    try:
        found = spread(nodes, None, workers)
    except DeviceError:
        assert not fit(1)
    else:
        assert (found.workers, found.gpus, found.device) == (workers, 0, "cpu")
        assert fit(found.cpus)
        assert not fit(found.cpus + 1)


def test_workers_go_to_gpus_or_else_machines() -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 4.0}, {"GPU": 1.0}]
    assert spread(nodes, None, None) == spread(nodes, "cuda", None) == Spread(3, 0, 1, "cuda")
    assert spread(nodes, "cuda", 2) == Spread(2, 0, 1, "cuda")
    assert spread(nodes, "cpu", None) == Spread(2, 4, 0, "cpu")
    assert str(spread(nodes, None, 1)) == "1 worker on Ray, each with 1 GPU"
    assert str(spread(nodes, "cpu", 3)) == "3 workers on Ray, each with 4 CPUs"


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "said"),
    [
        ([{"CPU": 2.0}], "cuda", None, "has no GPU"),
        ([{"GPU": 2.0}], None, 3, "has 2: lower workers"),
        ([{"CPU": 2.0}], None, 3, "has 2: lower workers"),
        ([{}], None, None, "has 0"),
        ([{"GPU": 2.0}], "cuda:1", None, "a GPU of its own"),
    ],
)
def test_what_a_cluster_has_not(nodes: Any, device: str | None, workers: int | None, said: str) -> None:
    with pytest.raises(DeviceError, match=said):
        spread(nodes, device, workers)


@given(rows=st.integers(1, 10**7), workers=st.integers(1, 300), sequences=st.none() | st.integers(1, 5000))
def test_rows_flow_to_every_worker_and_never_dry_up(rows: int, workers: int, sequences: int | None) -> None:
    flow = Spread(workers, 1, 0, "cpu").flow(rows, sequences)
    share = -(-rows // workers)
    assert 1 <= flow.chunks <= CHUNKS
    assert flow.workers <= min(workers, -(-rows // flow.rows))  # each has a chunk to begin with
    assert flow.chunks * flow.rows < share + flow.rows  # however early a worker is there, others get their share
    assert flow.chunks * flow.rows >= min(share, 2 * (sequences or 512))


@pytest.mark.parametrize("kind", [kind for kind in vars(errors).values() if isinstance(kind, type)])
def test_errors_of_a_worker_are_raised_again(kind: type[Exception]) -> None:
    if not issubclass(kind, TierstoreError):
        return
    options: dict[str, dict[str, Any]] = {"PlanError": {"needed": 7}, "PageLostError": {"cells": [(1, 2)]}}
    extra = options.get(kind.__name__, {})
    again = error_of(error_table(kind("why", **extra), "on a: "))
    assert type(again) is kind
    assert str(again) == "on a: why"
    assert getattr(again, "needed", 7) == 7


def test_errors_that_are_not_ours_become_ours() -> None:
    class OutOfMemoryError(RuntimeError):
        """As torch has one."""

    for error, kind in (
        (OutOfMemoryError("full"), CapacityError),
        (MemoryError(), CapacityError),
        (KeyError("x"), DeviceError),
    ):
        again = error_of(error_table(error))
        assert type(again) is kind
        assert type(error).__name__ in str(again)


texts = st.text(st.characters(), max_size=5)
ids = st.integers(-(1 << 62), 1 << 62) | st.text(min_size=1, max_size=5)


@given(text=texts, id=ids, tokens=st.lists(st.integers(0, 1 << 20), max_size=4), n=st.integers(1, 3))
def test_messages_arrive_as_they_were_sent_but_for_prompts(text: str, id: Any, tokens: list[int], n: int) -> None:
    row = replace(row_of(4, "prompt", n=n, stop=("a", text), seed=1 << 60), id=id)
    bare = replace(row, prompt=None)
    some: list[Any] = [
        Finished(row, n - 1, tuple(tokens), text, "stop", 9, 1 << 60),
        Failed(row, text),
        Failed(BadRow(7, None, text), text),
    ]
    sent = Message("a 1", Counts(3, prompt_tokens=5), 1 << 40, some, PlanError(text or "x", needed=1 << 40))
    got = Message.from_bytes(sent.to_bytes())
    assert replace(got, finished=(), error=None) == replace(sent, finished=(), error=None)
    assert list(got.finished) == [replace(some[0], row=bare), replace(some[1], row=bare), some[2]]
    assert isinstance(got.error, PlanError)


def test_requests_of_openai_keep_their_envelope(tmp_path: Path) -> None:
    with PromptFile(write_rows(tmp_path / "prompts", [request("a")]), DEFAULTS) as prompts:
        (row,) = prompts.rows()
    assert isinstance(row, Row)
    (failed,) = Message.from_bytes(Message("a", Counts(), 0, [Failed(row, "x")]).to_bytes()).finished
    assert isinstance(failed.row, Row)
    assert failed.row.openai == row.openai


LINES = [{"id": number, "prompt": "é" * number, "n": 1 + number % 2} for number in range(1, 9)]


@settings(max_examples=30, deadline=None)
@given(done=st.sets(st.integers(1, 11)), rows=st.integers(1, 9), most=st.sampled_from([1, 60, 1 << 20]))
def test_chunks_have_the_rows_that_are_left_in_the_order_of_the_file(
    tmp_path_factory: pytest.TempPathFactory, done: set[int], rows: int, most: int
) -> None:
    from tierstore.jobs import ray_source

    path = tmp_path_factory.mktemp("chunks") / "prompts"
    write_rows(path, [*LINES[:4], b"", b"{", LINES[0], *LINES[4:]])
    with pytest.MonkeyPatch.context() as patch, PromptFile(path, DEFAULTS) as prompts:
        patch.setattr(ray_source, "MOST_NBYTES", most)
        wanted = ray_source.Wanted.of(prompts, done.__contains__)
        chunks = [ray_source.Chunk.from_bytes(chunk.to_bytes()) for chunk in wanted.chunks(rows)]
    lines = [line for chunk in chunks for line in chunk.lines]
    left = [number for number in range(1, 12) if number not in done and number not in (5, 6, 7)]
    assert wanted.count == len(left)
    assert [line.number for line in lines] == left
    assert [line.raw for line in lines] == [path.read_bytes().splitlines()[number - 1] for number in left]
    assert all(1 <= len(chunk.lines) <= (1 if most == 1 else rows) for chunk in chunks)


@pytest.mark.parametrize("content", [b"{}\n", b"", None])
def test_a_file_that_changed_ends_the_chunks_with_an_error(tmp_path: Path, content: bytes | None) -> None:
    from tierstore.jobs.ray_source import Chunk, Wanted

    path = write_rows(tmp_path / "prompts", LINES)
    with PromptFile(path, DEFAULTS) as prompts:
        wanted = Wanted.of(prompts, lambda line: False)
    path.unlink() if content is None else path.write_bytes(content)
    (chunk,) = [Chunk.from_bytes(chunk.to_bytes()) for chunk in wanted.chunks(3)]
    assert isinstance(chunk.error, errors.StoreReadError if content is None else StoreMismatchError)
    path.write_bytes(b"".join(b'{"prompt": "%d"}' % n + b"\n" for n in range(8)).ljust(wanted.nbytes)[: wanted.nbytes])
    assert isinstance(list(wanted.chunks(3))[-1].error, StoreMismatchError)


@dataclass
class Job:
    """Stands for an opened job."""

    model: ToyModel
    fails: BaseException | None = None
    closed = False

    @contextmanager
    def __call__(self) -> Iterator[Any]:
        if self.fails is not None:
            raise self.fails
        self.engine: Engine = engine_of(self.model, positions=200)
        self.counts, self.moved_nbytes = self.engine.counts, 5
        yield self
        self.closed = True


def test_a_worker_answers_many_chunks_at_the_same_time() -> None:
    rows = [
        row_of(line, "ab"[line % 2] * (1 + line % 5), max_new_tokens=1 + line % 7, n=1 + line % 2)
        for line in range(1, 41)
    ]
    job = Job(ToyModel())
    answering = Answering(job)
    told: list[Message] = []

    def ask(some: Sequence[Row]) -> None:
        told.extend(answering.answer(some))

    threads = [threading.Thread(target=ask, args=(rows[at : at + 4],)) for at in range(0, 40, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check(rows, [each for message in told for each in message.finished])
    assert job.model.most_at_once > 4  # rows of one chunk would not fill the batch
    last = answering.message(())
    assert (last.counts, last.moved_nbytes, last.error) == (job.engine.counts, 5, None)
    answering.close()
    answering.close()
    assert job.closed
    (refusal,) = answering.answer(rows[:2])
    assert isinstance(refusal.error, DeviceError)


def test_a_chunk_whose_only_row_fails_is_done() -> None:
    answering = Answering(Job(ToyModel()))
    messages = list(answering.answer([row_of(1, "a" * 300)]))
    assert [each.row.line for message in messages for each in message.finished] == [1]
    assert "200 positions" in messages[-1].finished[0].reason  # type: ignore[union-attr]
    answering.close()


@pytest.mark.parametrize("error", [PlanError("too small", needed=9), MemoryError("full"), AssertionError("a fault")])
def test_what_ends_a_worker_is_told_to_all_who_wait(error: BaseException, capfd: Any) -> None:
    opening, stepping = Answering(Job(ToyModel(), fails=error)), Job(ToyModel())
    stepping.model.fail = [error]
    for answering in (opening, Answering(stepping)):
        (message,) = answering.answer([row_of(line, "a", max_new_tokens=9) for line in (1, 2)])
        assert message.error is not None
        assert str(error) in str(message.error)
        assert isinstance(message.error, type(error) if isinstance(error, TierstoreError) else TierstoreError)
        answering.close()
    assert ("Traceback" in capfd.readouterr().err) == (not isinstance(error, TierstoreError))


class Rounds:
    """Stands for the workers: each round they tell what it says, and are lost where it ends with an error."""

    def __init__(self, rounds: Sequence[Sequence[Any]]) -> None:
        self.rounds, self.wanted = list(rounds), list[int]()

    def __call__(self, wanted: Any) -> Iterator[Message]:
        self.wanted.append(wanted.count)
        for number, told in enumerate(self.rounds.pop(0)):
            if isinstance(told, BaseException):
                raise told
            yield Message(f"worker {number}", Counts(passes=1, generated_tokens=2), 3, told)


def job_of(rounds: Rounds) -> Any:
    from tierstore.jobs.ray_engine import RayJob

    job = RayJob(
        JobSettings(model="m", budget=Budget("1GiB")), Workload.unknown(DEFAULTS), Spread(2, 1, 0, "cpu"), 8, ["n"]
    )
    job._messages = rounds  # type: ignore[method-assign]
    return job


def test_rows_of_lost_workers_start_anew_and_what_comes_twice_counts_once(tmp_path: Path) -> None:
    from ray.exceptions import RayError

    path = write_rows(tmp_path / "prompts", [b"{", *({"id": f"r{line}", "prompt": "a"} for line in (2, 3, 4))])
    text = {line: Finished(row_of(line, "a"), 0, (1,), "t", "stop", 1, 1) for line in (2, 3, 4)}
    rounds = Rounds([[[text[2]], [], [text[2]], RayError("lost")], [[text[2], text[3]]], [[Failed(text[4].row, "no")]]])
    job, done = job_of(rounds), set[int]()
    with PromptFile(path, DEFAULTS) as prompts:
        for some in job.answer(prompts, done.__contains__, lambda row: () if row.line in done else (0,)):
            for each in some:
                assert each.row.line not in done
                done.add(each.row.line)
    assert done == {1, 2, 3, 4}
    assert rounds.wanted == [3, 2, 1]
    assert (job.counts.passes, job.counts.generated_tokens, job.moved_nbytes) == (3, 6, 9)
    assert job.notes == ("2 workers on Ray, each with 1 CPU", "n")


def test_workers_that_are_lost_at_once_end_the_job(tmp_path: Path) -> None:
    from ray.data.exceptions import ExecutionTimeoutError
    from ray.exceptions import RayError

    path = write_rows(tmp_path / "prompts", LINES)
    told: Any
    for told, why in (
        (RayError("it was\nlost"), r" \(RayError: lost\): see"),
        (ExecutionTimeoutError("x"), r" \(none of them gave a sign for 600 s\): see"),
        ([], ": see"),
    ):
        with PromptFile(path, DEFAULTS) as prompts, pytest.raises(DeviceError, match=f"any of the 8 rows .* left{why}"):
            list(job_of(Rounds([[told]])).answer(prompts, lambda line: False, lambda row: (0,)))


def test_settings_mean_the_same_in_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tierstore.jobs.ray_engine import _anywhere

    monkeypatch.chdir(tmp_path)
    settings = JobSettings(model="m", store=Path("s/t"), budget=Budget("1GiB"), seed=5)
    there = replace(settings, model=str(tmp_path / "m"), store=str(tmp_path / "s" / "t"), device="cuda")
    assert _anywhere(settings, Spread(1, 0, 1, "cuda")) == there


def test_a_wrong_engine(tmp_path: Path) -> None:
    settings = JobSettings(model="m", budget=Budget("1GiB"))
    for options in ({"engine": "abacus"}, {"workers": 2}, {"engine": "ray", "workers": 0}):
        with pytest.raises(BudgetError):
            run(tmp_path / "prompts", tmp_path / "results", settings, **options)
