"""The sums ``X^T X`` over the inputs X that linear products multiply weights with, collected while a module runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tierstore.formats.format import matrices_of


class Gram:
    """``X^T X`` of ``k`` input features, float32 on ``device``, over ``tokens`` rows of X."""

    def __init__(self, k: int, device: torch.device) -> None:
        self.matrix = torch.zeros((k, k), device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count ``inputs``, floating [..., k]."""
        rows = inputs.reshape(-1, len(self.matrix)).to(torch.float32)
        self.matrix.addmm_(rows.T, rows)
        self.tokens += len(rows)


class Grams(TorchFunctionMode):
    """While it is entered, every product ``x @ w.T`` with one of ``weights``, by ``linear`` or so, adds to w's Gram.

    A matrix of a stack counts for itself, as experts do. Weights that are multiplied one after another with the same
    tensor, such as those of queries, keys and values, share a Gram. Weights that are used in another way have none.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._matrices: dict[tuple[int, int, int], tuple[str, int]] = {}
        self._grams: dict[str, dict[int, Gram]] = {name: {} for name in weights}
        for name, weight in weights.items():
            _, n, k = matrices_of(weight.shape)
            for number, matrix in enumerate(weight.detach().view(-1, n, k)):
                self._matrices[matrix.data_ptr(), n, k] = name, number
        self._last: tuple[Tensor, Gram] | None = None

    def of(self, name: str) -> Mapping[int, Gram]:
        """What was collected for weight ``name``, by the number of the matrix in its stack."""
        return self._grams[name]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            self._see(*_operands(*args, **kwargs))
        elif func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and not kwargs and args[1].dim() == 2:
            self._see(args[0], args[1].T)
        return func(*args, **kwargs)

    def _see(self, inputs: Tensor, weight: Tensor) -> None:
        if weight.dim() != 2 or not weight.is_contiguous():
            return
        found = self._matrices.get((weight.data_ptr(), *weight.shape))
        if found is None:
            return
        grams, number = self._grams[found[0]], found[1]
        if self._last is not None and inputs is self._last[0]:
            gram = grams.setdefault(number, self._last[1])
            if gram is self._last[1]:
                return
        if number not in grams:
            grams[number] = Gram(weight.shape[1], weight.device)
        grams[number].add(inputs.detach())
        self._last = inputs, grams[number]


def _operands(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return input, weight
