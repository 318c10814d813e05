"""A job over a real checkpoint that streams from disk says what the plain model says, and can be stopped whenever."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from tests.jobs.made import write_rows
from tests.jobs.small import FAILED, ROWS, TEXTS, settings_of, texts_of, write_prompts
from tierstore.budget import Budget
from tierstore.errors import CheckpointError, DeviceError, ModuleError, StoreFormatError, StoreMismatchError
from tierstore.jobs import JobInterrupted, JobProgress, run, running, stream


@pytest.fixture(scope="module")
def greedy(tiny_checkpoint: Path) -> dict[str, str]:
    """What the plain model says to the greedy rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    said = {}
    for row in ROWS:
        if row.get("id", "").startswith(("plain", "chat")):
            text = row.get("prompt") or f"<user>{row['messages'][0]['content']}\n<assistant>"
            inputs = tokenizer(text, return_tensors="pt")
            most = row.get("max_new_tokens", 6)
            tokens = model.generate(**inputs, max_new_tokens=most, do_sample=False, pad_token_id=tokenizer.eos_token_id)
            said[row["id"]] = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return said


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, int], tuple[str, int]]:
    """What a job that nobody disturbs says."""
    folder = tmp_path_factory.mktemp("alone")
    said: list[str] = []
    report = run(write_prompts(folder), folder / "results", settings_of(tiny_checkpoint), say=said.append)
    assert (report.rows, report.done_rows, report.failed_rows) == (len(ROWS), len(ROWS), FAILED)
    assert report.found_tokens > 0  # of the common beginning
    assert report.session is not None
    assert report.session.bytes_moved > 0
    assert report.session.peak_bytes["hbm"] <= 6 << 20
    assert "sequences at once" in said[0]
    assert json.loads(report.to_json())["generated_tokens"] == report.generated_tokens
    assert "rows are done" in str(report)
    failed = [json.loads(line) for line in (folder / "results.errors").read_text().splitlines()]
    assert {line["id"]: line["line"] for line in failed} == {"bad": 7, "long": 8}
    found = texts_of(folder / "results")
    assert len(found) == TEXTS
    return found


def test_greedy_texts_are_those_of_the_plain_model(
    alone: dict[tuple[Any, int], tuple[str, int]], greedy: dict[str, str]
) -> None:
    assert {id: alone[id, 0][0] for id in greedy} == greedy


@pytest.mark.parametrize(
    "change",
    [{"sequences": 1, "speculate": "off"}, {"speculate": "lookup", "budget": Budget(hbm="64MiB")}],
    ids=["one at a time", "all in memory"],
)
def test_texts_do_not_depend_on_the_batch(
    tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]], change: dict[str, Any]
) -> None:
    run(write_prompts(tmp_path), tmp_path / "results", settings_of(tiny_checkpoint, **change))
    assert texts_of(tmp_path / "results") == alone


def test_interrupted_and_gone_on_with(
    tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]]
) -> None:
    prompts, results = write_prompts(tmp_path), tmp_path / "results"
    shown: list[JobProgress] = []

    def stop(now: JobProgress) -> None:
        shown.append(now)
        if now.done_rows > FAILED:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted) as stopped:
        run(prompts, results, settings_of(tiny_checkpoint), progress=stop)
    report = stopped.value.report
    assert 0 < report.done_rows < len(ROWS)
    assert shown[-1].done_rows == report.done_rows
    there = texts_of(results)
    assert all(alone[key] == said for key, said in there.items())
    assert run(prompts, results, settings_of(tiny_checkpoint)).done_rows == len(ROWS)
    assert texts_of(results) == alone
    again = run(prompts, results, settings_of(tiny_checkpoint, tokens=None))  # nothing is left to do
    assert (again.done_rows, again.passes, again.session) == (len(ROWS), 0, None)


