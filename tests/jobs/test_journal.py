"""Every sample is written once, whatever happens in between."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.made import answers, finish, good, opened, request, text_of, write_rows
from tierstore.errors import StoreBusyError, StoreError, StoreFormatError, StoreFullError, StoreMismatchError
from tierstore.jobs.paths import JobPaths
from tierstore.sampling import Sampling

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
ROWS: list[Any] = [
    {"id": "a", "prompt": "x"},
    {"id": "b", "prompt": "x", "n": 3},
    b"{",
    request("c", CHAT | {"n": 2}),
    {"prompt": "é"},
    request("d", CHAT | {"tools": [1]}),
]
ALL = {("a", 0), ("b", 0), ("b", 1), ("b", 2), ("c", 0), (5, 0)}


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", ROWS)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results.jsonl"


def errors_of(results: Path) -> list[int]:
    """Numbers of the lines that failed."""
    lines = results.with_name(results.name + ".errors").read_bytes().splitlines()
    return [(table["error"] if "custom_id" in table else table)["line"] for table in map(json.loads, lines)]


def test_a_job_from_begin_to_end(prompts: Path, results: Path) -> None:
    with opened(prompts, results) as journal:
        assert finish(journal, prompts) == 7
        assert (journal.done_rows, journal.failed_rows, journal.done_samples) == (6, 2, 7)
        before = results.read_bytes()
    assert answers(results).keys() == ALL
    assert errors_of(results) == [3, 6]
    with opened(prompts, results) as journal:
        assert (journal.done_rows, journal.failed_rows, journal.done_samples) == (6, 2, 7)
        assert all(journal.is_done(line) for line in range(1, 7))
        assert finish(journal, prompts) == 0
    assert results.read_bytes() == before
    assert errors_of(results) == [3, 6]
    assert sorted(path.name for path in results.parent.iterdir()) == [
        "prompts.jsonl", "results.jsonl", "results.jsonl.errors", "results.jsonl.job",
    ]  # fmt: skip


@pytest.mark.parametrize("most", range(8))
def test_a_job_goes_on_where_it_was(prompts: Path, results: Path, most: int) -> None:
    with opened(prompts, results) as journal:
        finish(journal, prompts, most=most)
        journal.commit()
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL
    assert errors_of(results) == [3, 6]
    whole = results.with_name("whole")
    with opened(prompts, whole) as journal:
        finish(journal, prompts)
    strip = [(a.get("text"), a.get("seed")) for _, a in sorted(answers(results).items(), key=str)]
    assert strip == [(a.get("text"), a.get("seed")) for _, a in sorted(answers(whole).items(), key=str)]


def test_what_is_not_committed_is_done_again(prompts: Path, results: Path) -> None:
    row = good({"id": "a", "prompt": "x"})
    with opened(prompts, results) as journal:
        journal.add(row, text_of(row, 0))
        assert journal.missing(row) == ()
        assert results.read_bytes() == b""
    with opened(prompts, results) as journal:
        assert journal.missing(row) == (0,)
        assert journal.commit() == 0


def test_nothing_is_done_twice(prompts: Path, results: Path) -> None:
    row, several, openai = good({"id": "a", "prompt": "x"}), good(ROWS[1], 2), good(ROWS[3], 4)
    with opened(prompts, results) as journal:
        for each in (row, several, openai):
            journal.add(each, text_of(each, 0))
            with pytest.raises(ValueError, match="sample 0 of the row in line"):
                journal.add(each, text_of(each, 0))
        assert [journal.missing(each) for each in (row, several, openai)] == [(), (1, 2), (1,)]
        journal.fail(several, "too long")
        journal.fail(openai, "too long")
        with pytest.raises(ValueError, match="done already"):
            journal.fail(row, "too long")
        assert journal.commit() == 4
    with opened(prompts, results) as journal:
        assert [journal.missing(each) for each in (row, several, openai)] == [(), (), ()]
        finish(journal, prompts)
    assert answers(results).keys() == {("a", 0), ("b", 0), (5, 0)}
    assert sorted(errors_of(results)) == [2, 3, 4, 6]


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_file_cut_anywhere_is_completed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """As a kill, or a power cut which leaves zeros, may leave it."""
    folder = tmp_path_factory.mktemp("cut")
    prompts, results = write_rows(folder / "p", ROWS), folder / "r"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda fd: None)  # what is not durable is cut here
        cut_and_complete(prompts, results, data)


def cut_and_complete(prompts: Path, results: Path, data: st.DataObject) -> None:
    for _ in range(data.draw(st.integers(1, 3))):
        with opened(prompts, results) as journal:
            finish(journal, prompts, each=data.draw(st.integers(1, 4)), most=data.draw(st.integers(0, 7)))
        for path in (results, results.with_name("r.errors")):
            raw = path.read_bytes()
            keep = data.draw(st.integers(0, len(raw)))
            zeros = data.draw(st.sampled_from([0, 0, 1, 100]))
            path.write_bytes(raw[:keep] + b"\0" * zeros + b"\n" * (zeros == 100))
        whole = results.read_bytes().replace(b"\0\n", b"").count(b"\n")
        with opened(prompts, results) as journal:
            assert results.read_bytes().count(b"\n") == whole
            assert journal.failed_rows == len(errors_of(results))
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL
    assert sorted(errors_of(results)) == [3, 6]


def test_zeros_and_what_was_written_after_them_are_cut(prompts: Path, results: Path) -> None:
    """A power cut may leave a block of zeros within the lines that were written last, in one go."""
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    first, second, *others = results.read_bytes().splitlines(keepends=True)
    results.write_bytes(first + b"\0" * (len(second) - 9) + second[-9:] + b"".join(others))
    with opened(prompts, results) as journal:
        assert results.read_bytes() == first
        finish(journal, prompts)
    assert answers(results).keys() == ALL


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model": {"config": "other"}}, 'model.config was "abc", now "other"'),
    ({"settings": {"seed": 2, "kv": None}}, "settings.seed was 1, now 2"),
    ({"settings": {"seed": 1}}, ""),
    ({"settings": {"seed": 1, "kv": "int8"}}, 'settings.kv was null, now "int8"'),
    ({"defaults": Sampling(temperature=0.5)}, "defaults.temperature was 0.0, now 0.5"),
    ({"model_name": "another"}, ""),
]


@pytest.mark.parametrize(("change", "why"), CHANGES, ids=str)
def test_with_other_settings_a_job_cannot_go_on(prompts: Path, results: Path, change: dict[str, Any], why: str) -> None:
    with opened(prompts, results) as journal:
        finish(journal, prompts, most=2)
    before = results.read_bytes()
    if not why:
        with opened(prompts, results, **dict(change)):
            return
    with (
        pytest.raises(StoreMismatchError, match="to start anew delete") as raised,
        opened(prompts, results, **dict(change)),
    ):
        pass
    assert f"another job: {why}: run it as it was begun" in str(raised.value)
    assert results.read_bytes() == before
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL


def test_with_other_prompts_a_job_cannot_go_on(prompts: Path, results: Path) -> None:
    with opened(prompts, results):
        pass
    write_rows(prompts, [*ROWS, {"prompt": "more"}])
    with (
        pytest.raises(StoreMismatchError, match=r"prompts\.nbytes was \d+, now \d+; prompts\.sha256"),
        opened(prompts, results),
    ):
        pass


def test_errors_go_where_they_went(prompts: Path, results: Path) -> None:
    with opened(prompts, results, errors=results.with_name("e")):
        pass
    with (
        pytest.raises(StoreMismatchError, match=r'errors was "e", now "results\.jsonl\.errors"'),
        opened(prompts, results),
    ):
        pass


def test_rows_whose_errors_are_deleted_are_tried_again(prompts: Path, results: Path) -> None:
    with opened(prompts, results) as journal:
        finish(journal, prompts)
        failed = journal.failed_rows
    before = results.read_bytes()
    results.with_name("results.jsonl.errors").unlink()
    with opened(prompts, results) as journal:
        assert journal.failed_rows == 0
        finish(journal, prompts)
        assert journal.failed_rows == failed > 0
    assert results.read_bytes() == before


def test_one_process_a_job(prompts: Path, results: Path) -> None:
    with opened(prompts, results) as journal:
        with pytest.raises(StoreBusyError, match=f"in use by process {os.getpid()}"), opened(prompts, results):
            pass
        assert finish(journal, prompts) == 7
    link = results.with_name("link")
    link.symlink_to(results)
    with opened(prompts, results), pytest.raises(StoreBusyError), opened(prompts, link):
        pass
    errors = results.with_name("e")
    with (
        opened(prompts, results.with_name("1"), errors=errors),
        pytest.raises(StoreBusyError, match="/e' is in use"),
        opened(prompts, results.with_name("2"), errors=errors),
    ):
        pass


LINE = b'{"id": "a", "text": "", "prompt_tokens": 1, "completion_tokens": 1, "finish_reason": "stop", "seed": 1}\n'


@pytest.mark.parametrize(
    ("content", "error", "why"),
    [
        (b"my thesis\n", StoreMismatchError, "not written by this job.*delete that line"),
        (b"my thesis", StoreMismatchError, "not written by this job"),
        (b"[1]\n" + LINE, StoreFormatError, "line 1 of .* is damaged"),
        (LINE + b"{]\n" + LINE.replace(b'"a"', b"5"), StoreFormatError, "line 2 of .* is damaged"),
        (LINE + LINE, StoreFormatError, "answers the row 'a' again"),
        (LINE.replace(b'"a"', b'"z"'), StoreMismatchError, "no row 'z'.*delete that line"),
        (LINE.replace(b'"a"', b"true"), StoreMismatchError, "no row"),
        (LINE.replace(b'"a"', b'["a"]'), StoreMismatchError, "no row"),
        (LINE.replace(b'"a"', b'"b"'), StoreMismatchError, "no row 'b'"),  # an index is missing
        (LINE.replace(b'"a"', b'"b", "index": 3'), StoreMismatchError, "sample 3"),
        (LINE.replace(b'"a"', b'"b", "index": -1'), StoreMismatchError, "sample -1"),
        (LINE.replace(b'"a"', b'"b", "index": "0"'), StoreMismatchError, "sample"),
        (LINE.replace(b'"a"', b'"a", "index": 0'), StoreMismatchError, "no row"),
        (b"{}\n", StoreMismatchError, "no row None"),
        (b'{"line": 1, "id": "a", "error": "x"}\n', StoreFormatError, ""),
    ],
)
def test_results_of_others_are_not_touched(
    prompts: Path, results: Path, content: bytes, error: type[StoreError], why: str
) -> None:
    results.write_bytes(content)
    with (
        pytest.raises(StoreMismatchError, match=r"holds something already.*nothing was touched"),
        opened(prompts, results),
    ):
        pass
    assert results.read_bytes() == content
    assert not results.with_name("results.jsonl.job").exists()
    results.unlink()
    with opened(prompts, results):
        pass
    results.write_bytes(content)  # beside a state that is ours
    if why:
        with pytest.raises(error, match=why), opened(prompts, results):
            pass
        assert results.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"line": 99, "id": 1, "error": "x"}\n', "names no line"),
        (b'{"line": true, "id": 1, "error": "x"}\n', "names no line"),
        (b'{"line": 3, "id": null, "error": "x"}\n' * 2, "done already"),
        (b'{"id": "x", "custom_id": "d", "error": {}}\n', "names no line"),
        (b"x\n", "not written by this job"),
    ],
)
def test_errors_of_others_are_not_touched(prompts: Path, results: Path, content: bytes, why: str) -> None:
    with opened(prompts, results):
        pass
    (errors := results.with_name("results.jsonl.errors")).write_bytes(content)
    with pytest.raises(StoreError, match=why), opened(prompts, results):
        pass
    assert errors.read_bytes() == content


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b'{"version": 2}', b'{"version": 1, "created": true, "facts": {}}', b"\xff", b" " * (2 << 20)],
    ids=["half", "array", "newer", "created", "bytes", "long"],
)
def test_a_state_that_cannot_be_read_is_an_error(prompts: Path, results: Path, content: bytes) -> None:
    (state := results.with_name("results.jsonl.job")).write_bytes(content)
    with (
        pytest.raises(StoreFormatError, match=r"no state of a job that can be read.*to start anew"),
        opened(prompts, results),
    ):
        pass
    assert state.read_bytes() == content
    assert not results.exists()


def test_names_that_cannot_be(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    os.link(prompts, tmp_path / "hard")
    (tmp_path / "ring").symlink_to("ring")
    for results, errors, why in (
        ("-", None, "standard input and output cannot be"),
        ("/dev/stdout", None, "an open file of this process"),
        ("/proc/self/fd/1", None, "an open file of this process"),
        ("/dev/null", None, "a device or pipe"),
        (tmp_path / "folder", None, "is a folder"),
        (tmp_path / "pipe", None, "a device or pipe"),
        (prompts, None, "the file of prompts and of results"),
        (tmp_path / "hard", None, "the file of prompts and of results"),
        (tmp_path / "ring", None, ""),
        (tmp_path / "no" / "r", None, "the folder .* does not exist: make it"),
        (prompts / "r", None, "does not exist"),
        (tmp_path / ("x" * 300), None, "name too long"),
        ("a\0b", None, "no name for a file"),
        (tmp_path / "r", tmp_path / "r", "the file of results and of errors"),
        (tmp_path / "r", prompts, "the file of prompts and of errors"),
        (tmp_path / "r", tmp_path / "r.job", "of errors and of state"),
        (tmp_path / "r", tmp_path / "r.job.new", "of errors and of the next state"),
        (tmp_path / "r", "-", "give a file"),
        (tmp_path / "r", tmp_path / "folder", "is a folder"),
    ):
        with pytest.raises(StoreError, match=f"(?i){why}"):
            JobPaths.checked(prompts, results, errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "hard", "pipe", "prompts.jsonl", "ring"]


def test_prompts_are_not_taken_for_what_a_killed_process_left(tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "r.job.new", [{"prompt": "a"}])
    with pytest.raises(StoreError, match="of prompts and of the next state"):
        JobPaths.checked(prompts, tmp_path / "r")


def test_files_without_rights_are_refused(
    prompts: Path, results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(StoreError, match="no right to read and write"):
        JobPaths.checked(prompts, results)
    with pytest.raises(StoreError, match="no right to make"):
        JobPaths.checked(prompts, tmp_path / "new")


@pytest.mark.parametrize("fault", ["full", "half", "fsync", "interrupt"])
def test_a_write_that_fails_leaves_nothing(
    prompts: Path, results: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    write: Callable[[int, Any], int] = os.write
    full = OSError(errno.ENOSPC, "No space left on device")

    def write_some(fd: int, data: memoryview) -> int:
        if fault == "half" and len(data) > 10:
            return write(fd, data[:10])  # then there is no room for the rest
        raise KeyboardInterrupt if fault == "interrupt" else full

    def no_sync(fd: int) -> None:
        raise full

    with opened(prompts, results) as journal:
        finish(journal, prompts, each=2, most=2)
        before = results.read_bytes()
        row = good({"id": "b", "prompt": "x", "n": 3}, 2)
        for index in journal.missing(row):
            journal.add(row, text_of(row, index))
        with monkeypatch.context() as patch:
            patch.setattr(os, *("fsync", no_sync) if fault == "fsync" else ("write", write_some))
            with pytest.raises(KeyboardInterrupt if fault == "interrupt" else StoreFullError) as raised:
                journal.commit()
        if fault != "interrupt":
            assert "free space there and run the job again, which goes on" in str(raised.value)
        assert results.read_bytes() == before
        if fault == "half":  # room again
            assert journal.commit() == 2
            assert journal.commit() == 0
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL


def test_a_file_that_may_not_grow_is_left_as_it_was(prompts: Path, results: Path) -> None:
    """The kernel itself takes 10 bytes and refuses the rest."""
    with opened(prompts, results) as journal:
        finish(journal, prompts, most=1)
        row = good({"prompt": "é"}, 5)
        journal.add(row, text_of(row, 0))
        before, limits = results.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        try:
            with pytest.raises(StoreFullError, match="File too large"):
                journal.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert results.read_bytes() == before
    with opened(prompts, results) as journal:
        finish(journal, prompts)
    assert answers(results).keys() == ALL


def test_what_counts_is_durable(prompts: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write and each name is followed by a sync of its file or folder before anything counts on it."""
    calls: list[tuple[str, str]] = []

    def noted(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            where = arguments[1] if name == "replace" else os.readlink(f"/proc/self/fd/{arguments[0]}")
            calls.append((name, Path(where).name))
            return plain(*arguments)

        return run

    folder, state = results.parent.name, "results.jsonl.job"
    with monkeypatch.context() as patch:
        for name in ("write", "fsync", "replace"):
            patch.setattr(os, name, noted(name, getattr(os, name)))
        with opened(prompts, results) as journal:
            assert calls == [
                *[("write", f"{state}.new"), ("fsync", f"{state}.new"), ("replace", state), ("fsync", folder)],
                *[("fsync", folder), ("fsync", results.name)],
                *[("fsync", folder), ("fsync", f"{results.name}.errors")],
            ]
            calls.clear()
            row, bad = good({"id": "b", "prompt": "x", "n": 3}, 2), good({"id": "a", "prompt": "x"})
            for index in journal.missing(row):
                journal.add(row, text_of(row, index))
            journal.fail(bad, "too long")
            assert calls == []
            assert journal.commit() == 4
            errors = f"{results.name}.errors"
            assert calls == [(name, file) for file in (results.name, errors) for name in ("write", "fsync")]


@pytest.mark.parametrize("what", ["move", "write", "replace"])
def test_results_that_others_move_or_write_are_noticed(prompts: Path, results: Path, what: str) -> None:
    with opened(prompts, results) as journal:
        finish(journal, prompts, most=1)
        if what == "write":
            results.write_bytes(results.read_bytes() + b"note\n")
        else:
            results.rename(results.with_name("elsewhere"))
            if what == "replace":
                results.write_bytes(results.with_name("elsewhere").read_bytes())
        with pytest.raises(StoreError, match=r"was moved, replaced or written|No such file"):
            finish(journal, prompts)


def test_it_may_be_a_folder_that_moves(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with opened(prompts, tmp_path / "one" / "r") as journal:
        finish(journal, prompts, most=3)
    (tmp_path / "one").rename(tmp_path / "two")
    with opened(prompts, tmp_path / "two" / "r") as journal:
        finish(journal, prompts)
    assert answers(tmp_path / "two" / "r").keys() == ALL


def test_a_journal_that_is_closed_says_so(prompts: Path, results: Path) -> None:
    with opened(prompts, results) as journal:
        journal.close()
        journal.close()
        with pytest.raises(ValueError, match="closed"):
            journal.commit()


def test_killed_at_every_system_call(tmp_path: Path) -> None:
    program = Path(__file__).parent / "killed.py"
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A process that commits row by row is killed after a few lines of its output, wherever it is then."""
    prompts, results = write_rows(tmp_path / "p", [{"prompt": "x", "n": 1 + n % 3} for n in range(400)]), tmp_path / "r"
    program = Path(__file__).parent / "killed.py"
    for run in range(4):
        with subprocess.Popen([sys.executable, program, "loop", prompts, results], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(3 + 7 * run):
                assert child.stdout.readline()
            child.kill()
    with opened(prompts, results) as journal:
        assert 3 + 10 + 17 + 24 <= journal.done_samples < 799
        finish(journal, prompts, each=50)
    assert answers(results).keys() == {(n + 1, index) for n in range(400) for index in range(1 + n % 3)}


def test_files_of_a_job_are_read_without_torch() -> None:
    absent = "import sys; sys.modules.update(dict.fromkeys(('torch', 'numpy', 'transformers')))"
    code = f"{absent}; import tierstore.jobs.journal"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
