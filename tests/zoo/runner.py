"""Runs one module of the zoo plain and offloaded, and tells every difference."""

from __future__ import annotations

import copy
import io
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo.registry import Entry, Expected, Interrupted
from tierstore import Budget, Session, offload
from tierstore.backends import Backend
from tierstore.binding.inventory import find_entries, find_spans
from tierstore.feeding import TRANSFER_NBYTES
from tierstore.testing.adversary import Adversary, adversary

LEAST = 0.0
"""The share that stands for what one operation needs at once, times 1.2."""
SHARES = (LEAST, 0.3, 0.6, 0.9, 4.0)
BACKENDS = ("disk", "kept", "staged")


@dataclass(frozen=True)
class Setting:
    """One way to offload: where weights rest, and how much of the module ``hbm`` holds."""

    backend: str
    share: float
    seed: int = 0


def settings() -> list[Setting]:
    """Every setting once."""
    return [Setting(backend, share) for share in SHARES for backend in BACKENDS]


@dataclass(frozen=True)
class Need:
    """Bytes: all that may move, all that stays, and the most that one operation of a run used at once."""

    movable: int
    staying: int
    step: int


# ---- what a module is asked, plain and offloaded


def run_all(module: nn.Module, entry: Entry) -> Iterator[tuple[str, Any]]:
    """Use ``module`` in every way; each outcome under a name."""
    inputs = _seeded(entry.inputs)
    module.eval()
    with torch.no_grad():
        for number, args in enumerate([*inputs, *inputs, inputs[0]]):
            yield f"no_grad {number}", _call(module, args)
    yield "tensors", tensors_of(module)
    with torch.inference_mode():
        for number, args in enumerate([*inputs, inputs[0]]):
            yield f"inference {number}", _call(module, args)
    if entry.grads:
        module.train()
        for number, args in enumerate([inputs[0], inputs[-1]]):
            yield f"train {number}", _train(module, args)
        yield "after training", tensors_of(module)
        module.eval()
    if entry.edits:
        yield from _edit(module)
    with torch.no_grad():
        for number, args in enumerate([*inputs, inputs[0]]):
            yield f"again {number}", _call(module, args)
    if entry.copies:
        yield from _copies(module, inputs[0])


def _train(module: nn.Module, args: Any) -> Any:
    out = _call(module, args)
    total: Any = 0
    for tensor in _leaves(out):
        if tensor.requires_grad:
            total = total + tensor.abs().double().sum() + (tensor.abs().double() ** 2).mean()
    if not isinstance(total, Tensor):
        return freeze(out)
    cast(Any, total).backward()
    gradients = {n: freeze(p.grad) for n, p in module.named_parameters()}
    trained = [p for p in module.parameters() if p.requires_grad and p.grad is not None]
    if trained:
        torch.optim.SGD(trained, lr=0.01, momentum=0.9).step()
    module.zero_grad()
    return freeze(out), freeze(total), gradients


def _edit(module: nn.Module) -> Iterator[tuple[str, Any]]:
    parameters = [p for p in module.parameters() if p.is_floating_point() and type(p).__torch_function__ is not None]
    with torch.no_grad():
        for parameter in parameters[:2]:
            parameter.add_(0.25)
        for parameter in parameters[2:4]:
            parameter.data.mul_(0.5)
        for parameter in parameters[-1:]:
            parameter.data.copy_(parameter.flip(0) if parameter.dim() else parameter * 2)
            parameter.data = parameter.detach() * 0.5
    yield "edited", tensors_of(module)


def _copies(module: nn.Module, args: Any) -> Iterator[tuple[str, Any]]:
    twin = copy.deepcopy(module)
    with torch.no_grad():
        yield "twin", _call(twin, args)
    yield "twin is plain", {n: _kind(t) for n, t in _named(twin)}
    state = module.state_dict()
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    # what the zoo saved itself: custom classes are among it
    saved = torch.load(file, weights_only=False)
    yield "saved", freeze(dict(saved))
    changed = {k: _changed(v) for k, v in saved.items()}
    yield "keys", [str(k) for k in module.load_state_dict(changed)]
    yield "loaded", tensors_of(module)
    with torch.no_grad():
        yield "after loading", _call(module, args)


def _changed(value: Any) -> Any:
    return value * 0.5 if isinstance(value, Tensor) and value.is_floating_point() and type(value) is Tensor else value


def _call(module: nn.Module, args: Any) -> Any:
    torch.manual_seed(7)
    try:
        out = module(*copy.deepcopy(args))
    except (Expected, Interrupted) as error:
        return f"raised {error}"
    return out if torch.is_grad_enabled() else freeze(out)


