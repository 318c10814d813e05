"""A checkpoint read by its pieces is what from_pretrained gives, bit for bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.hf.zoo import ZOO, differing, fill, named_tensors, read_all, save, tiny
from tierstore.errors import CheckpointError, StoreError
from tierstore.hf.checkpoint import Checkpoint

Open = Callable[..., Checkpoint]


def loaded(folder: Path, **how: Any) -> Any:
    named = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, named).from_pretrained(folder, **how)


def tied_groups(module: torch.nn.Module) -> set[frozenset[str]]:
    groups: dict[int, set[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@pytest.mark.parametrize("name", ZOO)
def test_every_value_and_the_forward_equal_from_pretrained(name: str, tmp_path: Path, opened: Open) -> None:
    save(tiny(name), tmp_path)
    want = loaded(tmp_path)
    checkpoint = opened(tmp_path)
    module: Any = checkpoint.module
    assert type(module) is type(want)
    assert module.training is False
    assert module.config.to_dict() == want.config.to_dict()
    assert module.config._attn_implementation == want.config._attn_implementation
    if want.can_generate():
        assert module.generation_config.to_dict() == want.generation_config.to_dict()
    assert tied_groups(module) == tied_groups(want)
    values = read_all(checkpoint)
    assert differing(values, named_tensors(want)) == []
    fill(module, values)
    tokens = torch.arange(3, 11).view(2, 4)
    inputs: dict[str, Any] = {"input_ids": tokens}
    if want.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if name == "RecurrentGemmaModel":
        inputs["use_cache"] = False
    with torch.no_grad():
        first, second = module(**inputs)[0], want(**inputs)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "MixtralForCausalLM", "DeepseekV3ForCausalLM"])
def test_experts_are_stacked_where_they_lie(name: str, tmp_path: Path, opened: Open) -> None:
    save(tiny(name), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt"})  # by name, as most checkpoints are
    checkpoint = opened(tmp_path)
    fused = [name for name in checkpoint.pieces if name.endswith("experts.gate_up_proj")]
    assert fused
    assert all(len(checkpoint.pieces[name]) >= 4 for name in fused)
    assert not any("experts.gate_up" in name or "experts.down" in name for name in checkpoint.ready)
    assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path))) == []


def test_experts_that_lie_as_they_are_used_are_one_piece(tmp_path: Path, opened: Open) -> None:
    save(tiny("DeepseekV3ForCausalLM"), tmp_path, max_shard_size="150KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    checkpoint = opened(tmp_path)
    assert len(checkpoint.pieces["model.layers.1.mlp.experts.gate_up_proj"]) == 1
    assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path))) == []


def test_short_runs_are_converted_and_said_aloud(tmp_path: Path, opened: Open) -> None:
    save(tiny("MixtralForCausalLM", hidden_size=16, intermediate_size=16, num_attention_heads=2), tmp_path)
    checkpoint = opened(tmp_path)
    assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.ready
    assert any("rearranged in runs below 4 KiB" in note for note in checkpoint.notes)
    assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path))) == []


@pytest.mark.parametrize("kept", ["both", "embedding", "head"])
def test_tied_weights_are_found_by_either_name(kept: str, tmp_path: Path, opened: Open) -> None:
    save(tiny("Qwen2ForCausalLM"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    embedding = tensors.pop("model.embed_tokens.weight")
    if kept in ("both", "embedding"):
        tensors["model.embed_tokens.weight"] = embedding
    if kept in ("both", "head"):
        tensors["lm_head.weight"] = embedding.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    module: Any = checkpoint.module
    assert module.lm_head.weight is module.model.embed_tokens.weight
    assert "lm_head.weight" not in checkpoint.pieces
    assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path))) == []


def test_tied_names_with_different_values_are_not_tied(tmp_path: Path, opened: Open) -> None:
    save(tiny("Qwen2ForCausalLM"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    module: Any = checkpoint.module
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path))) == []


def test_a_base_model_s_checkpoint_loads_into_its_head(tmp_path: Path, opened: Open) -> None:
    save(tiny("Qwen2ForCausalLM").model, tmp_path)
    checkpoint = opened(tmp_path, model_class=transformers.AutoModelForCausalLM)
    assert type(checkpoint.module) is transformers.Qwen2ForCausalLM
    want = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert differing(read_all(checkpoint), named_tensors(want)) == []
    assert type(opened(tmp_path).module) is transformers.Qwen2Model


def test_an_auto_class_and_a_plain_class_are_both_taken(tmp_path: Path, opened: Open) -> None:
    save(tiny("T5ForConditionalGeneration"), tmp_path)
    for wanted in (transformers.AutoModelForSeq2SeqLM, transformers.T5ForConditionalGeneration):
        module: Any = opened(tmp_path, model_class=wanted).module
        assert type(module) is transformers.T5ForConditionalGeneration
        assert module.config.to_dict() == wanted.from_pretrained(tmp_path).config.to_dict()


def test_small_casts_are_done_in_memory(tmp_path: Path, opened: Open) -> None:
    save(tiny("LlamaForCausalLM"), tmp_path, torch.float32)
    for asked in (torch.bfloat16, "bfloat16"):
        checkpoint = opened(tmp_path, dtype=asked)
        assert not checkpoint.pieces
        assert any("cast from float32 to bfloat16" in note for note in checkpoint.notes)
        assert differing(read_all(checkpoint), named_tensors(loaded(tmp_path, dtype=torch.bfloat16))) == []


def test_weights_that_no_model_asks_for_are_named(tmp_path: Path, opened: Open) -> None:
    save(tiny("LlamaForCausalLM"), tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "left.over": torch.zeros(3)}, file, metadata={"format": "pt"})
    checkpoint = opened(tmp_path)
    assert any("left.over" in note for note in checkpoint.notes)
    assert "left.over" not in checkpoint.pieces


def test_opening_neither_writes_nor_draws_random_numbers(tmp_path: Path, opened: Open) -> None:
    save(tiny("MarianMTModel"), tmp_path)  # its sinusoids are computed by an initialiser
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    assert opened(tmp_path).written_nbytes == 0
    assert torch.equal(torch.rand(4), want)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


OWN_CODE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.extra = torch.nn.Linear(64, 64)
        self.post_init()

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits + self.extra.weight.sum()
        return out
"""


