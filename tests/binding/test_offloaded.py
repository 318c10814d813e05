"""What may be done with a module while it is offloaded, and what is refused."""

# To torch's types an attribute of a module is a Tensor or a Module.
# mypy: disable-error-code="arg-type, no-any-return, operator"

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.dlpack import from_dlpack

from tierstore import Budget, Session, offload
from tierstore.errors import ModuleError, SessionClosedError, TierstoreError

SIZE = 64
LAYER = SIZE * SIZE * 4 + SIZE * 4


def layers(count: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(count)])


@pytest.fixture
def module(tmp_path: Path) -> Iterator[nn.Sequential]:
    """Six layers, two of which fit."""
    module = layers()
    with offload(module, Budget(2 * LAYER), store=tmp_path / "store", device="cpu"):
        yield module


def first(module: nn.Sequential) -> Any:
    return module[0].weight


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m[0].bfloat16(),
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.to(memory_format=torch.channels_last) and m.to("meta"),
        lambda m: first(m).set_(torch.zeros(3)),
        lambda m: first(m).detach().resize_(3),
        lambda m: first(m).detach().t_(),
        lambda m: first(m).detach().unsqueeze_(0),
        lambda m: setattr(first(m), "data", torch.zeros(3)),
        lambda m: setattr(first(m), "data", torch.zeros(SIZE, SIZE).double()),
        lambda m: first(m).data_ptr(),
        lambda m: first(m).untyped_storage(),
        lambda m: m.share_memory(),
    ],
)
def test_what_a_ghost_cannot_follow_is_refused_and_changes_nothing(
    module: nn.Sequential, change: Callable[[nn.Sequential], object]
) -> None:
    want = {name: tensor.clone() for name, tensor in layers().state_dict().items()}
    with pytest.raises(ModuleError), torch.no_grad():
        change(module)
    assert all(torch.equal(want[name], tensor) for name, tensor in module.state_dict().items())
    x = torch.randn(2, SIZE)
    assert torch.equal(module(x), layers()(x))


def test_conversions_that_change_nothing_are_allowed(module: nn.Sequential) -> None:
    assert module.float() is module
    assert module.to("cpu") is module
    assert module.train().eval().requires_grad_(False) is module


def test_conversions_are_possible_afterwards(tmp_path: Path) -> None:
    module, plain = layers(), layers()
    with offload(module, Budget(2 * LAYER), store=tmp_path / "store", device="cpu"):
        module(torch.randn(1, SIZE))
    module.double()
    plain.double()
    x = torch.randn(2, SIZE, dtype=torch.float64)
    assert torch.equal(module(x), plain(x))
    assert vars(module).keys() == vars(plain).keys()


def test_values_can_be_read_in_every_way(module: nn.Sequential) -> None:
    want = layers()[0].weight.detach()
    weight = first(module)
    assert weight.tolist() == want.tolist()
    assert np.array_equal(weight.detach().numpy(), want.numpy())
    assert np.array_equal(np.asarray(weight.detach()), want.numpy())
    assert torch.equal(from_dlpack(weight.detach()), want)
    assert weight[1, 2].item() == want[1, 2].item()
    assert float(weight.sum().detach()) == float(want.sum())
    assert repr(weight) == repr(nn.Parameter(want))
    assert torch.equal(copy.deepcopy(weight), want)
    assert weight.is_contiguous()
    assert torch.equal(torch.cat([row for row in weight]), want.reshape(-1))
    with pytest.raises(ValueError, match="read-only"):
        weight.detach().numpy()[0] = 1


def test_a_copy_is_plain_and_independent(module: nn.Sequential) -> None:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        first(module).zero_()
    x = torch.randn(2, SIZE)
    assert torch.equal(twin(x), layers()(x))
    assert {type(p) for p in twin.parameters()} == {nn.Parameter}
    twin.double()
    assert first(twin).dtype == torch.float64
    assert first(module).dtype == torch.float32


