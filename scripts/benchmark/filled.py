"""A decoder whose KV cache is filled with random keys and values: what is measured is their way to attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Decoder:
    """The shape of a Llama with hardly any weights beside its keys and values, in bfloat16."""

    layers: int
    kv_heads: int
    head_dim: int
    hidden: int

    def kv_nbytes(self, tokens: int) -> int:
        """Bytes of all keys and values of so many tokens."""
        return tokens * self.layers * 2 * self.kv_heads * self.head_dim * 2

    def build(self, device: torch.device) -> Any:
        """The model, with random weights."""
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=self.hidden,
            intermediate_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.kv_heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=1 << 20,
        )
        model: Any = LlamaForCausalLM(config)
        return model.to(device, torch.bfloat16).eval().requires_grad_(False)

    def fill(self, cache: Any, tokens: int, device: torch.device) -> None:
        """Put ``tokens`` positions of one sequence into ``cache``."""
        while tokens:
            count = min(tokens, cache.memory.columns_at_once(1))
            shape = (1, self.kv_heads, count, self.head_dim)
            keys, values = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
            for layer in range(self.layers):
                cache.update(keys, values, layer)
            cache.state.finish()
            tokens -= count


def decode(
    session: Any,
    timed: Callable[[Callable[[], None]], float],
    *,
    warm: int,
    steps: int,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Seconds of each steady step of ``session``'s model with its filled cache, and bytes that one of them read.
    Before each of them comes ``between``."""
    device = next(session.module.parameters()).device
    token = torch.zeros((1, 1), dtype=torch.int64, device=device)

    def step() -> None:
        session.module(token, past_key_values=session.kv, use_cache=True)

    seconds = []
    with torch.no_grad():
        for _ in range(warm):
            step()
        before = session.report().kv.read_nbytes
        for _ in range(steps):
            between()
            seconds.append(timed(step))
    kv = session.report().kv
    return {"seconds": seconds, "read_nbytes": (kv.read_nbytes - before) / steps, "kv": kv}
