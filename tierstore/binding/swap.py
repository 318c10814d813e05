"""Exchanges what two tensor objects are, so that every reference to either sees the other."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tierstore.binding.views import KEY


def become(tensor: Tensor, other: Tensor) -> None:
    """Turn the object ``tensor`` into what ``other`` is, and ``other`` into what it was.

    Attributes, gradient and hooks stay with the object ``tensor``; its gradient follows it to its device.
    As ``torch.utils.swap_tensors``, which refuses tensors that have weak references (every RNN's
    parameters have): those name the Python object, which keeps its identity here.
    """
    before = cast(Any, tensor)
    gradient, hooks, after = before.grad, before._backward_hooks, before._post_accumulate_grad_hooks
    attributes = {key: value for key, value in tensor.__dict__.items() if key != KEY}
    tensor.__class__, other.__class__ = other.__class__, tensor.__class__
    tensor.__dict__, other.__dict__ = other.__dict__, tensor.__dict__
    cast(Any, torch._C)._swap_tensor_impl(tensor, other)
    tensor.__dict__.update(attributes)
    if gradient is not None:
        tensor.grad = gradient.to(tensor.device)
    if hooks:
        tensor._backward_hooks = hooks
    if after:
        before._post_accumulate_grad_hooks = after


def can_swap(tensor: Tensor) -> bool:
    """Whether only its Python object holds the tensor: no autograd graph does."""
    return bool(cast(Any, tensor)._use_count() == 1)
