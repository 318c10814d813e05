"""The same giant within the same budget, offloaded by Accelerate."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gpu.giant import Giant, choose, describe, views, write_config
from gpu.settings import Settings
from gpu.tokens import Token, decode, figures


def measure(settings: Settings) -> dict[str, Any]:
    """Seconds per token with as many layers on the device as ``hbm`` holds, and the rest in the host's memory."""
    if find_spec("accelerate") is None:
        return {"skipped": "accelerate is not installed"}
    start, device = time.perf_counter(), torch.device(settings.device)
    giant = choose(device, settings)
    module, places = _dispatched(giant, Path(settings.scratch), device)
    opened = time.perf_counter() - start
    tokens: list[Token] = []
    for token in decode(module, giant.shape.vocab, device):
        tokens.append(token)
        print(f"token {len(tokens)}: {token.seconds:.2f} s", flush=True)
        if len(tokens) == 4 or time.perf_counter() + 1.2 * token.seconds > start + settings.seconds:
            break
    return {
        **describe(giant),
        **figures(tokens),
        "open_seconds": opened,
        "seconds_per_token": statistics.median(token.seconds for token in tokens[1:] or tokens),
        "only_prefill": len(tokens) == 1,
        "modules_on_host": sum(place == "cpu" for place in places.values()),
        "peak_allocated_nbytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def _dispatched(giant: Giant, folder: Path, device: torch.device) -> tuple[Any, Mapping[str, Any]]:
    """The model with hooks of Accelerate, and which module is where; weights are made where they stay."""
    import accelerate

    write_config(giant, folder)
    factory: Any = AutoModelForCausalLM
    with accelerate.init_empty_weights(include_buffers=False):
        module: Any = factory.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    places: dict[str, Any] = {"": "cpu"}
    if device.type == "cuda":
        most = {device.index or 0: giant.hbm, "cpu": 1 << 50}
        places = accelerate.infer_auto_device_map(
            module, max_memory=most, no_split_module_classes=["LlamaDecoderLayer"], dtype=torch.bfloat16
        )
    for name, view in views(giant, device).items():
        place = next(where for prefix, where in places.items() if f"{name}.".startswith(f"{prefix}." if prefix else ""))
        owner, _, key = name.rpartition(".")
        weight = view.clone() if place == "cpu" else view.to(torch.device("cuda", place))
        module.get_submodule(owner)._parameters[key] = nn.Parameter(weight, requires_grad=False)
    module.eval()
    if device.type == "cuda":
        return accelerate.dispatch_model(module, device_map=places), places
    return accelerate.cpu_offload(module, execution_device=device), places
