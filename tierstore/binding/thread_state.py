"""What torch keeps for a thread and a forward may change, so that each of several in one thread can have its own."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch

_C = cast(Any, torch._C)


class ThreadState(NamedTuple):
    """Grad mode, inference mode, autocast and, for a CUDA device, the current stream."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, bool, torch.dtype], ...]
    caches_casts: bool
    stream: Any

    @staticmethod
    def of(device: torch.device) -> ThreadState:
        """The present one of this thread, which computes on ``device``."""
        there = device.type != "cpu"
        return ThreadState(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            (_autocast("cpu"), _autocast(device.type)) if there else (_autocast("cpu"),),
            torch.is_autocast_cache_enabled(),
            torch.cuda.current_stream() if device.type == "cuda" else None,
        )

    def resume(self) -> None:
        """Make it the present one, but for inference mode, which only a ``with`` can set."""
        torch.set_grad_enabled(self.grad)
        for kind, enabled, dtype in self.autocast:
            torch.set_autocast_enabled(kind, enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self.caches_casts)
        if self.stream is not None and torch.cuda.current_stream() != self.stream:
            torch.cuda.set_stream(self.stream)


def _autocast(kind: str) -> tuple[str, bool, torch.dtype]:
    return kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)


def stacked() -> tuple[Any, ...]:
    """What torch keeps for the thread on stacks, where only what came last can be taken away: modes for functions and
    for the dispatcher, hooks on saved tensors, levels of ``torch.func``, and a backward under way.

    While it differs from what another forward left, only the forward that made the difference may go on.
    """
    return (
        _C._len_torch_function_stack(),
        _C._len_torch_dispatch_stack(),
        _C._autograd._top_saved_tensors_default_hooks(True),
        len(_C._functorch.get_interpreter_stack() or ()),
        _C._current_graph_task_id(),
    )