def test_killed_at_random_moments(
    tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]]
) -> None:
    write_prompts(tmp_path)
    program = Path(__file__).with_name("job_killed.py")
    done = subprocess.run(
        [sys.executable, program, tmp_path, tiny_checkpoint, "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) >= 2, done.stdout
    assert texts_of(tmp_path / "results") == alone
    assert len((tmp_path / "results.errors").read_text().splitlines()) == FAILED


@pytest.mark.parametrize("change", [{"seed": 1}, {"tokens": 8}, {"chat": True}, {"kv_format": "bf16"}])
def test_a_job_goes_on_only_as_it_was_begun(tiny_checkpoint: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    prompts, results = write_prompts(tmp_path), tmp_path / "results"

    def stop(now: JobProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        run(prompts, results, settings_of(tiny_checkpoint), progress=stop)
    with pytest.raises(StoreMismatchError, match=next(iter(change))):
        run(prompts, results, settings_of(tiny_checkpoint, **change))


def test_an_error_of_the_machine_leaves_what_is_done(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts, results = write_prompts(tmp_path), tmp_path / "results"

    def fail(now: JobProgress) -> None:
        if now.done_rows > FAILED:
            raise DeviceError("gone")

    with pytest.raises(DeviceError):
        run(prompts, results, settings_of(tiny_checkpoint), progress=fail)
    assert texts_of(results)


def test_results_may_lie_in_the_checkpoint_s_folder(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, folder := tmp_path / "checkpoint")
    prompts = write_rows(folder / "prompts.jsonl", ROWS[:1])
    for _ in range(2):  # the second run finds what the first one wrote
        assert run(prompts, folder / "results", settings_of(folder)).done_rows == 1
    assert len(texts_of(folder / "results")) == 1
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(StoreMismatchError, match=r"model\.files\.config\.json was"):
        run(prompts, folder / "results", settings_of(folder))


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("results", b"my thesis", StoreMismatchError),
        ("results.job", b"my thesis", StoreFormatError),
        ("results.job", b'{"version": 1, "created": 1, "facts": {}}', StoreMismatchError),
    ],
)
def test_files_of_others_are_refused_before_a_model_is_opened(
    tiny_checkpoint: Path, tmp_path: Path, name: str, content: bytes, error: type[Exception], monkeypatch: Any
) -> None:
    monkeypatch.setattr(running, "open_job", None)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error):
        run(write_prompts(tmp_path), tmp_path / "results", settings_of(tiny_checkpoint))
    assert (tmp_path / name).read_bytes() == content


def test_a_dtype_may_be_torch_s(tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts, results = write_rows(tmp_path / "prompts", ROWS[:1]), tmp_path / "results"
    for dtype in (torch.float32, "float32"):  # which is the same job
        report = run(prompts, results, settings_of(tiny_checkpoint, dtype=dtype))
        assert report.done_rows == 1


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(write_prompts(tmp_path), tmp_path / "results", settings_of(tmp_path / "nowhere"))


async def test_streamed_rows_say_the_same(
    tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]]
) -> None:
    prompts, settings = write_prompts(tmp_path), settings_of(tiny_checkpoint)
    results = [result async for result in stream(prompts, settings)]
    assert {(each.id, each.index): (each.text, each.seed) for each in results if each.error is None} == alone
    assert {each.id for each in results if each.error is not None} == {"bad", "long"}
    first = [result async for result in stream(ROWS[:1], settings)]
    assert [(each.text, each.seed) for each in first] == [alone["plain 0", 0]]


@pytest.fixture(scope="module")
def recurrent(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that keeps a state of each text, not keys and values."""
    folder = tmp_path_factory.mktemp("recurrent")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(folder)
    end = tokenizer.eos_token_id
    ids = {"eos_token_id": end, "bos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=64, state_size=8, num_hidden_layers=2, **ids)
    ).save_pretrained(folder)
    return folder


def test_texts_by_themselves(recurrent: Path, tmp_path: Path) -> None:
    prompts = write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Say {n}.", "n": n} for n in (1, 3)])
    for name, sequences in (("one", 1), ("many", None)):
        said: list[str] = []
        settings = settings_of(recurrent, budget=Budget("512KiB"), tokens=None, sequences=sequences)
        report = run(prompts, tmp_path / name, settings, say=said.append)
        assert "each text is computed by itself" in said[0]
        assert report.session is not None
        assert report.session.bytes_moved > report.passes * 1000  # it streams
    texts = texts_of(tmp_path / "many")
    assert len(texts) == 4
    assert texts_of(tmp_path / "one") == texts
    model: Any = AutoModelForCausalLM.from_pretrained(recurrent)
    tokenizer: Any = AutoTokenizer.from_pretrained(recurrent)
    inputs = tokenizer("Say 1.", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert texts[1, 0][0] == tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("change", [{"speculate": "lookup"}, {"kv_format": "int8"}, {"draft": "elsewhere"}])
def test_what_a_model_cannot_do_is_an_error(recurrent: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    settings = settings_of(recurrent, budget=Budget("512KiB"), tokens=None, **change)
    with pytest.raises((ModuleError, DeviceError)):
        run(write_prompts(tmp_path), tmp_path / "results", settings)
    assert not (tmp_path / "results").exists()
