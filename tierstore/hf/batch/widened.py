"""Products of 16-bit floats on CPUs without instructions for them: weights are made float32, a piece at a time.

torch computes such products row by row there: 64 rows took 6 times as long as this way, on a processor with AVX2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tierstore.binding.forwards import interpose, withdraw
from tierstore.binding.views import Ghost
from tierstore.formats.packed_views import Packed
from tierstore.formats.scratch import Scratch

PIECE_ELEMENTS = 3 << 18
"""Weights that are made float32 at once: 3 MiB, which stay in a cache until they are multiplied with."""
WHOLE_ROWS = 16
"""Rows are padded to a multiple of as many, which is faster than fewer."""


def why_widened(module: nn.Module) -> str:
    """Why products of ``module`` are better computed in this way; empty where they are not."""
    weights = [each.weight for each in module.modules() if type(each) is nn.Linear]
    slow = {weight.dtype for weight in weights if _is_slow(weight)}
    if not slow:
        return ""
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in slow))
    return f"this CPU has no instructions for products of {names}: they are computed in float32, and rounded"


class Widened:
    """Stands for the forward of those linear layers of ``module`` that torch is slow with: within ``used``, until
    ``close``.

    Each output is the float32 sum, rounded once; its bits depend on its row and on how many rows there are."""

    def __init__(self, module: nn.Module) -> None:
        self._scratch = Scratch()
        self._used = False
        self._throughs: list[tuple[nn.Module, Callable[..., Any]]] = []
        for each in module.modules():
            if type(each) is nn.Linear and _is_slow(each.weight):
                self._stand_for(each)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, products are computed in this way."""
        self._used = True
        try:
            yield
        finally:
            self._used = False

    def close(self) -> None:
        """Leave the modules as they were found. Idempotent."""
        while self._throughs:
            withdraw(*self._throughs.pop())

    def _stand_for(self, linear: nn.Linear) -> None:
        def through(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = args[0] if self._used and len(args) == 1 and not kwargs else None
            weight: Tensor = linear.weight
            if not isinstance(given, Tensor) or given.dtype != weight.dtype or torch.is_grad_enabled():
                return forward(*args, **kwargs)
            if isinstance(weight, Ghost):  # not in memory: each piece would bring all of it
                return forward(*args, **kwargs)
            return self._product(given, weight, linear.bias)

        interpose(linear, through)
        self._throughs.append((linear, through))

    def _product(self, given: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows, (features, columns) = given.numel() // given.shape[-1], weight.shape
        padded = -(-rows // WHOLE_ROWS) * WHOLE_ROWS
        x = self._take("input", columns, padded)
        x[:, :rows] = given.reshape(rows, columns).t()
        x[:, rows:] = 0
        sums = self._take("sums", features, padded)
        step = max(PIECE_ELEMENTS // columns, WHOLE_ROWS)
        for start in range(0, features, step):
            some = weight[start : start + step]
            torch.mm(self._take("piece", len(some), columns).copy_(some), x, out=sums[start : start + len(some)])
        if bias is not None:
            sums += bias.float()[:, None]
        return given.new_empty(*given.shape[:-1], features).copy_(sums[:, :rows].t().view(*given.shape[:-1], features))

    def _take(self, purpose: str, *shape: int) -> Tensor:
        return self._scratch.take(purpose, shape, torch.float32, torch.device("cpu"))


def _is_slow(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or isinstance(weight, Packed):
        return False
    supported = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return weight.dtype in supported and not supported[weight.dtype]()
