"""Tokens of many sequences side by side: the text of the plain model, and the bits of every sequence alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.batches import (
    alone,
    greedy,
    in_turn,
    prompt_slice,
    smallest,
    some_tokens,
    text_slice,
    token_model,
)
from tests.hf.paged import decoder
from tests.torch_threads import threads
from tierstore.errors import CapacityError, ModuleError, PageLostError
from tierstore.hf.batch.slices import Slice
from tierstore.hf.batch.support import why_not_exact, why_not_tokens
from tierstore.hf.batch.tokens import TokenModel
from tierstore.hf.kv import memory
from tierstore.stores.page_file import PageFile

MODELS = ("LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM", "GptOssForCausalLM", "GPT2LMHeadModel")
"""Grouped queries; a window; windows in some layers and capped scores; attention sinks and experts; no rotation."""
LONG = 300
"""Tokens that do not fit one block of keys."""


def attentive(name: str, **changes: Any) -> Any:
    """A model whose logits depend much on attention."""
    model = decoder(name, **changes)
    for parameter in model.parameters():
        parameter.data.mul_(4)
    return model


def fed(batch: TokenModel, sequence: int, tokens: list[int], *pieces: int) -> Tensor:
    """Logits of a prompt that comes in pieces."""
    found = []
    for count in pieces:
        start = batch.length(sequence)
        found += batch.step([prompt_slice(sequence, tokens[start : start + count])])
    return torch.cat(found)


@pytest.mark.parametrize("name", MODELS)
def test_text_is_that_of_generate(name: str) -> None:
    model = decoder(name)
    prompts = [some_tokens(count, count) for count in (41, 1, 20, 7)]
    with token_model(model) as batch:
        texts = greedy(batch, prompts, 8)
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt])
        wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, pad_token_id=0)
        assert text == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_close_to_those_of_the_plain_model(name: str) -> None:
    model = attentive(name)
    tokens = some_tokens(LONG)
    found = alone(model, tokens[:-8], tokens[-8:])
    with torch.no_grad():
        wanted = model(torch.tensor([tokens])).logits[0]
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("name", "dtype", "count"),
    [
        ("LlamaForCausalLM", torch.bfloat16, 2),
        ("MistralForCausalLM", torch.float32, 1),
        ("GPT2LMHeadModel", torch.float32, 1),
        ("Gemma2ForCausalLM", torch.bfloat16, 1),
    ],
)
def test_bits_are_those_of_the_sequence_alone(name: str, dtype: torch.dtype, count: int) -> None:
    model = decoder(name, dtype)
    prompt, text, other = some_tokens(37, 1), some_tokens(11, 2), some_tokens(50, 3)
    wanted = alone(model, prompt, text)
    with threads(count), token_model(model) as batch:
        mine, mate = batch.add(prompt)[0], batch.add(other)[0]
        found = batch.step([prompt_slice(mate, other[:5]), prompt_slice(mine, prompt[:9])])[1:]
        found += batch.step([prompt_slice(mine, prompt[9:30]), prompt_slice(mate, other[5:])])[:1]
        found += batch.step([text_slice(mate, 5, 6, 7), prompt_slice(mine, prompt[30:])])[1:]
        forked = batch.fork(mine)
        found += batch.step([text_slice(mate, 8), text_slice(forked, *text[:3]), text_slice(mine, *other[:4])])[1:2]
        batch.crop(forked, 38)
        again = batch.step([text_slice(mine, 9), text_slice(forked, *text[1:])])[1]
    assert torch.equal(found[-1][:1], wanted[37:38])
    assert torch.equal(torch.cat([*found[:-1], found[-1][:1], again]), wanted)


def test_bits_do_not_depend_on_how_a_long_prompt_comes() -> None:
    model = decoder("LlamaForCausalLM")
    prompt, text = some_tokens(LONG), some_tokens(3)
    wanted = alone(model, prompt, text)
    with token_model(model) as batch:
        sequence, _ = batch.add(prompt)
        found = [fed(batch, sequence, prompt, 1, 30, 200, LONG - 231)]
        assert torch.equal(found[0], wanted[:LONG])
        found = batch.step([text_slice(sequence, *text)])
        assert torch.equal(found[0], wanted[LONG:])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"])
def test_bits_of_a_shared_beginning(name: str) -> None:
    model = decoder(name)
    common = some_tokens(20)
    prompts = [common + some_tokens(count, count) for count in (3, 30)]
    wanted = [alone(model, prompt, [7]) for prompt in prompts]
    with token_model(model) as batch:
        first, there = batch.add(prompts[0])
        assert there == 0
        fed(batch, first, prompts[0], 23)
        batch.seal(first, prompts[0])
        second, there = batch.add(prompts[1])
        assert there == batch.length(second) == (16 if name == "LlamaForCausalLM" else 0 if name[0] == "M" else there)
        batch.remove(first)
        found = batch.step([prompt_slice(second, prompts[1][there:]), prompt_slice(batch.add(common)[0], common)])[0]
        assert torch.equal(found, wanted[1][there:-1])
        assert torch.equal(batch.step([text_slice(second, 7)])[0], wanted[1][-1:])


def test_what_was_generated_is_not_found_as_a_prompt() -> None:
    """Its numbers are those of other tiles."""
    model = decoder("LlamaForCausalLM")
    tokens = some_tokens(40)
    with token_model(model) as batch:
        sequence, _ = batch.add(tokens)
        fed(batch, sequence, tokens, 18)
        batch.step([text_slice(sequence, *tokens[18:])])
        batch.seal(sequence, tokens)
        assert batch.add(tokens)[1] == 16
        with pytest.raises(ValueError, match="has 40 positions, 41 tokens"):
            batch.seal(sequence, [*tokens, 1])


@pytest.mark.parametrize("below", [{"kv_ram": 1 << 20}, {"kv_ram": 1 << 20, "kv_nvme": 1 << 20}])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_bits_do_not_depend_on_where_pages_are(name: str, below: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(name)
    if "kv_nvme" in below:
        below = {**below, "kv_ram": 1 << 15}
    prompts = [some_tokens(count, count) for count in (40, 60)]
    wanted = [alone(model, prompt, [7, 8]) for prompt in prompts]
    with token_model(model, tmp_path, kv_hbm=smallest(model, **below) + (1 << 15), **below) as batch:
        numbers = [batch.add(prompt)[0] for prompt in prompts]
        found = [
            [fed(batch, n, prompt, *[20] * (len(prompt) // 20))] for n, prompt in zip(numbers, prompts, strict=True)
        ]
        for token in (7, 8):
            for mine, logits in zip(found, batch.step([text_slice(n, token) for n in numbers]), strict=True):
                mine.append(logits)
        usage = batch.memory.usage().cells
        assert sum(cells.ram_cells + cells.nvme_cells for cells in usage) > 0
    for mine, alike in zip(found, wanted, strict=True):
        assert torch.equal(torch.cat(mine), alike)


@pytest.mark.parametrize(("format", "bound"), [("bf16", 0.02), ("int8", 0.02), ("int4", 0.4)])
def test_packed_pages_are_close(format: str, bound: float) -> None:
    model = attentive("LlamaForCausalLM", head_dim=32)
    tokens = some_tokens(280)
    exact = alone(model, tokens[:-4], tokens[-4:], page_tokens=64)
    packed = alone(model, tokens[:-4], tokens[-4:], page_tokens=64, format=format)
    assert 0 < (packed - exact)[-4:].abs().max() < bound * exact[-4:].std()


def test_what_is_kept_of_a_sequence_is_packed() -> None:
    prompt = some_tokens(200)
    with token_model(decoder("LlamaForCausalLM", head_dim=32), format="int8") as batch:
        sequence, _ = batch.add(prompt)
        fed(batch, sequence, prompt, 200)
        batch.seal(sequence, prompt)
        assert len(batch.memory.kinds[0].open) == 16
        batch.remove(sequence)
        assert not batch.memory.kinds[0].open
        assert batch.memory.usage().cells[0].open_cells == 0
        assert batch.add(prompt)[1] == 192


@pytest.mark.parametrize("below", [{}, {"kv_nvme": 1 << 20}])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_closed_page_goes_on(format: str | None, below: dict[str, Any], tmp_path: Path) -> None:
    model = attentive("LlamaForCausalLM", head_dim=32)
    prompt = some_tokens(200)
    wanted = alone(model, prompt, [], format=format)
    kv_hbm = smallest(model, format, **below) * 4 if below else 1 << 24
    with token_model(model, tmp_path, format=format, kv_hbm=kv_hbm, **below) as batch:
        sequence, _ = batch.add(prompt)
        fed(batch, sequence, prompt, *[40] * 5)
        batch.crop(sequence, 20)
        found = fed(batch, sequence, prompt, *[60] * 3)
        if format is None:
            assert torch.equal(found, wanted[20:])
        else:
            assert 0 < (found - wanted[20:]).abs().max() < 0.1 * wanted.std()


def test_cropped_tokens_never_were() -> None:
    model = decoder("MistralForCausalLM")
    prompt, text = some_tokens(30), some_tokens(14, 1)
    wanted = alone(model, prompt, text)
    with token_model(model) as batch:
        sequence, _ = batch.add(prompt)
        fed(batch, sequence, prompt, 30)
        for at in range(0, 14, 2):
            found = batch.step([text_slice(sequence, *text[at : at + 2], *some_tokens(12, at))])[0]
            assert torch.equal(found[:2], wanted[30 + at : 32 + at])
            batch.crop(sequence, 32 + at)
        assert batch.length(sequence) == 44
        with pytest.raises(ValueError, match="cannot go back from 44 positions to 8"):
            batch.crop(sequence, 8)
        with pytest.raises(ValueError, match="has 44 positions"):
            batch.crop(sequence, 45)
        batch.crop(sequence, 0)
        assert torch.equal(fed(batch, sequence, prompt, 30), wanted[:30])


def test_a_step_without_room_never_was() -> None:
    model = decoder("LlamaForCausalLM")
    prompt = some_tokens(20)
    wanted = alone(model, prompt, [7, 8])
    with token_model(model, kv_hbm=smallest(model) + (1 << 14)) as batch:
        sequence, other = batch.add(prompt)[0], batch.add(prompt)[0]
        fed(batch, sequence, prompt, 20)
        forked = batch.fork(sequence)
        usage = batch.memory.usage().pages
        most = batch.capacity.pages * batch.capacity.page_tokens
        with pytest.raises(CapacityError):
            batch.step([text_slice(sequence, 7), text_slice(forked, 9), prompt_slice(other, some_tokens(most))])
        assert [batch.length(each) for each in (sequence, forked, other)] == [20, 20, 0]
        assert batch.memory.usage().pages == usage
        found = batch.step([text_slice(sequence, 7), text_slice(forked, 7)])
        assert torch.equal(found[0], wanted[20:21])
        assert torch.equal(found[1], wanted[20:21])


@pytest.mark.parametrize("format", [None, "int8"])
def test_a_step_that_fails_never_was(format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = attentive("LlamaForCausalLM", head_dim=32)
    prompt, text = some_tokens(170), some_tokens(12, 2)
    wanted = alone(model, prompt, text, format=format)
    with token_model(model, format=format) as batch:
        sequence, _ = batch.add(prompt)
        fed(batch, sequence, prompt, 170)
        forked = batch.fork(sequence)
        for layer in range(2):
            with monkeypatch.context() as patch:

                def fail(*args: Any, **kwargs: Any) -> None:
                    raise RuntimeError("no more")

                patch.setattr(model.model.layers[layer].mlp, "forward", fail)
                with pytest.raises(RuntimeError, match="no more"):
                    batch.step([text_slice(sequence, *some_tokens(30)), text_slice(forked, *text)])
            assert batch.length(sequence) == batch.length(forked) == 170
        found = batch.step([text_slice(forked, 3), text_slice(sequence, text[0])])[1]
        if format is None:
            assert torch.equal(found, wanted[170:171])
        else:
            assert torch.allclose(found, wanted[170:171], atol=0.1 * float(wanted.std()))


class DamagedFile(PageFile):
    """Once ``broken``, nothing that is read is what was written."""

    broken = False

    def read(self, requests: Any) -> Any:
        if self.broken:
            with open(self._file.path, "r+b") as raw:
                for request in requests:
                    raw.seek(request.run.extents[0].offset)
                    raw.write(b"\xa5" * 4096)
        return super().read(requests)


def test_lost_pages_say_whose_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PageFile", DamagedFile)
    model = decoder("LlamaForCausalLM")
    below: dict[str, Any] = {"kv_nvme": 1 << 20}
    prompt, other = some_tokens(80), some_tokens(9, 1)
    wanted = alone(model, other, [7])
    with token_model(model, tmp_path, kv_hbm=smallest(model, **below) + (1 << 14), **below) as batch:
        sequence, mate = batch.add(prompt)[0], batch.add(other)[0]
        fed(batch, sequence, prompt, *[20] * 4)
        fed(batch, mate, other, 9)
        batch.seal(sequence, prompt)
        assert sum(cells.nvme_cells for cells in batch.memory.usage().cells) > 0
        monkeypatch.setattr(DamagedFile, "broken", True)
        with pytest.raises(PageLostError) as lost:
            batch.step([text_slice(mate, 7), text_slice(sequence, 8)])
        monkeypatch.setattr(DamagedFile, "broken", False)
        assert batch.losing(lost.value) == (sequence,)
        assert batch.length(sequence) == 80
        assert torch.equal(batch.step([text_slice(mate, 7)])[0], wanted[-1:])
        batch.remove(sequence)
        assert batch.add(prompt)[1] < 72


def test_as_many_sequences_as_the_capacity_says(tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    cases: list[tuple[str | None, dict[str, Any]]] = [
        (None, {}),
        (None, {"kv_ram": 1 << 20}),
        ("int8", {"kv_ram": 1 << 20}),
    ]
    for format, below in cases:
        kv_hbm = smallest(model, format, **below) * 3
        with token_model(model, tmp_path, kv_hbm=kv_hbm, format=format, **below) as batch:
            numbers = [batch.add([1])[0] for _ in range(batch.capacity.open_pages)]
            slices = [text_slice(each, 5) for each in numbers]
            for _ in range(min(batch.capacity.pages // len(numbers), 3) * batch.capacity.page_tokens):
                batch.step(slices)
            assert batch.capacity.open_pages >= 2


def by_layer(model: Any, calls: Any) -> list[Tensor]:
    """All calls go through a layer before any goes on to the next."""
    greenlet = pytest.importorskip("greenlet")
    hub, found = greenlet.getcurrent(), [torch.empty(0)] * len(calls)

    def run(number: int) -> None:
        found[number] = calls[number]()

    def wait(*_: Any) -> None:
        hub.switch()

    runs = [greenlet.greenlet(partial(run, number)) for number in range(len(calls))]
    hooks = [layer.register_forward_pre_hook(wait) for layer in model.model.layers]
    while any(not each.dead for each in runs):
        for each in runs:
            if not each.dead:
                each.switch()
    for hook in hooks:
        hook.remove()
    return found


def test_micro_batches_may_go_through_layers_together(tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    prompts = [some_tokens(60), some_tokens(25, 1)]
    below: dict[str, Any] = {"kv_nvme": 1 << 20}
    wanted = [alone(model, prompt, [7]) for prompt in prompts]
    for together in (partial(by_layer, model), in_turn):
        budget = {"kv_hbm": smallest(model, **below) + (1 << 15), **below}
        with token_model(model, tmp_path, together=together, **budget) as batch:
            numbers = [batch.add(prompt)[0] for prompt in prompts]
            found = batch.step([prompt_slice(n, prompt[:40]) for n, prompt in zip(numbers, prompts, strict=True)])
            found += batch.step([prompt_slice(numbers[0], prompts[0][40:]), text_slice(numbers[1], 7)])
            found += batch.step([text_slice(numbers[0], 7)])
            assert torch.equal(torch.cat([found[0], found[2], found[4]]), wanted[0])
            assert torch.equal(torch.cat([found[1], found[3]]), wanted[1])


def test_calls_in_another_order_are_refused() -> None:
    model = decoder("LlamaForCausalLM")
    with token_model(model, together=lambda calls: [call() for call in reversed(calls)]) as batch:
        sequence, _ = batch.add([1])
        with pytest.raises(RuntimeError, match="keep their order"):
            batch.step([prompt_slice(sequence, some_tokens(20))])
        assert batch.length(sequence) == 0


def test_what_is_asked_wrongly() -> None:
    model = decoder("LlamaForCausalLM")
    prompt = some_tokens(40)
    wanted = alone(model, prompt, [])
    with token_model(model) as batch:
        sequence, _ = batch.add(prompt)
        for slices, error in (
            ([text_slice(sequence, 1), text_slice(sequence, 2)], ValueError),
            ([text_slice(77, 1)], KeyError),
            ([text_slice(sequence, 1000)], IndexError),
        ):
            with pytest.raises(error):
                batch.step(slices)
            assert batch.length(sequence) == 0
        for tokens, logits in ([], 0), ([1], 2), ([1], -1):
            with pytest.raises(ValueError, match="a slice of"):
                Slice(sequence, tuple(tokens), logits, prompt=True)
        with pytest.raises(ValueError, match="at least 1"):
            batch.tokens = 0
        assert batch.step([]) == []
        assert torch.equal(batch.step([Slice(sequence, tuple(prompt), 20, prompt=True)])[0], wanted[-20:])


def test_models_that_cannot_say_why() -> None:
    assert [why_not_tokens(decoder(name)) for name in MODELS] == [""] * len(MODELS)
    assert "way of its own" in why_not_tokens(decoder("FalconForCausalLM"))
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "dynamic" in why_not_tokens(decoder("LlamaForCausalLM", rope_parameters=rope))
    assert why_not_tokens(torch.nn.Linear(2, 2))
    assert why_not_exact(decoder("GptOssForCausalLM"))
    assert not why_not_exact(decoder("LlamaForCausalLM"))
    with pytest.raises(ModuleError, match="side by side"), token_model(decoder("FalconForCausalLM")):
        pass
    with pytest.raises(ModuleError, match="pages of 24"), token_model(decoder("LlamaForCausalLM"), page_tokens=24):
        pass
