"""Drafts change no text, whoever suggests them: those of a model like the large one are all right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from tests.jobs.made import write_rows
from tests.jobs.small import settings_of, texts_of
from tests.jobs.toy import END, VOCABULARY, ToyModel, ToyTokenizer
from tierstore.batch_schedule import Limits
from tierstore.budget import Budget
from tierstore.drafting import BY_MODEL, DraftLength, PassCost
from tierstore.errors import BudgetError, CheckpointError, ModuleError, PlanError
from tierstore.hf.batch.draft import DraftModel
from tierstore.hf.batch.slices import Slice
from tierstore.jobs import JobReport, run
from tierstore.jobs.drafts import Drafting, ModelDrafter
from tierstore.jobs.encoding import Encoder
from tierstore.jobs.engine import Engine
from tierstore.jobs.rows import Row
from tierstore.jobs.samples import Failed, Finished
from tierstore.packing import pack
from tierstore.sampling import Sampling

ENCODER = Encoder(ToyTokenizer(), VOCABULARY, chat=False)


class OtherModel(ToyModel):
    """Agrees with the toy model as often as not."""

    def step(self, slices: Sequence[Slice]) -> list[Tensor]:
        logits = super().step(slices)
        return [
            rows.roll(1, -1) if self.length(each.sequence) % 2 else rows
            for each, rows in zip(slices, logits, strict=True)
        ]


def drafting_by(draft: ToyModel, *, cost: PassCost, sequences: int = 4, tokens: int = 60) -> Drafting:
    return Drafting(
        cost, model=ModelDrafter(DraftModel(draft, sequences=sequences, tokens=tokens, vocabulary=VOCABULARY))
    )


CHEAP = PassCost(8, 4, compute_seconds=1.0, transfer_seconds=9.0)


def engine_of(drafting: Drafting | None, *, sequences: int = 5) -> Engine:
    model = ToyModel()
    room = model.capacity
    limits = Limits(model.tokens, 4, sequences, room.page_tokens, room.pages, room.open_pages)
    return Engine(model, ENCODER, limits=limits, ends=[END], positions=None, seed=7, drafting=drafting)


def answers_of(engine: Engine, rows: Iterable[Row]) -> list[Finished | Failed]:
    found = [each for some in engine.answer(rows) for each in some]
    return sorted(found, key=lambda each: (each.row.line, getattr(each, "index", 0)))


def row_of(line: int, prompt: str, **given: Any) -> Row:
    return Row(line, f"r{line}", prompt, None, Sampling(**given))


row_settings = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(1, 20),
        "temperature": st.sampled_from([0.0, 0.7]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "stop": st.sampled_from([(), ("a",), ("ab", "é")]),
        "n": st.sampled_from([1, 1, 3]),
        "ignore_eos": st.booleans(),
    }
)


@given(
    asked=st.lists(st.tuples(st.text("abc", min_size=1, max_size=30), row_settings), min_size=1, max_size=8),
    same=st.booleans(),
    sequences=st.integers(1, 6),
    followed=st.integers(1, 6),
)
@settings(max_examples=30, deadline=None)
def test_texts_are_the_same(asked: list[tuple[str, dict[str, Any]]], same: bool, sequences: int, followed: int) -> None:
    rows = [row_of(n, prompt, **given) for n, (prompt, given) in enumerate(asked, 1)]
    draft = ToyModel() if same else OtherModel()
    engine = engine_of(drafting_by(draft, cost=CHEAP, sequences=followed), sequences=sequences)
    assert answers_of(engine, rows) == answers_of(engine_of(None), rows)
    assert draft.sequences == {}, "all were forgotten"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_same_model_is_always_right(temperature: float) -> None:
    rows = [row_of(n, "abc" * n, max_new_tokens=40, temperature=temperature, ignore_eos=True, n=2) for n in (1, 2)]
    draft = ToyModel()
    engine = engine_of(drafting_by(draft, cost=CHEAP))
    answers_of(engine, rows)
    counts = engine.counts
    assert counts.accepted_tokens == counts.drafted_tokens > 100
    assert counts.passes < 25
    assert draft.calls < 8 + counts.drafted_tokens, "texts share steps"


def test_where_passes_are_full_no_model_drafts() -> None:
    """Sixteen sequences fill two micro-batches, a third one costs more than it gives: only beside prompts is room."""
    rows = [row_of(n, "abc", max_new_tokens=30, temperature=1.0, ignore_eos=True) for n in range(16)]
    draft = OtherModel()
    engine = engine_of(drafting_by(draft, cost=PassCost(8, 4, 1.0, 0.1), sequences=16), sequences=16)
    answers_of(engine, rows)
    assert draft.calls <= 10
    assert engine.counts.passes >= 30


# ---- real checkpoints


ROWS: list[Any] = [
    *({"id": n, "prompt": f"Say {n} and no more.", "max_new_tokens": 9 + 3 * n} for n in range(3)),
    {"id": "sampled", "prompt": "Tell me more.", "n": 2, "temperature": 0.7, "seed": 7, "max_new_tokens": 20},
    {"id": "stop", "prompt": "Tell me more.", "temperature": 1.0, "stop": ["a", "e"], "max_new_tokens": 20},
    {"id": "chat", "messages": [{"role": "user", "content": "Why?"}], "max_new_tokens": 12},
]
MODEL = Budget(hbm="8MiB", kv_hbm="4MiB")


@pytest.fixture
def drafts_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass takes so long that drafts are worth it, however slow this machine is just now."""
    monkeypatch.setattr(Drafting, "_now", lambda self: PassCost(32, 1, compute_seconds=1e6, transfer_seconds=0.0))


