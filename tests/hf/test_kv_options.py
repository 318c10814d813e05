"""What a user may ask of ``generate``, and what some models do within, with pages as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from tests.hf.paged import decoder, generated, left_padded, paged, prompt, smallest
from tests.hf.zoo import ZOO


@pytest.fixture(scope="module")
def gemma4() -> Any:
    """Its last layers keep nothing, and read what earlier ones keep, of a prompt for the last token alone."""
    torch.manual_seed(0)
    sharing = {
        "head_dim": 16,
        "global_head_dim": 32,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 12,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 96,
        "max_position_embeddings": 512,
    }
    config = transformers.Gemma4TextConfig(**{**ZOO["Gemma2ForCausalLM"], **sharing})
    model: Any = transformers.Gemma4ForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    model.generation_config.eos_token_id = None
    return model.eval()


def test_layers_that_look_from_fewer_queries_have_masks_of_their_own(gemma4: Any) -> None:
    for given in ({"input_ids": prompt(40)}, left_padded((33, 12, 40))):
        want, _ = generated(gemma4, **given)
        with paged(gemma4, kv_hbm=smallest(gemma4) + (1 << 18)) as made:
            made.memory.scratch = made.memory.scratch[: max(kind.cells.page_nbytes for kind in made.memory.kinds) * 2]
            found, _ = generated(gemma4, **given)
        assert torch.equal(found, want)


@pytest.mark.parametrize(("name", "value"), [("cache_implementation", "static"), ("use_cache", False)])
def test_a_model_whose_own_settings_say_another_cache_has_that(name: str, value: Any) -> None:
    model = decoder("LlamaForCausalLM")
    setattr(model.generation_config, name, value)
    want, _ = generated(model, input_ids=prompt(27))
    with paged(model) as made:
        found, _ = generated(model, input_ids=prompt(27))
        assert not made.cache.sequences
        assert made.memory.usage().pages[0].kept_pages == 0
    assert torch.equal(found, want)


def test_what_transformers_takes_for_no_setting_is_none() -> None:
    model = decoder("MistralForCausalLM")
    model.generation_config.cache_implementation = "hybrid"  # as early checkpoints with windows say
    want, _ = generated(model, input_ids=prompt(27))
    with paged(model) as made:
        found, _ = generated(model, input_ids=prompt(27))
        assert made.cache.sequences
    assert torch.equal(found, want)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel", "DeepseekV3ForCausalLM"])
def test_pages_keep_what_autocast_makes(name: str) -> None:
    model = decoder(name)
    with torch.autocast("cpu", torch.bfloat16):
        want, logits = generated(model, input_ids=prompt(60))
        with paged(model):
            found, same = generated(model, input_ids=prompt(60))
        assert torch.equal(found, want)
        assert all(map(torch.equal, same, logits))
        with paged(model) as made:
            made.memory.scratch = made.memory.scratch[: made.memory.kinds[0].cells.page_nbytes * 2]
            found, near = generated(model, input_ids=prompt(60), new=3)
    assert torch.equal(found, want[:, :63])
    torch.testing.assert_close(near, logits[:3], rtol=0.02, atol=0.02)


@torch.no_grad()
def test_tokens_of_another_type_are_other_tokens() -> None:
    model, ids = decoder("GPT2LMHeadModel"), prompt(40)
    types = torch.arange(40)[None] % 2
    asked: list[dict[str, Any]] = [{}, {"token_type_ids": types}, {"token_type_ids": 1 - types}, {}]
    wanted = [model(ids, logits_to_keep=1, **each).logits for each in asked]
    with paged(model) as made:
        found = [model(ids, logits_to_keep=1, cache=made.cache.another(), **each).logits for each in asked]
        assert made.cache.another().state.share(ids, None, 39) > 0
    torch.testing.assert_close(found, wanted)
