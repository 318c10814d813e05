"""A job on a device of its own: hidden states of micro-batches that wait go to host memory, and texts are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM

from tests.jobs.made import write_rows
from tests.jobs.small import settings_of, texts_of
from tierstore.backends import Backend
from tierstore.batch_plan import BatchCosts
from tierstore.budget import Budget
from tierstore.jobs import JobInterrupted, JobProgress, run
from tierstore.jobs.hidden_states import WIDTHS, StatesRoom, room_for_states
from tierstore.sampling import Sampling
from tierstore.testing.adversary import adversary
from tierstore.waiting_plan import SHARE

TIGHT: dict[str, Any] = {
    "tokens": 8,
    "budget": Budget(hbm="2MiB", ram="16MiB", kv_hbm="5MiB"),
    "defaults": Sampling(max_new_tokens=2),
    "speculate": "off",
}
ROWS = [{"prompt": f"{n} {'Say it. ' * (n % 5)}", "max_new_tokens": 1 + n % 3} for n in range(9)]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adversary in place of the CPU. Weights seem to take so long that a pass should have many micro-batches."""
    adverse = adversary(1)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    monkeypatch.setattr("tierstore.loading.backend_for", lambda device: backend)
    monkeypatch.setattr("tierstore.jobs.models.probe", lambda *given, **_: BatchCosts({given[2][0]: 1e-3}, 1e3))
    yield
    adverse.engine.check()


def test_texts_are_the_same(tiny_checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Also those of a job that was stopped on the way."""
    prompts, settings = write_rows(tmp_path / "prompts.jsonl", ROWS), settings_of(tiny_checkpoint, **TIGHT)
    plain = run(prompts, tmp_path / "plain", settings)
    assert plain.session is not None
    assert plain.session.waiting is None  # it computes where they would wait
    assert "hidden states" not in "\n".join(plain.notes)
    request.getfixturevalue("device")

    def stop(now: JobProgress) -> None:
        if now.done_rows:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted) as stopped:
        run(prompts, tmp_path / "moved", settings, progress=stop)
    assert 0 < stopped.value.report.done_rows < len(ROWS)
    for report in (stopped.value.report, run(prompts, tmp_path / "moved", settings)):
        assert "of ram: the device has room for 4" in "\n".join(report.notes)
        assert report.session is not None
        waiting = report.session.waiting
        assert waiting is not None
        assert 0 < waiting.peak_nbytes <= waiting.host_nbytes <= (16 << 20) // SHARE
        assert waiting.moved_nbytes > waiting.host_nbytes
    assert texts_of(tmp_path / "moved") == texts_of(tmp_path / "plain")


def test_texts_by_themselves(tiny_checkpoint: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A model with a recurrent state, each of whose calls is a micro-batch."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_checkpoint)
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    ids = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=64, state_size=8, num_hidden_layers=2, **ids)
    MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{'Say it again. ' * n}", "max_new_tokens": 2 + n} for n in range(1, 9)]
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    settings = settings_of(tmp_path / "model", budget=Budget("384KiB", "64MiB"), tokens=16)
    report = run(prompts, tmp_path / "plain", settings)
    request.getfixturevalue("device")
    report = run(prompts, tmp_path / "moved", settings)
    assert report.session is not None
    assert report.session.waiting is not None
    assert report.session.waiting.moved_nbytes > 0
    assert "of ram: the device has room for 4" in "\n".join(report.notes)
    assert texts_of(tmp_path / "moved") == texts_of(tmp_path / "plain")


def test_room_is_for_jobs_that_can_use_it() -> None:
    given: dict[str, Any] = {"weights": [1 << 29, 1 << 28, 1 << 28], "tokens": 10_000.5, "token_nbytes": 8192}
    whole = 10_001 * 8192 * WIDTHS
    assert room_for_states(1 << 20, 1 << 40, **given) == StatesRoom((1 << 20) // SHARE, whole)
    assert room_for_states(1 << 20, 1 << 34, **given) == StatesRoom((1 << 20) // SHARE, (1 << 34) // SHARE)
    assert room_for_states(SHARE * whole, 1 << 40, **given) == StatesRoom(whole, 0)
    assert room_for_states(1 << 20, 1 << 40, **given | {"weights": [1 << 18] * 2}).host_nbytes == 0
    for ram, host_nbytes in ((0, 0), (1 << 30, 0), ((1 << 30) + 99, 99)):  # what the largest tensor passes through
        assert room_for_states(1 << 20, ram, **given).host_nbytes == host_nbytes
