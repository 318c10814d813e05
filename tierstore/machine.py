"""What this machine has: memory and the caps on it, GPUs, and how fast its links are. Nothing is probed at import."""

from __future__ import annotations

import mmap
import os
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import psutil
import torch

from tierstore.budget import Budget, format_nbytes
from tierstore.errors import BudgetError, StoreReadError

HEADROOM_NBYTES = 256 << 20
"""RAM left beside the budget for activations, workspace and the allocator. A process that comes near its cgroup cap
does not die, it reclaims for ever: a budget that would bring it there is refused."""
HBM_HEADROOM_NBYTES = 256 << 20
"""The same on a GPU, where a kernel that finds no workspace fails."""
GDS_FILESYSTEMS = frozenset({"ext4", "xfs", "nfs", "nfs4", "lustre", "wekafs", "beegfs", "gpfs"})
"""Filesystems that GPUDirect Storage can read without a bounce buffer."""
_SAMPLE = 256 << 20  # bytes a link carries to be measured
_CHUNK = 4 << 20
_THREADS = 4


@dataclass(frozen=True, slots=True)
class Gpu:
    """A CUDA device as torch numbers it."""

    name: str
    index: int
    total_nbytes: int
    free_nbytes: int


@dataclass(frozen=True, slots=True)
class Machine:
    """``ram_available_nbytes`` is what this process may still take: of the machine, and below its cgroup's cap.
    ``cgroup_limit_nbytes`` is the tightest memory cap over this process, None when there is none.
    ``pinnable_nbytes`` is an estimate, 0 without a GPU. ``gds`` is ``"real"``, or why disk reads would bounce."""

    ram_nbytes: int
    ram_available_nbytes: int
    cgroup_limit_nbytes: int | None
    gpus: tuple[Gpu, ...]
    pinnable_nbytes: int
    gds: str


@dataclass(frozen=True, slots=True)
class LinkSpeeds:
    """Measured, in bytes per second. ``device`` is pinned host memory to the GPU; on the CPU it is ``memcpy``."""

    disk: float
    memcpy: float
    device: float


