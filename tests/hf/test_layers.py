"""A decoder run layer by layer is the decoder, what is none is refused, and Grams see every product with a weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf.zoo import ZOO, tiny
from tierstore.errors import ModuleError
from tierstore.formats.format import matrices_of
from tierstore.hf.grams import Grams
from tierstore.hf.layers import DecoderLayers, layers_path

TOKENS = torch.arange(3, 19)[None]
OTHERS = TOKENS.flip(1)
ENCODERS_TOO = {"T5ForConditionalGeneration", "BartForConditionalGeneration", "MarianMTModel"}
DECODERS = sorted(ZOO.keys() - ENCODERS_TOO)


def layers_of(model: nn.Module) -> tuple[list[nn.Module], DecoderLayers]:
    """The layers, and a copy of the model that stands in for them."""
    path = layers_path(model)
    return list(model.get_submodule(path).children()), DecoderLayers(copy.deepcopy(model), path)


@pytest.mark.parametrize("name", DECODERS)
def test_layer_by_layer_is_the_whole_model(name: str) -> None:
    model = tiny(name).eval()
    real, layers = layers_of(model)
    seen: list[Tensor] = []
    real[-1].register_forward_hook(lambda _, args, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
        hidden, calls = layers.begin(TOKENS)
        assert all(one.is_like(other) for one, other in zip(calls, layers.begin(OTHERS)[1], strict=True))
        assert len(calls) == len(real)
        for layer, call in zip(real, calls, strict=True):
            hidden = call.run(layer, hidden)
    assert torch.equal(hidden, seen[0])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPTJForCausalLM", "OPTForCausalLM", "CohereForCausalLM"])
def test_what_the_head_is_given(name: str) -> None:
    model = tiny(name).eval()
    real, layers = layers_of(model)
    given: list[Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    with torch.no_grad():
        model(input_ids=TOKENS, use_cache=False)
        hidden, calls = layers.begin(TOKENS)
        for layer, call in zip(real, calls, strict=True):
            hidden = call.run(layer, hidden)
        found = layers.finish(TOKENS, hidden, "lm_head")
    assert found is not None
    assert torch.equal(found, given[0])
    assert layers.finish(TOKENS, hidden, layers_path(tiny(name))) is None  # the list itself is never called


@pytest.mark.parametrize("name", ["T5ForConditionalGeneration", "MarianMTModel"])
def test_a_model_that_needs_more_than_tokens_is_refused(name: str) -> None:
    _, layers = layers_of(tiny(name).eval())
    with pytest.raises(ModuleError, match=f"{name} cannot be calibrated: its forward fails"):
        layers.begin(TOKENS)


def test_layers_that_see_more_of_the_text_are_told_apart() -> None:
    _, layers = layers_of(tiny("BartForConditionalGeneration").eval())
    calls, others = layers.begin(TOKENS)[1], layers.begin(OTHERS)[1]
    assert not any(one.is_like(other) for one, other in zip(calls, others, strict=True))


class Own(nn.Module):
    """A decoder whose forward does ``what``."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.embed = nn.Embedding(96, 4)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.what = what

    def forward(self, input_ids: Tensor, use_cache: bool) -> Tensor:
        hidden: Tensor = self.embed(input_ids)
        order = {"backwards": [2, 1, 0], "twice": [0, 1, 1, 2], "less": [0, 1]}.get(self.what, [0, 1, 2])
        for number in order:
            hidden = self.layers[number](hidden)
            if self.what == "between":
                hidden = hidden * 2
        return hidden


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("backwards", "calls layer 2 where layer 0 is next"),
        ("twice", "calls layer 1 where layer 2 is next"),
        ("less", "calls 2 of its 3 layers"),
        ("between", "something else than what the layer before gives"),
    ],
)
def test_other_orders_are_refused(what: str, said: str) -> None:
    _, layers = layers_of(Own(what))
    with pytest.raises(ModuleError, match=said):
        layers.begin(TOKENS)


def test_no_list_of_layers() -> None:
    with pytest.raises(ModuleError, match="Linear cannot be calibrated: it has no list of layers"):
        layers_path(nn.Linear(2, 2))


# Grams


def product(inputs: Tensor) -> Tensor:
    rows = inputs.reshape(-1, inputs.shape[-1]).float()
    return rows.T @ rows


@pytest.mark.parametrize("how", ["linear", "method", "matmul", "operator"])
def test_a_gram_is_the_sum_of_products(how: str) -> None:
    weight = torch.randn(5, 4)
    ways: dict[str, Any] = {
        "linear": lambda x: nn.functional.linear(x, weight),
        "method": lambda x: x.matmul(weight.T),
        "matmul": lambda x: torch.matmul(x, weight.T),
        "operator": lambda x: x @ weight.T,
    }
    first, second = torch.randn(2, 3, 4), torch.randn(7, 4)
    with Grams({"a": weight}) as grams:
        results = [ways[how](x) for x in (first, second)]
    assert torch.equal(results[0], first @ weight.T)
    gram = grams.of("a")[0]
    torch.testing.assert_close(gram.matrix, product(first) + product(second))
    assert gram.tokens == 13


def test_neighbours_with_the_same_input_share_a_gram() -> None:
    q, k, other = (nn.Linear(4, 5) for _ in range(3))
    weights = {name: module.weight for name, module in (("q", q), ("k", k), ("other", other))}
    with Grams(weights) as grams:
        for _ in range(2):
            x, y = torch.randn(3, 4), torch.randn(3, 4)
            q(x), k(x), other(y)
    assert grams.of("q")[0] is grams.of("k")[0]
    assert grams.of("q")[0] is not grams.of("other")[0]
    assert grams.of("k")[0].tokens == grams.of("other")[0].tokens == 6


def test_each_of_a_stack_counts_for_itself() -> None:
    stack = torch.randn(3, 5, 32)
    assert matrices_of(stack.shape) == ((3,), 5, 32)
    inputs = [torch.randn(number + 1, 32) for number in range(2)]
    with Grams({"experts": stack}) as grams:
        for number, x in enumerate(inputs):
            nn.functional.linear(x, stack[number])
    assert grams.of("experts").keys() == {0, 1}
    for number, x in enumerate(inputs):
        torch.testing.assert_close(grams.of("experts")[number].matrix, product(x))


def test_other_uses_count_nothing() -> None:
    weight, other = torch.randn(4, 4), torch.randn(4, 4)
    with Grams({"a": weight}) as grams:
        x = torch.randn(2, 4)
        x @ weight
        x @ other.T
        weight @ x[0]
        nn.functional.linear(x, weight[:2])
        nn.functional.embedding(torch.tensor([1]), weight)
    assert not grams.of("a")