def test_tensors_that_are_swapped_in_stay(module: nn.Sequential) -> None:
    other = nn.Parameter(torch.eye(SIZE))
    plain = layers()
    module[2].weight = other
    plain[2].weight = other
    x = torch.randn(2, SIZE)
    for _ in range(3):
        with torch.no_grad():
            assert torch.equal(module(x), plain(x))
    assert module[2].weight is other


def test_two_threads_at_once(module: nn.Sequential) -> None:
    plain = layers()
    inputs = [torch.randn(3, SIZE) for _ in range(8)]
    want = [plain(x).detach() for x in inputs]
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(grads: bool) -> None:
        try:
            start.wait()
            for x, y in zip(inputs, want, strict=True):
                with torch.set_grad_enabled(grads):
                    assert torch.equal(module(x).detach(), y)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number % 2 == 0,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_gradients_of_a_graph_recorded_in_a_forward_without_gradients(tmp_path: Path) -> None:
    class Adapts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(SIZE, SIZE)
            self.weight = nn.Parameter(torch.randn(SIZE, SIZE))

        def forward(self, x: Tensor) -> Tensor:
            with torch.enable_grad():
                loss = (self.layer(x) @ self.weight).square().mean()
            loss.backward()
            return loss.detach()

    x = torch.randn(3, SIZE)
    plain, module = Adapts(), Adapts()
    with offload(module, Budget(LAYER + 2000), store=tmp_path / "store", device="cpu"), torch.no_grad():
        for _ in range(4):
            assert torch.equal(module(x), plain(x))
    for (name, p), q in zip(module.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad), name


def test_a_graph_does_not_outlive_the_session_silently(tmp_path: Path) -> None:
    module = layers()
    with offload(module, Budget(2 * LAYER), store=tmp_path / "store", device="cpu"):
        loss = module(torch.randn(2, SIZE)).sum()
    with pytest.raises(SessionClosedError):
        loss.backward()
    module.zero_grad()
    y = module(torch.randn(2, SIZE)).sum()
    y.backward()
    assert all(p.grad is not None for p in module.parameters())


def test_offloading_twice(tmp_path: Path) -> None:
    module = layers()
    with offload(module, Budget(2 * LAYER), store=tmp_path / "a", device="cpu"):
        with pytest.raises(ModuleError, match="another session"):
            offload(module, Budget(2 * LAYER), store=tmp_path / "b", device="cpu")
        x = torch.randn(2, SIZE)
        assert torch.equal(module(x), layers()(x))


def test_a_part_of_it_is_offloaded_first(tmp_path: Path) -> None:
    module = layers()
    x = torch.randn(2, SIZE)
    with offload(module[2:5], Budget(LAYER + 1000), store=tmp_path / "a", device="cpu"):
        with pytest.raises(ModuleError, match="another session"):
            offload(module, Budget(2 * LAYER), store=tmp_path / "b", device="cpu")
        assert torch.equal(module(x), layers()(x))
    assert torch.equal(module(x), layers()(x))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: nn.LazyLinear(3), "lazy"),
        (lambda: nn.Linear(3, 3, device="meta"), "meta"),
        (lambda: 3, "Module"),
    ],
)
def test_what_has_no_values_is_refused(make: Callable[[], Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ModuleError, match=says):
        offload(make(), Budget(100), store=tmp_path / "store", device="cpu")
    assert not (tmp_path / "store").exists()


def test_close_waits_for_nobody_and_twice_is_once(tmp_path: Path) -> None:
    module = layers()
    session: Session = offload(module, Budget(2 * LAYER), store=tmp_path / "store", device="cpu")
    module(torch.randn(2, SIZE))
    session.close()
    session.close()
    assert torch.equal(first(module), layers()[0].weight)


def _zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def test_a_failing_write_is_told_and_undone(tmp_path: Path) -> None:
    module = layers()
    nbytes = sum(p.nbytes for p in module.parameters())
    with offload(module, Budget(2 * LAYER, nvme=nbytes + 16_000), store=tmp_path / "store", device="cpu"):
        with pytest.raises(TierstoreError):
            _zero(module)
        values = [
            (p == 0).all() or torch.equal(p, q) for p, q in zip(module.parameters(), layers().parameters(), strict=True)
        ]
        assert all(values)
