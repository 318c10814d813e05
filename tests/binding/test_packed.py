"""A packed tensor is a tensor of the values that its format kept: laws over all formats, and what is refused."""

# To torch's types an attribute of a module is a Tensor or a Module.
# mypy: disable-error-code="arg-type, attr-defined, index, no-any-return, no-untyped-call, operator, union-attr"

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tierstore.errors import ModuleError
from tierstore.formats.format import Parts, pack_tensor, unpack_tensor
from tierstore.formats.named import FORMATS, format_named
from tierstore.formats.packed import PackedTensor, packed_parameter
from tierstore.formats.scratch import Scratch

SHAPES = [(48, 40), (70, 130), (3, 48, 40), (6, 4, 3, 3)]
MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]
MATRIX, STACK, KERNEL = (72, 96), (3, 48, 40), (8, 4, 3, 3)

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float64: 2e-5}
"""Of a product of packed weights, relative to its largest element."""


def packed(form: str, *shape: int, dtype: torch.dtype = torch.float32) -> tuple[Any, Tensor]:
    """A packed parameter, and the plain tensor of the same values."""
    torch.manual_seed(sum(shape))
    chosen = format_named(form)
    parts: Parts = pack_tensor(chosen, torch.randn(shape).to(dtype))
    values = unpack_tensor(chosen, parts, shape, dtype)
    return packed_parameter(chosen, parts, shape, dtype, Scratch()), values


def close(have: Tensor, want: Tensor) -> bool:
    assert have.shape == want.shape
    assert have.dtype == want.dtype
    error = (have - want).abs().max() if have.numel() else torch.tensor(0.0)
    return bool(error <= TOLERANCE[want.dtype] * want.abs().max().clamp(min=1e-6)) if want.numel() else True


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_looks_as_the_plain_one(form: str, shape: tuple[int, ...]) -> None:
    weight, plain = packed(form, *shape)
    assert (weight.shape, weight.stride(), weight.dtype, weight.device) == (
        plain.shape,
        plain.stride(),
        plain.dtype,
        plain.device,
    )
    assert weight.numel() == plain.numel()
    assert isinstance(weight, nn.Parameter)
    assert not weight.requires_grad
    assert weight.is_leaf
    assert weight.is_contiguous()
    assert not weight.is_cuda
    assert form in repr(weight)
    assert str(tuple(shape)) in repr(weight)
    assert torch.equal(weight, plain)
    assert weight.tolist() == plain.tolist()
    assert np.array_equal(weight.numpy(), plain.numpy())
    assert np.array_equal(np.asarray(weight), plain.numpy())
    assert weight.flatten()[-1].item() == plain.flatten()[-1].item()
    assert all(part.dim() >= 2 for part in weight.parts.values())


# ---- views


VIEWS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "select": lambda t, draw: t.select(*_at(t, draw)),
    "slice": lambda t, draw: t.narrow(*_at(t, draw), 1) if t.dim() else t,
    "every second": lambda t, draw: t[:: draw(st.integers(1, 3))] if t.dim() else t,
    "transpose": lambda t, draw: t.transpose(-1, -2) if t.dim() > 1 else t,
    "permute": lambda t, draw: t.permute(tuple(reversed(range(t.dim())))),
    "unsqueeze": lambda t, draw: t.unsqueeze(draw(st.integers(0, t.dim()))),
    "expand": lambda t, draw: t.expand(2, *t.shape),
    "flatten": lambda t, draw: t.flatten(),
    "split": lambda t, draw: t.chunk(2)[-1] if t.dim() else t,
    "diagonal": lambda t, draw: t.diagonal() if t.dim() > 1 else t,
    "unfold": lambda t, draw: t.unfold(0, min(2, t.size(0)), 1) if t.dim() else t,
    "detach": lambda t, draw: t.detach(),
    "data": lambda t, draw: t.data,
    "contiguous": lambda t, draw: t.contiguous(),
    "as integers": lambda t, draw: t.view(torch.int32) if t.dtype is torch.float32 else t.view(torch.float32),
}


