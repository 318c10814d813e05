"""What calls hold while they wait, on a real GPU: the same bits whoever is late, and no more memory for more calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import tierstore
from tierstore import Budget
from tierstore.backends import backend_for
from tierstore.contracts import Buffer, Fence
from tierstore.copies.cuda import CudaCopyEngine
from tierstore.waiting_plan import IN_TRANSIT, WaitingPlan

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda", 0)
WIDTH, ROWS, LAYERS = 1024, 4096, 8
STATE_NBYTES = ROWS * WIDTH * 4
SLOW_CYCLES = 2_000_000
"""About 1 ms of a GPU: much longer than the host takes to issue what follows."""


def sleep(*_: Any) -> None:
    cast(Any, torch.cuda)._sleep(SLOW_CYCLES)


class LateCopies(CudaCopyEngine):
    """Copies in both directions lag far behind the host: whatever does not wait for them is early."""

    def copy(self, pairs: Sequence[tuple[Buffer, Buffer]], *, after: Sequence[Fence] = ()) -> Fence:
        for stream in (self._up, self._down):
            with torch.cuda.stream(stream):
                sleep()
        return super().copy(pairs, after=after)


def make_module() -> nn.Module:
    """From numbers to wide rows, through layers, and to numbers: what is wide is the calls' own."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS)]
    return nn.Sequential(nn.Linear(1, WIDTH), *layers, nn.Linear(WIDTH, 1)).eval()


def answer(module: nn.Module, seed: int) -> Tensor:
    numbers = torch.randn(ROWS, 1, generator=torch.Generator().manual_seed(seed))
    return cast(Tensor, module(numbers.to(CUDA))).cpu()


@pytest.mark.parametrize("slow", ["nothing", "compute", "copies"])
@torch.no_grad()
def test_the_same_bits_and_no_more_memory(slow: str) -> None:
    module = make_module()
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    plain = make_module().to(CUDA)
    want = [answer(plain, seed) for seed in range(16)]
    if slow == "compute":
        for part in module.modules():
            if isinstance(part, nn.Linear):
                part.register_forward_pre_hook(sleep)
    backend = backend_for(CUDA)
    if slow == "copies":
        backend = replace(backend, engine=LateCopies(CUDA))
    peaks = []
    for count in (8, 16):
        with tierstore.offload(module, Budget(weights // 3, 2 * weights), backend=backend) as session:
            aside = session.set_aside(WaitingPlan(count, IN_TRANSIT, 2 * STATE_NBYTES))
            calls = [partial(answer, module, seed) for seed in range(count)]
            for _ in range(3):
                torch.cuda.synchronize(CUDA)
                torch.cuda.reset_peak_memory_stats(CUDA)
                start = torch.cuda.memory_allocated(CUDA)
                assert all(map(torch.equal, session.together(calls, waits=aside), want[:count]))
            peaks.append(torch.cuda.max_memory_allocated(CUDA) - start)
            assert aside.moved_nbytes >= count * LAYERS * STATE_NBYTES // 2
    assert peaks[1] <= peaks[0] + STATE_NBYTES
    assert peaks[1] < 10 * STATE_NBYTES
