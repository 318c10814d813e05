"""Greedy decoding, step by step, the same for every way to run a model."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, LlamaForCausalLM

_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""What transformers calls the argument: it was renamed in 5.x."""


@dataclass(frozen=True)
class Step:
    """One pass: what it took, the token it chose, and a digest of the last position's logits."""

    seconds: float
    token: int
    digest: str


def prompt_of(vocab: int, length: int) -> torch.Tensor:
    """Token numbers, int64, shape ``(1, length)``: the same for the same arguments."""
    return torch.randint(3, vocab, (1, length), generator=torch.Generator().manual_seed(length))


def decode(module: Any, prompt: torch.Tensor, steps: int) -> Iterator[Step]:
    """Prefill of ``prompt`` as the first step, then one token a step, batch 1."""
    cache = DynamicCache()
    tokens = prompt
    for _ in range(steps):
        start = time.perf_counter()
        with torch.inference_mode():
            logits = _forward(module, tokens, cache)[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
            token = int(tokens)
        seconds = time.perf_counter() - start
        yield Step(seconds, token, digest_of(logits))


def prefill(module: Any, prompt: torch.Tensor) -> Step:
    """One pass over ``prompt`` alone."""
    return next(decode(module, prompt, 1))


def digest_of(logits: torch.Tensor) -> str:
    """Equal for equal bits. Raises ``ValueError`` where not every logit is finite: these prove nothing."""
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the model's logits are not finite")
    return hashlib.sha256(logits.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _forward(module: Any, tokens: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
    logits: torch.Tensor = module(input_ids=tokens, use_cache=True, logits_to_keep=1, **{_CACHE: cache}).logits
    return logits
