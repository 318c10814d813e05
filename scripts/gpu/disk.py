"""A checkpoint on disk, streamed through pinned memory to the device: disk to ring to ring."""

from __future__ import annotations

import shutil
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmark.disk import reader_rate
from make_checkpoint import Shape, make_checkpoint
from transformers import AutoModelForCausalLM

import tierstore
from gpu.rates import backend_of
from gpu.settings import Settings
from gpu.tokens import decode, figures
from tierstore import Budget

TINY = Shape(hidden=128, layers=4, ffn=256, heads=4, kv_heads=2, vocab=512, shard_nbytes=1 << 20)
WHOLE = Shape(layers=12, shard_nbytes=1 << 30)
WARM = 2


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds per token with a third of the weights in hbm and little RAM, and whether logits are the plain ones."""
    device, folder = torch.device(settings.device), Path(settings.scratch, "checkpoint")
    shape = TINY if settings.smoke else WHOLE
    if 2 * shape.nbytes() > shutil.disk_usage(settings.scratch).free:
        return {"skipped": f"{settings.scratch} has no room for a checkpoint of {shape.nbytes() >> 20} MiB"}
    make_checkpoint(folder, shape)
    files = sorted(folder.glob("*.safetensors"))
    steps = 3 if settings.smoke else 10
    plain: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain.to(device)
    expected = figures(list(islice(decode(plain, shape.vocab, device), steps)))
    del plain
    rounds = 2 if settings.smoke else 12
    rates = [reader_rate(files, rounds)]
    budget = Budget(shape.nbytes() // 3, ram=max(shape.nbytes() // 10, 1 << 20))
    with tierstore.load(folder, budget, backend=backend_of(device)) as session:
        found = figures(list(islice(decode(session.module, shape.vocab, device), steps)))
        report = session.report()
        plan = session.plan.explain()
    rates.append(reader_rate(files, rounds))
    return {
        **found,
        "first_token_seconds": found["seconds_each"][0],
        "seconds_per_token": statistics.median(found["seconds_each"][WARM:] or found["seconds_each"]),
        "read_nbytes": report.links["nvme->ram"].nbytes,
        "links": {name: {"nbytes": link.nbytes, "busy_seconds": link.seconds} for name, link in report.links.items()},
        "checkpoint_nbytes": shape.nbytes(),
        "disk_rates": rates,
        "equal": found["digests"] == expected["digests"],
        "peak_bytes": dict(report.peak_bytes),
        "within_budget": report.peak_bytes["hbm"] <= budget.hbm and report.peak_bytes["ram"] <= budget.ram,
        "misses": report.misses,
        "plan": plan,
    }
