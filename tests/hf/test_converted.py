"""Arithmetic is done once, kept, found again, and never seen half-done."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.hf.zoo import differing, named_tensors, read_all, save, tiny
from tierstore.errors import CheckpointError, StoreBusyError, StoreError, StoreFullError
from tierstore.hf import checkpoint as module_under_test
from tierstore.hf import converted, durable
from tierstore.hf.checkpoint import Checkpoint
from tierstore.hf.placement import materialise

Open = Callable[..., Checkpoint]
CAST: dict[str, Any] = {"dtype": torch.bfloat16}


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "READY_NBYTES", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tiny("MixtralForCausalLM", num_hidden_layers=1), tmp_path / "model", torch.float32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "store"


def files_in(place: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_size)
        for path in place.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def is_right(checkpoint: Checkpoint, folder: Path) -> bool:
    want = transformers.MixtralForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return differing(read_all(checkpoint), named_tensors(want)) == []


def test_without_a_place_it_says_what_is_needed(folder: Path, opened: Open) -> None:
    with pytest.raises(CheckpointError, match=r"cast from float32 to bfloat16.*KiB on disk.*store=") as raised:
        opened(folder, **CAST)
    assert "model.embed_tokens.weight" in str(raised.value)


def test_converted_once_and_found_again(folder: Path, place: Path, opened: Open) -> None:
    first = opened(folder, **CAST, store_dir=place)
    assert is_right(first, folder)
    (size,) = [size for _, size in files_in(place).values()]
    assert first.written_nbytes == size
    assert any(str(place) in note and "cast from float32 to bfloat16" in note for note in first.notes)
    before = files_in(place)
    second = opened(folder, **CAST, store_dir=place)
    assert second.written_nbytes == 0
    assert files_in(place) == before
    assert is_right(second, folder)


def test_experts_are_cast_one_by_one_and_still_stacked_by_place(folder: Path, place: Path, opened: Open) -> None:
    checkpoint = opened(folder, **CAST, store_dir=place)
    down = "model.layers.0.mlp.experts.down_proj"
    assert f"{down}#3" in checkpoint.store.specs
    assert checkpoint.store.specs[f"{down}#3"].shape == (64, 128)
    assert {piece.file for piece in checkpoint.pieces[down]} == {1}


def test_weights_that_need_nothing_stay_where_they_are(tmp_path: Path, place: Path, opened: Open) -> None:
    folder = save(tiny("DeepseekV3ForCausalLM"), tmp_path / "model")  # its router wants float32
    checkpoint = opened(folder, store_dir=place)
    made = {name for name, pieces in checkpoint.pieces.items() if any(piece.file == 1 for piece in pieces)}
    assert made == {"model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias"}
    want = transformers.DeepseekV3ForCausalLM.from_pretrained(folder)
    assert differing(read_all(checkpoint), named_tensors(want)) == []


def test_a_changed_source_is_converted_anew(folder: Path, place: Path, opened: Open) -> None:
    opened(folder, **CAST, store_dir=place)
    before = files_in(place)
    save(tiny("MixtralForCausalLM", num_hidden_layers=1).apply(_double), folder, torch.float32)
    again = opened(folder, **CAST, store_dir=place)
    assert is_right(again, folder)
    assert again.written_nbytes > 0
    assert files_in(place).keys() == before.keys()  # in the place of the old one


def _double(module: torch.nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.mul_(2)


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_damaged_file_is_made_again(damage: str, folder: Path, place: Path, opened: Open) -> None:
    opened(folder, **CAST, store_dir=place)
    (file,) = place.rglob("*.safetensors")
    data = file.read_bytes()
    file.write_bytes({"cut": data[:-1], "garbage": b"\xff" * 64, "empty": b""}[damage])
    assert is_right(opened(folder, **CAST, store_dir=place), folder)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_midway_nothing_looks_whole(
    folder: Path, place: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = os.fork()
    if child == 0:  # pragma: no cover
        calls = iter(range(10**6))
        honest = materialise

        def third_time_dies(value: Any) -> torch.Tensor:
            if next(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return honest(value)

        vars(converted)["materialise"] = third_time_dies
        try:
            module_under_test.open_checkpoint(folder, dtype=torch.bfloat16, store_dir=place)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [name.endswith(".part") for name in files_in(place)] == [True]
    assert is_right(opened(folder, **CAST, store_dir=place), folder)
    assert not any(name.endswith(".part") for name in files_in(place))


def test_a_failure_midway_leaves_nothing(
    folder: Path, place: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(value: Any) -> torch.Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(converted, "materialise", full)
    with pytest.raises(StoreFullError, match="make room"):
        opened(folder, **CAST, store_dir=place)
    assert files_in(place) == {}


def test_the_budget_for_what_is_written(folder: Path, place: Path, opened: Open) -> None:
    with pytest.raises(StoreFullError, match=r"Budget\.nvme is 1000 B"):
        opened(folder, **CAST, store_dir=place, nvme=1000)
    assert files_in(place) == {}


def test_a_full_disk_is_seen_before(folder: Path, place: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StoreFullError, match="10 B are free"):
        opened(folder, **CAST, store_dir=place)


def test_only_one_process_writes(folder: Path, place: Path, opened: Open) -> None:
    with durable.only_writer(place / "converted"), pytest.raises(StoreBusyError, match="another process"):
        opened(folder, **CAST, store_dir=place)
    assert is_right(opened(folder, **CAST, store_dir=place), folder)


def test_a_place_that_cannot_be_written(folder: Path, tmp_path: Path, opened: Open) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="pass store="):
        opened(folder, **CAST, store_dir=tmp_path / "file")


def test_a_shard_that_shrinks_while_it_is_converted(
    folder: Path, place: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = durable.require_room

    def shrink(*args: Any, **kwargs: Any) -> None:
        os.truncate(folder / "model.safetensors", 5000)
        honest(*args, **kwargs)

    monkeypatch.setattr(converted, "require_room", shrink)
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        opened(folder, **CAST, store_dir=place)
    assert files_in(place) == {}
