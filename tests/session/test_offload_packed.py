"""Weights that ``offload`` packs: what is chosen, what comes back, and nothing half done."""

# To torch's types an attribute of a module is a Tensor or a Module.
# mypy: disable-error-code="arg-type, attr-defined, call-overload, index, no-any-return, no-untyped-call"
# mypy: disable-error-code="operator, union-attr"

from __future__ import annotations

import copy
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from tests.zoo.runner import shape_of
from tierstore import Budget, Session, offload
from tierstore.binding.loans import Loans
from tierstore.errors import ChecksumError, ModuleError, PlanError, StoreFullError, TierstoreError
from tierstore.formats.format import pack_tensor, unpack_tensor
from tierstore.formats.named import format_named
from tierstore.formats.packed import PackedTensor

SIZE = 96
ROOMY = Budget(1 << 30)


def layers(count: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(SIZE, SIZE) for _ in range(count)])


def values_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(module: nn.Module, values: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, values[name]) for name, tensor in module.state_dict().items())


def kept(module: nn.Module, form: str) -> Any:
    """A plain copy with the values that ``form`` keeps of every matrix."""
    twin = copy.deepcopy(module)
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            chosen, shape = format_named(form), tuple(parameter.shape)
            parameter.data = unpack_tensor(chosen, pack_tensor(chosen, parameter.data), shape, parameter.dtype)
    return twin


def close(have: Tensor, want: Tensor) -> bool:
    return bool((have - want).abs().max() <= 2e-4 * want.abs().max())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


# ---- the way there and back


