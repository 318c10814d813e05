"""The command, run as a shell would."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tierstore import cli
from tierstore.report.report import LinkReport, Report

TOKENS = 6


@pytest.fixture(scope="module")
def plain(tiny_checkpoint: Path) -> Any:
    """What the plain model says, greedily."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_checkpoint)
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)

    def say(prompt: str) -> str:
        inputs = tokenizer(prompt, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        return cast(str, tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return say


def test_generate_says_what_the_plain_model_says_and_reports(run: Any, plain: Any, tiny_checkpoint: Path) -> None:
    ran = run("generate", tiny_checkpoint, "--prompt", "hello", "--hbm", "4MiB", "--max-new-tokens", TOKENS)
    assert ran.code == 0
    assert ran.out == plain("<user>hello\n<assistant>") + "\n"
    assert "nvme->hbm" in ran.err
    assert "misses: " in ran.err


def test_without_chat_the_prompt_is_taken_as_it_is(run: Any, plain: Any, tiny_checkpoint: Path) -> None:
    ran = run(
        "generate", tiny_checkpoint, "--prompt", "hello", "--hbm", "4MiB", "--max-new-tokens", TOKENS, "--no-chat"
    )
    assert ran.out == plain("hello") + "\n"


def test_json_is_one_line_of_text_and_report(run: Any, plain: Any, tiny_checkpoint: Path) -> None:
    ran = run("generate", tiny_checkpoint, "--prompt", "hello", "--hbm", "4MiB", "--max-new-tokens", TOKENS, "--json")
    (line,) = ran.out.splitlines()
    said = json.loads(line)
    assert said["text"] == plain("<user>hello\n<assistant>")
    assert said["report"]["bytes_moved"] > 0
    assert said["report"]["peak_bytes"]["hbm"] <= 4 << 20
    assert ran.err == ""


def test_sampling_follows_the_seed(run: Any, tiny_checkpoint: Path) -> None:
    def say(seed: int) -> str:
        options = ("--hbm", "20MiB", "--max-new-tokens", 20, "--temperature", "1.5", "--seed", seed)
        return cast(str, run("generate", tiny_checkpoint, "--prompt", "hello", *options).out)

    assert say(1) == say(1)
    assert say(1) != say(2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hbm", "8XB"], "Budget.hbm is '8XB'"),
        (["--hbm", "0"], "Budget.hbm is 0"),
        (["--hbm", "10000TiB"], "lower the budget"),
        (["--hbm", "1000"], "hbm"),
        (["--hbm", "4MiB", "--dtype", "float99"], "no dtype of torch"),
        (["--hbm", "4MiB", "--device", "abacus"], "'abacus' is not a device"),
    ],
)
def test_a_wrong_option_is_one_line_and_code_2(run: Any, tiny_checkpoint: Path, options: list[str], said: str) -> None:
    ran = run("generate", tiny_checkpoint, "--prompt", "hello", *options)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("tierstore: ")
    assert said in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize("left_out", ["", "config.json", "model.safetensors", "tokenizer.json tokenizer_config.json"])
def test_an_incomplete_checkpoint_is_one_line_and_code_2(
    run: Any, tiny_checkpoint: Path, tmp_path: Path, left_out: str
) -> None:
    folder = tmp_path / "checkpoint"
    if left_out:
        folder.mkdir()
        for file in tiny_checkpoint.iterdir():
            if file.name not in left_out.split():
                (folder / file.name).write_bytes(file.read_bytes())
    ran = run("generate", folder, "--prompt", "hello", "--hbm", "4MiB")
    assert ran.code == 2
    assert ran.err.startswith("tierstore: ")
    assert str(folder) in ran.err
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--fast"],
        ["generate"],
        ["generate", "x", "--prompt", "p"],
        ["generate", "x", "--prompt", "p", "--hbm", "1GiB", "--gpu", "1"],
        ["generate", "x", "--prompt", "p", "--hbm", "1GiB", "--max-new-tokens", "0"],
        ["generate", "x", "--prompt", "p", "--hbm", "1GiB", "--temperature", "-1"],
    ],
)
def test_wrong_usage_is_code_2(run: Any, arguments: list[str]) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert "Usage" in ran.err


def test_an_empty_prompt_is_wrong_usage(run: Any, tiny_checkpoint: Path) -> None:
    ran = run("generate", tiny_checkpoint, "--prompt", "", "--hbm", "4MiB", "--no-chat")
    assert ran.code == 2
    assert "the prompt has no tokens" in ran.err


def test_info_says_what_the_machine_has(run: Any, tiny_checkpoint: Path) -> None:
    ran = run("info", tiny_checkpoint)
    assert ran.code == 0
    said = dict(line.split("  ", 1) for line in ran.out.splitlines())
    assert {"RAM", "memory cap", "pinnable", "disk to RAM", "RAM to RAM", "GPUDirect"} <= set(said)
    assert "model.safetensors" in said["disk to RAM"]


def test_info_as_json(run: Any, tiny_checkpoint: Path) -> None:
    said = json.loads(run("info", tiny_checkpoint, "--json").out)
    assert said["machine"]["ram_nbytes"] > 0
    assert said["links"]["disk"] > 0


def test_info_without_anything_to_read_is_one_line_and_code_2(run: Any, tmp_path: Path) -> None:
    ran = run("info", tmp_path)
    assert ran.code == 2
    assert "holds no file" in ran.err


def test_the_progress_line_says_how_far_the_first_pass_is() -> None:
    progress = cli._Progress()
    assert progress.line() == "opening the checkpoint"
    links = {"nvme->hbm": LinkReport(nbytes=3 << 30, seconds=1.0, moves=7)}
    report = Report({"hbm": 0}, links, {}, misses=0, resident_share=0.0, passes=0, seconds=2.0)
    progress.follow(cast(Any, SimpleNamespace(report=lambda: report, progress=lambda: (7, 28))))
    assert progress.line() == "first pass: 7 of 28 units, 3.00 GiB read, 1.50 GiB/s"


def test_without_its_extra_the_command_says_what_to_install() -> None:
    program = "import sys; sys.modules['typer'] = None; import tierstore.cli"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.strip() == "the tierstore command needs typer: pip install 'tierstore[hf]'"
