"""Clocks, and how fast the links of this machine are."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tierstore.backends import Backend, backend_for
from tierstore.testing.adversary import adversary

SAMPLE_NBYTES = 256 << 20
_IN_A_ROW = 8


def backend_of(device: torch.device) -> Backend:
    """The device's own; for the CPU the one that stands for a GPU in tests, so that the same ways are taken."""
    if device.type == "cuda":
        return backend_for(device)
    adverse = adversary(0)
    return Backend(device, adverse.engine, adverse.pool, adverse.pool, adverse.pool)


def settle(device: torch.device) -> None:
    """Wait until the device has done all that it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(device: torch.device, action: Callable[[], Any]) -> float:
    """Seconds from an idle device to an idle device."""
    settle(device)
    start = time.perf_counter()
    action()
    settle(device)
    return time.perf_counter() - start


def upload_rate(device: torch.device, *, nbytes: int = SAMPLE_NBYTES, rounds: int = 4) -> float:
    """Bytes per second from memory that torch pinned to the device, the best of several rounds of copies in a row."""
    host, there = _ends(device, nbytes)
    return _best(device, rounds, nbytes, lambda: there.copy_(host, non_blocking=True))


def download_rate(device: torch.device, *, nbytes: int = SAMPLE_NBYTES, rounds: int = 2) -> float:
    """The same in the other direction."""
    host, there = _ends(device, nbytes)
    return _best(device, rounds, nbytes, lambda: host.copy_(there, non_blocking=True))


def _ends(device: torch.device, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    host = torch.ones(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
    return host, torch.zeros(nbytes, dtype=torch.uint8, device=device)


def _best(device: torch.device, rounds: int, nbytes: int, copy: Callable[[], Any]) -> float:
    def row() -> None:
        for _ in range(_IN_A_ROW):
            copy()

    copy()
    return _IN_A_ROW * nbytes / min(timed(device, row) for _ in range(rounds))