def _at(tensor: Tensor, draw: Any) -> tuple[int, int]:
    if not tensor.dim():
        return 0, 0
    axis = draw(st.integers(0, tensor.dim() - 1))
    return axis, draw(st.integers(0, tensor.size(axis) - 1))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_views_show_what_views_of_the_plain_one_show(data: st.DataObject) -> None:
    form = data.draw(st.sampled_from(["int8", "int4", "fp8", "fp4"]))
    have, want = packed(form, *data.draw(st.sampled_from([(12, 8), (2, 6, 32), (4, 3, 2, 2)])))
    have = have.detach()
    mode = data.draw(st.sampled_from(MODES))
    for name in data.draw(st.lists(st.sampled_from(sorted(VIEWS)), max_size=5)):
        if name == "select" and not want.dim():
            continue
        answers: list[Any] = []

        def recall(strategy: Any, answers: list[Any] = answers) -> Any:
            answers.append(data.draw(strategy))
            return answers[-1]

        with mode():
            want = VIEWS[name](want, recall)
            replayed = iter(answers)
            have = VIEWS[name](have, lambda _, replayed=replayed: next(replayed))
    assert have.shape == want.shape
    assert have.stride() == want.stride()
    assert have.storage_offset() == want.storage_offset() or not isinstance(have, PackedTensor)
    assert have.tolist() == want.tolist()
    assert torch.equal(have + 1, want + 1)


def test_views_move_and_unpack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, _ = packed("int4", *STACK)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("unpacked")

    monkeypatch.setattr("tierstore.formats.lent.dequantise", fail)
    for view in (weight[1], weight.transpose(1, 2), weight[1].t(), weight.data, weight[0][3:], weight.unbind(0)[2]):
        assert isinstance(view, PackedTensor)
    assert F.linear(torch.randn(2, 40), weight[1]).shape == (2, 48)
    with pytest.raises(AssertionError, match="unpacked"):
        weight.sum()


