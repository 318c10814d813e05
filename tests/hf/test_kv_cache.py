"""A cache in pages is a transformers cache: rows, crops, windows, several over one memory, and what goes wrong."""

# mypy: disable-error-code="arg-type"

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.hf.paged import PAGE, decoder, generated, left_padded, paged, prompt, smallest
from tierstore.errors import CapacityError, ModuleError, PlanError, SessionClosedError
from tierstore.hf.kv import memory
from tierstore.hf.kv.cache import PagedCache
from tierstore.hf.kv.generating import KvGeneration
from tierstore.stores.page_file import PageFile


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("LlamaForCausalLM")


@pytest.fixture(scope="module")
def mistral() -> Any:
    return decoder("MistralForCausalLM")


def held(made: KvGeneration) -> int:
    """Pages that rows hold, of all kinds of layers."""
    return sum(pages.held_pages for pages in made.memory.usage().pages)


def moved(made: KvGeneration) -> list[Any]:
    """What the pagers have."""
    return [kind.pager.usage() for kind in made.memory.kinds]


@torch.no_grad()
def logits(model: Any, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    found: Tensor = model(input_ids=ids, cache=cache, **kwargs).logits
    return found


def test_beams_share_their_prompt(llama: Any) -> None:
    with paged(llama) as made:
        generated(llama, input_ids=prompt(400), new=8)
        one = held(made)
        made.cache.reset()
        with paged(llama) as other:
            generated(llama, input_ids=prompt(400, seed=1), new=8, num_beams=4)
            assert held(other) <= 1.2 * one


def test_rows_that_become_others_move_no_bytes(llama: Any) -> None:
    with paged(llama) as made:
        logits(llama, prompt(30, rows=4), made.cache)
        writes = [kind.cells.region.clone() for kind in made.memory.kinds]
        before = moved(made)
        made.cache.reorder_cache(torch.tensor([1, 1, 3, 0]))
        made.cache.batch_repeat_interleave(2)
        made.cache.batch_select_indices(torch.tensor([0, 3, 4, 7]))
        assert all(map(torch.equal, writes, [kind.cells.region for kind in made.memory.kinds]))
        assert [usage.written_nbytes for usage in moved(made)] == [usage.written_nbytes for usage in before]
        assert made.cache.sequences == (30,) * 4
        plain = DynamicCache(config=llama.config)
        logits(llama, prompt(30, rows=4), plain)
        plain.reorder_cache(torch.tensor([1, 1, 3, 0]))
        plain.batch_repeat_interleave(2)
        plain.batch_select_indices(torch.tensor([0, 3, 4, 7]))
        new = prompt(3, rows=4, seed=1)
        assert torch.equal(logits(llama, new, made.cache), logits(llama, new, plain))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("format", [None, "int8"])
def test_a_crop_goes_back(name: str, format: str | None) -> None:
    model = decoder(name)
    with paged(model, format=format) as made:
        made.cache.activate_past_recording()
        logits(model, prompt(260), made.cache)
        made.cache.crop(-216)
        assert made.cache.get_seq_length() == 44
        plain = DynamicCache(config=model.config)
        logits(model, prompt(260)[:, :44], plain)
        for length in (1, 9, 40):
            new = prompt(length, seed=length)
            torch.testing.assert_close(
                logits(model, new, made.cache), logits(model, new, plain), rtol=0, atol=2e-3 if format else 1e-6
            )
        made.cache.crop(0)


def test_pages_behind_a_window_are_freed(mistral: Any) -> None:
    with paged(mistral) as made:
        generated(mistral, input_ids=prompt(60), new=40)
        assert made.cache.sequences == (99,)
        assert held(made) <= 12 // PAGE + 2
        with pytest.raises(ValueError, match="activate_past_recording"):
            made.cache.crop(-30)
        made.cache.activate_past_recording()
        logits(mistral, prompt(30), made.cache)
        made.cache.crop(-25)
        assert made.cache.sequences == (104,)
        assert held(made) <= 12 // PAGE + 2


def test_a_conversation_goes_on(llama: Any) -> None:
    first, second = prompt(21), prompt(13, seed=1)

    def talk(cache: Any) -> Tensor:
        said, _ = generated(llama, input_ids=first, cache=cache)
        more, _ = generated(llama, input_ids=torch.cat([said, second], 1), cache=cache)
        return more

    with paged(llama) as made:
        assert torch.equal(talk(made.cache), talk(DynamicCache(config=llama.config)))


def test_a_padded_conversation_goes_on(llama: Any) -> None:
    rows, more = left_padded((15, 9)), left_padded((6, 11), seed=1)

    def talk(cache: Any) -> Tensor:
        said, _ = generated(llama, **rows, cache=cache)
        ids = torch.cat([said, more["input_ids"]], 1)
        ones = torch.ones(2, said.shape[1] - 15, dtype=torch.long)
        mask = torch.cat([rows["attention_mask"], ones, more["attention_mask"]], 1)
        return generated(llama, input_ids=ids, attention_mask=mask, cache=cache)[0]

    with paged(llama) as made:
        found = talk(made.cache)
        assert made.cache.sequences == (15 + 9 + 6 + 8, 9 + 9 + 11 + 8)  # no padding
    assert torch.equal(found, talk(DynamicCache(config=llama.config)))


def test_what_was_seen_is_not_computed_again(llama: Any) -> None:
    ids = prompt(100)
    want, _ = generated(llama, input_ids=ids)
    lengths: list[int] = []
    with paged(llama):
        generated(llama, input_ids=ids)
        embed = llama.get_input_embeddings()
        hook = embed.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
        found, _ = generated(llama, input_ids=ids)
        again, _ = generated(llama, input_ids=torch.cat([ids[:, :50], prompt(50, seed=3)], 1))
        hook.remove()
    assert torch.equal(found, want)
    assert lengths[0] < PAGE + 1
    assert max(lengths) == 100 - 48
    assert torch.equal(again, generated(llama, input_ids=torch.cat([ids[:, :50], prompt(50, seed=3)], 1))[0])


def test_caches_over_one_memory_do_not_meet(llama: Any) -> None:
    with paged(llama) as made:
        other = made.cache.another()
        a, b = prompt(20), prompt(33, seed=1)
        logits(llama, a, made.cache)
        logits(llama, b, other)
        plain = [DynamicCache(config=llama.config) for _ in range(2)]
        logits(llama, a, plain[0])
        logits(llama, b, plain[1])
        for _ in range(12):
            for ids, mine, theirs in ((a, made.cache, plain[0]), (b, other, plain[1])):
                assert torch.equal(logits(llama, ids[:, :1], mine), logits(llama, ids[:, :1], theirs))
        pages = held(made)
        del other, mine
        gc.collect()
        logits(llama, a[:, :1], made.cache)
        assert held(made) < pages


def test_a_pause_takes_pages_down_and_brings_them_back(llama: Any, tmp_path: Path) -> None:
    with paged(llama, tmp_path, kv_hbm=1 << 20, kv_nvme=1 << 20) as made:
        want = generated(llama, input_ids=prompt(60), new=20)[0]
        made.cache.reset()
        logits(llama, want[:, :70], made.cache)
        with made.cache.pause():
            assert made.memory.usage().cells[0].written_nbytes
        plain = DynamicCache(config=llama.config)
        logits(llama, want[:, :70], plain)
        torch.testing.assert_close(logits(llama, want[:, 70:], made.cache), logits(llama, want[:, 70:], plain))


def test_a_pass_that_fails_never_was(llama: Any) -> None:
    last = llama.model.layers[1].mlp
    with paged(llama) as made:
        kept = made.cache.another()
        logits(llama, prompt(20), kept)
        logits(llama, prompt(20), made.cache)
        pages = held(made)

        def fail(*args: Any) -> None:
            raise RuntimeError("stop")

        hook = last.register_forward_pre_hook(fail)
        for length in (1, 30):
            with pytest.raises(RuntimeError, match="stop"):
                logits(llama, prompt(length), made.cache)
        with pytest.raises(RuntimeError, match="stop"):
            generated(llama, input_ids=prompt(25), num_beams=3)
        hook.remove()
        assert made.cache.sequences == ()
        logits(llama, prompt(20), made.cache)
        assert held(made) == pages
        plain = DynamicCache(config=llama.config)
        logits(llama, prompt(20), plain)
        new = prompt(9, seed=4)
        want = logits(llama, new, plain)
        assert torch.equal(logits(llama, new, kept), want)
        assert torch.equal(logits(llama, new, made.cache), want)


class DamagedFile(PageFile):
    """Cells that are read are damaged first, now and then."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads, self.damaged = 0, 0

    def read(self, requests: Any) -> Any:
        self.reads += 1
        if self.reads % 9 == 7 and self.damaged < 3:
            self.damaged += 1
            with open(self._file.path, "r+b") as raw:
                raw.seek(requests[0].run.extents[0].offset + requests[0].first * self.cell_nbytes)
                raw.write(b"\xa5" * 64)
        return super().read(requests)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GptOssForCausalLM"])
def test_pages_that_are_lost_are_computed_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, files = decoder(name), []

    def damaged(*args: Any, **kwargs: Any) -> PageFile:
        files.append(DamagedFile(*args, **kwargs))
        return files[-1]

    monkeypatch.setattr(memory, "PageFile", damaged)
    rows = left_padded((45, 31))
    want, _ = generated(model, **rows, new=16)
    with paged(model, tmp_path, kv_hbm=smallest(model, kv_nvme=1 << 20) * 2, kv_nvme=1 << 20):
        found, _ = generated(model, **rows, new=16)
    assert sum(file.damaged for file in files) > 1
    assert torch.equal(found, want)


def test_what_cannot_be_is_said(llama: Any) -> None:
    with paged(llama) as made:
        with pytest.raises(ModuleError, match="output_attentions"):
            logits(llama, prompt(5), made.cache, output_attentions=True)
        with pytest.raises(ModuleError, match="no_grad"):
            llama(input_ids=prompt(5), cache=made.cache)
        dropping = decoder("LlamaForCausalLM", attention_dropout=0.5).train()
        with paged(dropping) as other, pytest.raises(ModuleError, match="dropout"):
            logits(dropping, prompt(5), other.cache)
        logits(llama, prompt(5, rows=2), made.cache)
        with pytest.raises(ValueError, match="2 rows and gets 3"):
            logits(llama, prompt(5, rows=3), made.cache)
        hidden = torch.zeros(2, 5, dtype=torch.long)
        shown = torch.ones(2, 6, dtype=torch.long)
        made.cache.reset()
        hidden[:, 2:] = 1
        logits(llama, prompt(5, rows=2), made.cache, attention_mask=hidden)
        with pytest.raises(ValueError, match="not stored"):
            logits(llama, prompt(1, rows=2), made.cache, attention_mask=shown)
        kept = made.cache
    with pytest.raises(SessionClosedError):
        kept.another().update(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16), 0)
    with pytest.raises(PlanError, match="kv_hbm"), paged(llama, kv_hbm=1000):
        pass


@pytest.mark.parametrize(
    ("name", "why"),
    [("T5ForConditionalGeneration", "encoder-decoder"), ("MambaForCausalLM", "LinearAttentionLayer")],
)
def test_models_with_other_caches_are_refused(name: str, why: str) -> None:
    from tests.hf.zoo import tiny

    with pytest.raises(ModuleError, match=why), paged(tiny(name)):
        pass


def test_a_model_with_attention_of_its_own_is_noted() -> None:
    model = decoder("FalconForCausalLM")
    notes: list[str] = []
    with paged(model) as made:
        KvGeneration(model, made.memory, notes)
    assert "attention" not in model.__dict__
    assert "in a way of its own" in notes[0]
    del model.__dict__["generate"]


def test_exhausted_pages_leave_the_cache_as_it_was(llama: Any) -> None:
    with paged(llama, kv_hbm=smallest(llama)) as made:
        room = made.memory.plan.tokens
        assert room is not None
        logits(llama, prompt(room - 1), made.cache)
        with pytest.raises(CapacityError):
            logits(llama, prompt(5), made.cache)
        assert made.cache.sequences == (room - 1,)
        logits(llama, prompt(1), made.cache)


def test_a_cache_without_its_generation_is_still_a_cache(llama: Any) -> None:
    """As for a forward of the model within: nothing is known of its tokens, and its attention is the model's own."""
    rows = left_padded((17, 9))
    with paged(llama) as made, torch.no_grad():
        mine, plain = PagedCache(made.memory), DynamicCache(config=llama.config)
        for cache in (mine, plain):
            llama.model(**rows, cache=cache)
        new, mask = prompt(2, rows=2), torch.cat([rows["attention_mask"], torch.ones(2, 2, dtype=torch.long)], 1)
        found = [llama.model(input_ids=new, attention_mask=mask, cache=cache)[0] for cache in (mine, plain)]
    assert torch.equal(*found)


def test_a_copy_of_the_model_is_plain(llama: Any) -> None:
    with paged(llama) as made:
        twin = copy.deepcopy(llama)
        found, _ = generated(twin, input_ids=prompt(9))
        assert not len(made.cache.state.rows)
        assert torch.equal(found, generated(llama, input_ids=prompt(9))[0])
        assert made.cache.sequences == (17,)


def test_a_model_that_drafts_with_its_own_first_layers_finds_no_pages_of_theirs() -> None:
    model = decoder("LlamaForCausalLM", num_hidden_layers=3)
    want, _ = generated(model, input_ids=prompt(27), assistant_early_exit=1)
    with paged(model):
        found, _ = generated(model, input_ids=prompt(27), assistant_early_exit=1)
    assert torch.equal(found, want)


def test_both_models_of_a_pair_have_pages(llama: Any) -> None:
    assistant = decoder("MistralForCausalLM", num_hidden_layers=1)
    want, _ = generated(llama, input_ids=prompt(27), assistant_model=assistant, new=20)
    with paged(llama), paged(assistant):
        found, _ = generated(llama, input_ids=prompt(27), assistant_model=assistant, new=20)
    assert torch.equal(found, want)


def test_embeddings_enter_too(llama: Any) -> None:
    embedded = llama.get_input_embeddings()(prompt(20)).detach()
    want, _ = generated(llama, inputs_embeds=embedded)
    with paged(llama):
        for _ in range(2):
            found, _ = generated(llama, inputs_embeds=embedded)
            assert torch.equal(found, want)
