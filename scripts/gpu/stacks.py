"""Stacks of square layers: as much to move as to compute with, in any proportion, by the number of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gpu.rates import timed
from gpu.settings import Settings
from tierstore import Budget

CARD_SHARE = 5
"""A stack takes at most this part (one fifth) of the card's memory."""


class Stack:
    """``plain`` on the device, and ``module`` with the same weights on the host, to be offloaded within ``budget``."""

    @torch.inference_mode(False)
    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.device = device
        self.width = 64 if settings.smoke else 8192
        self.dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        layer_nbytes = self.width**2 * self.dtype.itemsize
        fits = 12 if settings.smoke else torch.cuda.mem_get_info(device)[1] // CARD_SHARE // layer_nbytes
        self.layers = min(48, fits)
        self.nbytes = self.layers * layer_nbytes
        self.budget = Budget(self.nbytes // 4, ram=self.nbytes + self.nbytes // 4)
        self.plain = self._sequence(device)
        self.module = nn.Sequential(*(_layer(weight.detach().cpu()) for weight in self.plain.parameters()))

    def rows(self, count: int) -> torch.Tensor:
        """Input of ``count`` rows, the same for the same count."""
        generator = torch.Generator(self.device).manual_seed(count)
        return torch.randn(count, self.width, device=self.device, dtype=self.dtype, generator=generator)

    def _sequence(self, device: torch.device) -> nn.Sequential:
        generator = torch.Generator(device).manual_seed(0)
        scale = self.width**-0.5  # so that numbers keep their size through the layers
        weights = (
            torch.randn(self.width, self.width, device=device, dtype=self.dtype, generator=generator).mul_(scale)
            for _ in range(self.layers)
        )
        return nn.Sequential(*(_layer(weight) for weight in weights))


def _layer(weight: torch.Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def passes(device: torch.device, run: Callable[[], Any], *, seconds: float, least: int) -> tuple[float, int]:
    """Seconds of one of many passes that follow each other without a stop, and how many they were."""
    one = timed(device, run)
    count = max(least, int(seconds / max(one, 1e-6)))

    def several() -> None:
        for _ in range(count):
            run()

    return timed(device, several) / count, count