# ---- products


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
def test_linear(form: str, mode: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight, plain = packed(form, *MATRIX, dtype=dtype)
        bias = torch.randn(MATRIX[0], dtype=dtype)
        x = torch.randn(3, 5, MATRIX[1], dtype=dtype)
        with mode():
            for rows in (x, x[0], x[0, 0], x[:, :0], x.transpose(0, 1)[:, -1:], x[0, :1].expand(4, -1), x[None]):
                for b in (None, bias):
                    assert close(F.linear(rows, weight, b), F.linear(rows, plain, b)), (dtype, rows.shape)
            assert close(x @ weight.T, x @ plain.T)
            assert close(x[0] @ weight.T, x[0] @ plain.T)
            assert close(torch.addmm(bias, x[0], weight.t()), torch.addmm(bias, x[0], plain.t()))
            assert close(torch.mv(weight, x[0, 0]), torch.mv(plain, x[0, 0]))
            y = torch.randn(4, MATRIX[0], dtype=dtype)
            assert close(y @ weight, y @ plain)
            assert close(weight @ x[0].T, plain @ x[0].T)


@pytest.mark.parametrize("form", FORMATS)
def test_a_stack_of_matrices(form: str) -> None:
    weight, plain = packed(form, *STACK)
    rows = torch.randn(9, 40)
    batch = torch.randn(3, 5, 40)
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    for mode in MODES:
        with mode():
            assert close(F.linear(rows, weight[torch.tensor(1)]), F.linear(rows, plain[1]))
            for number, matrix in enumerate(weight):
                assert close(F.linear(rows, matrix), F.linear(rows, plain[number]))
            assert close(torch.bmm(batch, weight.mT), torch.bmm(batch, plain.mT))
            assert close(torch.bmm(weight, batch.mT), torch.bmm(plain, batch.mT))
            assert close(batch @ weight.transpose(1, 2), batch @ plain.transpose(1, 2))
            assert close(
                F.grouped_mm(rows, weight.transpose(-2, -1), offs=ends),
                F.grouped_mm(rows, plain.transpose(-2, -1), offs=ends),
            )


@pytest.mark.parametrize("form", FORMATS)
def test_gradients_of_what_it_is_multiplied_with(form: str) -> None:
    weight, plain = packed(form, *MATRIX)
    stack, plain_stack = packed(form, *STACK)
    ends = torch.tensor([2, 2, 9], dtype=torch.int32)
    uses: list[tuple[tuple[int, ...], Callable[[Tensor, Tensor, Tensor], Tensor]]] = [
        ((3, 5, 96), lambda x, w, s: F.linear(x, w, torch.ones(72))),
        ((3, 5, 96), lambda x, w, s: F.linear(x.transpose(0, 1)[:, -1:], w)),
        ((9, 72), lambda x, w, s: x @ w),
        ((9, 40), lambda x, w, s: F.grouped_mm(x, s.transpose(-2, -1), offs=ends)),
        ((3, 5, 40), lambda x, w, s: torch.bmm(x, s.mT)),
        ((48, 40), lambda x, w, s: x * s[1]),
    ]
    for shape, use in uses:
        x = torch.randn(shape).requires_grad_()
        y = x.detach().clone().requires_grad_()
        use(x, weight, stack).square().mean().backward()
        use(y, plain, plain_stack).square().mean().backward()
        assert x.grad is not None
        assert y.grad is not None
        assert close(x.grad, y.grad), shape


def test_a_graph_keeps_no_unpacked_weight() -> None:
    weight, _ = packed("int4", *MATRIX)
    kept: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = torch.randn(4, MATRIX[1]).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        F.linear(x[None], weight, torch.ones(MATRIX[0])).sum().backward()
        with torch.autocast("cpu", torch.bfloat16):
            F.linear(x[None], weight).float().sum().backward()
    weights = [tensor for tensor in kept if tensor.numel() == weight.numel()]
    assert len(weights) == 2
    assert all(isinstance(tensor, PackedTensor) for tensor in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast(dtype: torch.dtype) -> None:
    weight, plain = packed("int8", *MATRIX, dtype=dtype)
    for x in (torch.randn(4, 96), torch.randn(4, 96).bfloat16()):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            for use in (lambda w, x=x: F.linear(x, w), lambda w, x=x: x @ w.T):
                have, want = use(weight), use(plain)
                assert have.dtype == want.dtype == torch.bfloat16
                assert close(have, want)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, at its first jvp
def test_function_transforms() -> None:
    weight, plain = packed("int8", *MATRIX)
    x = torch.randn(4, 96)
    have = torch.func.vmap(lambda row: F.linear(row, weight))(x)
    assert close(have, F.linear(x, plain))
    slope = torch.func.grad(lambda y: F.linear(y, weight).square().mean())(x)
    assert close(slope, torch.func.grad(lambda y: F.linear(y, plain).square().mean())(x))
    jvp: Any = torch.func.jvp(lambda y: F.linear(y, weight), (x,), (x,))
    assert close(jvp[1], F.linear(x, plain))


def test_what_does_not_fit_is_the_error_of_torch() -> None:
    weight, plain = packed("int4", *MATRIX)
    stack, _ = packed("int4", *STACK)
    for wrong in (torch.randn(3, 95), torch.randn(3, 96).double(), torch.randn(3, 96).half(), torch.tensor(1.0)):
        with pytest.raises(RuntimeError) as told:
            F.linear(wrong, plain)
        with pytest.raises(RuntimeError) as found:
            F.linear(wrong, weight)
        assert str(found.value) == str(told.value)
    with pytest.raises(RuntimeError):
        F.linear(torch.randn(3, 96), weight, torch.randn(71))
    with pytest.raises(RuntimeError):
        torch.bmm(torch.randn(2, 5, 40), stack.mT)


# ---- rows


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", FORMATS)
def test_rows_of_a_table(form: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, plain = packed(form, 130, 40)
    stack, plain_stack = packed(form, *STACK)

    def fail(*args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("unpacked as a whole")

    monkeypatch.setattr("tierstore.formats.lent.dequantise", fail)
    ids = torch.tensor([[3, 129, 0], [3, 64, 63]])
    with mode():
        for some in (ids, ids[0, 0], ids[:, :0], ids.int()):
            assert torch.equal(F.embedding(some, weight), F.embedding(some, plain))
        assert torch.equal(F.embedding(ids, weight, padding_idx=3), F.embedding(ids, plain, padding_idx=3))
        scaled = F.embedding(ids, plain.clone(), max_norm=0.5)
        assert torch.equal(F.embedding(ids, weight, max_norm=0.5), scaled)
        assert torch.equal(F.embedding(ids, weight, max_norm=0.5), scaled)
        assert torch.equal(F.embedding(ids % 48, stack[1]), F.embedding(ids % 48, plain_stack[1]))
        for how in ("sum", "mean", "max"):
            bags = F.embedding_bag(ids, plain, mode=how)
            assert torch.equal(F.embedding_bag(ids, weight, mode=how), bags)
        for outside in (130, -1, 191):
            with pytest.raises(IndexError):
                F.embedding(torch.tensor([1, outside]), weight)


# ---- everything else


OTHER: dict[str, Callable[[Tensor], Any]] = {
    "arithmetic": lambda w: (w * 2 + w).exp() - w.abs().sum(),
    "comparisons": lambda w: (w > 0, w == w, torch.isfinite(w), w.argmax()),
    "cat": lambda w: torch.cat([w, w.detach() * 2, w]),
    "stack of rows": lambda w: torch.stack([row for row in w]),
    "index": lambda w: (
        w[torch.tensor([1, 0])],
        w[w > 0],
        w[..., 1:3].clone(),
        w.gather(0, torch.zeros_like(w).long()),
    ),
    "einsum": lambda w: torch.einsum("i...,j...->ij", w, w),
    "casts": lambda w: (w.to(torch.float64), w.half(), w.to(torch.int32), w.bfloat16()),
    "clone": lambda w: (w.clone(), w.contiguous().clone(), w.cpu().clone()),
    "norm": lambda w: (torch.linalg.vector_norm(w), F.normalize(w, dim=1), F.layer_norm(w, w.shape[-1:])),
    "dropout": lambda w: F.dropout(w, 0.5, training=False).clone(),
    "like": lambda w: (torch.zeros_like(w), w.new_ones(2), torch.empty_like(w).shape),
    "where": lambda w: torch.where(w > 0, w, -w),
    "sort": lambda w: w.sort(dim=0),
    "into": lambda w: torch.zeros(w.shape).copy_(w),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("form", ["int8", "int4", "fp8", "fp4"])
def test_other_operations_are_those_on_the_values(form: str, name: str, mode: Any) -> None:
    for shape in (MATRIX, STACK, KERNEL):
        weight, plain = packed(form, *shape)
        with mode():
            have, want = OTHER[name](weight), OTHER[name](plain)
        for mine, theirs in zip(_list(have), _list(want), strict=True):
            assert type(mine) is type(theirs), type(mine)
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) and not isinstance(value, torch.Size) else [value]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(8, 8, 3, padding=1), (2, 8, 6, 6)),
    "transposed conv": (lambda: nn.ConvTranspose1d(8, 8, 3), (2, 8, 10)),
    "bilinear": (lambda: nn.Bilinear(40, 40, 8), (3, 40)),
    "gru": (lambda: nn.GRU(40, 16, num_layers=2, bidirectional=True), (5, 2, 40)),
    "lstm": (lambda: nn.LSTM(40, 16, batch_first=True), (2, 5, 40)),
    "attention": (lambda: nn.MultiheadAttention(40, 4), (5, 2, 40)),
    "encoder": (lambda: nn.TransformerEncoderLayer(40, 4, 64), (5, 2, 40)),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name: str, mode: Any) -> None:
    build, shape = LAYERS[name]
    torch.manual_seed(0)
    module = build().eval()
    twin = copy.deepcopy(module)
    for place, other in zip(module.modules(), twin.modules(), strict=True):
        for key, parameter in list(place._parameters.items()):
            if parameter is not None and parameter.dim() > 1:
                form = FORMATS["int8"]
                parts = pack_tensor(form, parameter.detach())
                values = unpack_tensor(form, parts, tuple(parameter.shape), parameter.dtype)
                getattr(other, key).data.copy_(values)
                setattr(place, key, packed_parameter(form, parts, tuple(parameter.shape), parameter.dtype, Scratch()))
    x = torch.randn(shape)
    inputs = {"bilinear": 2, "attention": 3}.get(name, 1) * (x,)
    with mode():
        for have, want in zip(_tensors(module(*inputs)), _tensors(twin(*inputs)), strict=True):
            assert torch.equal(have, want) if name in ("conv", "transposed conv", "bilinear") else close(have, want)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for item in value for tensor in _tensors(item)]


def test_no_result_is_overwritten_by_the_next() -> None:
    shared = Scratch()
    form = FORMATS["int4"]
    first, second = torch.randn(64, 64), torch.randn(64, 64)
    a = packed_parameter(form, pack_tensor(form, first), (64, 64), torch.float32, shared)
    b = packed_parameter(form, pack_tensor(form, second), (64, 64), torch.float32, shared)
    for mode in MODES:
        for use in (
            lambda w: F.dropout(w, 0.5, training=False),
            lambda w: w.expand(2, 64, 64).reshape(128, 64),
            lambda w: w.float(),
            lambda w: w.clone(),
            torch.atleast_2d,
            lambda w: F.linear(torch.eye(64), w),
            lambda w: w.max(dim=0).values,
        ):
            with mode():
                result = use(a)
                before = result.clone()
                use(b)
                (b * 1).sum()
            assert torch.equal(result, before)


def test_several_threads() -> None:
    weights = [packed("int4", 96, 64 + 32 * number) for number in range(4)]
    wrong: list[int] = []

    def work(number: int) -> None:
        weight, plain = weights[number]
        for _ in range(30):
            if not torch.equal(weight * 1, plain):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# ---- what is refused, and copies


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.copy_(torch.zeros(MATRIX)),
        lambda w: w.zero_(),
        lambda w: setattr(w, "data", torch.zeros(MATRIX)),
        lambda w: w.data.mul_(2),
        lambda w: w[0].zero_(),
        lambda w: w.view(-1)[:3].fill_(1),
        lambda w: w.__setitem__((0, 1), 1.0),
        lambda w: w.t_(),
        lambda w: w.resize_(3),
        lambda w: w.set_(torch.zeros(3)),
        lambda w: torch.add(torch.zeros(MATRIX), 1, out=w),
        nn.init.normal_,
        lambda w: w.requires_grad_(),
        lambda w: setattr(w, "requires_grad", True),
        nn.Parameter,
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: F.embedding_bag(torch.tensor([[1]]), w, max_norm=0.1, padding_idx=0),
    ],
)
def test_writes_are_refused_by_name(write: Callable[[Any], object]) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        weight, plain = packed("int4-g32", *MATRIX)
        with pytest.raises(ModuleError, match=r'int4-g32.*"keep"'), mode():
            write(weight)
        assert torch.equal(weight, plain)


