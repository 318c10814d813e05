"""With a KV cache in pages a model generates what it generates with its own, whatever the way, wherever pages are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.paged import ARCHITECTURES, decoder, generated, left_padded, paged, prompt, smallest, ways
from tierstore.errors import CapacityError

Found = dict[str, tuple[Tensor, tuple[Tensor, ...]]]
Plain = dict[torch.dtype, tuple[Any, Found]]

BF16 = torch.bfloat16
WAYS = ways(decoder("LlamaForCausalLM", num_hidden_layers=1))
BELOW: tuple[dict[str, Any], ...] = ({"kv_nvme": 1 << 21}, {"kv_ram": 1 << 15, "kv_nvme": 1 << 21})
FEWER = ("padded beams", "assisted")
MOST = ("Llama", "GptOss")
"""Models that generate in every way."""
VIEWED = ("lookup", "assisted")
"""Ways in which transformers' own cache hands out views with other strides, so that the last bits differ."""


@pytest.fixture(scope="module", params=ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def plain(name: str) -> dict[torch.dtype, tuple[Any, Found]]:
    """Of each dtype the model, and what it generates with transformers' own cache."""
    found = {}
    for dtype in (torch.float32, BF16):
        model = decoder(name, dtype)
        these = WAYS if dtype == torch.float32 and name.startswith(MOST) else FEWER
        found[dtype] = (model, {way: WAYS[way](model) for way in these})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_resident_pages_give_the_very_logits(plain: Plain, dtype: torch.dtype) -> None:
    model, wanted = plain[dtype]
    for way, (tokens, logits) in wanted.items():
        with paged(model):  # anew, since pages of a prompt that was seen are not computed again
            found = WAYS[way](model)
        assert torch.equal(found[0], tokens), way
        assert way in VIEWED or all(map(torch.equal, found[1], logits)), way
    assert not {"forward", "generate"} & model.__dict__.keys()


def test_spilled_pages_give_the_same_tokens(plain: Plain, tmp_path: Path) -> None:
    model, wanted = plain[torch.float32]
    for below in BELOW:
        least = smallest(model, **below)
        for way in wanted if below is BELOW[0] else FEWER:
            room = {"padded": 2, "beams": 2, "padded beams": 3, "samples": 2}.get(way, 1)
            with paged(model, tmp_path, kv_hbm=least * room, **below) as made:
                found = WAYS[way](model)
                usage = made.memory.usage().cells
            assert torch.equal(found[0], wanted[way][0]), way
            assert way not in ("greedy", "lookup", "assisted") or all(u.nvme_cells + u.ram_cells for u in usage), way


def test_spilled_bfloat16_pages_lose_no_bit(plain: Plain, tmp_path: Path) -> None:
    model, wanted = plain[BF16]
    least = smallest(model, kv_nvme=1 << 21)
    for way in FEWER:
        with paged(model, tmp_path, kv_hbm=least * (3 if "beams" in way else 1), kv_nvme=1 << 21) as made:
            made.memory.scratch = torch.zeros(1 << 20, dtype=torch.uint8)
            found = WAYS[way](model)
            assert "beams" in way or any(u.read_nbytes for u in made.memory.usage().cells)
        assert torch.equal(found[0], wanted[way][0]), way


def test_pages_are_read_group_by_group_where_a_layer_does_not_fit_the_scratch(plain: Plain) -> None:
    model, wanted = plain[torch.float32]
    for way in FEWER:
        with paged(model, kv_hbm=smallest(model) + (1 << 18)) as made:
            made.memory.scratch = made.memory.scratch[: made.memory.kinds[0].cells.page_nbytes * 2]
            found = WAYS[way](model)
        assert torch.equal(found[0], wanted[way][0]), way


def test_a_long_prompt_is_written_in_chunks(tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    one: dict[str, Any] = {"input_ids": prompt(150)}
    rows = left_padded((130, 61, 99))
    wanted = [generated(model, **one), generated(model, **rows)]
    with paged(model, tmp_path, kv_hbm=100_000, kv_nvme=1 << 20) as made:
        assert made.memory.columns_at_once(1) < 60
        found = [generated(model, **one), generated(model, **rows)]
    for (have, _), (want, _) in zip(found, wanted, strict=True):
        assert torch.equal(have, want)


def test_all_logits_of_a_prompt_in_chunks(tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    with torch.no_grad():
        wanted = model(input_ids=prompt(150)).logits
        with paged(model, tmp_path, kv_hbm=100_000, kv_nvme=1 << 20) as made:
            found = model(input_ids=prompt(150), cache=made.cache).logits
    torch.testing.assert_close(found, wanted)


def test_a_prompt_longer_than_all_tiers_is_refused_and_leaves_others_unharmed(tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    budget: dict[str, Any] = {"kv_hbm": smallest(model, kv_nvme=1 << 17), "kv_nvme": 1 << 17}
    with paged(model, tmp_path, **budget) as made, torch.no_grad():
        held = made.memory.plan.tokens
        assert held is not None
        kept = made.cache.another()
        want = model(input_ids=prompt(30), cache=made.cache.another()).logits
        model(input_ids=prompt(29), cache=kept)
        before = made.memory.usage().pages
        with pytest.raises(CapacityError, match="longer than all KV tiers together"):
            generated(model, input_ids=prompt(held + 1))
        with pytest.raises(CapacityError, match="more pages"):
            generated(model, input_ids=prompt(held - 40), new=60)
        made.cache.reset()
        assert made.memory.usage().pages[0].held_pages == before[0].held_pages
        last = model(input_ids=prompt(30)[:, 29:], cache=kept).logits
        torch.testing.assert_close(last[:, -1], want[:, -1])


def test_more_rows_than_pages_can_be_open_is_an_error_by_name() -> None:
    model = decoder("LlamaForCausalLM")
    with paged(model, kv_hbm=smallest(model)), pytest.raises(CapacityError):
        generated(model, input_ids=prompt(9, rows=40))
