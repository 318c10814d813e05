"""gpu_check itself: all its parts run, one that fails or hangs harms no other, and its table says what was found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
PARTS = {"environment", "tests", "streaming", "overlap", "kernels", "pages", "disk", "giant", "accelerate"}


def check(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "gpu_check"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, env=environment)


def last_line(done: subprocess.CompletedProcess[str]) -> Any:
    return json.loads(done.stdout.splitlines()[-1])


def test_every_part_runs_on_tiny_sizes(tmp_path: Path) -> None:
    """The same code as with a GPU, on the engine that stands for one: numbers are right, files are written."""
    out = tmp_path / "deep" / "found.json"
    done = check("--smoke", "--device", "cpu", "--out", str(out), "--scratch", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    figures, kept = last_line(done), json.loads(out.read_text())
    assert set(figures["parts"]) == set(kept["parts"]) == PARTS
    assert all(part["seconds"] > 0 and "error" not in part for part in kept["parts"].values())
    assert all(figures["goals"].values())
    assert kept["parts"]["tests"]["skipped"] > 10
    for name in ("streaming", "overlap", "disk"):
        assert kept["parts"][name]["equal"]
    products = kept["parts"]["kernels"]["products"]
    assert len(products) == 12
    assert {product["format"] for product in products} == {"int4", "int8", "int8-row", "fp8", "fp4", "mxfp4"}
    assert kept["parts"]["giant"]["digests"][:3] == kept["parts"]["accelerate"]["digests"][:3]
    table = out.with_suffix(".txt").read_text()
    assert table.strip() in done.stdout
    assert [*tmp_path.iterdir()] == [out.parent]


def test_a_part_that_fails_is_a_row_and_the_others_run(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('this torch is broken')")
    out = tmp_path / "found.json"
    parts = ("environment", "streaming")
    done = check("--smoke", "--device", "cpu", "--out", str(out), "--part", *parts, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    figures = last_line(done)
    assert set(figures["parts"]) == set(parts)
    for name in parts:
        assert "ended with status 1" in figures["parts"][name]["error"]
        assert f"{name}: FAILED" in done.stdout
        assert not figures["goals"][f"{name}: FAILED"]
    assert "this torch is broken" in done.stdout
    assert out.with_suffix(".txt").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(("--device", "cpu"), "--smoke"), (("--part", "nothing"), "invalid choice"), (("--out", "here"), ".json")],
)
def test_bad_arguments_are_refused(arguments: tuple[str, ...], said: str) -> None:
    done = check(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_crash_loses_only_the_test_it_is_in(tmp_path: Path) -> None:
    """What the suite part reads of a pytest process that was killed, and of one whose test failed."""
    crashing = tmp_path / "test_crashing.py"
    crashing.write_text(
        "import os, pytest\n"
        "pytestmark = pytest.mark.cuda\n"
        "def test_good(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_crash(): os._exit(134)\n"
        "def test_lost(): pass\n"
    )
    script = (
        "import json, sys; from pathlib import Path; from gpu.suite import _run\n"
        "print('\\n' + json.dumps(_run(Path(sys.argv[1]), Path(sys.argv[2]), 60)))"
    )
    environment = os.environ | {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", script, str(crashing), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, env=environment)
    found, problem = last_line(done)
    outcomes = {name.rpartition("::")[2]: outcome for name, (outcome, _) in found.items()}
    assert outcomes == {"test_good": "passed", "test_wrong": "failed", "test_crash": "failed"}
    assert "134" in problem


def test_every_test_is_in_one_share(tmp_path: Path) -> None:
    """Files that only quote a mark are not run, and a share without a test is no problem."""
    some = tmp_path / "test_some.py"
    some.write_text("import pytest\n" + "".join(f"@pytest.mark.cuda\ndef test_{n}(): pass\n" for n in range(3)))
    script = (
        "import json, sys; from pathlib import Path; from gpu.suite import _run, has_marks\n"
        "path, scratch, own = map(Path, sys.argv[1:])\n"
        "print('\\n' + json.dumps([_run(path, scratch, 60, share, 4) for share in range(4)]"
        " + [has_marks(path.read_text()), has_marks(own.read_text())]))"
    )
    environment = os.environ | {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", script, str(some), str(tmp_path), __file__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True, env=environment)
    *shares, marked, own = last_line(done)
    names = [[test.rpartition("::")[2] for test in found] for found, _ in shares]
    assert names == [["test_0"], ["test_1"], ["test_2"], []]
    assert not any(problem for _, problem in shares)
    assert marked
    assert not own
