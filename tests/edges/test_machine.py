"""What a machine has, caps included, and the budgets that it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import psutil
import pytest
import torch

from tierstore.budget import Budget
from tierstore.errors import BudgetError, StoreReadError
from tierstore.machine import (
    HBM_HEADROOM_NBYTES,
    HEADROOM_NBYTES,
    Cap,
    Gpu,
    Machine,
    cgroup_caps,
    check_budget,
    check_room,
    filesystem_of,
    gds_is_real,
    gds_state,
    inspect_machine,
    measure_links,
)

GIB = 1 << 30
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def machine(available: int, *, cap: int | None = None, free: int | None = None) -> Machine:
    gpus = () if free is None else (Gpu("A GPU", 0, 24 * GIB, free),)
    return Machine(64 * GIB, available, cap, gpus, available if gpus else 0, "no")


def test_this_machine_adds_up() -> None:
    here = inspect_machine()
    assert here.ram_nbytes == psutil.virtual_memory().total
    assert 0 < here.ram_available_nbytes <= here.ram_nbytes
    assert here.cgroup_limit_nbytes is None or 0 < here.cgroup_limit_nbytes < here.ram_nbytes
    assert bool(here.gpus) == torch.cuda.is_available()
    assert bool(here.pinnable_nbytes) == bool(here.gpus)


def test_nothing_is_probed_at_import() -> None:
    """A module that opened files, started CUDA or imported kvikio when imported would slow every program down."""
    code = (
        "import builtins, sys, torch, psutil, tempfile, tierstore.budget\n"
        "def no(*a, **k): raise AssertionError('probed')\n"
        "torch.cuda.is_available = psutil.virtual_memory = no\n"
        "import tierstore.machine, tierstore.pools.cuda, tierstore.copies.cuda, tierstore.copies.gds\n"
        "assert 'kvikio' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=100)


# ---- caps


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_version_2_caps_are_found_up_the_tree(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("0::/user/session\n")
    root = tmp_path / "fs"
    write(root / "user" / "session", memory__max="max\n", memory__current="5\n")
    write(
        root / "user",
        memory__max=f"{4 * GIB}\n",
        memory__current=f"{3 * GIB}\n",
        memory__stat=f"anon {GIB}\nfile {2 * GIB}\nslab_unreclaimable 100\n",
    )
    write(root, memory__stat="anon 1\n")
    assert cgroup_caps(tmp_path / "cgroup", root) == [Cap(4 * GIB, GIB + 100)]


def test_version_1_caps_are_found_up_the_tree(tmp_path: Path) -> None:
    (tmp_path / "cgroup").write_text("5:cpu,cpuacct:/x\n4:memory:/jobs/7\n0::/\n")
    root = tmp_path / "fs"
    write(root / "memory" / "jobs" / "7", memory__limit_in_bytes=f"{2 * GIB}", memory__usage_in_bytes=f"{GIB}")
    write(
        root / "memory" / "jobs",
        memory__limit_in_bytes="9223372036854771712",
        memory__usage_in_bytes="8000",
        memory__stat="cache 7000\ntotal_rss 1000\n",
    )
    assert cgroup_caps(tmp_path / "cgroup", root) == [Cap(2 * GIB, GIB), Cap(9223372036854771712, 1000)]


def test_a_container_that_sees_only_its_own_tree(tmp_path: Path) -> None:
    """The path in /proc names folders that are not mounted; the mount itself has the cap."""
    (tmp_path / "cgroup").write_text("0::/../../docker/abc\n4:memory:/docker/abc\n")
    root = tmp_path / "fs"
    write(root, memory__max=f"{GIB}", memory__current="10")
    write(root / "memory", memory__limit_in_bytes=f"{2 * GIB}", memory__usage_in_bytes="20")
    assert cgroup_caps(tmp_path / "cgroup", root) == [Cap(GIB, 10), Cap(2 * GIB, 20)]


@pytest.mark.parametrize("text", ["", "nonsense\n", "0::/\n", "4:memory:/x\n", "a:b\n"])
def test_whatever_proc_says_is_survived(tmp_path: Path, text: str) -> None:
    (tmp_path / "cgroup").write_text(text)
    write(tmp_path / "fs", memory__max="not a number")
    assert cgroup_caps(tmp_path / "cgroup", tmp_path / "fs") == []
    assert cgroup_caps(tmp_path / "missing", tmp_path / "fs") == []


# ---- budgets


def test_room_that_is_there_passes() -> None:
    check_room(4 * GIB, 2 * GIB, machine(6 * GIB + HEADROOM_NBYTES), CPU)
    check_room(4 * GIB, 2 * GIB, machine(2 * GIB + HEADROOM_NBYTES, free=5 * GIB), CUDA)
    check_room(4 * GIB, 0, machine(0, free=5 * GIB), CUDA)


def test_a_cpu_budget_shares_one_memory() -> None:
    tight = machine(6 * GIB + HEADROOM_NBYTES - 1, cap=8 * GIB)
    with pytest.raises(
        BudgetError, match=r"Budget\.hbm and Budget\.ram ask for 6\.00 GiB.*cap \(cgroup\) of 8\.00 GiB"
    ):
        check_room(4 * GIB, 2 * GIB, tight, CPU)
    with pytest.raises(BudgetError, match=r"lower the budget to 1\.75 GiB"):
        check_room(100 * GIB, 0, machine(2 * GIB), CPU)
    with pytest.raises(BudgetError, match="lower the budget to 0 B"):
        check_room(1, 0, machine(0), CPU)


def test_a_gpu_budget_is_checked_on_each_side() -> None:
    with pytest.raises(BudgetError, match=r"Budget\.hbm ask for 4\.00 GiB.*free on A GPU"):
        check_room(4 * GIB, 0, machine(64 * GIB, free=4 * GIB + HBM_HEADROOM_NBYTES - 1), CUDA)
    with pytest.raises(BudgetError, match=r"Budget\.ram ask for 50\.00 GiB"):
        check_room(4 * GIB, 50 * GIB, machine(50 * GIB, free=20 * GIB), CUDA)
    with pytest.raises(BudgetError, match="0 B are free on cuda:0"):
        check_room(4 * GIB, 0, machine(50 * GIB), CUDA)


def test_a_budget_beyond_the_machine_is_refused_whatever_is_free() -> None:
    check_budget(Budget("64GiB"), machine(0), CPU)
    check_budget(Budget("24GiB", ram="64GiB"), machine(0, free=0), CUDA)
    with pytest.raises(BudgetError, match=r"ask for 65\.00 GiB: 64\.00 GiB are all the RAM there is"):
        check_budget(Budget("1GiB", ram="64GiB"), machine(0), CPU)
    with pytest.raises(BudgetError, match=r"cap \(cgroup\) of 2\.00 GiB"):
        check_budget(Budget("3GiB"), machine(0, cap=2 * GIB), CPU)
    with pytest.raises(BudgetError, match="all that A GPU has"):
        check_budget(Budget("25GiB"), machine(0, free=0), CUDA)


# ---- GPUDirect Storage


def fake_kvikio(monkeypatch: pytest.MonkeyPatch, *, available: bool = True, compat: str = "AUTO") -> None:
    kvikio, driver, defaults = (ModuleType(name) for name in ("kvikio", "kvikio.cufile_driver", "kvikio.defaults"))
    modes = SimpleNamespace(ON="ON", OFF="OFF", AUTO="AUTO")

    def get(name: str) -> bool:
        if compat == "broken":
            raise RuntimeError("libcufile is not there")
        return {"is_gds_available": available}[name]

    for name, value in (("CompatMode", modes), ("cufile_driver", driver), ("defaults", defaults)):
        setattr(kvikio, name, value)
    setattr(driver, "get", get)  # noqa: B010
    setattr(defaults, "get", {"compat_mode": compat}.__getitem__)  # noqa: B010
    for module in (kvikio, driver, defaults):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def test_gds_says_why_it_falls_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        assert gds_state() == "no NVIDIA GPU that torch can use"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setitem(sys.modules, "kvikio", None)
        assert "pip install" in gds_state()
    for settings, reason in (
        ({"available": False}, "nvidia-fs"),
        ({"compat": "ON"}, "compatibility mode"),
        ({"compat": "broken"}, "libcufile is not there"),
    ):
        with monkeypatch.context() as patch:
            fake_kvikio(patch, **settings)
            assert reason in gds_state()
            assert not gds_is_real()
    fake_kvikio(monkeypatch)
    assert gds_state() == "real"
    monkeypatch.setattr("tierstore.machine.filesystem_of", lambda path: "tmpfs")
    assert gds_state(tmp_path) == f"the filesystem of {str(tmp_path)!r} is tmpfs"
    monkeypatch.setattr("tierstore.machine.filesystem_of", lambda path: "xfs")
    assert gds_is_real(tmp_path)


def test_the_filesystem_is_that_of_the_deepest_mount(tmp_path: Path) -> None:
    mounts = Path("/proc/self/mounts").read_text().split("\n")
    types = {line.split()[2] for line in mounts if line}
    assert filesystem_of(tmp_path) in types
    assert filesystem_of(Path("/proc/self")) == "proc"


# ---- links


def test_links_are_measured(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(9 << 20))
    speeds = measure_links(file, CPU)
    assert all(1e6 < speed < 1e13 for speed in (speeds.disk, speeds.memcpy, speeds.device))
    assert speeds.device == speeds.memcpy


def test_a_file_that_cannot_be_measured_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("empty", "missing", "."):
        with pytest.raises(StoreReadError, match="name"):
            measure_links(tmp_path / name, CPU)


@pytest.mark.cuda
def test_the_link_to_the_gpu_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(9 << 20))
    assert measure_links(file, torch.device("cuda")).device > 1e8
