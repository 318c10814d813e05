"""What the machine is, what is installed, and how fast its links are."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch

from gpu.rates import backend_of, download_rate, timed, upload_rate
from gpu.settings import Settings
from tierstore.contracts import ReadRequest
from tierstore.extents import Extent
from tierstore.machine import filesystem_of, inspect_machine
from tierstore.stores.reader import Reader

MISSING = {
    "psutil": "a stand-in reads /proc instead",
    "hypothesis": "laws run on seeded examples through a stand-in",
    "pytest_timeout": "gpu_check's own limits end a hang",
    "pytest_asyncio": "no cuda test needs it",
    "zarr": "the spill store is written without it; only its tests compare with it",
    "accelerate": "nothing to compare the giant with",
    "triton": "packed weights are multiplied without kernels",
    "kvikio": "no GPUDirect Storage: its tests are skipped",
    "typer": "the command line is not there",
    "gguf": ".gguf files cannot be imported",
}
"""What may not be installed, and what that means here. A wheel of that name brings it."""
_QUERY = "name,driver_version,memory.total,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,power.limit"


def measure(settings: Settings) -> dict[str, Any]:
    """Figures of the machine; rates are bytes per second."""
    device, scratch = torch.device(settings.device), Path(settings.scratch)
    machine = inspect_machine(scratch)
    rows = 1 if settings.smoke else 8
    found: dict[str, Any] = {
        "machine": asdict(machine),
        "cores": os.cpu_count(),
        "cpu": _cpu(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "packages": {name: _version(name) for name in ("transformers", "safetensors", "numpy", "pytest", *MISSING)},
        "missing": {name: what for name, what in MISSING.items() if _version(name) is None},
        "nvidia_smi": _nvidia_smi(),
        "scratch_filesystem": filesystem_of(scratch),
        "scratch_free_nbytes": shutil.disk_usage(scratch).free,
    }
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name(device)
        found["capability"] = list(torch.cuda.get_device_capability(device))
    sample = (1 << 20) if settings.smoke else 256 << 20
    found["upload_rate"] = upload_rate(device, nbytes=sample)
    found["download_rate"] = download_rate(device, nbytes=sample)
    found |= _pinning(device, rows * sample)
    found |= _disk(scratch, rows * sample)
    return found


def _pinning(device: torch.device, nbytes: int) -> dict[str, Any]:
    """How fast host memory of ours is made ready for the driver, and how fast copies from it are."""
    backend = backend_of(device)
    pool, there = backend.host_pool(nbytes), torch.zeros(nbytes // 4, dtype=torch.uint8, device=device)
    try:
        lease = pool.lease(nbytes, align=4096)
        assert lease is not None
        into = lease
        seconds = timed(device, lambda: cast(torch.Tensor, into.buffer).fill_(1))
        source = cast(torch.Tensor, lease.buffer)[: nbytes // 4]

        def upload() -> None:
            backend.engine.copy([(source, there)]).wait()

        upload()
        return {
            "pin_and_fill_rate": nbytes / seconds,
            "engine_upload_rate": nbytes // 4 / min(timed(device, upload) for _ in range(3)),
            "pinned": bool(device.type == "cuda" and source[:4096].is_pinned()),
            "pin_notes": list(getattr(pool, "notes", ())),
        }
    finally:
        backend.engine.close()
        pool.close()


def _disk(scratch: Path, nbytes: int) -> dict[str, Any]:
    """Bytes per second of tierstore's own reader, over a file made for it."""
    path, block = scratch / "sample", os.urandom(1 << 20)
    with path.open("wb") as file:
        for _ in range(nbytes >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    reader = Reader([path])
    try:
        into = torch.zeros(nbytes, dtype=torch.uint8)
        request = ReadRequest(0, Extent(0, nbytes), into)
        seconds = min(timed(torch.device("cpu"), lambda: reader.read([request]).wait()) for _ in range(2))
        return {"disk_rate": nbytes / seconds, "disk_direct": reader.direct[0]}
    finally:
        reader.close()
        path.unlink()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(name: str) -> str | None:
    for wheel in (name, name.replace("_", "-"), f"{name}-cu13", f"{name}-cu12"):
        try:
            return version(wheel)
        except PackageNotFoundError:
            continue
    return None


def _nvidia_smi() -> str:
    try:
        command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"cannot be asked: {error}"
    return (done.stdout or done.stderr).strip()
