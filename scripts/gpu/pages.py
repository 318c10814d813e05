"""Decoding with most of a KV cache in pinned memory, beside decoding with all of it on the device, by KV format."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from benchmark.filled import Decoder, decode

from gpu.rates import SAMPLE_NBYTES, backend_of, timed, upload_rate
from gpu.settings import Settings
from tierstore import Budget, offload

FORMATS = (None, "int8", "int4", "fp8", "fp4")
BELOW = 0.9
"""The part of the KV cache that is not in HBM."""
_RESERVE_SECONDS = 12.0
"""A format that would be begun with less than this left is left out."""


def measure(settings: Settings) -> dict[str, Any]:
    """For each format: seconds of a token with all pages in HBM, and with most in pinned memory, and bytes moved."""
    until = time.perf_counter() + settings.seconds
    device = torch.device(settings.device)
    decoder = Decoder(2, 2, 16, 32) if settings.smoke else Decoder(32, 8, 128, 1024)
    tokens = 2048 if settings.smoke else 32768
    model = decoder.build(device)
    raw = decoder.kv_nbytes(tokens)
    found: list[dict[str, Any]] = []
    left_out = []
    for name in FORMATS[:2] if settings.smoke else FORMATS:
        if found and time.perf_counter() > until - _RESERVE_SECONDS:
            left_out.append(str(name))
            continue
        all_there, cells = _run(model, decoder, tokens, {"kv_hbm": 2 * raw + (64 << 20)}, name, settings)
        hbm = max(int((1 - BELOW) * cells), (256 << 10) if settings.smoke else 0)
        below, _ = _run(model, decoder, tokens, {"kv_hbm": hbm, "kv_ram": 2 * cells}, name, settings)
        found.append(
            {
                "format": name,
                "compute_seconds": statistics.median(all_there["seconds"]),
                "seconds": statistics.median(below["seconds"]),
                "read_nbytes": below["read_nbytes"],
                "cells_nbytes": cells,
            }
        )
    rate = upload_rate(device, nbytes=(1 << 20) if settings.smoke else SAMPLE_NBYTES)
    return {
        "tokens": tokens,
        "raw_nbytes": raw,
        "link_rate": rate,
        "decoded": found,
        "left_out": left_out,
        "judged": not settings.smoke,
    }


def _run(
    model: Any, decoder: Decoder, tokens: int, kv: dict[str, int], form: str | None, settings: Settings
) -> tuple[dict[str, Any], int]:
    device = torch.device(settings.device)
    steps = 2 if settings.smoke else 8
    budget = Budget("2GiB", "1GiB", **kv)
    with offload(model, budget, kv_format=form, backend=backend_of(device)) as session:
        decoder.fill(session.kv, tokens, device)
        found = decode(session, lambda step: timed(device, step), warm=3, steps=steps)
        report = session.report().kv
        assert report is not None, "the budget has bytes for a KV cache"
        return found, report.hbm_nbytes + report.ram_nbytes