def inspect_machine(path: str | os.PathLike[str] | None = None) -> Machine:
    """Ask the system; takes milliseconds. ``path`` is where weights rest, which decides whether ``gds`` is real."""
    memory = psutil.virtual_memory()
    caps = cgroup_caps(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    limit = min((cap.limit for cap in caps if cap.limit < memory.total), default=None)
    available = min([int(memory.available), *(max(0, cap.limit - cap.used) for cap in caps)])
    gpus = _gpus()
    # Windows lets its Linux pin about half of what it gave it.
    pinnable = memory.total // 2 if "microsoft" in platform.release().lower() else available
    return Machine(
        ram_nbytes=int(memory.total),
        ram_available_nbytes=available,
        cgroup_limit_nbytes=limit,
        gpus=gpus,
        pinnable_nbytes=min(pinnable, available) if gpus else 0,
        gds=gds_state(path),
    )


def check_budget(budget: Budget, machine: Machine, device: torch.device) -> None:
    """Raises ``BudgetError`` when ``budget`` is more than ``machine`` or a cap over this process could ever give."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpu = _gpu_of(machine, device)
        total = gpu.total_nbytes if gpu is not None else 0
        hbm = budget.hbm + budget.kv_hbm
        names = "Budget.hbm and Budget.kv_hbm" if budget.kv_hbm else "Budget.hbm"
        _refuse(names, hbm, total, 0, f"all that {gpu.name if gpu is not None else device} has")
    asked, names = (budget.ram, "Budget.ram") if on_gpu else (budget.hbm + budget.ram, "Budget.hbm and Budget.ram")
    if budget.kv_hbm:
        asked += budget.kv_ram + (0 if on_gpu else budget.kv_hbm)
        names += " and those of the KV cache"
    cap = machine.cgroup_limit_nbytes
    if asked:
        most = machine.ram_nbytes if cap is None else min(cap, machine.ram_nbytes)
        _refuse(names, asked, most, 0, f"all the RAM there is{_capped(cap)}")


def check_room(hbm: int, ram: int, machine: Machine, device: torch.device) -> None:
    """Raises ``BudgetError`` when ``hbm`` and ``ram`` bytes, which a plan is about to take, are not free on ``machine``
    with room left to compute on ``device``."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        gpu = _gpu_of(machine, device)
        free = gpu.free_nbytes if gpu is not None else 0
        what = f"{gpu.name} ({device})" if gpu is not None else str(device)
        _refuse("Budget.hbm", hbm, free, HBM_HEADROOM_NBYTES, f"free on {what}")
    need, names = (ram, "Budget.ram") if on_gpu else (hbm + ram, "Budget.hbm and Budget.ram")
    if need:
        where = f"available of {format_nbytes(machine.ram_nbytes)} of RAM{_capped(machine.cgroup_limit_nbytes)}"
        _refuse(names, need, machine.ram_available_nbytes, HEADROOM_NBYTES, where)


def _gpu_of(machine: Machine, device: torch.device) -> Gpu | None:
    index = device.index if device.index is not None else torch.cuda.current_device()
    return next((gpu for gpu in machine.gpus if gpu.index == index), None)


def _capped(cap: int | None) -> str:
    return "" if cap is None else f" and a memory cap (cgroup) of {format_nbytes(cap)}"


def _refuse(names: str, need: int, have: int, headroom: int, where: str) -> None:
    if need + headroom > have:
        beside = f", and {format_nbytes(headroom)} more are needed to compute" if headroom else ""
        raise BudgetError(
            f"{names} ask for {format_nbytes(need)}{beside}: {format_nbytes(have)} are {where}: "
            f"lower the budget to {format_nbytes(max(0, have - headroom))} or end what else uses the memory"
        )


def gds_is_real(path: str | os.PathLike[str] | None = None) -> bool:
    """Whether reads of ``path`` would go from the disk to the GPU without a bounce buffer."""
    return gds_state(path) == "real"


def gds_state(path: str | os.PathLike[str] | None = None) -> str:
    """``"real"``, or the reason why reads of ``path`` (None: of any file) would bounce through RAM."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU that torch can use"
    try:
        import kvikio
        import kvikio.cufile_driver
        import kvikio.defaults
    except ImportError:
        return "kvikio is not installed: pip install 'tierstore[gds]'"
    try:
        if not kvikio.cufile_driver.get("is_gds_available"):
            return "the nvidia-fs driver is not loaded"
        if kvikio.defaults.get("compat_mode") == kvikio.CompatMode.ON:
            return "kvikio is in compatibility mode"
    except Exception as error:  # whatever a driver that is half there says
        return f"kvikio cannot use the driver: {error}"
    filesystem = filesystem_of(Path(path)) if path is not None else None
    if filesystem is not None and filesystem not in GDS_FILESYSTEMS:
        return f"the filesystem of {os.fspath(path) if path is not None else ''!r} is {filesystem}"
    return "real"


def measure_links(path: str | os.PathLike[str] | None, device: torch.device) -> LinkSpeeds:
    """Measure each link for a fraction of a second; reads up to 256 MiB of ``path``, a file, or of a temporary one.

    The disk is read past the page cache where the filesystem allows. Raises ``StoreReadError`` for a file that
    cannot be read or is empty.
    """
    memcpy = _memcpy_speed()
    return LinkSpeeds(_disk_speed(path), memcpy, _upload_speed(device) if device.type == "cuda" else memcpy)


@dataclass(frozen=True, slots=True)
class Cap:
    """A cgroup's memory limit, and what of it can not be reclaimed."""

    limit: int
    used: int


def cgroup_caps(membership: Path, mount: Path) -> list[Cap]:
    """The caps over this process: its cgroup and every one above it, of version 2 and 1."""
    caps: list[Cap] = []
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for line in lines:
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and not controllers:
            both = mount / "unified"  # where version 1 is mounted too
            root, names = both if both.is_dir() else mount, ("memory.max", "memory.current", "anon")
        elif "memory" in controllers.split(","):
            root, names = mount / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_rss")
        else:
            continue
        folder = root / path.lstrip("/")
        while True:
            cap = _cap(folder, *names)
            if cap is not None:
                caps.append(cap)
            if folder == root or root not in folder.parents:
                break
            folder = folder.parent
    return caps


def _cap(folder: Path, limit_name: str, usage_name: str, resident: str) -> Cap | None:
    try:
        text = (folder / limit_name).read_text().strip()
        if text == "max":
            return None
        limit, used = int(text), int((folder / usage_name).read_text())
    except (OSError, ValueError):
        return None
    with suppress(OSError, ValueError):  # the page cache is counted in, but gives way
        fields = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
        used = min(used, int(fields[resident]) + int(fields.get("slab_unreclaimable", 0)))
    return Cap(limit, used)


def _gpus() -> tuple[Gpu, ...]:
    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        reserved = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
        found.append(Gpu(torch.cuda.get_device_name(index), index, total, free + reserved))
    return tuple(found)


def filesystem_of(path: Path) -> str | None:
    """The type of the filesystem that holds ``path``, by the longest mount point above it."""
    where = path.resolve()
    mounts = [part for part in psutil.disk_partitions(all=True) if where.is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else None


def _disk_speed(path: str | os.PathLike[str] | None) -> float:
    with ExitStack() as stack:
        if path is None:
            file = stack.enter_context(tempfile.NamedTemporaryFile())
            for _ in range(_SAMPLE // _CHUNK):
                file.write(os.urandom(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
            path = file.name
        try:
            fd = _open_direct(path)
            stack.callback(os.close, fd)
            nbytes = min(_SAMPLE, os.fstat(fd).st_size)
            if not nbytes:
                raise StoreReadError(f"{os.fspath(path)!r} is empty, so no speed can be measured: name a larger file")
            threads = stack.enter_context(ThreadPoolExecutor(_THREADS, thread_name_prefix="tierstore-measure"))
            os.posix_fadvise(fd, 0, nbytes, os.POSIX_FADV_DONTNEED)

            def read(worker: int) -> None:
                chunk = _huge_pages(_CHUNK)
                for offset in range(worker * _CHUNK, nbytes, _THREADS * _CHUNK):
                    os.preadv(fd, (chunk,), offset)

            start = perf_counter()
            list(threads.map(read, range(_THREADS)))
            return nbytes / (perf_counter() - start)
        except OSError as error:
            if isinstance(error, StoreReadError):
                raise
            raise StoreReadError(
                f"cannot read {os.fspath(path)!r} to measure it: {error}: name another file"
            ) from error


def _huge_pages(nbytes: int) -> memoryview:
    """Private memory as a ring has it, whole huge pages where the system has them: a disk fills these faster."""
    align = 2 << 20
    memory = mmap.mmap(-1, nbytes + align, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % align
    return memoryview(memory)[start : start + nbytes]


def _open_direct(path: str | os.PathLike[str]) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
        try:
            os.preadv(fd, (mmap.mmap(-1, mmap.PAGESIZE),), 0)
        except OSError:
            os.close(fd)
            raise
        return fd
    except OSError:  # this filesystem has no O_DIRECT
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


def _memcpy_speed() -> float:
    src, dst = (torch.ones(64 << 20, dtype=torch.uint8) for _ in range(2))
    return src.numel() / _fastest(lambda: dst.copy_(src))


def _upload_speed(device: torch.device) -> float:
    host = torch.empty(_SAMPLE, dtype=torch.uint8, pin_memory=True)  # a power of two, so none is wasted
    there = torch.empty(_SAMPLE, dtype=torch.uint8, device=device)

    def copy() -> None:
        there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)

    return _SAMPLE / _fastest(copy)


def _fastest(action: Callable[[], object], times: int = 4) -> float:
    """Seconds of the fastest run; the first one pays for memory that was never touched."""
    seconds = []
    for _ in range(times):
        start = perf_counter()
        action()
        seconds.append(perf_counter() - start)
    return min(seconds)