@pytest.mark.parametrize(
    ("form", "share"),
    [
        *[("int8", 0.3), ("int8", 0.7), ("int8", 100), ("int4", 0.3), ("int4", 0.7), ("int4", 100), ("fp8", 0.3)],
        *[("fp4", 0.7), ("int8-row", 100), ("mxfp4", 0.3), ("bf16", 0.7)],
    ],
)
def test_it_runs_packed_and_comes_back(form: str, share: float, store: Path) -> None:
    module = layers()
    before, values, plain = shape_of(module), values_of(module), kept(layers(), form)
    packed_nbytes = whole_nbytes(form)
    budget = Budget(max(int(packed_nbytes * share), packed_nbytes // 3))
    x = torch.randn(3, SIZE)
    with offload(module, budget, format=form, store=store, device="cpu") as session:
        assert all(isinstance(layer.weight, PackedTensor) for layer in module)
        assert same(module, values_of(plain))
        for _ in range(3):
            with torch.no_grad():
                assert close(module(x), plain(x))
        report = session.report()
        assert report.peak_bytes["hbm"] <= budget.hbm
        assert report.peak_bytes["nvme"] >= sum(p.nbytes for p in layers().parameters() if p.dim() > 1)
        assert bool(report.bytes_moved) == (share < 1)
        assert any("5 weights are packed as " + form in note for note in report.notes)
    assert shape_of(module) == before
    assert same(module, values)
    assert not store.exists()
    x = x.requires_grad_()
    module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def whole_nbytes(form: str) -> int:
    with offload(layers(), ROOMY, format=form, device="cpu") as session:
        return session.report().peak_bytes["hbm"]


def test_without_a_store_the_kept_values_come_back(tmp_path: Path) -> None:
    module = layers()
    before = shape_of(module)
    session = offload(module, ROOMY, format="int4", device="cpu")
    (note,) = session.report().notes
    assert note.startswith("5 weights are packed as int4; without store=")
    session.close()
    assert session.report().notes == (note,)
    assert shape_of(module) == before
    assert same(module, values_of(kept(layers(), "int4")))
    assert {type(p) for p in module.parameters()} == {nn.Parameter}
    assert all(p.requires_grad for p in module.parameters())


def test_packed_bytes_are_what_counts(store: Path) -> None:
    plain_nbytes = sum(p.nbytes for p in layers().parameters())
    with offload(layers(), Budget(plain_nbytes // 3), store=store, device="cpu") as session:
        assert session.plan.share < 0.5
    with offload(layers(), Budget(plain_nbytes // 3), format="int4", device="cpu") as session:
        assert session.plan.share == 1  # everything fits after packing
        assert session.report().peak_bytes["hbm"] < plain_nbytes // 3
    with pytest.raises(PlanError):
        offload(layers(), Budget(plain_nbytes // 3), device="cpu")


def test_one_loan_serves_a_whole_product(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, plain = layers(), kept(layers(), "int4")
    loans: list[int] = []
    lend = Loans.loan

    def counting(self: Loans, blocks: Any, **how: Any) -> Any:
        loans.append(len(blocks))
        return lend(self, blocks, **how)

    monkeypatch.setattr(Loans, "loan", counting)
    x = torch.randn(2, SIZE)
    with offload(module, Budget(whole_nbytes("int4") // 2), format="int4", store=store, device="cpu"):
        layer: Any = module[3]
        with torch.no_grad():
            assert close(F.linear(x, layer.weight, layer.bias), F.linear(x, plain[3].weight, plain[3].bias))
        assert loans == [3]
        loans.clear()
        assert torch.equal(layer.weight * 1, plain[3].weight)
        assert loans == [2]
        loans.clear()
        y = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(F.linear(y, layer.weight).sum(), y)
        assert close(slope, plain[3].weight.sum(0).expand(2, -1))
        assert loans == [2, 2]


@pytest.mark.parametrize(("form", "parts"), [("int8", ["high", "low"]), ("fp8", ["codes"]), ("int4-g32", ["codes"])])
def test_rows_of_a_packed_table_are_read_where_they_rest(
    form: str, parts: list[str], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    wide = [nn.Linear(64, 512), nn.Linear(512, 1024), nn.Linear(1024, 512), nn.Linear(512, 1024)]
    module = nn.Sequential(nn.Embedding(70_000, 64), *wide)
    ids = torch.tensor([[5, 69_999, 64, 5]])
    read: list[str] = []
    look_up = Loans.lookup

    def noting(self: Loans, block: str, meta: Tensor, indices: Tensor) -> Any:
        found = look_up(self, block, meta, indices)
        read.extend([block] if found is not None else [])
        return found

    monkeypatch.setattr(Loans, "lookup", noting)
    with pytest.raises(PlanError) as told:
        offload(module, Budget(1000), formats={"*": form}, store=store, device="cpu")
    least = told.value.needed
    with offload(module, Budget(int(least * 1.2)), formats={"*": form}, store=store, device="cpu") as session:
        for _ in range(3):
            module(ids)
        read.clear()
        before = session.report().bytes_moved
        rows = module[0](ids)
        assert session.report().bytes_moved - before < least // 4
        assert {name.rpartition(".")[2] for name in read} == set(parts)
        assert torch.equal(rows, module[0].weight[ids])  # all of it, which finds room
        assert session.report().peak_bytes["hbm"] <= int(least * 1.2)


def test_gradients_of_inputs_and_of_what_is_not_packed(store: Path) -> None:
    module, plain = layers(), kept(layers(), "int8")
    x, y = (torch.ones(2, SIZE).requires_grad_() for _ in range(2))
    plain(y).square().mean().backward()
    with offload(module, Budget(whole_nbytes("int8") // 2), format="int8", store=store, device="cpu"):
        module(x).square().mean().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert close(x.grad, y.grad)
        assert all(close(layer.bias.grad, other.bias.grad) for layer, other in zip(module, plain, strict=True))
        assert all(layer.weight.grad is None for layer in module)
        torch.optim.SGD(module.parameters(), lr=0.1).step()
        assert not torch.equal(module[0].bias, layers()[0].bias)
    assert same_weights(module, layers())
    assert not torch.equal(module[0].bias, layers()[0].bias)


def same_weights(module: nn.Sequential, other: nn.Sequential) -> bool:
    return all(torch.equal(a.weight, b.weight) for a, b in zip(module, other, strict=True))


def test_memory_is_freed_on_both_ways(store: Path) -> None:
    for hbm, where in ((1 << 30, None), (1 << 30, store), (40_000, store)):
        module = layers()
        plain = StorageWeakRef(module[1].weight.untyped_storage())
        session = offload(module, Budget(hbm), format="int8", store=where, device="cpu")
        assert plain.expired()
        module(torch.randn(1, SIZE))
        parts = [weakref.ref(part) for part in module[1].weight.parts.values()]
        session.close()
        assert [part() for part in parts] == [None, None, None, None]
        assert session.report().passes == (hbm == 40_000)


# ---- who else holds them


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(200, SIZE)
        self.rnn = nn.LSTM(SIZE, SIZE)
        self.head = nn.Linear(SIZE, 200, bias=False)
        self.head.weight = self.embed.weight
        self.listed = [self.rnn.weight_ih_l0]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0]) @ self.embed.weight @ self.listed[0].T


def test_every_holder_sees_the_packed_one(store: Path) -> None:
    module, ids = Tied(), torch.arange(12).view(3, 4)
    before, values, plain = shape_of(module), values_of(module), kept(Tied(), "int8")
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with offload(module, Budget(200_000), formats={"*": "int8"}, store=store, device="cpu"):
        assert isinstance(module.embed.weight, PackedTensor)
        assert module.head.weight is module.embed.weight
        assert module.listed[0] is module.rnn.weight_ih_l0 is module.rnn._flat_weights[0]
        assert any(module.embed.weight is p for p in optimizer.param_groups[0]["params"])
        with torch.no_grad():
            for _ in range(3):
                assert close(module(ids), plain(ids))
    assert shape_of(module) == before
    assert same(module, values)
    assert module.rnn._flat_weights[0] is module.rnn.weight_ih_l0


def test_views_from_outside_see_the_parameter_again(tmp_path: Path) -> None:
    module, values = layers(), values_of(layers())
    view = module[0].weight.detach()[2:6]
    address = module[0].weight.data_ptr()
    with offload(module, ROOMY, format="int4", device="cpu"):
        assert torch.equal(view, values["0.weight"][2:6])
    assert module[0].weight.data_ptr() == address
    assert torch.equal(module[0].weight, values["0.weight"])
    assert not torch.equal(module[1].weight, values["1.weight"])


def test_attributes_gradients_and_hooks_stay(store: Path) -> None:
    module = layers(2)
    weight: Any = module[0].weight
    weight.note = "mine"
    weight.grad = torch.ones(SIZE, SIZE)
    weight.register_hook(lambda grad: grad * 2)
    with offload(module, ROOMY, format="int4", store=store, device="cpu"):
        assert weight.note == "mine"
        assert torch.equal(weight.grad, torch.ones(SIZE, SIZE))
    assert vars(weight) == {"note": "mine"}
    assert torch.equal(weight.grad, torch.ones(SIZE, SIZE))
    weight.grad = None
    module(torch.ones(1, SIZE)).sum().backward()
    twin = layers(2)
    twin(torch.ones(1, SIZE)).sum().backward()
    assert torch.equal(weight.grad, 2 * twin[0].weight.grad)


def test_strides_come_back(store: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(16, 32, 3), nn.Linear(64, 96)).to(memory_format=torch.channels_last)
    module[1].weight = nn.Parameter(torch.randn(64, 96).T)
    before, values = shape_of(module), values_of(module)
    for where in (store, None):
        with offload(module, ROOMY, format="int8", store=where, device="cpu"):
            assert all(isinstance(layer.weight, PackedTensor) for layer in module)
        assert shape_of(module) == before
        assert same(module, values) == (where is not None)


# ---- what is chosen


def test_formats_by_pattern(store: Path) -> None:
    module = layers()
    chosen = {"0": "keep", "1.weight": "fp8", "[23]": "int8"}
    for default, last in (("int4", "int4"), (None, "")):
        with offload(module, ROOMY, format=default, formats=chosen, store=store, device="cpu"):
            forms = [layer.weight.form.name if isinstance(layer.weight, PackedTensor) else "" for layer in module]
            assert forms == ["", "fp8", "int8", "int8", last]


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"format": "int3"}, "int3.*int4"),
        ({"formats": {"0.weight": "q4"}}, "q4.*int4"),
        ({"format": "int4", "formats": {"5.weight": "int8"}}, "5.weight"),
        ({"formats": {"0.bias": "int8"}}, "0.bias"),
        ({"formats": ["int8"]}, "mapping"),
        ({"format": 8}, "int4"),
    ],
)
def test_a_choice_that_cannot_be(how: dict[str, Any], says: str, store: Path) -> None:
    module = layers()
    before, values = shape_of(module), values_of(module)
    with pytest.raises(ModuleError, match=says):
        offload(module, ROOMY, store=store, device="cpu", **how)
    assert shape_of(module) == before
    assert same(module, values)
    assert not store.exists()


def shares_memory(module: nn.Sequential) -> str:
    flat = torch.randn(2 * SIZE * SIZE)
    module[0].weight = nn.Parameter(flat[: SIZE * SIZE].view(SIZE, SIZE))
    module[1].weight = nn.Parameter(flat[SIZE * SIZE :].view(SIZE, SIZE))
    return "shares memory"


def is_a_subclass(module: nn.Sequential) -> str:
    module[0].weight = nn.Parameter(torch.randn(SIZE, SIZE).as_subclass(_Named))
    return "class is _Named"


def has_gaps(module: nn.Sequential) -> str:
    module[0].weight = nn.Parameter(torch.randn(SIZE, 2 * SIZE)[:, ::2])
    return "gaps"


def has_codes(module: nn.Sequential) -> str:
    module[0].weight.codes = 1
    return "attribute 'codes'"


class _Named(Tensor):
    pass


@pytest.mark.parametrize("change", [shares_memory, is_a_subclass, has_gaps, has_codes])
def test_what_cannot_be_packed_is_kept_with_a_note(change: Callable[[nn.Sequential], str], store: Path) -> None:
    module = layers()
    why = change(module)
    before, values = shape_of(module), values_of(module)
    with pytest.raises(ModuleError, match=f"0.weight cannot be packed as fp8.*{why}"):
        offload(module, ROOMY, formats={"0.weight": "fp8"}, store=store, device="cpu")
    with offload(module, ROOMY, format="int4", store=store, device="cpu") as session:
        assert any("0.weight is not packed" in note and why in note for note in session.report().notes)
        assert not isinstance(module[0].weight, PackedTensor)
        assert isinstance(module[4].weight, PackedTensor)
    assert shape_of(module) == before
    assert same(module, values)


def test_buffers_are_never_packed(store: Path) -> None:
    module = layers(2)
    module.register_buffer("table", torch.randn(SIZE, SIZE))
    with offload(module, ROOMY, formats={"*": "int4"}, store=store, device="cpu"):
        assert type(module.table) is Tensor
    with pytest.raises(ModuleError, match="table"):
        offload(module, ROOMY, formats={"table": "int4"}, store=store, device="cpu")


# ---- hostile


def test_values_that_no_format_holds_are_refused_by_name(store: Path) -> None:
    module = layers()
    with torch.no_grad():
        module[3].weight[2, 3] = float("nan")
    before = shape_of(module)
    with pytest.raises(ModuleError, match=r"3\.weight"):
        offload(module, ROOMY, format="int4", store=store, device="cpu")
    assert shape_of(module) == before
    assert same_weights(module[:3], layers()[:3])


@pytest.mark.parametrize("budget", [Budget(1000), Budget(20_000, nvme=1000)])
def test_a_failure_leaves_the_module_as_it_was(budget: Budget, store: Path) -> None:
    module = layers()
    before, values = shape_of(module), values_of(module)
    addresses = [p.data_ptr() for p in module.parameters()]
    with pytest.raises((PlanError, StoreFullError)):
        offload(module, budget, format="int4", store=store, device="cpu")
    assert shape_of(module) == before
    assert same(module, values)
    assert [p.data_ptr() for p in module.parameters()] == addresses
    assert not store.exists()
    with offload(module, ROOMY, format="int4", store=store, device="cpu"):
        pass
    assert same(module, values)


def test_a_bit_flips_while_the_original_is_on_disk(store: Path) -> None:
    module = layers()
    before, values, plain = shape_of(module), values_of(module), kept(layers(), "int4")
    session = offload(module, ROOMY, format="int4", store=store, device="cpu")
    (file,) = [path for path in store.rglob("0") if path.parent.parent.name.startswith("1.weight")]
    with open(file, "r+b") as written:
        written.write(b"\xff\xff\xff\xff")
    with pytest.raises(ChecksumError, match=r"1\.weight"):
        session.close()
    session.close()
    assert shape_of(module) == before
    assert torch.equal(module[1].weight, plain[1].weight)
    assert all(torch.equal(module[at].weight, values[f"{at}.weight"]) for at in (0, 2, 3, 4))


def test_closing_twice_and_an_exception_in_the_middle(store: Path) -> None:
    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("in the middle")

    module = layers()
    values = values_of(module)
    module.append(Breaks())
    session: Session = offload(module, Budget(40_000), format="int8", store=store, device="cpu")
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            module(torch.randn(1, SIZE))
    session.close()
    session.close()
    assert same(module, values)


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m[1].weight.mul_(2),
        lambda m: m[1].weight.data.copy_(torch.zeros(SIZE, SIZE)),
        lambda m: setattr(m[1].weight, "data", torch.zeros(SIZE, SIZE)),
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m[1].to_empty(device="cpu"),
        lambda m: m.requires_grad_(True),
    ],
)
def test_writes_and_conversions_are_refused(write: Callable[[Any], object], store: Path) -> None:
    x = torch.randn(2, SIZE)
    for hbm in (22_000, 1 << 30):
        module, plain = layers(2), kept(layers(2), "int8")
        with offload(module, Budget(hbm), format="int8", store=store, device="cpu"), torch.no_grad():
            module(x)
            with pytest.raises(ModuleError, match=r"int8|offloaded"):
                write(module)
            assert same(module, values_of(plain))
            assert close(module(x), plain(x))
            assert module.float() is module
            assert module.to("cpu") is module
        module.half()
        assert module[0].weight.dtype is torch.float16


def test_packed_twice_is_packed_once(store: Path) -> None:
    module, values = layers(), values_of(layers())
    with offload(module, ROOMY, format="int8", device="cpu"):
        twin = copy.deepcopy(module)
        with offload(module, Budget(60_000), format="int4", store=store, device="cpu") as inner:
            assert {layer.weight.form.name for layer in module} == {"int8"}
            assert not any(" packed as " in note for note in inner.report().notes)
            x = torch.randn(2, SIZE)
            assert torch.equal(module(x), twin(x))
        assert isinstance(module[0].weight, PackedTensor)
    assert same(module, values_of(kept(layers(), "int8")))
    assert all(isinstance(layer.weight, PackedTensor) for layer in twin)
    assert not same(module, values)


def test_a_copy_is_independent_and_packed(store: Path) -> None:
    module, plain = layers(), kept(layers(), "int4")
    x = torch.randn(2, SIZE)
    with offload(module, Budget(40_000), format="int4", store=store, device="cpu"):
        twin = copy.deepcopy(module)
        fresh = layers()
        fresh.load_state_dict(module.state_dict())
    assert close(twin(x), plain(x))
    assert isinstance(twin[0].weight, PackedTensor)
    assert same(fresh, values_of(plain))
    twin[1].weight = nn.Parameter(torch.eye(SIZE))
    assert close(module(x), layers()(x))


@pytest.mark.cuda
@pytest.mark.parametrize("share", [0.5, 100])
def test_on_a_gpu(share: float, store: Path) -> None:
    module, values, plain = layers().bfloat16(), values_of(layers().bfloat16()), kept(layers().bfloat16(), "int4")
    plain.to("cuda")
    x = torch.randn(3, SIZE, dtype=torch.bfloat16, device="cuda")
    budget = Budget(max(int(whole_nbytes("int4") * share), 20_000))
    with offload(module, budget, format="int4", store=store, device="cuda"):
        assert module[0].weight.is_cuda
        for _ in range(3):
            with torch.no_grad():
                error = (module(x) - plain(x)).abs().max()
                assert error <= 4e-2 * plain(x).abs().max()
    assert same(module, values)
    assert module[0].weight.device.type == "cpu"


def test_nothing_is_left_open(store: Path) -> None:
    module = layers()
    with pytest.raises(TierstoreError), offload(module, Budget(40_000), format="int4", store=store, device="cpu"):
        module[0].weight.zero_()
    assert not store.exists()
    store.mkdir()
    (store / "mine").write_text("mine")
    with pytest.raises(TierstoreError):
        offload(module, ROOMY, format="int4", store=store, device="cpu")
    assert os.listdir(store) == ["mine"]
    assert same(module, values_of(layers()))
