"""Runs one module of the zoo plain and offloaded, and tells every difference."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.zoo.asking import named_tensors, run_all, seeded, tensors_of
from tests.zoo.comparing import difference, freeze, inside_of, is_wrapper, leaves_of, same
from tests.zoo.registry import Entry
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


# ---- how a module looks before and after


def shape_of(module: nn.Module) -> dict[str, Any]:
    """What must be as it was found: objects, classes, attributes, hooks, and who shares memory with whom."""
    looks: dict[str, Any] = {}
    for name, child in module.named_modules(remove_duplicate=False):
        looks[f"module {name}"] = (id(child), type(child))
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called"):
            looks[f"{kind} {name}"] = [(k, id(v)) for k, v in getattr(child, kind).items()]
    named = list(named_tensors(module))
    for name, tensor in named:
        looks[name] = (id(tensor), type(tensor), tensor.requires_grad, tensor.stride(), str(tensor.device))
        looks[f"{name} attributes"] = sorted(vars(tensor))
        looks[f"{name} hooks"] = [id(h) for h in (tensor._backward_hooks or {}).values()]
        looks[f"{name} shares"] = [other for other, t in named if _share(t, tensor)]
    return looks


def _share(a: Tensor, b: Tensor) -> bool:
    if any(is_wrapper(t) or t.layout is not torch.strided for t in (a, b)) or not a.numel():
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
        for tensor in leaves_of(list(value) if isinstance(value, tuple) else value):
            if is_wrapper(tensor):
                self._note(inside_of(tensor), used)
                continue
            if tensor.layout is not torch.strided or tensor.device.type == "meta":
                continue
            at = tensor.storage_offset() * tensor.itemsize
            for span in self._where.get(tensor.untyped_storage()._cdata, ()):
                if span.start <= at < span.end:
                    used[id(span)] = span.nbytes


def need_of(entry: Entry) -> Need:
    """Trace the runs of a module of its own; also what cannot move counts."""
    module = seeded(entry.build)
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
    module = seeded(entry.build)
    before = shape_of(module)
    held = [*module.modules(), *named_tensors(module)]  # else what the module drops may hand its id on
    with _quiet():
        outcomes = [(name, freeze(value)) for name, value in run_all(module, entry)]
    after = shape_of(module)
    del held
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
    backend = Backend(torch.device("cpu"), adv.engine, adv.pool, adv.pool, adv.pool)
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
        module = seeded(entry.build)
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
