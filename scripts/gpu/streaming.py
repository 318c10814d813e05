"""Pinned memory to the device, in steady passes, beside what the link can carry."""

from __future__ import annotations

from typing import Any

import torch

from gpu.rates import SAMPLE_NBYTES, backend_of, upload_rate
from gpu.settings import Settings
from gpu.stacks import Stack, passes
from tierstore import offload

LINK = "ram->hbm"
WARM = 3


@torch.inference_mode()
def measure(settings: Settings) -> dict[str, Any]:
    """Bytes per second of whole passes over a module that hardly computes; the link's own rate before and after."""
    device = torch.device(settings.device)
    sample = (1 << 20) if settings.smoke else SAMPLE_NBYTES
    stack = Stack(settings, device)
    row = stack.rows(1)
    expected = stack.plain(row)
    compute, _ = passes(device, lambda: stack.plain(row), seconds=0.3, least=3)
    del stack.plain
    rates = [upload_rate(device, nbytes=sample)]
    with offload(stack.module, stack.budget, backend=backend_of(device)) as session:
        for _ in range(WARM):
            out = stack.module(row)
        before = session.report().links[LINK]
        seconds, count = passes(device, lambda: stack.module(row), seconds=0.1 if settings.smoke else 4, least=4)
        equal = torch.equal(stack.module(row), expected) and torch.equal(out, expected)
        report = session.report()
        link = report.links[LINK]
        rates.append(upload_rate(device, nbytes=sample))
        return {
            "link_rates": rates,
            "seconds_per_pass": seconds,
            "passes": count,
            "streamed_nbytes": session.plan.streamed_nbytes,
            "achieved_rate": session.plan.streamed_nbytes / seconds,
            "busy_rate": (link.nbytes - before.nbytes) / max(link.seconds - before.seconds, 1e-9),
            "moved_per_pass": (link.nbytes - before.nbytes) / (count + 2),
            "compute_alone_seconds": compute,
            "equal": equal,
            "misses": report.misses,
            "plan": session.plan.explain(),
        }
