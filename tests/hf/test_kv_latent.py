"""Models whose pages keep what keys and values are made from make these of a few pages at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.paged import decoder, generated, left_padded, paged, prompt, smallest
from tierstore.hf.kv.generating import KvGeneration
from tierstore.hf.kv.latent import expanding_attentions, expansion_of
from tierstore.hf.kv.state import CacheState

MODELS = ("DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM")


@contextmanager
def expanded(model: Any) -> Iterator[list[int]]:
    """How many tokens of how many rows keys and values are made of, each time."""
    kind, seen = type(expanding_attentions(model)[0]), list[int]()
    own = kind.expand_kv  # type: ignore[attr-defined]

    def expand(self: Any, latents: Tensor, rotated: Tensor) -> Any:
        seen.append(latents.shape[0] * latents.shape[2])
        return own(self, latents, rotated)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "expand_kv", expand)
        patch.setattr(CacheState, "gather", lambda self, layer: pytest.fail("a layer is gathered"))
        yield seen


def most_tokens(model: Any, made: KvGeneration) -> int:
    """Of how many tokens keys and values fit the scratch, beside what pages keep of them; of a page at least."""
    shape, expansion = made.memory.kinds[0].cells.shape, expansion_of(expanding_attentions(model)[0])
    kept = shape.heads * (shape.key_dim + shape.value_dim) * made.memory.dtype.itemsize
    each = kept + expansion.nbytes(1, made.memory.dtype.itemsize)
    return max(made.memory.scratch.numel() // each, shape.page_tokens)


@pytest.mark.parametrize("name", MODELS)
def test_a_layer_is_never_whole_where_the_scratch_is_small(name: str, tmp_path: Path) -> None:
    """With pages for several times kv_hbm, on disk: the tokens are those of the plain model."""
    model = decoder(name)
    for given in ({"input_ids": prompt(200)}, left_padded((150, 140))):
        wanted, _ = generated(model, **given)
        kv_hbm = len(wanted) * smallest(model, kv_nvme=1 << 22)
        with paged(model, tmp_path, kv_hbm=kv_hbm, kv_nvme=1 << 22) as made, expanded(model) as seen:
            found, _ = generated(model, **given)
            kept = sum(kind.table.usage().held_pages * kind.plan.kind.page_nbytes for kind in made.memory.kinds)
            most = most_tokens(model, made)
        assert torch.equal(found, wanted)
        assert kept > 3 * kv_hbm >= 3 * made.memory.plan.hbm_nbytes
        assert max(seen) <= most < 50
    assert all("expand_kv" not in vars(each) for each in expanding_attentions(model))


@pytest.mark.parametrize("name", MODELS)
def test_where_a_layer_fits_attention_is_the_models_own(name: str) -> None:
    model = decoder(name)
    wanted = generated(model, input_ids=prompt(40))
    with paged(model), expanded(model) as seen:
        found = generated(model, input_ids=prompt(40))
    assert torch.equal(found[0], wanted[0])
    assert all(map(torch.equal, found[1], wanted[1]))
    assert max(seen) == 48


@pytest.mark.parametrize("format", ["bf16", "int8"])
def test_what_is_packed_is_unpacked_before_it_becomes_keys(format: str) -> None:
    model = decoder(MODELS[0])
    found = []
    for whole in (True, False):
        with paged(model, format=format, page_tokens=16) as made:
            if not whole:
                made.memory.scratch = made.memory.scratch[: 2 * made.memory.kinds[0].cells.page_nbytes]
            found.append(generated(model, input_ids=prompt(200))[1])
    for have, want in zip(*found, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)


def test_tensors_that_are_in_no_page_become_what_they_did() -> None:
    model = decoder(MODELS[0])
    with paged(model), torch.no_grad():
        found = model(input_ids=prompt(20), use_cache=False).logits
    assert torch.equal(found, model(input_ids=prompt(20)).logits)
