"""The benches run, and what they make and say holds together. Their figures are for ``docs/performance.md``."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
Smoke = Callable[..., str]
SHAPE = ["--hidden=64", "--layers=3", "--ffn=96", "--heads=4", "--kv-heads=2", "--vocab=128"]


def run(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


@pytest.fixture
def smoke(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Smoke]:
    """Runs a bench on tiny sizes, here, where torch is imported already: what it printed, if it ended well."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def smoke(bench: str, *arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", [bench, "--smoke", "--threads=1", *map(str, arguments)])
        status = import_module(bench).main()
        said = capsys.readouterr()
        assert not status, said.out + said.err
        return said.out

    at_term = signal.getsignal(signal.SIGTERM)
    yield smoke
    signal.signal(signal.SIGTERM, at_term)


def make(folder: Path, *arguments: str) -> dict[str, bytes]:
    """The files of a checkpoint made anew."""
    done = run("make_checkpoint.py", folder, *SHAPE, *arguments)
    assert done.returncode == 0, done.stderr
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_smoke_run_measures_everything(tmp_path: Path, smoke: Smoke) -> None:
    printed = smoke("bench_streaming", "--out", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text() == printed
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    assert "decode: wall per token" in table
    said: dict[str, Any] = json.loads(line)
    exact = [what for what, met in said["goals"].items() if "equal" in what and met]
    assert len(exact) == 3, said["goals"]
    assert said["goals"]["bytes written"]
    decode = said["figures"]["tierstore_decode"]
    assert 0 < decode["streamed_nbytes"] < said["checkpoint_nbytes"]
    assert decode["report"]["peak_bytes"]["hbm"] <= said["hbm_nbytes"]
    assert said["figures"]["accelerate_decode"]["modules_on_disk"] > 0


def test_smoke_run_of_packed_models(tmp_path: Path, smoke: Smoke) -> None:
    printed = smoke("bench_packed", "--formats", "int4", "--out", tmp_path / "out.txt")
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    assert "int4: times faster" in table
    figures: dict[str, Any] = json.loads(line)["figures"]
    unpacked, packed = figures["decode unpacked"][0], figures["decode int4"][0]
    assert 0 < packed["streamed_nbytes"] < unpacked["streamed_nbytes"]
    assert figures["int4, all in memory"][0]["streamed_nbytes"] == 0
    assert not list(tmp_path.glob("tierstore-bench-*"))


def test_lossless_codecs_give_the_weights_back() -> None:
    done = run("bench_lossless.py", "--chunks=1", "--threads=1")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"0\.\d{3} of the bytes", done.stdout)) == 4


def test_smoke_run_of_accuracy(tmp_path: Path, smoke: Smoke) -> None:
    out = tmp_path / "out.txt"
    printed = smoke("bench_quantization", "--formats", "int8", "int4", "--out", out)
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    assert out.read_text() == printed
    said: dict[str, Any] = json.loads(line)
    figures = said["figures"]
    assert list(figures) == [row.split("  ")[0] for row in table.splitlines()[2 : 2 + len(figures)]]
    kl = {name: found["topics_kl"] for name, found in figures.items()}
    assert 0 < kl["int8"] < kl["int4 on docstrings"] < kl["int4"] < 0.01
    assert {name: kl[name + ", input rounded"] for name in kl if name + ", input rounded" in kl} == {
        name: pytest.approx(kl[name], rel=0.2) for name in ("int8", "int4", "int4 on docstrings")
    }
    assert kl["int4, input rounded"] != kl["int4"]
    assert figures["int4"]["bits"] == pytest.approx(4.5)
    assert said["goals"]["int4: relative error on normal weights"]


def test_smoke_run_of_activations(tmp_path: Path, smoke: Smoke) -> None:
    out = tmp_path / "out.txt"
    printed = smoke("bench_activations", "--bound=2MiB", "--out", out)
    assert out.read_text() == printed
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    said: dict[str, Any] = json.loads(line)
    peaks = {way: [one["peak_nbytes"] for one in found.values()] for way, found in said["figures"].items()}
    assert len(peaks) == 3
    short, longer, longest = peaks["whole"]
    assert longest == pytest.approx(2 * longer, rel=0.01) == pytest.approx(4 * short, rel=0.01)
    assert all(f"{way}: peak at 2048 tokens" in table for way in peaks)
    exact = [met for what, met in said["goals"].items() if "token equal" in what]
    assert exact == [True, True]
    assert all(met for what, met in said["goals"].items() if "highest peak" in what)


