"""The same shapes as a GGUF file, and llama.cpp decoding it: what tierstore's int4 is held against."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from benchmark.decoding import prompt_of
from benchmark.job import Job

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CONTEXT = 256
"""Tokens that its cache has room for."""


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python and gguf are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("llama_cpp", "gguf"))


def write_q4_0(checkpoint: Path, file: Path) -> None:
    """Write a Llama-shaped checkpoint as a GGUF ``file`` with every matrix in Q4_0.

    Values stand where the checkpoint has them, without the order of rotary pairs that llama.cpp wants: it is for
    timing only.
    """
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"t{number}" for number in range(config["vocab_size"])])
    writer.add_token_scores([0.0] * config["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    q4_0 = gguf.GGMLQuantizationType.Q4_0
    for shard in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(shard, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  # a safe_open is no mapping
                values = tensors.get_tensor(name).to(torch.float32).numpy()
                if values.ndim == 2:
                    writer.add_tensor(_name_of(name), gguf.quants.quantize(values, q4_0), raw_dtype=q4_0)
                else:
                    writer.add_tensor(_name_of(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def decode(job: Job) -> dict[str, Any]:
    """Seconds of each token that llama.cpp decodes from ``job.checkpoint``, a GGUF file, all in memory."""
    import llama_cpp

    model = llama_cpp.Llama(
        job.checkpoint, n_ctx=CONTEXT, n_threads=job.threads, n_threads_batch=job.threads, verbose=False, use_mmap=False
    )
    tokens = prompt_of(model.n_vocab(), job.length)[0].tolist()
    model.eval(tokens)
    seconds = []
    for _ in range(job.groups * job.steps):
        start = time.perf_counter()
        model.eval([tokens[0]])
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "version": llama_cpp.__version__}


def _name_of(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[rest]}.weight"
    return f"{NAMES[stem]}.weight"
