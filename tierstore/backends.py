"""Which memory, streams and links a compute device has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tierstore.contracts import CopyEngine, Pool
from tierstore.errors import DeviceError

if TYPE_CHECKING:
    from tierstore.copies.gds import GdsReads


@dataclass(frozen=True)
class Backend:
    """A compute device: its copy engine, and pools of given bytes: ``device_pool`` for weights that stay on it,
    ``ring_pool`` for those that stream through it, ``host_pool`` for (pinned) memory that they pass through.

    ``device_reads`` gives what reads files straight into device memory, or None where that is not faster.
    """

    device: torch.device
    engine: CopyEngine
    device_pool: Callable[[int], Pool]
    ring_pool: Callable[[int], Pool]
    host_pool: Callable[[int], Pool]
    device_reads: Callable[[Sequence[Path]], GdsReads | None] = lambda paths: None


def backend_for(device: torch.device | str | None) -> Backend:
    """The backend of ``device``; None is the current CUDA device where there is one, else the CPU.

    Raises ``DeviceError`` for a device that this machine or tierstore does not have.
    """
    try:
        chosen = torch.device(device) if device is not None else _default_device()
    except RuntimeError as error:
        raise DeviceError(f"device {device!r} is not a device: use 'cpu', 'cuda' or 'cuda:N'") from error
    if chosen.type == "cpu":
        from tierstore.copies.cpu import CpuCopyEngine
        from tierstore.pools.host import HostPool

        ring_pool = partial(HostPool, huge_pages=True)
        return Backend(chosen, CpuCopyEngine(), HostPool, ring_pool, ring_pool)
    if chosen.type == "cuda":
        return _cuda_backend(chosen)
    raise DeviceError(f"device {chosen} is not supported: use 'cpu' or 'cuda'")


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _cuda_backend(device: torch.device) -> Backend:
    if not torch.cuda.is_available():
        raise DeviceError(
            f"device {device} needs an NVIDIA GPU with its driver and a CUDA build of torch, and this machine's torch "
            f"finds none: use device='cpu'"
        )
    from tierstore.copies.cuda import CudaCopyEngine
    from tierstore.copies.gds import GdsReads
    from tierstore.machine import gds_is_real
    from tierstore.pools.cuda import CudaPool, CudaRegistrar
    from tierstore.pools.host import HostPool

    index = device.index if device.index is not None else torch.cuda.current_device()
    if index >= torch.cuda.device_count():
        raise DeviceError(f"device {device} does not exist, this machine has {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", index)
    return Backend(
        device,
        CudaCopyEngine(device),
        partial(CudaPool, device=device),
        partial(CudaPool, device=device),
        lambda nbytes: HostPool(nbytes, registrar=CudaRegistrar(device), huge_pages=True),
        lambda paths: GdsReads(paths) if all(gds_is_real(path) for path in paths) else None,
    )
