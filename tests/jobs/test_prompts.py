"""A file of prompts as a whole: its lines, its ids, and what happens when it changes."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.jobs.made import DEFAULTS, request, write_rows
from tierstore.errors import StoreError, StoreMismatchError
from tierstore.jobs import lines
from tierstore.jobs.ids import IdLines
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.rows import BadRow, Row
from tierstore.sampling import Sampling


def test_rows_are_counted_then_read(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "p",
        [{"id": "a", "prompt": "1"}, b"", b"{", request("b") | {"method": "GET"}, {"id": "a", "prompt": "2"}, b" \r"],
    )
    path.write_bytes(path.read_bytes() + b'{"prompt": "3", "n": 4}')  # no newline
    with PromptFile(path, Sampling(n=2)) as file:
        assert (file.lines, file.rows_total, file.bad_total, file.samples_total) == (7, 2, 3, 6)
        assert file.sha256 == sha256(path.read_bytes()).hexdigest()
        assert [file.samples_of(line) for line in range(-1, 9)] == [0, 0, 2, 0, 0, 0, 0, 0, 4, 0]
        assert [file.line_of(id) for id in ("a", "b", 7, "7", 3)] == [1, None, 7, None, None]
        for _ in range(2):
            first, bad, openai, twice, last = file.rows()
            assert isinstance(first, Row)
            assert (bad.line, bad.id) == (3, None)
            assert isinstance(openai, BadRow)
            assert (openai.id, openai.openai) == ("b", True)
            assert twice == BadRow(5, "a", "the id 'a' is that of line 1 already")
            assert (last.line, last.id) == (7, 7)
        assert [row.line for row in file.rows(lambda line: line < 5)] == [5, 7]


def test_an_id_given_may_be_that_of_a_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p", [{"id": 2, "prompt": "a"}, {"prompt": "b"}, {"id": "2", "prompt": "c"}])
    with PromptFile(path, DEFAULTS) as file:
        assert [isinstance(row, Row) for row in file.rows()] == [True, False, True]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=12).map(lambda raw: raw.replace(b"\n", b"")), max_size=8), st.booleans(), st.data())
def test_lines_are_those_of_split(
    tmp_path_factory: pytest.TempPathFactory, parts: list[bytes], ended: bool, data: st.DataObject
) -> None:
    content = b"\n".join(parts) + (b"\n" if ended else b"")
    block, longest = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 12))
    path = tmp_path_factory.mktemp("lines") / "x"
    path.write_bytes(content)
    seen: list[bytes] = []
    fd = os.open(path, os.O_RDONLY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK", block)
        patch.setattr(lines, "MAX_LINE_NBYTES", longest)
        found = list(lines.lines_of(fd, len(content), seen=seen.append))
    os.close(fd)
    assert b"".join(seen) == content
    *whole, last = content.split(b"\n")
    wanted = [*whole, last] if last else whole
    assert [line.number for line in found] == list(range(1, len(wanted) + 1))
    for line, raw in zip(found, wanted, strict=True):
        assert line.raw == (raw if len(raw) <= longest else None)
        assert content[line.offset :].startswith(raw)
        assert line.offset == 0 or content[line.offset - 1 : line.offset] == b"\n"
    assert [line.whole for line in found] == [True] * len(whole) + [False] * bool(last)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-3, 3) | st.text(max_size=2)))
def test_ids_have_the_line_that_was_first(ids: list[int | str]) -> None:
    table, model = IdLines(), dict[int | str, int]()
    for line, id in enumerate(ids, 1):
        assert table.add(id, line) == model.setdefault(id, line)
    assert {id: table.find(id) for id in model} == model
    assert len(table) == len(model)
    assert table.find("none of them") is None


def test_many_ids() -> None:
    table = IdLines()
    assert all(table.add(f"row-{line}", line) == line for line in range(1, 20_001))
    assert all(table.find(f"row-{line}") == line for line in range(1, 20_001))
    assert all(table.find(line) is None for line in range(1, 1000))


def test_many_rows_are_read_without_holding_them(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_bytes(
        b"".join(b'{"id": "row-%d", "prompt": "some words", "seed": %d}\n' % (n, n) for n in range(20_000))
    )
    with PromptFile(path, DEFAULTS) as file:
        assert file.rows_total == file.samples_total == 20_000
        assert sum(isinstance(row, Row) for row in file.rows(lambda line: line % 10 > 0)) == 2000


@pytest.mark.parametrize("change", ["grow", "shrink", "touch", "silent"])
def test_a_file_that_changes_is_an_error(tmp_path: Path, change: str) -> None:
    path = write_rows(tmp_path / "p", [{"prompt": "a"}, {"prompt": "b"}])
    with PromptFile(path, DEFAULTS) as file:
        before = path.stat()
        content = path.read_bytes()
        path.write_bytes({"grow": content * 2, "shrink": content[:10]}.get(change, content.replace(b"b", b"c")))
        if change == "silent":
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        else:
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        with pytest.raises(StoreMismatchError, match="changed while it was read"):
            list(file.rows())


def test_a_file_that_is_replaced_is_read_as_it_was(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "p", [{"prompt": "a"}])
    with PromptFile(path, DEFAULTS) as file:
        path.unlink()
        write_rows(path, [{"prompt": "b"}] * 5)
        assert [row.prompt for row in file.rows() if isinstance(row, Row)] == ["a"]


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, why in (
        (tmp_path, "regular file"),
        (tmp_path / "pipe", "regular file"),
        (tmp_path / "no", "No such file"),
    ):
        with pytest.raises(StoreError, match=why):
            PromptFile(path, DEFAULTS)
    with pytest.raises(StoreError, match="standard input"):
        PromptFile("-", DEFAULTS)
    with PromptFile(write_rows(tmp_path / "empty", []), DEFAULTS) as file:
        assert (file.lines, list(file.rows())) == (0, [])


def test_what_is_packed_is_refused_as_a_whole(tmp_path: Path) -> None:
    for name, packed in (("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)):
        (path := tmp_path / name).write_bytes(packed(b'{"prompt": "a"}\n'))
        with pytest.raises(StoreError, match=f"packed with {name}.*unpack it first"):
            PromptFile(path, DEFAULTS)


def test_a_disk_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, nbytes: int, offset: int) -> bytes:
        raise OSError(5, "Input/output error")

    path = write_rows(tmp_path / "p", [{"prompt": "a"}])
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(StoreError, match="Input/output error: check the disk"):
        PromptFile(path, DEFAULTS)
