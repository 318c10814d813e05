"""Tensors that stay in memory, moved to the compute device while a session lasts."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tierstore.binding.swap import become


class Relocated:
    """Moves ``tensors`` to ``device``, each as the same object; ``undo`` takes them, as they then are, back."""

    def __init__(self, tensors: Iterable[Tensor], device: torch.device) -> None:
        self._moved: list[tuple[Tensor, Tensor]] = []
        for tensor in tensors:
            if tensor.device != device:
                with torch.no_grad():
                    there = tensor.detach().to(device)
                if isinstance(tensor, nn.Parameter):
                    there = nn.Parameter(there, tensor.requires_grad)
                become(tensor, there)
                self._moved.append((tensor, there))

    def undo(self) -> None:
        """Put the tensors back on their own devices, with their present values. Idempotent."""
        while self._moved:
            tensor, original = self._moved.pop()
            with torch.no_grad():
                original.detach().copy_(tensor.detach())
            original.requires_grad_(tensor.requires_grad)
            become(tensor, original)
