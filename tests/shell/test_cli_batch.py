"""The command for batches, run as a shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.jobs.made import write_rows
from tierstore.jobs import running
from tierstore.jobs.journal import Journal

ROOT = Path(__file__).parents[2]
ROWS = [{"id": number, "prompt": f"Say {number}.", "max_new_tokens": 4} for number in range(6)]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "prompts.jsonl", [*ROWS, b"{"])


def test_results_errors_and_a_summary(run: Any, prompts: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = ("--model", tiny_checkpoint, "--hbm", "8MiB", "--errors", tmp_path / "wrong")
    ran = run("batch", prompts, tmp_path / "results", *options)
    assert ran.code == 0, ran.err
    assert ran.out == ""
    assert "sequences at once" in ran.err
    assert "7 of 7 rows are done, 1 of them failed" in ran.err
    answers = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert sorted(answer["id"] for answer in answers) == list(range(6))
    assert json.loads((tmp_path / "wrong").read_text())["line"] == 7


def test_json_and_quiet(run: Any, prompts: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    options = ("--model", tiny_checkpoint, "--hbm", "64MiB", "--json", "--quiet", "--temperature", "1", "--seed", "3")
    ran = run("batch", prompts, tmp_path / "results", *options)
    assert ran.err == ""
    said = json.loads(ran.out)
    assert (said["rows"], said["done_rows"], said["failed_rows"]) == (7, 7, 1)
    assert said["session"]["peak_bytes"]["hbm"] > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engine", "abacus"], "engine is 'abacus'"),
        (["--speculate", "wildly"], "speculate is 'wildly'"),
        (["--top-p", "7"], "top_p is 7"),
        (["--hbm", "8XB"], "Budget.hbm is '8XB'"),
        (["--errors", "prompts.jsonl"], "prompts.jsonl"),
        (["--dtype", "float99"], "float99"),
        (["--tokens-per-micro-batch", "1000000000"], "tokens is 1000000000: give at most 65536"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(
    run: Any, prompts: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: Any, options: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("batch", "prompts.jsonl", "results", "--model", tiny_checkpoint, "--hbm", "8MiB", *options)
    assert ran.code == 2
    assert ran.err.startswith("tierstore: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["prompts.jsonl"]


def test_ctrl_c_says_how_to_go_on_and_the_script_is_the_same_command(
    run: Any, prompts: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(prompts, [{"id": number, "prompt": "abc", "max_new_tokens": 1 + 3 * number} for number in range(6)])
    arguments = [prompts, tmp_path / "results", "--model", tiny_checkpoint, "--hbm", "64MiB", "--speculate", "off"]
    commit = Journal.commit

    def interrupted(journal: Journal) -> int:
        lines = commit(journal)
        if journal.done_rows == 2:
            raise KeyboardInterrupt
        return lines

    monkeypatch.setattr(Journal, "commit", interrupted)
    stopped = run("batch", *arguments)
    assert stopped.code == 130, stopped.err
    assert "2 of 6 rows are done and written. The same command goes on" in stopped.err
    assert len((tmp_path / "results").read_text().splitlines()) == 2
    script = [sys.executable, "scripts/batch_generate.py", *map(str, arguments), "--quiet"]
    done = subprocess.run(script, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    answers = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert sorted(answer["id"] for answer in answers) == list(range(6))


def test_ctrl_c_before_there_is_a_job(
    run: Any, prompts: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "PromptFile", interrupted)  # which may be long
    ran = run("batch", prompts, tmp_path / "results", "--model", tiny_checkpoint, "--hbm", "64MiB")
    assert (ran.code, ran.err) == (130, "tierstore: stopped. The same command goes on with the rest.\n")


def test_without_stderr(prompts: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """As a job that a shell begins with ``2>&-``: nobody can be told, and no file of the job gets the number 2."""
    arguments = [prompts, tmp_path / "results", "--model", tiny_checkpoint, "--hbm", "64MiB"]
    command = [sys.executable, "scripts/batch_generate.py", *map(str, arguments)]
    done = subprocess.run(["bash", "-c", '"$@" 2>&- >&-', "bash", *command], check=False, cwd=ROOT)
    assert done.returncode == 0
    assert len((tmp_path / "results").read_text().splitlines()) == 6
    code = "import os; from tierstore.cli import open_standard_files as go; go(); print(os.open('.', 0))"
    opened = f'{sys.executable} -c "{code}" 2>&- <&- | cat'
    assert int(subprocess.run(["bash", "-c", opened], check=True, cwd=ROOT, capture_output=True).stdout) > 2