def tensors_of(module: nn.Module) -> dict[str, Any]:
    """All that can be seen of a module's tensors, and their values in several ways."""
    seen: dict[str, Any] = {
        f"vars of {n}": sorted(vars(m).keys() - {"_apply", "forward"}) for n, m in module.named_modules()
    }
    for name, tensor in _named(module):
        seen[name] = (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.stride(),
            str(tensor.device),
            tensor.requires_grad,
            tensor.is_leaf,
            tensor.is_contiguous(),
            isinstance(tensor, nn.Parameter),
            sorted(k for k in tensor.__dict__ if not k.startswith("_tierstore")),
            freeze(tensor),
        )
        if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__ or "Ghost" in type(tensor).__name__:
            seen[f"{name} list"] = freeze(torch.tensor(tensor.detach().tolist()))
            if tensor.dtype not in (torch.bfloat16,):
                seen[f"{name} numpy"] = tensor.detach().numpy().tobytes()
            if tensor.numel() == 1:
                seen[f"{name} item"] = tensor.item()
    return seen


def _named(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    for name, buffer in module.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", buffer


def _kind(tensor: Tensor) -> str:
    return type(tensor).__name__


def _seeded(make: Callable[[], Any]) -> Any:
    torch.manual_seed(1)
    return make()


def _is_wrapper(tensor: Tensor) -> bool:
    return bool(_python_dispatch.is_traceable_wrapper_subclass(tensor))


def _inside(tensor: Any) -> dict[str, Tensor]:
    """The tensors that a wrapper subclass is made of."""
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def freeze(value: Any) -> Any:
    """``value`` with plain copies of its tensors, that nothing changes any more."""
    if isinstance(value, Tensor):
        if _is_wrapper(value) and type(value).__name__ not in ("GhostTensor", "GhostParameter"):
            return freeze(_inside(value))
        with torch.no_grad():
            copied = value.detach().clone()
            if type(copied) is not Tensor:
                copied = copied.as_subclass(Tensor)
            return copied
    if isinstance(value, Mapping):
        return {k: freeze(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [freeze(v) for v in value]
    if isinstance(value, int | float | str | bytes | bool | torch.dtype | torch.device | type(None)):
        return value
    return {k: freeze(v) for k, v in vars(value).items() if isinstance(v, Tensor | list | tuple | dict)}


def same(a: Any, b: Any) -> bool:
    """Whether two frozen values are equal, tensors bit for bit (NaN is equal to NaN)."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.layout is not torch.strided or b.layout is not torch.strided:
            return a.layout == b.layout and same(a.to_dense(), b.to_dense())
        if a.is_quantized or b.is_quantized:
            return torch.equal(a, b)
        return torch.equal(a, b) or torch.equal(torch.view_copy(_bits(a), torch.uint8), _bits(b).view(torch.uint8))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return a == b or (a != a and b != b)
    return bool(type(a) is type(b) and a == b)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1)


def difference(a: Any, b: Any, path: str = "") -> str:
    """Where two frozen values first differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *b]:
            if key not in a or key not in b:
                return f"{path}.{key} only on one side"
            if not same(a[key], b[key]):
                return difference(a[key], b[key], f"{path}.{key}")
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            if not same(x, y):
                return difference(x, y, f"{path}[{number}]")
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype:
        return f"{path}: {int((a != b).sum())} of {a.numel()} elements of {tuple(a.shape)}, {a.dtype}"
    return f"{path}: {str(a)[:80]} became {str(b)[:80]}"


# ---- how a module looks before and after


def shape_of(module: nn.Module) -> dict[str, Any]:
    """What must be as it was found: objects, classes, attributes, hooks, and who shares memory with whom."""
    looks: dict[str, Any] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        looks[f"module {name}"] = (id(child), type(child))
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called"):
            looks[f"{kind} {name}"] = [(k, id(v)) for k, v in getattr(child, kind).items()]
    named = list(_named(module))
    for name, tensor in named:
        looks[name] = (id(tensor), type(tensor), tensor.requires_grad, tensor.stride(), str(tensor.device))
        looks[f"{name} attributes"] = sorted(vars(tensor))
        looks[f"{name} hooks"] = [id(h) for h in (tensor._backward_hooks or {}).values()]
        looks[f"{name} shares"] = [other for other, t in named if _share(t, tensor)]
    return looks


def _share(a: Tensor, b: Tensor) -> bool:
    if any(_is_wrapper(t) or t.layout is not torch.strided for t in (a, b)) or not a.numel():
        return a is b
    first, second = a.untyped_storage().data_ptr(), b.untyped_storage().data_ptr()
    return first + a.storage_offset() * a.itemsize == second + b.storage_offset() * b.itemsize


# ---- what one operation needs


class _Trace(cast(Any, TorchDispatchMode)):  # type: ignore[misc]  # it has no types
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.entries = find_entries(module)
        self.spans = find_spans(self.entries, in_place=True)
        self.most = 0
        self._where: dict[int, list[Any]] = {}
        for span in self.spans:
            self._where.setdefault(span.entries[0].tensor.untyped_storage()._cdata, []).append(span)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        used: dict[int, int] = {}
        self._note((args, kwargs or {}), used)
        self.most = max(self.most, sum(used.values()))
        return func(*args, **(kwargs or {}))

    def _note(self, value: Any, used: dict[int, int]) -> None:
        for tensor in _leaves(list(value) if isinstance(value, tuple) else value):
            if _is_wrapper(tensor):
                self._note(_inside(tensor), used)
                continue
            if tensor.layout is not torch.strided or tensor.device.type == "meta":
                continue
            at = tensor.storage_offset() * tensor.itemsize
            for span in self._where.get(tensor.untyped_storage()._cdata, ()):
                if span.start <= at < span.end:
                    used[id(span)] = span.nbytes


def need_of(entry: Entry) -> Need:
    """Trace the runs of a module of its own; also what cannot move counts."""
    module = _seeded(entry.build)
    trace = _Trace(module)
    staying = sum(e.tensor.numel() * e.tensor.element_size() for e in trace.entries if e.stays)
    total = sum(span.nbytes for span in trace.spans)
    largest = max((span.nbytes for span in trace.spans), default=1)
    with trace:
        for _ in run_all(module, Entry(entry.build, entry.inputs, entry.grads, False, False)):
            pass
    return Need(total, staying, max(trace.most, largest))


# ---- the comparison


@dataclass(frozen=True)
class Plain:
    """The plain module's outcomes, its tensors at the end, and what of its looks it changed by itself."""

    outcomes: list[tuple[str, Any]]
    end: dict[str, Any]
    changed: frozenset[str]


def expected(entry: Entry) -> Plain:
    """Run a plain module."""
    module = _seeded(entry.build)
    before = shape_of(module)
    with _quiet():
        outcomes = [(name, freeze(value)) for name, value in run_all(module, entry)]
    after = shape_of(module)
    return Plain(outcomes, tensors_of(module), frozenset(k for k in before if before[k] != after.get(k)))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def budget_of(setting: Setting, need: Need) -> Budget:
    """Bytes for a setting."""
    whole = need.movable + need.staying
    least = need.staying + -(-need.step * 6 // 5)
    hbm = max(least, int(setting.share * whole))
    ram = {"disk": 0, "kept": 2 * whole + (1 << 20), "staged": max(need.movable // 4, need.step, 64 << 10)}[
        setting.backend
    ]
    return Budget(hbm, ram)


def open_session(
    module: nn.Module, setting: Setting, need: Need, folder: Path
) -> tuple[Session, Adversary | None, Budget]:
    """Offload ``module`` in the way of ``setting``."""
    budget = budget_of(setting, need)
    if setting.backend == "disk":
        return offload(module, budget, store=folder / "store", device="cpu"), None, budget
    adv = adversary(setting.seed)
    backend = Backend(torch.device("cpu"), adv.engine, adv.pool, adv.pool)
    store = folder / "store" if setting.backend == "staged" else None
    return offload(module, budget, store=store, backend=backend), adv, budget


def examine(
    entry: Entry,
    setting: Setting,
    folder: Path,
    *,
    need: Need | None = None,
    want: Plain | None = None,
) -> list[str]:
    """Every way in which the offloaded module differs from the plain one; an empty list is success."""
    with _quiet():
        need = need or need_of(entry)
        want = want or expected(entry)
        module = _seeded(entry.build)
        before = {k: v for k, v in shape_of(module).items() if k not in want.changed}
        problems: list[str] = []
        session, adv, budget = open_session(module, setting, need, folder)
        try:
            for (name, value), (_, outcome) in zip(run_all(module, entry), want.outcomes, strict=True):
                have = freeze(value)
                del value
                if not same(outcome, have):
                    problems.append(f"{name}{difference(outcome, have)}")
        finally:
            session.close()
        if adv is not None:
            problems += adv.engine.faults
        problems += _after(module, session, before, budget, need, folder)
        end = tensors_of(module)
        if not same(want.end, end):
            problems.append(f"at the end{difference(want.end, end)}")
    return problems


def _after(
    module: nn.Module, session: Session, before: dict[str, Any], budget: Budget, need: Need, folder: Path
) -> list[str]:
    problems = []
    looks = shape_of(module)
    problems += [f"{k}: {before.get(k)} became {looks.get(k)}" for k in before if before[k] != looks.get(k)]
    report = session.report()
    if report.peak_bytes["hbm"] > budget.hbm:
        problems.append(f"peak of hbm {report.peak_bytes['hbm']} is over {budget.hbm}")
    # residents pass through a little host memory on their way up, whatever the budget
    if report.peak_bytes["ram"] > budget.ram + TRANSFER_NBYTES[0]:
        problems.append(f"peak of ram {report.peak_bytes['ram']} is over {budget.ram}")
    if need.movable + need.staying > budget.hbm and not report.bytes_moved:
        problems.append("no byte moved")
    if (folder / "store").exists():
        problems.append(f"the store was left: {os.listdir(folder / 'store')}")
    left = [t.name for t in threading.enumerate() if t.name.startswith("tierstore")]
    if left:
        problems.append(f"threads left: {left}")
    return problems
