"""What cannot be done is refused by name, with the module untouched and usable and nothing left behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tierstore
from tierstore import Budget, errors
from tierstore.backends import Backend
from tierstore.binding.slot import storage_users
from tierstore.testing.adversary import adversary

X = torch.ones(2, 64)


def run_passes(module: nn.Module, count: int) -> None:
    for _ in range(count):
        module(X)


def model(seed: int = 0, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64), nn.Linear(64, 64)).eval()


class Untouched:
    """Notes what a module is, and checks later that it still is that."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._parameters = {name: (p, p.detach().clone()) for name, p in module.named_parameters()}
        with torch.no_grad():
            self._out = module(X)

    def check(self) -> None:
        for name, p in self._module.named_parameters():
            then, values = self._parameters[name]
            assert p is then
            assert type(p) is nn.Parameter
            assert torch.equal(p, values)
        for part in self._module.modules():
            assert not part._forward_hooks
            assert not part._forward_pre_hooks
        with torch.no_grad():
            assert torch.equal(self._module(X), self._out)


@pytest.fixture
def module() -> Iterator[nn.Module]:
    made = model()
    noted = Untouched(made)
    yield made
    noted.check()


@pytest.mark.parametrize(
    ("budget", "store", "error", "says"),
    [
        (Budget(100), True, errors.PlanError, "raise Budget.hbm to at least"),
        (Budget(20_000), False, errors.PlanError, "pass store="),
        (Budget(20_000, nvme=100), True, errors.StoreFullError, "nvme"),
        (Budget("4000TiB"), True, errors.BudgetError, "RAM"),
    ],
)
def test_budgets_that_cannot_be_kept(
    module: nn.Module, tmp_path: Path, budget: Budget, store: bool, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        tierstore.offload(module, budget, store=tmp_path / "store" if store else None)
    assert list(tmp_path.iterdir()) == []


def test_the_smallest_budget_is_named(module: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(errors.PlanError) as refused:
        tierstore.offload(module, Budget(1), store=tmp_path)
    with tierstore.offload(module, Budget(refused.value.needed + 1024), store=tmp_path), torch.no_grad():
        module(X)


def test_a_store_of_another_model(module: nn.Module, tmp_path: Path) -> None:
    other = model(1, width=96)
    with (
        tierstore.offload(other, Budget(30_000), store=tmp_path),
        pytest.raises((errors.StoreMismatchError, errors.StoreBusyError)),
    ):
        tierstore.offload(module, Budget(20_000), store=tmp_path)


def test_a_folder_that_is_no_store(module: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(errors.StoreMismatchError):
        tierstore.offload(module, Budget(20_000), store=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small filesystem needs root")
def test_a_full_disk(module: nn.Module, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        with pytest.raises(errors.StoreFullError):
            tierstore.offload(module, Budget(20_000), store=disk)
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_flipped_bit_below_the_session(tmp_path: Path) -> None:
    broken = model()
    session = tierstore.offload(broken, Budget(20_000), store=tmp_path)
    try:
        for chunk in tmp_path.rglob("c/0"):
            with chunk.open("r+b") as file:
                file.seek(17)
                byte = file.read(1)
                file.seek(17)
                file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(errors.ChecksumError), torch.no_grad():
            run_passes(broken, 2)
    finally:
        with pytest.raises(errors.ChecksumError):
            session.close()


@pytest.mark.parametrize("wrong", [None, "module", 3, {"a": torch.ones(2)}])
def test_what_is_no_module(wrong: Any) -> None:
    with pytest.raises(errors.ModuleError):
        tierstore.offload(wrong, Budget(20_000))


def test_what_is_no_budget(module: nn.Module) -> None:
    with pytest.raises(errors.BudgetError):
        tierstore.offload(module, 20_000)  # type: ignore[arg-type]


def test_tensors_without_values() -> None:
    with torch.device("meta"):
        empty = nn.Linear(4, 4)
    with pytest.raises(errors.ModuleError, match="meta"):
        tierstore.offload(empty, Budget(20_000))
    with pytest.raises(errors.ModuleError, match="lazy"):
        tierstore.offload(nn.LazyLinear(4), Budget(20_000))


def test_an_exception_inside_forward_leaves_everything_right(module: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        expected = module(X)
    with tierstore.offload(module, Budget(20_000), store=tmp_path), torch.no_grad():
        for _ in range(3):
            with pytest.raises(RuntimeError, match="shapes"):
                module(torch.ones(2, 63))
            assert torch.equal(module(X), expected)


def test_an_exception_in_the_with_block_restores_the_module(module: nn.Module, tmp_path: Path) -> None:
    def broken_off() -> None:
        with tierstore.offload(module, Budget(20_000), store=tmp_path / "s"):
            module(X)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken_off()
    assert not (tmp_path / "s").exists()


def test_memory_is_freed_once_weights_rest_elsewhere() -> None:
    """On a device of its own memory, the module's own copy is gone when the session begins."""
    adverse = adversary(5)
    backend = Backend(torch.device("cpu"), adverse.engine, adverse.pool, adverse.pool, adverse.pool)
    module = model()
    noted = Untouched(module)
    held = [p.untyped_storage() for p in module.parameters()]
    with tierstore.offload(module, Budget(20_000, ram="1MiB"), backend=backend):
        assert [storage_users(s) for s in held] == [1] * len(held)
        del held
    noted.check()
    adverse.engine.check()
