"""Every store and every wrapper keeps the contract."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tierstore.stores import reader
from tierstore.stores.memory import MemoryStore
from tierstore.stores.safetensors import SafetensorsStore
from tierstore.stores.wrappers import CountingStore, FailingStore, SlowStore
from tierstore.stores.zarr import SpillStore
from tierstore.testing.store_contract import (
    Opened,
    StoreContract,
    WritableStoreContract,
    raw_bytes,
    sample_tensors,
)

TENSORS = sample_tensors()
TRUTH = {name: raw_bytes(tensor) for name, tensor in TENSORS.items()}


def save_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of three shards with an index."""
    names = list(tensors)
    weight_map = {name: f"model-{number % 3}.safetensors" for number, name in enumerate(names)}
    for shard in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def spill(root: Path) -> SpillStore:
    return SpillStore.create(
        root, ((name, tensor.reshape(-1).view(torch.uint8)) for name, tensor in TENSORS.items()), fingerprint="model"
    )


class TestSafetensorsFile(StoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        save_file(TENSORS, tmp_path / "model.safetensors")
        store = SafetensorsStore(tmp_path / "model.safetensors")
        yield store, TRUTH
        store.close()


class TestSafetensorsShards(StoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        save_shards(tmp_path, TENSORS)
        store = SafetensorsStore(tmp_path)
        yield store, TRUTH
        store.close()


class TestManyFiles(StoreContract):
    """More files than may stay open."""

    @pytest.fixture
    def opened(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Opened]:
        monkeypatch.setattr(reader, "KEPT_OPEN", 2)
        save_shards(tmp_path, TENSORS)
        store = SafetensorsStore(tmp_path)
        yield store, TRUTH
        store.close()


class TestMemory(WritableStoreContract):
    @pytest.fixture
    def opened(self) -> Iterator[Opened]:
        store = MemoryStore({name: tensor.clone() for name, tensor in TENSORS.items()})
        yield store, TRUTH
        store.close()


class TestSpill(WritableStoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        store = spill(tmp_path / "store")
        yield store, TRUTH
        store.remove()


class TestSpillOpenedAgain(WritableStoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        spill(tmp_path / "store").close()
        store = SpillStore.open(tmp_path / "store", fingerprint="model")
        yield store, TRUTH
        store.close()


class TestSlow(StoreContract):
    @pytest.fixture
    def opened(self, tmp_path: Path) -> Iterator[Opened]:
        save_file(TENSORS, tmp_path / "model.safetensors")
        store = SlowStore(SafetensorsStore(tmp_path), 2e9)
        yield store, TRUTH
        store.close()


class TestFailingWhereItDoesNotFail(StoreContract):
    @pytest.fixture
    def opened(self) -> Iterator[Opened]:
        store = FailingStore(MemoryStore(TENSORS), lambda request: False)
        yield store, TRUTH
        store.close()


class TestCounting(StoreContract):
    @pytest.fixture
    def opened(self) -> Iterator[Opened]:
        store = CountingStore(MemoryStore(TENSORS))
        yield store, TRUTH
        store.close()