def test_an_optimizer_does_not_change_it() -> None:
    weight, _ = packed("fp8", *MATRIX)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.step()
    weight.grad = torch.ones(MATRIX)
    with pytest.raises(ModuleError, match="fp8"):
        optimizer.step()


@pytest.mark.parametrize("ask", [lambda w: w.data_ptr(), lambda w: w.untyped_storage(), lambda w: w.share_memory_()])
def test_what_needs_an_address_is_refused(ask: Callable[[Any], object]) -> None:
    with pytest.raises(ModuleError, match="clone"):
        ask(packed("int4", *MATRIX)[0])


def test_copies() -> None:
    weight, plain = packed("int4", *MATRIX)
    weight.note = ["kept"]
    twin = copy.deepcopy(weight)
    assert type(twin) is PackedTensor
    assert isinstance(twin, nn.Parameter)
    assert torch.equal(twin, plain)
    assert twin.note == ["kept"]
    assert twin.note is not weight.note
    twin.codes.zero_()
    assert torch.equal(weight, plain)
    assert torch.equal(copy.copy(weight).detach(), plain)
    file = io.BytesIO()
    torch.save({"parameter": weight, "view": weight[1:3]}, file)
    file.seek(0)
    loaded = torch.load(file)  # with weights only: they are plain
    assert type(loaded["parameter"]) is nn.Parameter
    assert type(loaded["view"]) is Tensor
    assert torch.equal(loaded["parameter"], plain)
    assert torch.equal(loaded["view"], plain[1:3])


