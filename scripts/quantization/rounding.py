"""Rounds what the linear layers of a model are given, as compiled products with packed weights do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import pad

from tierstore.formats.named import format_named
from tierstore.kernels.int4_matmul.reference import round_input

MOST = {"int4": 127, "int8": 127 * 128}
"""The largest integer that a value becomes, by the format of the weight."""


def kind_of(form: str) -> str:
    """The format ``form`` without its group."""
    return form.partition("-g")[0]


@contextmanager
def rounded_input(model: Any, form: str) -> Iterator[None]:
    """Meanwhile ``model`` computes as if all its linear layers were packed as ``form``, with rounded input; but for the
    head, which is int8 with every format."""
    head = model.get_output_embeddings()
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                own = "int8" if module is head else form
                handle = module.register_forward_pre_hook(_rounding(format_named(own).group, MOST[kind_of(own)]))
                hooks.callback(handle.remove)
        yield


def _rounding(group: int, most: int) -> Any:
    def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, *others = args
        columns = x.shape[-1]
        whole, factors = round_input(pad(x.reshape(-1, columns), (0, -columns % group)), group, most)
        near = (whole * factors[:, :, None]).flatten(1)[:, :columns]
        return (near.to(x.dtype).view(x.shape), *others)

    return hook