@pytest.fixture(scope="module")
def other(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smaller model of the same family."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def job(folder: Path, model: Path, **change: Any) -> tuple[JobReport, dict[tuple[str, int], tuple[str, int]]]:
    """What a job with ``change`` says, and how it went."""
    results = folder / f"results {len(list(folder.iterdir()))}"
    given = {"budget": MODEL, "sequences": 3, **change}
    report = run(write_rows(folder / "prompts", ROWS), results, settings_of(model, **given))
    return report, texts_of(results)


@pytest.mark.usefixtures("drafts_pay")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts_of_a_job_are_the_same(
    tiny_checkpoint: Path, other: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, right = 0, 0

    def observe(length: DraftLength, sequence: int, kind: int, drafted: int, accepted: int) -> None:
        nonlocal tried, right
        if kind == BY_MODEL:
            tried, right = tried + drafted, right + accepted

    monkeypatch.setattr(DraftLength, "observe", observe)
    store = {"dtype": dtype, "store": tmp_path / "store"}
    _, texts = job(tmp_path, tiny_checkpoint, speculate="off", **store)
    budget = Budget(hbm="24MiB", kv_hbm="4MiB")
    report, drafted = job(tmp_path, tiny_checkpoint, draft=tiny_checkpoint, budget=budget, **store)
    assert drafted == texts
    assert right >= 0.95 * tried > 30, "their numbers differ in the last bits at most"
    assert report.session is not None
    assert report.session.bytes_moved > 0 or dtype == "bfloat16", "it streams beside the one that drafts"
    assert any("a draft model takes" in note for note in report.notes)
    _, drafted = job(tmp_path, tiny_checkpoint, draft=other, **store)
    assert drafted == texts


@pytest.mark.usefixtures("drafts_pay")
def test_a_packed_store_drafts_for_its_original(tiny_checkpoint: Path, tmp_path: Path) -> None:
    pack(tiny_checkpoint, tmp_path / "packed", format="int8")
    _, texts = job(tmp_path, tiny_checkpoint, speculate="off")
    report, drafted = job(
        tmp_path, tiny_checkpoint, draft=tmp_path / "packed", budget=Budget(hbm="12MiB", kv_hbm="4MiB")
    )
    assert drafted == texts
    assert report.accepted_tokens > 0


def test_memory_that_a_draft_model_needs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="the draft model needs") as small:
        job(tmp_path, tiny_checkpoint, draft=tiny_checkpoint)
    with pytest.raises(PlanError, match="beside the draft model's") as more:
        job(tmp_path, tiny_checkpoint, draft=tiny_checkpoint, budget=Budget(small.value.needed + 1, kv_hbm="4MiB"))
    report, _ = job(tmp_path, tiny_checkpoint, draft=tiny_checkpoint, budget=Budget(more.value.needed, kv_hbm="4MiB"))
    assert report.done_rows == len(ROWS)


def test_models_that_cannot_draft(tiny_checkpoint: Path, other: Path, tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="leave one of the two out"):
        settings_of(tiny_checkpoint, draft=other, speculate="lookup")
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1))
    mamba.save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    with pytest.raises(ModuleError, match="cannot draft"):
        job(tmp_path, tiny_checkpoint, draft=tmp_path / "mamba")
    with pytest.raises(ModuleError, match="a draft model cannot be used"):
        job(tmp_path, tmp_path / "mamba", draft=other, budget=Budget(hbm="8MiB"))
    tokenizer.add_tokens(["another"])
    LlamaForCausalLM.from_pretrained(other).save_pretrained(tmp_path / "family")
    tokenizer.save_pretrained(tmp_path / "family")
    with pytest.raises(CheckpointError, match="has other tokens"):
        job(tmp_path, tiny_checkpoint, draft=tmp_path / "family")