def test_a_module_with_it() -> None:
    weight, plain = packed("int4", *MATRIX)
    module = nn.Linear(MATRIX[1], MATRIX[0])
    module.weight = weight
    state = module.state_dict()
    assert isinstance(state["weight"], PackedTensor)
    twin = nn.Linear(MATRIX[1], MATRIX[0])
    twin.load_state_dict(state)
    assert torch.equal(twin.weight, plain)
    with pytest.raises(RuntimeError, match="int4"):
        module.load_state_dict(twin.state_dict())
    assert module.train().requires_grad_(False) is module
    with pytest.raises(ModuleError, match="training"):
        module.requires_grad_()
    assert module.float() is module
    assert module.to("cpu") is module
    assert module.weight is weight
    assert torch.equal(module.weight, plain)
    module.to("meta")
    assert isinstance(module.weight, nn.Parameter)
    assert module.weight.device.type == "meta"
    assert {part.device.type for part in module.weight.parts.values()} == {"meta"}


def test_devices() -> None:
    weight, plain = packed("int4", *MATRIX)
    assert weight.to("cpu") is weight
    away = weight.to("meta")
    assert isinstance(away, PackedTensor)
    assert away.codes.device.type == "meta"
    assert type(weight.to(torch.float64)) is Tensor
    assert torch.equal(weight.to(torch.float64), plain.double())
    parts = {name: part.to("meta") for name, part in weight.parts.items()}
    seeming = packed_parameter(weight.form, parts, MATRIX, torch.float32, Scratch(), device=torch.device("cpu"))
    assert seeming.device.type == "cpu"
    with pytest.raises(ValueError, match="read-only"):
        weight.numpy()[0] = 1