def test_code_of_its_own_runs_when_asked(tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.delitem(sys.modules, "transformers_modules", raising=False)
    folder = save(tiny("LlamaForCausalLM"), tmp_path / "model")
    file = folder / "model.safetensors"
    extra = {"extra.weight": torch.randn(64, 64).to(torch.bfloat16), "extra.bias": torch.ones(64).to(torch.bfloat16)}
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    (folder / "own.py").write_text(OWN_CODE)
    change_config(
        folder, model_type="own", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    )
    want = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    checkpoint = opened(folder, trust_remote_code=True)
    assert type(checkpoint.module).__name__ == "OwnForCausalLM"
    values = read_all(checkpoint)
    assert differing(values, named_tensors(want)) == []
    fill(checkpoint.module, values)
    tokens = torch.arange(5).view(1, 5)
    with torch.no_grad():
        assert torch.equal(checkpoint.module(tokens).logits, want(tokens).logits)


def change_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


class TestRefusals:
    """Each names the thing, and no store stays open (the suite looks for open files and threads)."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        return save(tiny("LlamaForCausalLM"), tmp_path)

    def test_missing_weights(self, folder: Path, opened: Open) -> None:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lacks 1 weights.*model\.layers\.1\.mlp\.up_proj\.weight"):
            opened(folder)

    def test_missing_weights_cost_no_memory(self, folder: Path, opened: Open) -> None:
        change_config(folder, num_hidden_layers=3, intermediate_size=1 << 40)  # 32 TiB a layer, never allocated
        with pytest.raises(CheckpointError):
            opened(folder)

    def test_a_head_that_would_be_random(self, folder: Path, opened: Open) -> None:
        with pytest.raises(CheckpointError, match=r"score\.weight"):
            opened(folder, model_class=transformers.AutoModelForSequenceClassification)

    def test_shapes_that_differ(self, folder: Path, opened: Open) -> None:
        change_config(folder, vocab_size=90)
        with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \(96, 64\), .* needs \(90, 64\)"):
            opened(folder)

    def test_no_config(self, folder: Path, opened: Open) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"has no config\.json"):
            opened(folder)

    @pytest.mark.parametrize("text", ["", "[]", "{", '"x"', '{"model_type": "no-such"}', '{"hidden_size": 3}', "\xff"])
    def test_a_config_that_is_none(self, text: str, folder: Path, opened: Open) -> None:
        (folder / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(CheckpointError, match=r"config\.json"):
            opened(folder)

    def test_a_config_that_makes_no_model(self, folder: Path, opened: Open) -> None:
        change_config(folder, hidden_act="no-such")
        with pytest.raises(CheckpointError, match="no-such"):
            opened(folder)

    def test_a_generation_config_that_is_none(self, folder: Path, opened: Open) -> None:
        (folder / "generation_config.json").write_text("{")
        with pytest.raises(CheckpointError, match="generation_config"):
            opened(folder)

    def test_an_unknown_dtype(self, folder: Path, opened: Open) -> None:
        with pytest.raises(CheckpointError, match="dtype"):
            opened(folder, dtype="float99")

    def test_weights_elsewhere(self, folder: Path, opened: Open) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        change_config(folder, transformers_weights="other.safetensors")
        assert opened(folder).pieces
        change_config(folder, transformers_weights="../other.safetensors")
        with pytest.raises(CheckpointError, match="do not trust"):
            opened(folder)

    def test_quantized_weights(self, folder: Path, opened: Open) -> None:
        change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(CheckpointError, match=r"quantized \(gptq\)"):
            opened(folder)

    def test_code_is_not_run_unasked(self, folder: Path, opened: Open) -> None:
        (folder / "own.py").write_text("raise SystemExit('ran')")
        change_config(folder, model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
        with pytest.raises(CheckpointError, match="trust_remote_code=True"):
            opened(folder)

    def test_pickles_are_not_loaded(self, folder: Path, opened: Open) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(StoreError, match="pickle"):
            opened(folder)

    def test_a_file(self, folder: Path, opened: Open) -> None:
        with pytest.raises(CheckpointError, match="is a file"):
            opened(folder / "model.safetensors")

    def test_a_folder_that_is_not_there(self, tmp_path: Path, opened: Open) -> None:
        with pytest.raises(CheckpointError, match="no-such"):
            opened(tmp_path / "no-such")
