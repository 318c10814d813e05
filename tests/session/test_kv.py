"""A session with a KV cache in pages: the plain model's tokens from any tier, and the module as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tierstore
from tierstore import Budget, errors
from tierstore.backends import Backend

PROMPT = torch.arange(2 * 70).reshape(2, 70) * 7 % 511 + 1
MASK = torch.ones_like(PROMPT)
LAYERS = 6
PAGE_NBYTES = LAYERS * 64 * 2 * 2 * 32 * 4  # 64 tokens, keys and values, 2 heads of 32 in float32
KV_TIERS: list[dict[str, int]] = [
    {"kv_hbm": 40 * PAGE_NBYTES},
    {"kv_hbm": 12 * PAGE_NBYTES, "kv_ram": 40 * PAGE_NBYTES},
    {"kv_hbm": 12 * PAGE_NBYTES, "kv_ram": 2 * PAGE_NBYTES, "kv_nvme": 40 * PAGE_NBYTES},
]


@pytest.fixture(scope="module")
def plain(checkpoint: Path) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    return model.eval()


def generate(model: Any, **options: Any) -> torch.Tensor:
    found: torch.Tensor = model.generate(PROMPT, attention_mask=MASK, max_new_tokens=6, do_sample=False, **options)
    return found


@pytest.fixture(scope="module")
def greedy(plain: Any) -> torch.Tensor:
    return generate(plain)


@pytest.mark.parametrize("kv", KV_TIERS, ids=["hbm", "ram", "nvme"])
def test_loaded_model_generates_the_plain_models_tokens(
    checkpoint: Path,
    greedy: torch.Tensor,
    make_backend: Callable[[], Backend],
    tmp_path: Path,
    kv: dict[str, int],
) -> None:
    budget = Budget("6MiB", "8MiB", **kv)
    opened = tierstore.load(checkpoint, budget, dtype=torch.float32, store=tmp_path, backend=make_backend())
    with opened as session:
        assert torch.equal(generate(session.module).cpu(), greedy)
        assert session.kv.get_seq_length() == greedy.shape[1] - 1
        report = session.report()
        assert report.kv is not None
        assert report.kv.held_pages == 4
        assert "kv: 4 pages held" in str(report)
        assert json.loads(report.to_json())["kv"]["tokens"] == 2 * (greedy.shape[1] - 1)
    assert session.report().kv is not None


def test_offloaded_model_generates_the_plain_models_tokens(plain: Any, greedy: torch.Tensor, tmp_path: Path) -> None:
    before = dict(plain.__dict__)
    budget = Budget("2MiB", "2MiB", **KV_TIERS[2])
    with tierstore.offload(plain, budget, store=tmp_path, device="cpu") as session:
        assert torch.equal(generate(session.module), greedy)
        assert torch.equal(generate(session.module, num_beams=3), generate(session.module, num_beams=3))
    assert {name: plain.__dict__.get(name) for name in before} == before
    assert plain.__dict__.keys() == before.keys()
    assert torch.equal(generate(plain), greedy)
    assert list(tmp_path.rglob("*.pages")) == []


def test_a_session_without_kv_says_how_to_have_one(checkpoint: Path) -> None:
    with tierstore.load(checkpoint, Budget("8MiB"), device="cpu") as session:
        assert session.report().kv is None
        with pytest.raises(errors.BudgetError, match="kv_hbm"):
            _ = session.kv


def test_what_cannot_be_is_refused_and_leaves_the_module_as_it_was(plain: Any, checkpoint: Path) -> None:
    before = dict(plain.__dict__)
    with pytest.raises(errors.BudgetError, match="kv_format"):
        tierstore.load(checkpoint, Budget("8MiB"), device="cpu", kv_format="int8")
    with pytest.raises(errors.TierstoreError, match="int9"):
        tierstore.offload(plain, Budget("8MiB", kv_hbm="1MiB"), device="cpu", kv_format="int9")
    with pytest.raises(errors.PlanError) as refused:
        tierstore.offload(plain, Budget("8MiB", kv_hbm="10KiB"), device="cpu")
    with pytest.raises(errors.BudgetError, match="store"):
        tierstore.offload(plain, Budget("8MiB", kv_hbm="4MiB", kv_nvme="4MiB"), device="cpu")
    with pytest.raises(errors.ModuleError):
        tierstore.offload(torch.nn.Linear(4, 4), Budget("8MiB", kv_hbm="4MiB"), device="cpu")
    with pytest.raises(errors.BudgetError, match="KV cache"):
        tierstore.load(checkpoint, Budget("8MiB", kv_hbm="900TiB"), device="cpu")
    assert plain.__dict__ == before
    with tierstore.offload(plain, Budget("8MiB", kv_hbm=refused.value.needed), device="cpu") as session:
        model: Any = session.module
        model.generate(PROMPT[:1], attention_mask=MASK[:1], max_new_tokens=6, do_sample=False)


def test_activations_are_bounded_with_the_same_tokens(checkpoint: Path, greedy: torch.Tensor) -> None:
    budget = Budget("6MiB", activations="700KiB")
    with tierstore.load(checkpoint, budget, dtype=torch.float32, device="cpu") as session:
        assert torch.equal(generate(session.module), greedy)
        assert session.report().passes > 6  # the prompt took several


@pytest.mark.parametrize("waiting", ["keep", "offload"])
def test_a_long_input_takes_one_pass_over_the_weights(
    checkpoint: Path, greedy: torch.Tensor, make_backend: Callable[[], Backend], waiting: str
) -> None:
    budget = Budget("6MiB", "8MiB", activations="700KiB")
    opened = tierstore.load(checkpoint, budget, dtype=torch.float32, hidden_states=waiting, backend=make_backend())
    with opened as session:
        assert torch.equal(generate(session.module).cpu(), greedy)
        assert session.report().passes == 6


def test_hidden_states_are_refused_where_they_cannot_be(checkpoint: Path, plain: Any) -> None:
    def refused(match: str, budget: Budget, hidden_states: str) -> None:
        with pytest.raises(errors.BudgetError, match=match):
            tierstore.load(checkpoint, budget, device="cpu", hidden_states=hidden_states)

    refused("'keep', 'offload' or 'recompute'", Budget("8MiB"), "forget")
    refused("activations", Budget("8MiB"), "keep")
    refused("kv_hbm", Budget("8MiB", kv_hbm="4MiB", activations="4MiB"), "offload")


def test_gradients_are_those_of_the_plain_module(plain: Any) -> None:
    plain(PROMPT, labels=PROMPT).loss.backward()
    expected = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    with tierstore.offload(plain, Budget("8MiB"), hidden_states="recompute", device="cpu") as session:
        session.module(PROMPT, labels=PROMPT, use_cache=False).loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(plain.parameters(), expected, strict=True))
    plain.zero_grad()
