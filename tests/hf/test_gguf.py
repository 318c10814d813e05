"""A .gguf file is imported once, whole or not at all."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.hf.zoo import differing, named_tensors, read_all
from tierstore.errors import CheckpointError, StoreBusyError, StoreError, StoreFullError
from tierstore.hf import durable
from tierstore.hf import gguf as module_under_test
from tierstore.hf.checkpoint import Checkpoint

Open = Callable[..., Checkpoint]
HIDDEN, FFN, VOCAB = 64, 128, 64


def write_gguf(file: Path, seed: int = 0, tokenizer: bool = True) -> Path:
    """A Llama of one layer with Q8_0 weights and a byte-pair tokenizer of single letters."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(VOCAB)
    writer.add_tokenizer_model("gpt2")
    if tokenizer:
        writer.add_token_list([*(chr(ord("0") + i) for i in range(VOCAB - 3)), "12", "<s>", "</s>"])
        writer.add_token_types([1] * (VOCAB - 2) + [3, 3])
        writer.add_token_merges(["1 2"])
        writer.add_bos_token_id(VOCAB - 2)
        writer.add_eos_token_id(VOCAB - 1)

    def add(name: str, rows: int, columns: int) -> None:
        values = rng.standard_normal((rows, columns), np.float32)
        packed = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    add("token_embd.weight", VOCAB, HIDDEN)
    add("output.weight", VOCAB, HIDDEN)
    add("blk.0.attn_q.weight", HIDDEN, HIDDEN)
    add("blk.0.attn_k.weight", HIDDEN // 2, HIDDEN)
    add("blk.0.attn_v.weight", HIDDEN // 2, HIDDEN)
    add("blk.0.attn_output.weight", HIDDEN, HIDDEN)
    add("blk.0.ffn_gate.weight", FFN, HIDDEN)
    add("blk.0.ffn_up.weight", FFN, HIDDEN)
    add("blk.0.ffn_down.weight", HIDDEN, FFN)
    for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight"):
        writer.add_tensor(name, rng.standard_normal(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.Q8_0.gguf")


def dequantized(file: Path, **how: Any) -> dict[str, torch.Tensor]:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=transformers.GgufConfig(dequantize=True), **how
    )
    return named_tensors(model)


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_imported_once_beside_the_file(file: Path, opened: Open) -> None:
    first = opened(file)
    assert first.path == file.parent / "tiny.Q8_0.gguf.tierstore" / "auto"
    assert first.written_nbytes > 0
    assert differing(read_all(first), dequantized(file)) == []
    assert {parameter.dtype for parameter in first.module.parameters()} == {torch.float32}
    assert transformers.AutoTokenizer.from_pretrained(first.path)("1235")["input_ids"] == [VOCAB - 3, 3, 5]
    before = stamps(first.path)
    second = opened(file)
    assert second.written_nbytes == 0
    assert "before" in second.notes[0]
    assert stamps(first.path) == before
    assert differing(read_all(second), read_all(first)) == []


def test_weights_come_without_a_tokenizer_too(file: Path, opened: Open) -> None:
    checkpoint = opened(write_gguf(file, tokenizer=False))
    assert "without a tokenizer" in checkpoint.notes[0]
    assert differing(read_all(checkpoint), dequantized(file)) == []


def test_in_the_dtype_asked_for_below_store(file: Path, tmp_path: Path, opened: Open) -> None:
    place = tmp_path / "store"
    checkpoint = opened(file, dtype=torch.bfloat16, store_dir=place)
    assert checkpoint.path == place / "tiny.Q8_0.gguf.tierstore" / "bfloat16"
    assert not (tmp_path / "tiny.Q8_0.gguf.tierstore").exists()
    assert differing(read_all(checkpoint), dequantized(file, dtype=torch.bfloat16)) == []


def test_a_changed_file_is_imported_anew(file: Path, opened: Open) -> None:
    opened(file)
    write_gguf(file, seed=1)
    again = opened(file)
    assert again.written_nbytes > 0
    assert differing(read_all(again), dequantized(file)) == []


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_killed_midway_nothing_looks_whole(file: Path, opened: Open) -> None:
    child = os.fork()
    if child == 0:  # pragma: no cover
        vars(durable)["_sync"] = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # all written, nothing durable
        try:
            module_under_test.import_gguf(file)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    home = file.parent / "tiny.Q8_0.gguf.tierstore"
    assert (home / "auto.part" / "model.safetensors").exists()
    assert not (home / "auto").exists()
    assert differing(read_all(opened(file)), dequantized(file)) == []
    assert not (home / "auto.part").exists()


def test_only_one_process_imports(file: Path, opened: Open) -> None:
    home = file.parent / "tiny.Q8_0.gguf.tierstore"
    with durable.only_writer(home), pytest.raises(StoreBusyError):
        opened(file)


def test_the_budget_for_what_is_written(file: Path, opened: Open) -> None:
    with pytest.raises(StoreFullError, match=r"Budget\.nvme"):
        opened(file, nvme=1000)
    assert not (file.parent / "tiny.Q8_0.gguf.tierstore" / "auto").exists()


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a gguf file at all", b"GGUF\x03\0\0\0" + b"\xff" * 64])
def test_what_is_no_gguf(content: bytes, tmp_path: Path, opened: Open) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot import"):
        opened(file)


def test_a_file_cut_short(file: Path, opened: Open) -> None:
    os.truncate(file, file.stat().st_size - 4096)
    with pytest.raises(CheckpointError, match="cannot import"):
        opened(file)


def test_a_file_that_is_not_there(tmp_path: Path, opened: Open) -> None:
    with pytest.raises(StoreError, match=r"no\.gguf"):
        opened(tmp_path / "no.gguf")
