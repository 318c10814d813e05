"""Chunks that wait between layers give what they give one after another; a layer is there once for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tierstore
from tests.hf.test_prefill import LENGTH, MASK, PROMPT, bound, model_of
from tierstore import Budget
from tierstore.backends import Backend, backend_for
from tierstore.errors import CapacityError, ModuleError, PlanError
from tierstore.hf.by_layer import LayerByLayer
from tierstore.hf.kv.shapes import layers_of
from tierstore.hf.prefill import ChunkedPrefill
from tierstore.hf.waiting import OnHost, WaitingStates
from tierstore.testing.adversary import adversary

WAITING = 60_000
"""Bytes that hidden states and positions of these prompts take at most."""


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@contextmanager
def by_layer(model: Any, backend: Backend | None = None) -> Iterator[ChunkedPrefill]:
    prefill = ChunkedPrefill(model, bound(model) + WAITING, by_layer=LayerByLayer(model, backend))
    try:
        yield prefill
    finally:
        prefill.close()


def visits(model: Any) -> list[int]:
    """The layer of each call of a layer, as they come."""
    seen: list[int] = []
    layers: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for number, layer in enumerate(layers):
        layer.input_layernorm.register_forward_pre_hook(lambda _, args, number=number: seen.append(number))
    return seen


@pytest.mark.parametrize("offload", [False, True], ids=["keep", "offload"])
@pytest.mark.parametrize(
    "name",
    [
        "LlamaForCausalLM",
        "GPT2LMHeadModel",
        "Gemma3ForCausalLM",
        "GptOssForCausalLM",
        "OPTForCausalLM",
        "GPTJForCausalLM",
    ],
)
def test_gives_the_same(name: str, offload: bool) -> None:
    model = model_of(name)
    asked: list[dict[str, Any]] = [
        {"attention_mask": MASK},
        {"logits_to_keep": 1},
        {"attention_mask": MASK, "logits_to_keep": 20, "use_cache": False},
    ]
    generated: dict[str, Any] = {"attention_mask": MASK, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    want = [model(PROMPT, **kwargs) for kwargs in asked]
    tokens = model.generate(PROMPT, **generated)
    adverse = adversary(5)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    with by_layer(model, backend if offload else None) as prefill:
        for kwargs, whole in zip(asked, want, strict=True):
            made = model(PROMPT, **kwargs)
            assert type(made) is type(whole)
            assert made.keys() == whole.keys()
            real = MASK[:, -made.logits.shape[1] :] > 0
            torch.testing.assert_close(made.logits[real], whole.logits[real], rtol=0, atol=2e-6)
        assert torch.equal(model.generate(PROMPT, **generated), tokens)
        assert prefill.chunks >= 3 * (len(asked) + 1)
    adverse.engine.check()
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert model.config._attn_implementation in ("sdpa", "eager")


def test_all_chunks_pass_a_layer_before_the_next() -> None:
    model = model_of(num_hidden_layers=3)
    seen = visits(model)
    with by_layer(model) as prefill:
        logits = model(PROMPT).logits
        count = prefill.chunks
        assert count >= 3
        assert seen == [*[0] * count, *[1] * count, *[2] * count]
        assert logits.shape == (2, LENGTH, 96)
        seen.clear()
        model(PROMPT[:, :3])
        assert seen == [0, 1, 2]
        assert model(inputs_embeds=model.get_input_embeddings()(PROMPT)).logits.sub_(logits).abs().max() < 2e-6
        assert isinstance(model(PROMPT, return_dict=False), tuple)


def test_weights_stream_once_for_all_chunks(tmp_path: Path) -> None:
    model = model_of(num_hidden_layers=16, tie_word_embeddings=True)
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    want = model(PROMPT, logits_to_keep=1).logits
    moved: dict[str, int] = {}
    for way in ("chunk by chunk", "layer by layer"):
        with tierstore.offload(model, Budget(int(nbytes * 0.6)), store=tmp_path / way) as session:
            for _ in range(2):
                model(PROMPT[:, :2])  # learns the order
            layered = LayerByLayer(model, None) if way == "layer by layer" else None
            prefill = ChunkedPrefill(model, bound(model, tokens=5) + WAITING * bool(layered), by_layer=layered)
            before, passes = session.report().bytes_moved, session.report().passes
            made = model(PROMPT, logits_to_keep=1).logits
            moved[way] = session.report().bytes_moved - before
            assert prefill.chunks >= 4
            assert session.report().passes - passes == (1 if layered else prefill.chunks)
            assert prefill.notes == ()
            prefill.close()
        torch.testing.assert_close(made, want, rtol=0, atol=2e-6)
    assert 0 < moved["layer by layer"] < 0.5 * moved["chunk by chunk"]


def test_what_cannot_wait_is_refused() -> None:
    for name in ("BloomForCausalLM", "FalconForCausalLM", "MambaForCausalLM"):
        model = model_of(name)
        with pytest.raises(ModuleError, match=r"a way of its own.*leave hidden_states out"):
            LayerByLayer(model, None)
    model = model_of()
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(2, 1, LENGTH, LENGTH)
    with by_layer(model):
        with pytest.raises(ModuleError, match="given attention_mask"):
            model(PROMPT, attention_mask=causal)
        with pytest.raises(CapacityError, match="labels"):
            model(PROMPT, labels=PROMPT)
        model(PROMPT)  # goes on working
    layered = LayerByLayer(model, None)
    with pytest.raises(PlanError):
        ChunkedPrefill(model, 10, by_layer=layered)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert layers_of(model)


def test_hidden_states_that_wait_count() -> None:
    model = model_of()
    prefill = ChunkedPrefill(model, bound(model, tokens=1), by_layer=LayerByLayer(model, None))
    with pytest.raises(PlanError, match=r"raise Budget\.activations"):
        model(PROMPT)
    prefill.close()


def test_chunks_on_the_host() -> None:
    adverse = adversary(2)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    chunks = [torch.randn(2, 3, 5), torch.randn(2, 3, 5), torch.randn(2, 1, 5)]
    waiting = OnHost(backend, 3, sum(chunk.nbytes for chunk in chunks))
    for number, chunk in enumerate(chunks):
        waiting.put(number, chunk.clone())
    whole = WaitingStates.of(waiting, 3, (2, 7, 5), torch.float32, torch.device("cpu"))
    assert torch.equal(whole + 0, torch.cat(chunks, 1))
    for _ in range(3):
        for number in range(3):
            chunks[number] = waiting.take(number) * 2
            waiting.put(number, chunks[number])
    waiting.put(1, torch.zeros(2, 3, 5))  # without having asked for what was there
    assert torch.equal(waiting.take(0), chunks[0])
    assert torch.equal(waiting.take(1), torch.zeros(2, 3, 5))
    waiting.close()
    waiting.close()
    adverse.engine.check()


def test_an_error_in_a_layer_leaves_nothing_behind() -> None:
    model = model_of()
    attention = model.config._attn_implementation
    adverse = adversary(2)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    calls: list[int] = []

    def fail(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with by_layer(model, backend):
        with pytest.raises(RuntimeError, match="in the middle"):
            model(PROMPT)
        handle.remove()
        assert model.config._attn_implementation == attention
        model(PROMPT)
    adverse.engine.check()
    assert backend_for("cpu").engine.unified
