"""Tensors in memory, by reference."""

from __future__ import annotations

import pytest
import torch

from tierstore.errors import StoreError
from tierstore.stores.memory import MemoryStore
from tierstore.testing.store_contract import read_tensor


def test_tensors_are_kept_and_not_copied() -> None:
    weight = torch.zeros(5)
    store = MemoryStore({"w": weight})
    weight.fill_(3)
    assert read_tensor(store, "w").view(torch.float32).tolist() == [3.0] * 5
    store.write("w", torch.ones(5).view(torch.uint8))
    assert weight.tolist() == [1.0] * 5
    store.close()


def test_a_large_tensor_is_copied_in_parts() -> None:
    weight = torch.arange(10_000_000, dtype=torch.int32)
    store = MemoryStore({"w": weight})
    assert torch.equal(read_tensor(store, "w").view(torch.int32), weight)
    store.close()


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(4, 4).t()[1:], "contiguous host memory"),
        (torch.zeros(4, device="meta"), "is on meta"),
        (torch.zeros(4, 4).to_sparse(), "layout torch.sparse_coo"),
        (torch.zeros(4, dtype=torch.complex64).conj(), "resolve_conj"),
        (torch.zeros(4, dtype=torch.complex64).conj().imag, "contiguous host memory"),
        (torch.empty(4, dtype=torch.float4_e2m1fn_x2), "dtype torch.float4_e2m1fn_x2"),
    ],
)
def test_what_is_not_plain_bytes_is_refused(tensor: torch.Tensor, match: str) -> None:
    with pytest.raises(StoreError, match=match):
        MemoryStore({"fine": torch.zeros(1), "w": tensor})


def test_a_parameter_is_as_good_as_a_tensor() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    store = MemoryStore({"w": parameter})
    assert read_tensor(store, "w").view(torch.float32).tolist() == [0.0, 1.0, 2.0]
    store.close()
