"""A pass whose compute takes as long as its transfer: one should hide the other."""

from __future__ import annotations

from typing import Any

import torch

from gpu.rates import SAMPLE_NBYTES, backend_of, upload_rate
from gpu.settings import Settings
from gpu.stacks import Stack, passes
from tierstore import offload

WARM = 3
_NEAR = 0.05
"""How near the compute alone must come to the transfer alone, as a share, before no better number is looked for."""


@torch.inference_mode()
def measure(settings: Settings) -> dict[str, Any]:
    """Seconds of the compute alone, of the transfer alone, and of both at once, in passes that follow each other."""
    device = torch.device(settings.device)
    sample = (1 << 20) if settings.smoke else SAMPLE_NBYTES
    stack = Stack(settings, device)
    with offload(stack.module, stack.budget, backend=backend_of(device)) as session:
        streamed = session.plan.streamed_nbytes
        rates = [upload_rate(device, nbytes=sample)]
        count, probes = _find_rows(stack, streamed / rates[0], settings)
        rows = stack.rows(count)
        expected = stack.plain(rows)
        for _ in range(WARM):
            out = stack.module(rows)
        equal = torch.equal(out, expected)
        least, seconds = (2, 0.05) if settings.smoke else (4, 1.5)
        compute = [passes(device, lambda: stack.plain(rows), seconds=seconds, least=least)[0]]
        wall, passed = passes(device, lambda: stack.module(rows), seconds=2 * seconds, least=least)
        compute.append(passes(device, lambda: stack.plain(rows), seconds=seconds, least=least)[0])
        thin = stack.rows(1)
        transfer, _ = passes(device, lambda: stack.module(thin), seconds=seconds, least=least)
        rates.append(upload_rate(device, nbytes=sample))
        return {
            "rows": count,
            "probes": probes,
            "compute_alone_seconds": compute,
            "transfer_alone_seconds": streamed / max(rates),
            "thin_pass_seconds": transfer,
            "seconds_per_pass": wall,
            "passes": passed,
            "streamed_nbytes": streamed,
            "link_rates": rates,
            "equal": equal,
            "misses": session.report().misses,
        }


def _find_rows(stack: Stack, goal_seconds: float, settings: Settings) -> tuple[int, list[tuple[int, float]]]:
    """How many rows the plain stack computes with for about ``goal_seconds``, and the (rows, seconds) tried."""
    step, most = (8, 256) if settings.smoke else (256, 1 << 16)
    count, probes = step * 8, []
    for _ in range(5):
        seconds = _compute_alone(stack, count)
        probes.append((count, seconds))
        if abs(seconds / goal_seconds - 1) <= _NEAR:
            break
        better = min(most, max(step, round(count * goal_seconds / seconds / step) * step))
        if better == count:
            break
        count = better
    best = min(probes, key=lambda probe: abs(probe[1] - goal_seconds))
    return best[0], probes


def _compute_alone(stack: Stack, count: int) -> float:
    rows = stack.rows(count)
    stack.plain(rows)
    return passes(stack.device, lambda: stack.plain(rows), seconds=0.2, least=2)[0]
