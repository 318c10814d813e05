"""Whoever raises ``kv_hbm`` to what an error says gets no other error: the cache opens, and the model generates."""

from __future__ import annotations

import re
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.hf.paged import decoder, generated, paged, prompt, smallest
from tierstore.errors import CapacityError

KIB = 1 << 10
BELOW: dict[str, dict[str, Any]] = {
    "nothing": {},
    "ram": {"kv_ram": 64 * KIB},
    "disk": {"kv_nvme": 512 * KIB},
    "both": {"kv_ram": 24 * KIB, "kv_nvme": 128 * KIB},
}


@lru_cache
def model_of(name: str) -> Any:
    return decoder(name)


@pytest.fixture(autouse=True)
def _forget() -> Any:
    yield
    model_of.cache_clear()


def named(error: CapacityError) -> int:
    """The last number of bytes that the error tells."""
    return int(re.findall(r"raise Budget\.kv_hbm to (\d+) bytes for", str(error))[-1])


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["LlamaForCausalLM", "MistralForCausalLM", "Gemma2ForCausalLM"]),
    form=st.sampled_from([None, "int8", "int4"]),
    below=st.sampled_from(sorted(BELOW)),
    rows=st.integers(1, 5),
    length=st.sampled_from([1, 20, 60, 200]),
    new=st.integers(1, 12),
    beams=st.sampled_from([1, 1, 2]),
)
@example(name="Gemma2ForCausalLM", form="int4", below="disk", rows=1, length=200, new=3, beams=1)
@example(name="LlamaForCausalLM", form=None, below="nothing", rows=5, length=20, new=12, beams=2)
def test_the_number_of_an_error_is_enough(
    name: str, form: str | None, below: str, rows: int, length: int, new: int, beams: int
) -> None:
    model, tiers = model_of(name), BELOW[below]
    ids = prompt(length, rows)

    def generate(kv_hbm: int) -> Any:
        with tempfile.TemporaryDirectory() as folder, paged(model, Path(folder), format=form, kv_hbm=kv_hbm, **tiers):
            return generated(model, new, input_ids=ids, num_beams=beams)[0]

    kv_hbm = smallest(model, form, **tiers)
    try:
        generate(kv_hbm)
        return
    except CapacityError as error:
        enough = named(error)
    assert enough > kv_hbm
    generate(enough)


@pytest.mark.parametrize("form", [None, "int8", "int4"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM"])
def test_the_smallest_budget_is_enough_for_one_sequence_of_any_length_that_fits(
    name: str, form: str | None, tmp_path: Path
) -> None:
    """Its prompt goes in chunks, beside the recent pages that the chunks before have left open."""
    model = model_of(name)
    tiers: dict[str, Any] = {"kv_nvme": 4 << 20}
    with paged(model, tmp_path, format=form, kv_hbm=smallest(model, form, **tiers), **tiers) as kv:
        bound = kv.memory.plan.tokens
        assert bound is None or bound > 400
        generated(model, 5, input_ids=prompt(390))


def test_what_other_caches_hold_counts() -> None:
    model, ids = model_of("LlamaForCausalLM"), prompt(100)

    def both(kv_hbm: int) -> None:
        with paged(model, kv_hbm=kv_hbm) as kv:
            other = kv.cache.another()
            with torch.no_grad():
                model(input_ids=prompt(40, seed=1), past_key_values=other, use_cache=True)
            generated(model, 4, input_ids=ids)

    with paged(model, kv_hbm=1 << 18) as kv:
        page = kv.memory.plan.kinds[0].kind.page_nbytes
    kv_hbm = smallest(model) + 14 * page  # pages for one of the two
    with pytest.raises(CapacityError) as full:
        both(kv_hbm)
    both(named(full.value))


@pytest.mark.parametrize("form", [None, "int8"])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_input_that_cannot_go_in_chunks_has_all_its_pages_open(form: str | None, rows: int, tmp_path: Path) -> None:
    model, tiers = model_of("MistralForCausalLM"), BELOW["disk"]

    def generate(kv_hbm: int) -> None:
        with paged(model, tmp_path, format=form, kv_hbm=kv_hbm, **tiers):
            generated(model, 3, input_ids=prompt(150, rows), output_hidden_states=True)

    with pytest.raises(CapacityError, match="output_hidden_states") as refused:
        generate(smallest(model, form, **tiers))
    generate(named(refused.value))
