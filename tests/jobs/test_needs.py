"""Whoever gives a job the KV bytes that an error names has no row that fails for want of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

from tests.jobs.made import write_rows
from tests.jobs.small import settings_of
from tierstore.budget import Budget
from tierstore.errors import PlanError
from tierstore.jobs import run

KIB = 1 << 10
ROWS: list[Any] = [
    {"id": "long", "prompt": "x" * 700},
    *({"id": f"short {n}", "prompt": f"{n}" * (1 + 50 * n)} for n in range(4)),
]
BELOW: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ram": {"kv_ram": 192 * KIB},
    "disk": {"kv_nvme": 2048 * KIB},
}


def small_checkpoint(tiny: Path, folder: Path, make: Any, config: Any) -> Path:
    """A model of two layers with windows of 100 tokens, in all of them or in one, and the tiny one's tokenizer."""
    shutil.copytree(
        tiny, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "generation_config.json")
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    make(config(vocab_size=257, num_key_value_heads=2, head_dim=16, sliding_window=100, **sizes)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("windows")
    return {
        "none": tiny_checkpoint,
        "all": small_checkpoint(tiny_checkpoint, folder / "all", MistralForCausalLM, MistralConfig),
        "some": small_checkpoint(tiny_checkpoint, folder / "some", Gemma2ForCausalLM, Gemma2Config),
    }


def answered(checkpoint: Path, folder: Path, kv_format: str | None, **budget: Any) -> dict[str, str]:
    """Why rows failed, by their names."""
    for old in folder.glob("results*"):
        old.unlink()
    settings = settings_of(
        checkpoint, budget=Budget(hbm="16MiB", **budget), kv_format=kv_format, store=folder / "store", speculate="off"
    )
    run(write_rows(folder / "prompts.jsonl", ROWS), folder / "results", settings)
    errors = folder / "results.errors"
    lines = [json.loads(line) for line in errors.read_text().splitlines()] if errors.exists() else []
    return {line["id"]: json.dumps(line) for line in lines}


@pytest.mark.parametrize("below", sorted(BELOW))
@pytest.mark.parametrize("kv_format", [None, "int4"])
@pytest.mark.parametrize("windows", ["none", "all", "some"])
def test_the_number_of_an_error_is_enough(
    checkpoints: dict[str, Path], tmp_path: Path, windows: str, kv_format: str | None, below: str
) -> None:
    checkpoint, tiers = checkpoints[windows], BELOW[below]
    with pytest.raises(PlanError, match=r"to (\d+) bytes for rows of up to 706 tokens") as refused:
        answered(checkpoint, tmp_path, kv_format, kv_hbm=1, **tiers)
    assert answered(checkpoint, tmp_path, kv_format, kv_hbm=refused.value.needed, **tiers) == {}
    least = int(re.findall(r"raise Budget\.kv_hbm to (\d+) bytes,", str(refused.value))[0])
    failed = answered(checkpoint, tmp_path, kv_format, kv_hbm=least, **tiers)
    assert set(failed) <= {"long", "short 3"}
    if failed:  # it has room for one sequence, and not for any
        numbers = [re.findall(r"raise Budget\.kv_hbm to (\d+) bytes for 1 seq", why)[0] for why in failed.values()]
        assert answered(checkpoint, tmp_path, kv_format, kv_hbm=max(map(int, numbers)), **tiers) == {}


def test_rows_longer_than_all_windows_need_no_more_pages_than_a_window(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    page = 2 * 64 * 2 * 32 * 4  # layers, tokens, keys and values, heads x dims, float32
    assert answered(checkpoints["all"], tmp_path, None, kv_hbm=8 * page) == {}


def test_a_budget_that_was_divided_names_what_to_give(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    checkpoint = checkpoints["none"]
    page = 4 * 64 * 2 * 128 * 4
    weights = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    settings = settings_of(checkpoint, budget=Budget(hbm=6 * page))
    assert weights > 6 * page
    prompts = write_rows(tmp_path / "prompts.jsonl", ROWS)
    run(prompts, tmp_path / "results", settings)
    numbers = re.findall(r"raise Budget\.kv_hbm to (\d+) bytes for 1 seq", (tmp_path / "results.errors").read_text())
    assert numbers
    again = settings_of(checkpoint, budget=Budget(hbm=6 * page, kv_hbm=max(map(int, numbers))))
    assert run(prompts, tmp_path / "again", again).failed_rows == 0
