"""Inputs in chunks give what whole ones give, within the bound, and what cannot be split exactly is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from tests.hf.zoo import tiny
from tierstore.activation_plan import build_activation_plan
from tierstore.backends import backend_for
from tierstore.binding.forwards import withdraw
from tierstore.budget import Budget
from tierstore.errors import CapacityError, ModuleError, PlanError
from tierstore.hf.activations import layer_shape
from tierstore.hf.chunked_mlp import ChunkedMlps
from tierstore.hf.kv.generating import make_kv
from tierstore.hf.kv.memory import KvMemory
from tierstore.hf.prefill import ChunkedPrefill

MODELS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "GPT2LMHeadModel": {"n_positions": 128},
    "Gemma3ForCausalLM": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "FalconForCausalLM": {"new_decoder_architecture": False, "multi_query": True},
    "Qwen3MoeForCausalLM": {},
    "BloomForCausalLM": {},
    "DeepseekV3ForCausalLM": {},
}
LENGTH = 45
PROMPT = torch.randint(3, 96, (2, LENGTH), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(PROMPT)
MASK[0, :17] = 0  # more than a chunk


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def model_of(name: str = "LlamaForCausalLM", **changes: Any) -> Any:
    return tiny(name, **{"max_position_embeddings": 128, **MODELS.get(name, {}), **changes}).eval()


def bound(model: Any, *, tokens: int = 9, batch: int = 2, memory: KvMemory | None = None) -> int:
    """The smallest bound that lets so many tokens a row through at once."""
    shape = layer_shape(model, chunked_mlp=ChunkedMlps(model).complete, memory=memory)

    def allows(nbytes: int) -> bool:
        try:
            return build_activation_plan(nbytes, shape, batch=batch, context=LENGTH).prefill_tokens >= tokens
        except PlanError:
            return False

    low, high = 0, 1 << 30
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if allows(middle) else (middle, high)
    return high


@contextmanager
def chunked(model: Any, **sizes: Any) -> Iterator[ChunkedPrefill]:
    prefill = ChunkedPrefill(model, bound(model, **sizes))
    try:
        yield prefill
    finally:
        prefill.close()


def lengths_of(model: Any) -> list[int]:
    """How many tokens each call of the model's first layer gets."""
    seen: list[int] = []
    layer = next(m for m in model.modules() if isinstance(m, nn.ModuleList))[0]
    layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args or (kwargs["hidden_states"],))[0].shape[1]), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_generates_the_same_tokens(name: str) -> None:
    model = model_of(name)
    asked: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    want = model.generate(PROMPT, **asked)
    beams = model.generate(PROMPT, **asked, num_beams=3)
    seen = lengths_of(model)
    with chunked(model) as prefill:
        assert torch.equal(model.generate(PROMPT, **asked), want)
        assert prefill.chunks == 5
    with chunked(model, batch=6):
        assert torch.equal(model.generate(PROMPT, **asked, num_beams=3), beams)
    assert seen == 2 * [*[9] * 5, *[1] * 5]


@pytest.mark.parametrize("name", MODELS)
def test_gives_the_same_numbers_whatever_is_asked_for(name: str) -> None:
    model = model_of(name)
    asked: list[dict[str, Any]] = [
        {},
        {"attention_mask": MASK},
        {"attention_mask": MASK, "logits_to_keep": 1},
        {"logits_to_keep": 12},
        {"logits_to_keep": 99},
        {"use_cache": False},
        {"position_ids": torch.arange(2, LENGTH + 2)[None]},
    ]
    if name == "BloomForCausalLM":
        asked.pop()  # has no positions
    want = [model(PROMPT, **kwargs) for kwargs in asked]
    with chunked(model) as prefill:
        for kwargs, whole in zip(asked, want, strict=True):
            made = model(PROMPT, **kwargs)
            assert type(made) is type(whole)
            assert made.keys() == whole.keys()
            torch.testing.assert_close(
                made.logits[MASK[:, -made.logits.shape[1] :] > 0],
                whole.logits[MASK[:, -made.logits.shape[1] :] > 0],
                rtol=0,
                atol=2e-6,
            )
            assert made.logits.shape == whole.logits.shape
        assert prefill.chunks == 5 * len(asked)


def test_goes_on_from_a_cache() -> None:
    model = model_of()
    first, rest, later = PROMPT[:, :3], PROMPT[:, 3:33], PROMPT[:, 33:]
    given = {"position_ids": torch.cumsum(MASK, 1) - 1}

    def run(model: Any) -> list[Tensor]:
        cache, logits, stop = DynamicCache(config=model.config), [], 0
        for part in (first, rest, later):
            start, stop = stop, stop + part.shape[1]
            out = model(
                part, attention_mask=MASK[:, :stop], cache=cache, position_ids=given["position_ids"][:, start:stop]
            )
            assert out.cache is cache
            assert cache.get_seq_length() == stop
            logits.append(out.logits)
        return logits

    want = run(model)
    with chunked(model) as prefill:
        for made, whole in zip(run(model), want, strict=True):
            torch.testing.assert_close(made[1], whole[1], rtol=0, atol=2e-6)
        assert prefill.chunks == 3 + 2


