"""A Llama of 70B's shape with random weights: as many of its 80 layers as this machine's memory holds.

The whole model is 131 GiB, more than disk or RAM may have. So nothing is written to disk: every weight is a view of one
block of random numbers, each from another place in it. From there it comes, once, into its own place in hbm or pinned
RAM, and from then on the bytes that stream are as many and as far apart in memory as a real checkpoint's would be.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from make_checkpoint import STRIDE, Shape

from gpu.rates import SAMPLE_NBYTES, backend_of, settle, timed, upload_rate
from gpu.settings import Settings
from gpu.tokens import Token, decode, figures
from tierstore import Budget, Session
from tierstore.hf.checkpoint import Checkpoint
from tierstore.hf.model import read_config, trace
from tierstore.loading import _engage
from tierstore.machine import inspect_machine
from tierstore.stores.memory import MemoryStore

LAYERS = 80
HBM = 24 << 30
RAM_LEFT = 14 << 30
"""Bytes of RAM that are left to the block of random numbers, the process and everybody else."""
SETUP_SHARE = 0.5
"""The part of the time that may pass before the first token: what fills memory decides how many layers there are."""
WARM = 2
"""Tokens that are not counted: the prefill, which fills all memory, and the one after it."""


@dataclass(frozen=True)
class Giant:
    """A shape, and the bytes of hbm and RAM that its weights may take."""

    shape: Shape
    hbm: int
    ram: int

    @property
    def layer_nbytes(self) -> int:
        """Bytes of the weights of one layer."""
        return (self.shape.nbytes() - self.outer_nbytes) // self.shape.layers

    @property
    def outer_nbytes(self) -> int:
        """Bytes of the weights outside the layers."""
        return sum(math.prod(dims) for name, dims in self.shape.tensors().items() if ".layers." not in name) * 2


def choose(device: torch.device, settings: Settings) -> Giant:
    """As many layers as memory holds and as can be brought there in time, unless ``settings`` says how many."""
    if settings.smoke:
        shape = Shape(hidden=64, layers=6, ffn=224, heads=4, kv_heads=2, vocab=256)
        return Giant(shape, shape.nbytes() // 3, shape.nbytes())
    hbm = min(HBM, torch.cuda.mem_get_info(device)[0] * 2 // 3)
    ram = max(inspect_machine().ram_available_nbytes - RAM_LEFT, 1 << 30)
    if settings.layers:
        return Giant(_shape(settings.layers), hbm, ram)
    whole = Giant(_shape(LAYERS), hbm, ram)
    room = min(hbm + ram, int(settings.seconds * SETUP_SHARE * _fill_rate(device))) - whole.outer_nbytes
    layers = max(2, min(LAYERS, room * 19 // 20 // whole.layer_nbytes))  # a ring and padding take a little
    return Giant(_shape(layers), hbm, ram)


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds per token beside those that the bytes streamed take at the link's measured rate."""
    start, device = time.perf_counter(), torch.device(settings.device)
    sample = (1 << 20) if settings.smoke else SAMPLE_NBYTES
    rates = [upload_rate(device, nbytes=sample)]
    giant = choose(device, settings)
    with open_giant(giant, Path(settings.scratch), device) as session:
        tokens: list[Token] = []
        moved: list[int] = []
        until = start + settings.seconds * 0.85
        for token in decode(session.module, giant.shape.vocab, device):
            tokens.append(token)
            settle(device)
            moved.append(session.report().links["ram->hbm"].nbytes)
            print(f"token {len(tokens)}: {token.seconds:.2f} s", flush=True)
            slowest = max(each.seconds for each in tokens[1:] or tokens)
            if len(tokens) == 16 or (len(tokens) > WARM + 1 and time.perf_counter() + slowest > until):
                break
        rates.append(upload_rate(device, nbytes=sample))
        report, plan = session.report(), session.plan
        return {
            **describe(giant),
            **figures(tokens),
            "first_token_seconds": tokens[0].seconds,
            "seconds_per_token": statistics.median(token.seconds for token in tokens[WARM:]),
            "streamed_nbytes": plan.streamed_nbytes,
            "moved_per_token": (moved[-1] - moved[WARM - 1]) / (len(moved) - WARM),
            "link_rates": rates,
            "peak_bytes": dict(report.peak_bytes),
            "within_budget": report.peak_bytes["hbm"] <= giant.hbm and report.peak_bytes["ram"] <= giant.ram,
            "peak_allocated_nbytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
            "links": {name: [link.nbytes, link.seconds] for name, link in report.links.items()},
            "misses": report.misses,
            "notes": list(report.notes),
            "plan": plan.explain(),
        }


def describe(giant: Giant) -> dict[str, Any]:
    """What is the same for every way to run it."""
    return {
        "layers": giant.shape.layers,
        "weights_nbytes": giant.shape.nbytes(),
        "layer_nbytes": giant.layer_nbytes,
        "hbm_nbytes": giant.hbm,
        "ram_nbytes": giant.ram,
    }


def open_giant(giant: Giant, folder: Path, device: torch.device) -> Session:
    """A session as ``tierstore.load`` opens it, but for the store, which is in memory."""
    write_config(giant, folder)
    store = MemoryStore(views(giant, device), threads=8)
    with ExitStack() as undo:
        undo.callback(store.close)
        config = read_config(folder, None, False)
        traced = trace(folder, config, store, dtype=None, model_class=None, trust_remote_code=False)
        pieces = {name: store.pieces(name) for name in traced.placed}
        checkpoint = Checkpoint(traced.module, pieces, store, traced.ready, traced.notes, folder)
        session = _engage(checkpoint, Budget(giant.hbm, giant.ram), backend_of(device))
        undo.pop_all()
    return session


def write_config(giant: Giant, folder: Path) -> None:
    """config.json, as a checkpoint's folder has it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(giant.shape.config()))


def views(giant: Giant, device: torch.device) -> Mapping[str, torch.Tensor]:
    """Every weight on the host, bfloat16, as a view of one block of random numbers: the same on the same card."""
    shapes = giant.shape.tensors()
    largest = max(map(math.prod, shapes.values()))
    slack = largest // 4 // STRIDE * STRIDE + 1
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.empty(largest + slack, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator)
    block = drawn.cpu()
    found: dict[str, torch.Tensor] = {}
    for number, (name, dims) in enumerate(shapes.items()):
        place = number * STRIDE % slack
        ones = torch.ones(dims, dtype=torch.bfloat16) if len(dims) == 1 else None  # a norm
        found[name] = block[place : place + math.prod(dims)].view(dims) if ones is None else ones
    return found


def _shape(layers: int) -> Shape:
    return Shape(hidden=8192, layers=layers, ffn=28672, heads=64, kv_heads=8, vocab=128256)


def _fill_rate(device: torch.device) -> float:
    """Bytes per second at which memory is pinned and filled, on a sample."""
    nbytes = 2 << 30
    source = torch.ones(nbytes // 4, dtype=torch.uint8)
    pool = backend_of(device).host_pool(nbytes)
    try:
        lease = pool.lease(nbytes, align=4096)
        assert lease is not None
        into = lease

        def fill() -> None:
            buffer = cast(torch.Tensor, into.buffer)
            for part in buffer.chunk(4):
                part.copy_(source[: part.numel()])

        seconds: float = timed(device, fill)
        return nbytes / seconds
    finally:
        pool.close()
