"""Where the bytes of a loaded parameter lie, found by letting a loader run on tensors that only know their place.

A ``Placed`` tensor has a shape, a dtype and strides, but no bytes: only the extents of a store that its
storage is made of. Views of it are views; copies, stacks and concatenations move extents; everything else
is remembered as a ``Computed`` and replayed on real bytes by ``materialise``. So whatever a loader does to
a checkpoint, what was mere placement is told from what is arithmetic without knowing the loader's rules.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from math import prod
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map

from tierstore.contracts import ReadRequest, Store
from tierstore.extents import Extent

MIN_RUN = 4096
"""Bytes. Pieces that are shorter than this on average cost more to gather than to convert once."""

MAX_RUNS = 1 << 16
"""Pieces of one operand. More cost the interpreter more than one conversion costs the disk."""

_COMPARED_AT_ONCE = 8 << 20
_aten = torch.ops.aten
_VIEWS_BY_NATURE = (_aten._unsafe_view.default,)


@dataclass(frozen=True, eq=False, slots=True)
class Computed:
    """A contiguous tensor that only arithmetic can make: ``func(*args, **kwargs)``, with ``Placed`` arguments."""

    func: Callable[..., torch.Tensor]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        return prod(self.shape) * self.dtype.itemsize


class Run(NamedTuple):
    """``nbytes`` at byte ``start`` of a source (a store's file number, or a tensor to compute), landing at ``at``."""

    source: int | Computed
    start: int
    nbytes: int
    at: int


class Placed(torch.Tensor):
    """A CPU tensor by its looks; ``runs`` cover the storage that ``form``, a meta tensor, is a view of."""

    form: torch.Tensor
    runs: tuple[Run, ...]
    store: Store

    @staticmethod
    def __new__(cls, form: torch.Tensor, runs: tuple[Run, ...], store: Store) -> Placed:
        made: Placed = torch.Tensor._make_wrapper_subclass(
            cls,
            form.size(),
            strides=form.stride(),
            storage_offset=form.storage_offset(),
            dtype=form.dtype,
            device=torch.device("cpu"),
        )
        made.form, made.runs, made.store = form, runs, store
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Placed({tuple(self.shape)}, {self.dtype}, {len(self.runs)} runs)"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.pop("device", None) or "cpu"  # moving is no arithmetic
        if func is _aten.equal.default:
            return _equal(args[0], args[1])
        if _takes_only_the_shape(func):
            return func(args[0].form, *args[1:], **kwargs, device=device)
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} would write into a weight that is still on disk")
        first = args[0]
        if _changes_nothing(func, args, kwargs):
            func, args, kwargs = _aten.alias.default, (first,), {}
        out = func(*tree_map(_form_of, args), **tree_map(_form_of, kwargs))
        if func.is_view or func in _VIEWS_BY_NATURE:
            return tree_map(lambda part: Placed(part, first.runs, first.store), out)
        if not isinstance(out, torch.Tensor):
            raise NotImplementedError(f"{func} has no tensor for a result, so it cannot be put off")
        whole = torch.empty(out.shape, dtype=out.dtype, device="meta")
        runs = _gathered(_destinations(func, args, kwargs, whole))
        some = next(part for part in tree_leaves((args, kwargs)) if isinstance(part, Placed))
        return Placed(whole, runs or _computed(func, args, kwargs, whole), some.store)


def stored(name: str, store: Store) -> Placed:
    """Tensor ``name`` of ``store``, unread."""
    spec = store.specs[name]
    form = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
    pieces = sorted(store.pieces(name), key=lambda piece: piece.at)
    return Placed(
        form, tuple(Run(piece.file, piece.extent.offset, piece.extent.nbytes, piece.at) for piece in pieces), store
    )


def contiguous_runs(placed: Placed) -> tuple[Run, ...]:
    """Runs that make the contiguous bytes of ``placed``, in order; one ``Computed`` where they would be too short."""
    whole = torch.empty(placed.shape, dtype=placed.dtype, device="meta")
    runs = _gathered([(whole, placed)])
    if runs is not None and (len(runs) <= 1 or whole.nbytes >= MIN_RUN * len(runs)):
        return runs
    return _computed(_aten.clone.default, (placed,), {}, whole)


def materialise(value: Placed | Computed) -> torch.Tensor:
    """The real tensor, contiguous, of the same values: reads what it is made of, replays what was put off.

    Holds its arguments and its result; nothing is kept afterwards. Raises what the store raises.
    """
    if isinstance(value, Computed):
        args, kwargs = tree_map(_real, (value.args, dict(value.kwargs)))
        return value.func(*args, **kwargs).contiguous()
    whole = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if (runs := _gathered([(whole, value)])) is not None:
        return _fill(runs, whole.nbytes, value.store).view(value.dtype).view(value.shape)
    flat = _fill(value.runs, value.form.untyped_storage().nbytes(), value.store).view(value.dtype)
    return flat.as_strided(value.shape, value.stride(), value.storage_offset()).contiguous()


def _real(value: Any) -> Any:
    return materialise(value) if isinstance(value, Placed) else value


