"""Greedy decoding on any device, step by step and timed."""

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
class Token:
    """One pass: what it took, the token it chose, and a digest of the logits it chose from."""

    seconds: float
    number: int
    digest: str


def decode(module: Any, vocab: int, device: torch.device, *, prompt: int = 16) -> Iterator[Token]:
    """A prefill of ``prompt`` tokens as the first step, then one token a step, batch 1, without end."""
    tokens = torch.randint(3, vocab, (1, prompt), generator=torch.Generator().manual_seed(prompt)).to(device)
    cache = DynamicCache()
    while True:
        start = time.perf_counter()
        with torch.inference_mode():
            logits = module(input_ids=tokens, use_cache=True, logits_to_keep=1, **{_CACHE: cache}).logits[:, -1]
            tokens = logits.argmax(-1, keepdim=True)
            number = int(tokens)  # the device is through with the pass
        seconds = time.perf_counter() - start
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's logits are not finite")
        raw = logits.contiguous().cpu().view(torch.uint8).numpy().tobytes()
        yield Token(seconds, number, hashlib.sha256(raw).hexdigest()[:16])


def figures(tokens: list[Token]) -> dict[str, Any]:
    """Lists, by what a token has."""
    return {
        "seconds_each": [token.seconds for token in tokens],
        "tokens": [token.number for token in tokens],
        "digests": [token.digest for token in tokens],
    }