def test_other_ways_to_call() -> None:
    model = model_of()
    whole = model(PROMPT)
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, LENGTH, LENGTH)
    embeds = model.get_input_embeddings()(PROMPT)
    with chunked(model) as prefill:
        for made in (
            model(PROMPT, causal),
            model(inputs_embeds=embeds),
            model(PROMPT, None, None, DynamicCache(config=model.config)),
            model(input_ids=PROMPT, past_key_values=DynamicCache(config=model.config)),
        ):
            torch.testing.assert_close(made.logits, whole.logits, rtol=0, atol=2e-6)
        as_tuple = model(PROMPT, return_dict=False)
        assert isinstance(as_tuple, tuple)
        torch.testing.assert_close(as_tuple[0], whole.logits, rtol=0, atol=2e-6)
        assert prefill.chunks == 5 * 5
    with chunked(model.model):
        made = model.model(PROMPT).last_hidden_state
    torch.testing.assert_close(made, model.model(PROMPT).last_hidden_state, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma3ForCausalLM"])
def test_over_pages(name: str) -> None:
    model = model_of(name)
    asked: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(PROMPT, **asked)
    whole = model(PROMPT, attention_mask=MASK).logits[MASK > 0]
    kv = make_kv(
        model,
        Budget(1, kv_hbm="1MiB"),
        format=None,
        backend=backend_for("cpu"),
        recorder=lambda event: None,
        folder=None,
        notes=[],
        page_tokens=8,
    )
    with pytest.raises(PlanError, match=r"raise Budget\.activations") as refusal:
        ChunkedPrefill(model, 100, kv)
    with pytest.raises(PlanError, match=f"to at least {refusal.value.needed} bytes"):
        ChunkedPrefill(model, refusal.value.needed - 1, kv)
    ChunkedPrefill(model, refusal.value.needed, kv).close()
    prefill = ChunkedPrefill(model, bound(model, memory=kv.memory), kv)
    seen = lengths_of(model)
    assert torch.equal(model.generate(PROMPT, **asked), want)
    assert prefill.chunks == 5
    assert max(seen) <= 9
    assert kv.cache.sequences == (LENGTH - 17 + 4, LENGTH + 4)
    kv.cache.reset()
    made = model(PROMPT, attention_mask=MASK, cache=kv.cache).logits[MASK > 0]
    torch.testing.assert_close(made, whole, rtol=0, atol=2e-6)
    prefill.close()
    kv.cache.reset()
    seen.clear()
    model(PROMPT, attention_mask=MASK, cache=kv.cache)
    assert max(seen) > 9
    kv.close()
    assert "forward" not in model.__dict__


def test_what_fits_goes_through_as_it_is() -> None:
    model = model_of()
    few = PROMPT[:, :9]
    want = model(few, output_hidden_states=True, labels=few)
    with chunked(model) as prefill:
        made = model(few, output_hidden_states=True, labels=few)
        assert prefill.chunks == 0
    assert len(made.hidden_states) == len(want.hidden_states)
    torch.testing.assert_close(made.loss, want.loss)


def test_is_undone_and_not_copied() -> None:
    model = model_of()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with chunked(model):
        twin = copy.deepcopy(model)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    seen = lengths_of(twin)
    twin(PROMPT)
    assert seen == [LENGTH]


@pytest.mark.parametrize(
    ("why", "given"),
    [
        ("labels", {"labels": PROMPT}),
        ("output_hidden_states", {"output_hidden_states": True}),
        ("output_attentions", {"output_attentions": True}),
        (r"mask is \[2, 44\]", {"attention_mask": MASK[:, 1:]}),
        (r"mask is \[2, 1, 45, 9\]", {"attention_mask": torch.ones(2, 1, LENGTH, 9, dtype=torch.bool)}),
        ("mask is a dict", {"attention_mask": {"full_attention": None}}),
        ("position_ids are", {"position_ids": torch.arange(4)[None]}),
        ("several texts", {"use_cache": False, "position_ids": torch.arange(LENGTH)[None] % 20}),
        ("tensor|logits_to_keep", {"logits_to_keep": torch.tensor([1])}),
        ("pixel_values", {"pixel_values": torch.ones(1)}),
        ("no text", {"mm_token_type_ids": torch.ones_like(PROMPT)}),
        ("cache is a list", {"cache": []}),
    ],
)
def test_what_cannot_be_split_is_refused(why: str, given: dict[str, Any]) -> None:
    model = model_of()
    seen = lengths_of(model)
    with (
        chunked(model),
        pytest.raises(CapacityError, match=rf"45 tokens a row.*9 at a time.*{why}.*Budget.activations"),
    ):
        model(PROMPT, **given)
    assert seen == []


def test_gradients_are_refused() -> None:
    model = model_of()
    with chunked(model), torch.enable_grad(), pytest.raises(CapacityError, match="no_grad"):
        model(PROMPT)
    model.requires_grad_(False)
    with chunked(model) as prefill, torch.enable_grad():
        model(PROMPT)
        with pytest.raises(CapacityError, match="no_grad"):
            model(inputs_embeds=model.get_input_embeddings()(PROMPT).requires_grad_())
    assert prefill.chunks == 5


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MambaForCausalLM", "recurrent state"),
        ("FalconMambaForCausalLM", "recurrent state"),
        ("RecurrentGemmaModel", "recurrent state"),
        ("BertForMaskedLM", "no cache"),
        ("BartForConditionalGeneration", "encoder-decoder"),
    ],
)
def test_models_that_cannot_be_split(name: str, why: str) -> None:
    model = tiny(name).eval()
    with chunked(model), pytest.raises(CapacityError, match=why):
        model(input_ids=PROMPT)


