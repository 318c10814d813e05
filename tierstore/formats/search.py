"""Scales and codes that make a small squared error."""

from __future__ import annotations

import torch
from torch import Tensor


def affine4(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    lo, hi = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    scale = ((hi - lo) / 15).bfloat16().float()
    zero = (lo + 8 * scale).bfloat16().float()
    safe = torch.where(scale == 0, 1, scale)
    codes = ((values - zero[..., None]) / safe[..., None]).round() + 8
    return codes.clamp(0, 15).to(torch.uint8), scale, zero


def affine8(values: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lo, hi = values.amin(2).clamp_max(0), values.amax(2).clamp_min(0)
    exact = (hi - lo) / 254
    steps = exact.amax(1, keepdim=True) / 255 if exact.numel() else exact.new_zeros((exact.shape[0], 1))
    scale_codes = (exact / torch.where(steps == 0, 1, steps)).ceil().clamp(1, 255)
    scale = (steps * scale_codes).bfloat16().float()
    safe = torch.where(scale == 0, 1, scale)
    zero_codes = (((hi + lo) / 2 / safe).round() + 128 + 8).clamp(0, 255)
    zero = (scale * (zero_codes - 128) / 17).bfloat16().float()
    codes = ((values - 17 * zero[..., None]) / safe[..., None]).round() + 136
    return codes.clamp(0, 255).to(torch.uint8), scale_codes.to(torch.uint8), zero_codes.to(torch.uint8), steps


def symmetric8(values: Tensor) -> tuple[Tensor, Tensor]:
    top = values.abs().amax(1, keepdim=True) if values.numel() else values.new_zeros((values.shape[0], 1))
    scales = (top / 127).bfloat16()
    codes = (values / torch.where(scales == 0, 1, scales).float()).round().clamp(-128, 127).to(torch.int8)
    return codes, scales
