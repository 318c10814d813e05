"""Gradients of layers that are computed again are those of the plain module, and less is kept for them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.cache_utils import DynamicCache

import tierstore
from tests.hf.zoo import tiny
from tierstore import Budget
from tierstore.errors import ModuleError
from tierstore.hf.recomputing import RecomputedLayers

TOKENS = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(1))


def gradients(model: Any) -> dict[str, torch.Tensor | None]:
    """Of the loss on ``TOKENS``, with the same dropout each time; and how many bytes autograd kept."""
    model.zero_grad()
    torch.manual_seed(1)
    model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def kept_nbytes(model: Any) -> int:
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[id(tensor)] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(TOKENS, labels=TOKENS, use_cache=False)
    return sum(kept.values())


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_gradients_are_the_same(name: str, streams: bool, tmp_path: Path) -> None:
    model = tiny(name).train()  # GPT-2 drops some of it out
    want = gradients(copy.deepcopy(model))
    plain = kept_nbytes(copy.deepcopy(model))
    budget = Budget(sum(parameter.nbytes for parameter in model.parameters()) // (2 if streams else 1) + 9000)
    with tierstore.offload(model, budget, store=tmp_path / "tier") as session:
        recomputed = RecomputedLayers(model)
        if not streams:
            assert kept_nbytes(model) < plain / 2
        made = gradients(model)
        assert made.keys() == want.keys()
        assert all(torch.equal(made[key], want[key]) for key in want)  # type: ignore[arg-type]
        assert bool(session.report().bytes_moved) == streams
        recomputed.close()
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_a_cache_is_not_filled_twice() -> None:
    model = tiny("LlamaForCausalLM")
    recomputed = RecomputedLayers(model)
    assert "cache" not in model(TOKENS)
    for given in ({"use_cache": True}, {"cache": DynamicCache(config=model.config)}):
        with pytest.raises(ModuleError, match=r"fill a cache.*use_cache=False"):
            model(TOKENS, **given)
    with torch.no_grad():
        assert model(TOKENS, use_cache=True).cache.get_seq_length() == 20
    recomputed.close()
    assert "cache" in model(TOKENS)


def test_a_module_without_layers_is_refused() -> None:
    with pytest.raises(ModuleError, match="no list of layers"):
        RecomputedLayers(nn.Linear(2, 2))
