"""Exchanges what two tensor objects are, so that every reference to either sees the other."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def swap_tensors(a: Tensor, b: Tensor) -> None:
    """Exchange class, attributes and content of two tensor objects.

    As ``torch.utils.swap_tensors``, which refuses tensors that have weak references (every RNN's
    parameters have): those name the Python object, which keeps its identity here. Neither tensor may
    be held by an autograd graph.
    """
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    cast(Any, torch._C)._swap_tensor_impl(a, b)


def can_swap(tensor: Tensor) -> bool:
    """Whether only its Python object holds the tensor."""
    return bool(cast(Any, tensor)._use_count() == 1)


def carry_gradient(source: Tensor, target: Tensor) -> None:
    """Give ``target`` the gradient and the gradient hooks of ``source``."""
    hooks, after = source._backward_hooks, cast(Any, source)._post_accumulate_grad_hooks
    if source.grad is not None:
        target.grad = source.grad
    if hooks:
        target._backward_hooks = hooks
    if after:
        cast(Any, target)._post_accumulate_grad_hooks = after
