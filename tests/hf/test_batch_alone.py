"""Sequences that are computed each by itself give what the model's own ``generate`` gives, whoever is beside them."""

# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tierstore
from tierstore import Budget
from tierstore.errors import CapacityError, ModuleError, PageLostError
from tierstore.hf.batch.alone import SequenceModel
from tierstore.hf.batch.slices import Slice

VOCABULARY = 97
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SMALL = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "attn_layer_indices": [1]}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", DECODER),
    "window": ("MistralForCausalLM", {**DECODER, "sliding_window": 5}),
    "gpt2": ("GPT2LMHeadModel", SMALL),
    "mamba": ("MambaForCausalLM", MAMBA),
    "hybrid": ("BambaForCausalLM", {**DECODER, **HYBRID}),
    "without a cache": ("OpenAIGPTLMHeadModel", SMALL),
}
SPECULATING = ["llama", "window", "gpt2", "without a cache"]
PROMPTS = [torch.randint(3, VOCABULARY, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (11, 7, 1)]
NEW = 6


def make(name: str) -> Any:
    cls, sizes = MODELS[name]
    model_class: Any = getattr(transformers, cls)
    torch.manual_seed(0)
    return model_class(model_class.config_class(**sizes, eos_token_id=None)).eval()


def one_by_one(calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    return [call() for call in calls]


def alone(module: Any, tokens: int = 64, **options: int) -> SequenceModel:
    return SequenceModel(module, one_by_one, tokens=tokens, **options)


def started(model: SequenceModel, prompts: Sequence[list[int]]) -> tuple[list[int], list[Tensor]]:
    sequences = [model.add(prompt)[0] for prompt in prompts]
    slices = [Slice(number, tuple(prompt), 1, True) for number, prompt in zip(sequences, prompts, strict=True)]
    return sequences, model.step(slices)


def go_on(model: SequenceModel, sequences: Sequence[int], logits: list[Tensor], count: int) -> list[Tensor]:
    """Greedy texts of ``sequences``, from the last logits on: all logits of each, [count, vocabulary]."""
    seen = [[] for _ in sequences]  # type: list[list[Tensor]]
    for step in range(count):
        for rows, last in zip(seen, logits, strict=True):
            assert last.dtype == torch.float32
            rows.append(last[-1:])
        if step < count - 1:
            tokens = [int(rows[-1].argmax()) for rows in seen]
            logits = model.step([Slice(s, (t,), 1, False) for s, t in zip(sequences, tokens, strict=True)])
    return [torch.cat(rows) for rows in seen]


def generated(module: Any, prompt: list[int], count: int = NEW) -> Tensor:
    ids = torch.tensor([prompt])
    made = module.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=count,
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
        output_logits=True,
    )
    logits: Tensor = torch.cat(made.logits)
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_texts_are_those_of_generate(name: str) -> None:
    module = make(name)
    model = alone(module)
    sequences, logits = started(model, PROMPTS)
    got = go_on(model, sequences, logits, NEW)
    assert all(map(torch.equal, got, [generated(module, prompt) for prompt in PROMPTS]))
    assert model.speculates is (name in SPECULATING)
    for number, prompt in zip(sequences, PROMPTS, strict=True):
        assert model.length(number) == len(prompt) + NEW - 1
        model.seal(number, prompt)
        model.remove(number)
    assert model.nbytes == 0


@pytest.mark.parametrize("name", ["llama", "window", "mamba"])
def test_where_a_prompt_is_cut_changes_no_bit(name: str) -> None:
    module = make(name)
    model = alone(module, tokens=4)
    want = {len(p): go_on(model, *started(model, [p]), 3)[0] for p in PROMPTS}

    @settings(max_examples=15, deadline=None)
    @given(st.lists(st.integers(1, 6), min_size=12, max_size=12))
    def law(cuts: list[int]) -> None:
        sequences = [model.add(prompt)[0] for prompt in PROMPTS]
        last: dict[int, Tensor] = {}
        there = [0] * len(PROMPTS)
        for cut in cuts:
            slices = []
            for at, prompt in enumerate(PROMPTS):
                part = tuple(prompt[there[at] : there[at] + cut])
                there[at] += len(part)
                if part:
                    slices.append(Slice(sequences[at], part, int(there[at] == len(prompt)), True))
            for each, logits in zip(slices, model.step(slices), strict=True):
                assert logits.shape == (each.logits, VOCABULARY)
                assert model.length(each.sequence) == there[sequences.index(each.sequence)]
                last[each.sequence] = logits
        got = go_on(model, sequences, [last[number] for number in sequences], 3)
        assert all(torch.equal(rows, want[len(prompt)]) for rows, prompt in zip(got, PROMPTS, strict=True))
        for number in sequences:
            model.remove(number)

    law()


@pytest.mark.parametrize("name", MODELS)
def test_forks_share_nothing(name: str) -> None:
    model = alone(make(name))
    (first,), logits = started(model, PROMPTS[:1])
    second, third = model.fork(first), model.fork(first)
    whole = go_on(model, [first], logits, 5)[0]
    model.step([Slice(second, (7,), 1, False)])
    assert model.length(third) == len(PROMPTS[0])
    assert torch.equal(go_on(model, [third], logits, 5)[0], whole)
    model.remove(first)
    assert torch.equal(go_on(model, [model.fork(third)], [whole[-1:]], 2)[0][:1], whole[-1:])


@pytest.mark.parametrize("name", SPECULATING)
@pytest.mark.parametrize("drafted", [1, 4, 9])
def test_drafts_are_taken_back(name: str, drafted: int) -> None:
    module = make(name)
    model = alone(module)
    sequences, logits = started(model, PROMPTS)
    want = [generated(module, prompt) for prompt in PROMPTS]
    for number, rows in zip(sequences, want, strict=True):
        length, text = model.length(number), tuple(rows.argmax(-1).tolist())
        right = text[: min(drafted, NEW - 1)]
        (got,) = model.step([Slice(number, (*right, *[1] * drafted), len(right), False)])
        assert got.shape == (len(right), VOCABULARY)
        model.crop(number, length)
        (got,) = model.step([Slice(number, right, len(right), False)])
        torch.testing.assert_close(got, rows[1 : 1 + len(right)])
        model.crop(number, length)
    assert all(map(torch.equal, go_on(model, sequences, logits, NEW), want))


def test_what_cannot_be_taken_back() -> None:
    window, mamba = alone(make("window")), alone(make("mamba"))
    (number,), _ = started(window, PROMPTS[:1])
    window.step([Slice(number, (5,), 0, False)])
    window.step([Slice(number, (5, 6), 0, False)])
    window.crop(number, 12)
    with pytest.raises(ValueError, match="windows"):
        window.crop(number, 11)
    with pytest.raises(ValueError, match="has 12 tokens"):
        window.crop(number, 13)
    (number,), _ = started(mamba, PROMPTS[:1])
    mamba.crop(number, 11)
    with pytest.raises(ValueError, match="start anew"):
        mamba.crop(number, 10)
    assert mamba.step([Slice(number, (5, 6, 7), 2, False)])[0].shape == (2, VOCABULARY)


class Fails:
    """Runs calls one by one, and lets a module of the model fail when it is called for the last of them."""

    def __init__(self, at: Any) -> None:
        self.armed = False
        self._last = False
        at.register_forward_pre_hook(self._hook)

    def __call__(self, calls: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        found = []
        for number, call in enumerate(calls):
            self._last = self.armed and number == len(calls) - 1
            found.append(call())
        return found

    def _hook(self, *_: Any) -> None:
        if self._last:
            raise RuntimeError("broken")


@pytest.mark.parametrize("name", MODELS)
def test_a_step_that_fails(name: str) -> None:
    module = make(name)
    base = module.base_model
    fails = Fails((base.layers if hasattr(base, "layers") else base.h)[1])
    model = SequenceModel(module, fails, tokens=64)
    sequences, logits = started(model, PROMPTS)
    want = [generated(module, prompt) for prompt in PROMPTS]
    fails.armed = True
    with pytest.raises(RuntimeError, match="broken") as raised:
        model.step([Slice(number, (5, 6) if model.speculates else (5,), 1, False) for number in sequences[1:]])
    fails.armed = False
    if model.speculates:
        assert [model.length(number) for number in sequences] == [len(prompt) for prompt in PROMPTS]
        assert all(map(torch.equal, go_on(model, sequences, logits, NEW), want))
        return
    assert raised.value.__notes__ == [f"sequences {sequences[1]}, {sequences[2]} are lost: start them anew"]
    with pytest.raises(PageLostError, match="start anew") as lost:
        model.step([Slice(number, (5,), 1, False) for number in sequences])
    assert model.losing(lost.value) == (sequences[1], sequences[2])
    for number in model.losing(lost.value):
        model.remove(number)
    anew, again = started(model, PROMPTS[1:])
    got = go_on(model, [sequences[0], *anew], [logits[0], *again], NEW)
    assert all(map(torch.equal, got, want))


def test_bad_steps_change_nothing() -> None:
    model = alone(make("llama"), positions=512)
    assert (model.capacity.pages, model.capacity.page_tokens) == (2, 256)
    (one, two), logits = started(model, PROMPTS[:2])
    for slices in ([Slice(one, (5,), 1, False)] * 2, [Slice(one, (5,), 1, False), Slice(99, (5,), 1, False)]):
        with pytest.raises((ValueError, KeyError)):
            model.step(slices)
    with pytest.raises(CapacityError, match="3 pages"):
        model.step([Slice(one, (5,) * 250, 1, True), Slice(two, (5,), 1, False)])
    with pytest.raises(ValueError, match="at least 1"):
        model.tokens = 0
    assert (model.length(one), model.length(two)) == (11, 7)
    assert model.nbytes == 2 * 2 * 2 * 8 * 4 * (11 + 7)  # layers, keys and values, heads, dimensions, bytes
    assert torch.equal(go_on(model, [two], logits[1:], 3)[0], generated(model.module, PROMPTS[1], 3))
    model.close()
    model.close()
    with pytest.raises(KeyError):
        model.length(one)


def test_models_that_cannot() -> None:
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    library: Any = transformers
    sizes = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    with pytest.raises(ModuleError, match="no decoder"):
        alone(library.T5ForConditionalGeneration(library.T5Config(**sizes)))
    xlnet = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 1, "n_head": 4, "d_inner": 32}
    both_ways = library.XLNetLMHeadModel(library.XLNetConfig(**xlnet))
    gemma = {**DECODER, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 5, "head_dim": 8}
    own_state = library.RecurrentGemmaForCausalLM(library.RecurrentGemmaConfig(**gemma))
    for module in (both_ways, own_state):
        with pytest.raises(ModuleError, match="does not generate in batches"):
            started(alone(module.eval()), PROMPTS[:1])


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_one_pass_over_weights_that_stream(name: str, tmp_path: Path) -> None:
    module = make(name)
    want = [generated(module, prompt) for prompt in PROMPTS]
    with tierstore.offload(module, Budget(30_000), store=tmp_path, device="cpu") as session:
        model = SequenceModel(module, session.together, tokens=64)
        sequences, logits = started(model, PROMPTS)
        passes = session.report().passes
        got = go_on(model, sequences, logits, NEW)
        assert session.report().passes == passes + NEW - 1
        assert session.report().bytes_moved
    assert all(map(torch.equal, got, want))
