"""Triton's whole compiler without a card: kernels are compiled for one that is named, and never launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest


class _Card:
    """Stands for Triton's driver."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 1000 + cast(int, self.target.arch)  # so that no real card is ever given one of these kernels

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiled(monkeypatch: pytest.MonkeyPatch, folder: Path, capability: int) -> Iterator[list[Any]]:
    """The kernels that are launched meanwhile, compiled for cards of ``capability``, in the order of the launches."""
    import triton

    made: list[Any] = []

    def compile_only(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **more: Any) -> None:
        made.append(run(kernel, *arguments, grid=grid, warmup=True, **more))

    run = triton.runtime.jit.JITFunction.run
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", _Card(target))
    with triton.knobs.cache.scope():
        triton.knobs.cache.dir = str(folder)
        yield made
