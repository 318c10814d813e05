"""Tiny models of many architectures, and how to read a checkpoint whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from tierstore.contracts import ReadRequest
from tierstore.hf.checkpoint import Checkpoint

_TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# Experts of 64 x 64 in bfloat16 are 8 KiB: long enough to stay where they lie.
_EXPERTS = {**_PLAIN, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2}
_OLD = {**_TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_PAIR = {
    **_TOKENS,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 64,
}

ZOO: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _PLAIN,
    "MistralForCausalLM": _PLAIN,
    "Qwen2ForCausalLM": {**_PLAIN, "tie_word_embeddings": True},
    "Qwen3ForCausalLM": _PLAIN,
    "Qwen3MoeForCausalLM": _EXPERTS,
    "MixtralForCausalLM": {**_PLAIN, "num_local_experts": 4},
    "OlmoeForCausalLM": _EXPERTS,
    "DeepseekV3ForCausalLM": {
        **_PLAIN,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 16,
        "q_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
    },
    "GptOssForCausalLM": {**_PLAIN, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Gemma2ForCausalLM": {**_PLAIN, "head_dim": 16},
    "Gemma3ForCausalLM": {**_PLAIN, "head_dim": 16},
    "Phi3ForCausalLM": _PLAIN,
    "GPT2LMHeadModel": _OLD,
    "GPTNeoXForCausalLM": _PLAIN,
    "GPTJForCausalLM": {**_OLD, "rotary_dim": 8},
    "OPTForCausalLM": {**_PLAIN, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {**_TOKENS, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "FalconForCausalLM": _PLAIN,
    "MambaForCausalLM": _PLAIN,
    "FalconMambaForCausalLM": _PLAIN,
    "RecurrentGemmaModel": {**_PLAIN, "lru_width": 64, "attention_window_size": 16},
    "GraniteForCausalLM": _PLAIN,
    "CohereForCausalLM": _PLAIN,
    "StableLmForCausalLM": _PLAIN,
    "Starcoder2ForCausalLM": _PLAIN,
    "BertForMaskedLM": _PLAIN,
    "T5ForConditionalGeneration": {**_TOKENS, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4},
    "BartForConditionalGeneration": _PAIR,
    "MarianMTModel": _PAIR,
}


def tiny(name: str, **changes: Any) -> Any:
    """A random model of class ``name``, the same each time, in float32."""
    model_class: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**ZOO[name], **changes}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)  # biases and norms too: no two tensors are alike
    return model


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16, **how: Any) -> Path:
    """Save ``model`` as a checkpoint of ``dtype``."""
    model.to(dtype)
    model.save_pretrained(folder, **how)
    return folder


def named_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def read_all(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, read by its pieces; they must cover each tensor exactly once."""
    values = dict(checkpoint.ready)
    tensors = named_tensors(checkpoint.module)
    for name, pieces in checkpoint.pieces.items():
        tensor = tensors[name]
        flat = torch.empty(tensor.nbytes, dtype=torch.uint8)
        end = 0
        for piece in sorted(pieces, key=lambda piece: piece.at):
            assert piece.at == end, f"{name} has a hole or an overlap at byte {end}"
            end = piece.at + piece.extent.nbytes
        assert end == tensor.nbytes
        checkpoint.store.read(
            [ReadRequest(p.file, p.extent, flat[p.at : p.at + p.extent.nbytes]) for p in pieces]
        ).wait()
        assert name not in values
        values[name] = flat.view(tensor.dtype).view(tensor.shape)
    return values


def fill(module: nn.Module, values: dict[str, torch.Tensor]) -> None:
    """Give a module on meta its values; what is one object stays one."""
    real: dict[int, torch.Tensor] = {}
    for name, tensor in named_tensors(module).items():
        assert tensor.is_meta, f"{name} is not on meta"
        value = values[name]
        is_parameter = isinstance(tensor, nn.Parameter)
        real[id(tensor)] = nn.Parameter(value, requires_grad=tensor.requires_grad) if is_parameter else value
    for owner in module.modules():
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None:
                setattr(owner, key, real[id(parameter)])
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[key] = real[id(buffer)]


def differing(have: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    """Names whose values or dtypes differ, or that only one side has."""
    return [
        name
        for name in have.keys() | want.keys()
        if name not in have
        or name not in want
        or have[name].dtype != want[name].dtype
        or not torch.equal(have[name], want[name])
    ]
