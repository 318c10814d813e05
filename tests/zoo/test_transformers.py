"""Tiny random models of many families, as transformers builds them from a config."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from tests.zoo.registry import Entry
from tests.zoo.runner import examine, expected, need_of, settings

_TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PLAIN = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
_EXPERTS = {**_PLAIN, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
_OLD = {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
_PAIR = {
    **_TOKENS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 1,
    "max_position_embeddings": 32,
}
_T5 = {**_TOKENS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_SEES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_STAGES = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 16, "image_size": 16, "patch_size": 4, "window_size": 2}
_CONVOLVES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
_HEARS = {
    **_PLAIN,
    "conv_dim": [16, 16],
    "conv_kernel": [4, 3],
    "conv_stride": [2, 2],
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
    "mask_time_prob": 0.0,
}
_CLIP = {"text_config": {**_PLAIN, "projection_dim": 16}, "vision_config": _SEES, "projection_dim": 16}
_DEEPSEEK = {
    **_PLAIN,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_WHISPER = {**_PAIR, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}


def _words(*names: str) -> Callable[[], dict[str, Any]]:
    return lambda: {name: torch.randint(3, 96, (2, 6)) for name in names}


def _image() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def _sound() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 64)}


_text = _words("input_ids")
_pair = _words("input_ids", "decoder_input_ids")
MODELS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "LlamaForCausalLM": (_PLAIN, _text),
    "MistralForCausalLM": (_PLAIN, _text),
    "Qwen2ForCausalLM": ({**_PLAIN, "tie_word_embeddings": True}, _text),
    "Qwen3MoeForCausalLM": (_EXPERTS, _text),
    "MixtralForCausalLM": ({**_PLAIN, "num_local_experts": 4}, _text),
    "DeepseekV3ForCausalLM": (_DEEPSEEK, _text),
    "Gemma2ForCausalLM": ({**_PLAIN, "head_dim": 8}, _text),
    "Gemma3ForCausalLM": ({**_PLAIN, "head_dim": 8}, _text),
    "Phi3ForCausalLM": (_PLAIN, _text),
    "GPT2LMHeadModel": (_OLD, _text),
    "GPTNeoXForCausalLM": (_PLAIN, _text),
    "GPTJForCausalLM": ({**_OLD, "rotary_dim": 4}, _text),
    "OPTForCausalLM": ({**_PLAIN, "ffn_dim": 48, "word_embed_proj_dim": 32}, _text),
    "BloomForCausalLM": ({**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}, _text),
    "FalconForCausalLM": (_PLAIN, _text),
    "MambaForCausalLM": (_PLAIN, _text),
    "Mamba2ForCausalLM": ({**_PLAIN, "num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, _text),
    "RecurrentGemmaForCausalLM": ({**_PLAIN, "lru_width": 32, "attention_window_size": 8, "use_cache": False}, _text),
    "CohereForCausalLM": (_PLAIN, _text),
    "StableLmForCausalLM": (_PLAIN, _text),
    "BertForMaskedLM": (_PLAIN, _text),
    "RobertaForMaskedLM": (_PLAIN, _text),
    "AlbertForMaskedLM": ({**_PLAIN, "embedding_size": 16}, _text),
    "ElectraForMaskedLM": ({**_PLAIN, "embedding_size": 16}, _text),
    "DebertaV2ForMaskedLM": ({**_PLAIN, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}, _text),
    "DistilBertForMaskedLM": ({**_TOKENS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, _text),
    "MPNetForMaskedLM": (_PLAIN, _text),
    "T5ForConditionalGeneration": (_T5, _pair),
    "BartForConditionalGeneration": (_PAIR, _pair),
    "MarianMTModel": (_PAIR, _pair),
    "PegasusForConditionalGeneration": (_PAIR, _pair),
    "WhisperForConditionalGeneration": (
        _WHISPER,
        lambda: {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.randint(3, 96, (2, 4))},
    ),
    "ViTModel": (_SEES, _image),
    "DeiTModel": (_SEES, _image),
    "BeitModel": (_SEES, _image),
    "SwinModel": (_STAGES, _image),
    "ConvNextModel": (_CONVOLVES, _image),
    "ResNetModel": ({"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8}, _image),
    "CLIPModel": (_CLIP, lambda: {**_text(), **_image()}),
    "Wav2Vec2Model": (_HEARS, _sound),
    "HubertModel": (_HEARS, _sound),
}


class Keyed(nn.Module):
    """Takes the inputs of a model as one dict."""

    def __init__(self, name: str) -> None:
        super().__init__()
        model_class: Any = getattr(transformers, name)
        self.model = model_class(model_class.config_class(**MODELS[name][0]))
        for tensor in self.model.parameters():
            tensor.data.normal_(0, 0.05)

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.model(**inputs)[0]


@pytest.mark.filterwarnings("ignore")  # what transformers says of its configs
@pytest.mark.parametrize("name", MODELS)
def test_offloaded_is_plain(name: str, tmp_path: Path) -> None:
    number = list(MODELS).index(name)
    entry = Entry(lambda: Keyed(name), lambda: [(MODELS[name][1](),)], grads=number % 4 == 0, copies=False)
    every = settings()
    need, want = need_of(entry), expected(entry)
    setting = every[number * 7 % len(every)]
    assert examine(entry, setting, tmp_path, need=need, want=want) == [], setting