def test_bounds_that_are_too_small() -> None:
    model = model_of()
    with pytest.raises(PlanError, match="one token of 1 rows") as refusal:
        ChunkedPrefill(model, 100)
    prefill = ChunkedPrefill(model, refusal.value.needed + 40 * 1000)
    with pytest.raises(PlanError, match="one token of 64 rows"):
        model(PROMPT[:1].expand(64, -1))
    prefill.close()
    with pytest.raises(ModuleError, match="transformers' decoders only"):
        ChunkedPrefill(nn.Linear(2, 2), 1 << 20)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_the_head_is_given_rows_that_lie_side_by_side() -> None:
    model = model_of()
    seen: list[bool] = []

    def look(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        seen.append(hidden.is_contiguous())
        return forward(hidden)

    with chunked(model):
        model.lm_head.forward.inside.insert(0, look)
        model(PROMPT, logits_to_keep=1)
        model(PROMPT[:, :7], logits_to_keep=1)
        withdraw(model.lm_head, look)
    assert seen == [True] * 6


# MLPs


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


class Mlp(nn.Module):
    """Two matrices, and ``between``, which is given [B, L, 8]."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        self.between = between
        self.seen: list[int] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append(hidden.numel() // 4)
        return self.down(self.between(self.up(hidden)))  # type: ignore[no-any-return]


def of_layers(*mlps: nn.Module) -> tuple[nn.Module, ChunkedMlps]:
    model = nn.Module()
    model.layers = nn.ModuleList(map(Layer, mlps))
    mlps_of = ChunkedMlps(model)
    mlps_of.open()
    mlps_of.tokens = 4
    return model, mlps_of


def test_mlp_takes_some_tokens_at_a_time() -> None:
    mlp = Mlp(torch.relu)
    hidden = torch.randn(3, 5, 4)
    want = mlp(hidden)
    mlp.seen.clear()
    _, mlps = of_layers(mlp)
    state = torch.get_rng_state()
    for given in (hidden, hidden.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(mlp(given), want)
    assert torch.equal(torch.get_rng_state(), state)
    assert mlp.seen == [6, 2, 2, 2, 4, 4, 4, 3, 4, 4, 4, 3]
    assert mlps.complete
    mlps.close()
    assert torch.equal(mlp(hidden), want)
    assert "forward" not in mlp.__dict__


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x.cumsum(1),
        lambda x: x.flip(1),
        lambda x: (x / x.abs().amax() * 127).round() * x.abs().amax() / 127,
        lambda x: nn.functional.dropout(x, 0.5),
    ],
    ids=["mean", "sum so far", "neighbours", "one scale", "dropout"],
)
def test_mlp_with_an_effect_over_tokens_is_left_alone(between: Callable[[Tensor], Tensor]) -> None:
    mlp = Mlp(between)
    hidden = torch.randn(3, 5, 4)
    torch.manual_seed(3)
    want = mlp(hidden)
    _, mlps = of_layers(Mlp(torch.relu), mlp)
    mlp(hidden)
    torch.manual_seed(3)
    assert torch.equal(mlp(hidden), want)
    assert not mlps.complete
    assert mlps.notes == (
        "takes all tokens of a chunk at once, as tokens have an effect on each other in it: layers.1.mlp",
    )


def test_layers_without_an_mlp_are_named() -> None:
    notes = {name: ChunkedMlps(model_of(name)).notes for name in ("OPTForCausalLM", "MixtralForCausalLM")}
    assert notes["OPTForCausalLM"] == (
        "takes all tokens of a chunk at once, as none of its parts is called as an MLP: "
        "model.decoder.layers.0, model.decoder.layers.1",
    )
    assert notes["MixtralForCausalLM"] == (
        "takes all tokens of a chunk at once, as it has experts: model.layers.0.mlp, model.layers.1.mlp",
    )
    assert not ChunkedMlps(model_of()).notes


def test_gradients_go_through_all_tokens() -> None:
    mlp = Mlp(torch.relu)
    _, mlps = of_layers(mlp)
    with torch.enable_grad():
        mlp(torch.randn(3, 5, 4)).sum().backward()
    assert mlp.seen == [15]
    assert mlp.up.weight.grad is not None
    mlps.close()
