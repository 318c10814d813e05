"""A job on a device of its own: hidden states of micro-batches that wait go to host memory, and texts are the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs.small import settings_of, texts_of, write_prompts
from tierstore.backends import Backend
from tierstore.batch_plan import BatchCosts
from tierstore.budget import Budget
from tierstore.jobs import JobInterrupted, JobProgress, JobReport, run
from tierstore.jobs.hidden_states import WIDTHS, StatesRoom, room_for_states
from tierstore.testing.adversary import adversary
from tierstore.waiting_plan import SHARE

TIGHT: dict[str, Any] = {"tokens": 8, "budget": Budget(hbm="2MiB", ram="16MiB", kv_hbm="5MiB")}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An adversary in place of the CPU. Weights seem to take so long that a pass should have many micro-batches."""
    adverse = adversary(1)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    monkeypatch.setattr("tierstore.loading.backend_for", lambda device: backend)
    monkeypatch.setattr("tierstore.jobs.models.probe", lambda *_, **__: BatchCosts({8: 1e-3}, 1.0))
    yield
    adverse.engine.check()


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[Any, int], tuple[str, int]]:
    """What the job says on a CPU, where hidden states stay."""
    folder = tmp_path_factory.mktemp("alone")
    report = run(write_prompts(folder), folder / "results", settings_of(tiny_checkpoint, **TIGHT))
    assert report.session is not None
    assert report.session.waiting is None
    assert "hidden states" not in "\n".join(report.notes)
    return texts_of(folder / "results")


def test_texts_are_the_same(
    device: None, tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]]
) -> None:
    report = run(write_prompts(tmp_path), tmp_path / "results", settings_of(tiny_checkpoint, **TIGHT))
    assert texts_of(tmp_path / "results") == alone
    assert "of ram: the device has room for 4" in "\n".join(report.notes)
    assert report.session is not None
    waiting = report.session.waiting
    assert waiting is not None
    assert 0 < waiting.peak_nbytes <= waiting.host_nbytes <= (16 << 20) // SHARE
    assert waiting.moved_nbytes > waiting.host_nbytes


def test_stopped_in_the_middle_it_goes_on(
    device: None, tiny_checkpoint: Path, tmp_path: Path, alone: dict[tuple[Any, int], tuple[str, int]]
) -> None:
    prompts, results = write_prompts(tmp_path), tmp_path / "results"

    def stop(now: JobProgress) -> None:
        if now.generated_tokens:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted) as stopped:
        run(prompts, results, settings_of(tiny_checkpoint, **TIGHT), progress=stop)
    report: JobReport = stopped.value.report
    assert report.session is not None
    assert report.session.waiting is not None
    run(prompts, results, settings_of(tiny_checkpoint, **TIGHT))
    assert texts_of(results) == alone


def test_room_is_for_jobs_that_can_use_it() -> None:
    given: dict[str, Any] = {"weights_nbytes": 1 << 30, "tokens": 10_000.5, "token_nbytes": 8192}
    whole = 10_001 * 8192 * WIDTHS
    assert room_for_states(1 << 20, 1 << 40, **given) == StatesRoom((1 << 20) // SHARE, whole)
    assert room_for_states(1 << 20, 1 << 30, **given) == StatesRoom((1 << 20) // SHARE, (1 << 30) // SHARE)
    assert room_for_states(SHARE * whole, 1 << 40, **given) == StatesRoom(whole, 0)
    assert room_for_states(1 << 20, 1 << 40, **given | {"weights_nbytes": 1 << 19}).host_nbytes == 0
    assert room_for_states(1 << 20, 0, **given).host_nbytes == 0
