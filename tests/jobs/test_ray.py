"""A job on a Ray cluster says what one in this process says, each text once, whoever is killed meanwhile."""

from __future__ import annotations

import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.jobs.small import FAILED, ROWS, TEXTS, settings_of, texts_of, write_prompts
from tierstore.budget import Budget
from tierstore.errors import PlanError
from tierstore.jobs import JobInterrupted, JobProgress, run

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(300)  # every worker imports torch and transformers, beside other tests


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of this machine, for two workers of a CPU each."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # sockets are in it, whose names must be short
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                context = ray.init(
                    "local",
                    num_cpus=2,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=100 << 20,
                    _temp_dir=folder,
                )
        except Exception as error:  # where shared memory is small, ports are closed, or it takes too long
            pytest.skip(f"Ray does not start here: {error}")
        yield context.address_info["address"]
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[str, int]]:
    """What a job in this process says."""
    folder = tmp_path_factory.mktemp("alone")
    run(write_prompts(folder), folder / "results", settings_of(tiny_checkpoint))
    return texts_of(folder / "results")


def workers() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if " ".join(process.cmdline()).startswith("ray::MapWorker")]


def test_an_error_of_a_worker_is_raised_here(cluster: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    prompts, results = write_prompts(tmp_path), tmp_path / "results"
    settings = settings_of(tiny_checkpoint, budget=Budget(hbm="1MiB"), tokens=None)
    with pytest.raises(PlanError, match=r"raise Budget\.hbm to") as told:
        run(prompts, results, settings, engine="ray", workers=1)
    assert told.value.needed > 1 << 20
    assert not results.exists()


def test_a_job_goes_on_whoever_was_stopped_or_killed(
    cluster: str, alone: dict[tuple[str, int], tuple[str, int]], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """First on Ray and in this process, then a driver that kills itself, then two workers of which one is killed."""
    prompts, results, settings = write_prompts(tmp_path), tmp_path / "results", settings_of(tiny_checkpoint)

    def stop_at_once(now: JobProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(JobInterrupted, match=f"1 of {len(ROWS)} rows"):  # the one that no worker is needed for
        run(prompts, results, settings, engine="ray", workers=1, progress=stop_at_once)

    def stop(now: JobProgress) -> None:
        if now.done_rows > now.failed_rows:
            raise KeyboardInterrupt

    with pytest.raises(JobInterrupted):
        run(prompts, results, settings, progress=stop)
    first = texts_of(results)
    program = Path(__file__).with_name("ray_killed.py")
    ended = subprocess.run([sys.executable, program, cluster, prompts, results, tiny_checkpoint], check=False)
    assert ended.returncode == -signal.SIGKILL
    second = texts_of(results)
    assert 0 < len(first) < len(second) < TEXTS

    killed: list[int] = []

    def kill(now: JobProgress) -> None:
        if not killed and now.generated_tokens:
            assert now.done_rows < len(ROWS)
            worker = workers()[0]
            killed.append(worker.pid)
            worker.kill()

    report = run(prompts, results, settings, engine="ray", workers=2, progress=kill)
    assert killed
    assert texts_of(results) == alone
    assert (report.done_rows, report.failed_rows) == (len(ROWS), FAILED)
    assert len((tmp_path / "results.errors").read_text().splitlines()) == FAILED
    assert report.notes == ("2 workers on Ray, each with 1 CPU",)
    assert report.generated_tokens > 0