def test_smoke_run_of_batches(tmp_path: Path, smoke: Smoke) -> None:
    printed = smoke("bench_batch", "--out", tmp_path / "out.txt")
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    said: dict[str, Any] = json.loads(line)
    assert "Accelerate disk offload, batch of 2" in table
    assert said["goals"]["drafts auto: texts equal"]
    batch = said["figures"]["batch of 2"]
    assert batch["streamed_nbytes"] > 0
    _, tokens, finished = batch["moments"][-1]
    assert (tokens, finished) == (16, 2)
    assert said["figures"]["everything in memory"]["streamed_nbytes"] == 0


def test_smoke_run_of_kills(tmp_path: Path, smoke: Smoke) -> None:
    printed = smoke("bench_kills", "--folder", tmp_path)
    said: dict[str, Any] = json.loads(printed.splitlines()[-1])
    assert len(said["moments"]) == 1
    assert said["goals"]["job 0: lost, twice, with another text"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_checkpoint_is_what_transformers_reads(tmp_path: Path, dtype: str) -> None:
    from transformers import AutoModelForCausalLM

    files = make(tmp_path, f"--dtype={dtype}", "--shard-nbytes=60000")
    assert sum(name.endswith(".safetensors") for name in files) > 2
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == getattr(torch, dtype)
    weights = dict(model.named_parameters())
    assert torch.equal(weights["model.norm.weight"], torch.ones(64, dtype=model.dtype))
    others = torch.cat([w.flatten().float() for w in weights.values() if w.dim() == 2])
    assert abs(others.mean().item()) < 1e-3
    assert others.std().item() == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        assert model(input_ids=torch.arange(9)[None]).logits.isfinite().all()


def test_checkpoint_is_the_same_each_time_and_kept(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    assert make(tmp_path / "b") == first
    assert make(tmp_path / "c", "--seed=1") != first
    before = (tmp_path / "a" / "config.json").stat().st_mtime_ns
    assert make(tmp_path / "a") == first
    assert (tmp_path / "a" / "config.json").stat().st_mtime_ns == before
    changed = make(tmp_path / "a", "--shard-nbytes=30000")
    assert changed.keys() > first.keys() - {"model-00001-of-00001.safetensors"}
    assert "model-00001-of-00001.safetensors" not in changed


@pytest.mark.parametrize(
    ("script", "arguments", "complaint"),
    [
        ("make_checkpoint.py", ["--heads=5"], "heads must divide"),
        ("make_checkpoint.py", ["--layers=0"], "at least 1"),
        ("bench_streaming.py", ["--cap=4XB"], "write a number and a unit"),
    ],
)
def test_what_makes_no_sense_is_refused(tmp_path: Path, script: str, arguments: list[str], complaint: str) -> None:
    done = run(script, *([tmp_path / "x"] if script == "make_checkpoint.py" else []), *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert not (tmp_path / "x").exists()


def test_without_memory_cgroups_a_cap_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmark.cap import CapError, Hierarchy, MemoryCap

    with pytest.raises(CapError, match="--no-cap"):
        Hierarchy.found(tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpu memory\n")
    found = Hierarchy.found(tmp_path)
    assert found.limit == "memory.max"
    (tmp_path / f"tierstore-bench-{os.getpid()}").write_text("in the way")
    with pytest.raises(CapError, match=r"root.*--no-cap"), MemoryCap(1 << 30, found):
        pass


def test_smoke_run_of_kv(tmp_path: Path, smoke: Smoke) -> None:
    printed = smoke("bench_kv", "--folder", tmp_path, "--out", tmp_path / "out.txt")
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    assert "wall / max(compute, transfer)" in table
    figures: dict[str, Any] = json.loads(line)["figures"]
    assert figures["kv"]["nvme_nbytes"] > 0.8 * figures["full_pages_nbytes"]
    assert figures["read_nbytes_per_token"] > 0.8 * figures["full_pages_nbytes"]
    assert figures["held_pages"]["4"] < 2 * figures["held_pages"]["1"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_smoke_run_of_kv_accuracy(tmp_path: Path, smoke: Smoke) -> None:
    out = tmp_path / "out.txt"
    printed = smoke("bench_kv_accuracy", "--formats", "plain", "int8", "int4", "--out", out)
    table, _, line = printed.rstrip("\n").rpartition("\n\n")
    assert out.read_text() == printed
    assert "int4: mean KL" in table
    figures: dict[str, Any] = json.loads(line)["figures"]
    assert figures["plain"]["kl"] == 0
    assert 0 < figures["int8"]["kl"] < figures["int4"]["kl"] < 1e-4
    assert figures["int8"]["unpacked_bytes_per_second"] > 0