def _form_of(value: Any) -> Any:
    if isinstance(value, Placed):
        return value.form
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _fill(runs: Sequence[Run], nbytes: int, store: Store) -> torch.Tensor:
    flat = torch.empty(nbytes, dtype=torch.uint8)
    requests = []
    for run in runs:
        into = flat[run.at : run.at + run.nbytes]
        if isinstance(run.source, Computed):
            made = materialise(run.source).reshape(-1).view(torch.uint8)
            into.copy_(made[run.start : run.start + run.nbytes])
        elif run.nbytes:
            requests.append(ReadRequest(run.source, Extent(run.start, run.nbytes), into))
    if requests:
        store.read(requests).wait()
    return flat


def _takes_only_the_shape(func: Any) -> bool:
    name: str = func._schema.name
    return name.endswith("_like") or "::new_" in name


def _changes_nothing(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if func is _aten._to_copy.default:
        return bool((kwargs.get("dtype") or args[0].dtype) == args[0].dtype)
    return func is _aten.constant_pad_nd.default and not any(args[1])


def _computed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: torch.Tensor) -> tuple[Run, ...]:
    result = Computed(func, args, kwargs, whole.dtype, tuple(whole.shape))
    return (Run(result, 0, result.nbytes, 0),)


def _destinations(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], whole: torch.Tensor
) -> list[tuple[torch.Tensor, Placed]] | None:
    """Which part of the result each argument is copied to, for the operations that only copy."""
    if func is _aten.clone.default:
        return [(whole, args[0])]
    if func not in (_aten.cat.default, _aten.stack.default):
        return None
    parts = args[0]
    if any(not isinstance(part, Placed) or part.dtype != whole.dtype or part.dim() == 0 for part in parts):
        return None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    if func is _aten.stack.default:
        return list(zip(whole.unbind(dim), parts, strict=True))
    ends = list(accumulate(part.shape[dim] for part in parts))[:-1]
    return list(zip(whole.tensor_split(ends, dim), parts, strict=True))


def _gathered(copies: Sequence[tuple[torch.Tensor, Placed]] | None) -> tuple[Run, ...] | None:
    """The runs of a storage that the given copies fill; None where they are too short or too many, or no copies."""
    if copies is None:
        return None
    runs: list[Run] = []
    for into, placed in copies:
        item = placed.dtype.itemsize
        inner, block = placed.dim(), item
        while inner and _continues(placed, inner - 1, block) and _continues(into, inner - 1, block):
            inner -= 1
            block *= placed.shape[inner]
        count = prod(placed.shape[:inner])
        if count > 1 and (block < MIN_RUN or count > MAX_RUNS):
            return None
        if placed.numel():
            for at, start in zip(_offsets(into, inner), _offsets(placed.form, inner), strict=True):
                runs.extend(_window(placed.runs, start, block, at))
    runs.sort(key=lambda run: run.at)
    return tuple(_joined(runs))


def _continues(tensor: torch.Tensor, dim: int, block: int) -> bool:
    return tensor.shape[dim] == 1 or tensor.stride(dim) * tensor.dtype.itemsize == block


def _offsets(tensor: torch.Tensor, dims: int) -> Iterator[int]:
    """Byte offset of each index over the first ``dims`` dimensions, in row-major order."""
    item = tensor.dtype.itemsize
    first = int(tensor.storage_offset()) * item
    steps = [range(0, size * stride * item, stride * item) if stride else [0] * size
             for size, stride in zip(tensor.shape[:dims], tensor.stride()[:dims], strict=True)]  # fmt: skip
    return (first + sum(index) for index in product(*steps))


def _window(runs: tuple[Run, ...], start: int, nbytes: int, at: int) -> Iterator[Run]:
    """Bytes ``[start, start + nbytes)`` of a storage made of ``runs``, landing at byte ``at`` of another."""
    end = start + nbytes
    for index in range(bisect_right(runs, start, key=lambda run: run.at) - 1, len(runs)):
        run = runs[index]
        if run.at >= end:
            return
        low, high = max(start, run.at), min(end, run.at + run.nbytes)
        if high > low:
            yield Run(run.source, run.start + low - run.at, high - low, at + low - start)


def _joined(runs: Sequence[Run]) -> Iterator[Run]:
    """The same runs, with neighbours that follow each other on both sides made one."""
    last: Run | None = None
    for run in runs:
        follows = (
            last is not None
            and last.source == run.source
            and (last.start + last.nbytes, last.at + last.nbytes) == (run.start, run.at)
        )
        if last is not None and follows:
            last = last._replace(nbytes=last.nbytes + run.nbytes)
            continue
        if last is not None:
            yield last
        last = run
    if last is not None:
        yield last


def _equal(one: Any, other: Any) -> bool:
    """``torch.equal``, reading a few MiB at a time."""
    if not (isinstance(one, Placed) and isinstance(other, Placed)):
        return bool(torch.equal(_real(one), _real(other)))
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = contiguous_runs(one), contiguous_runs(other)
    if any(isinstance(run.source, Computed) for run in (*first, *second)):
        return torch.equal(materialise(one), materialise(other))
    if first == second:
        return True
    for start in range(0, one.nbytes, _COMPARED_AT_ONCE):
        size = min(_COMPARED_AT_ONCE, one.nbytes - start)
        left, right = (
            _fill(tuple(_window(runs, start, size, 0)), size, placed.store).view(placed.dtype)
            for runs, placed in ((first, one), (second, other))
        )
        if not torch.equal(left, right):
            return False
    return True
