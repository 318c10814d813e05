"""Packs the weights of a module in place, and gives it the same objects back as they were."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tierstore.binding.conversion import Conversions
from tierstore.binding.inventory import Entry, find_entries
from tierstore.binding.parameters import parameters_of
from tierstore.binding.slot import storage_users
from tierstore.binding.swap import become
from tierstore.binding.uninterrupted import Uninterrupted
from tierstore.errors import ModuleError
from tierstore.formats.choosing import Parameter, choose_formats, words_of
from tierstore.formats.format import pack_tensor, part_specs
from tierstore.formats.named import format_named
from tierstore.formats.packed import PackedTensor, attributes_of, packed_parameter, read
from tierstore.formats.scratch import Scratch
from tierstore.tensors import KEEP, TensorSpec

FUSED = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules that compute all at once where no tensor of theirs overrides functions, with another outcome for padding."""

Source = Callable[[], Tensor]
"""Makes the bytes of a tensor in host memory: 1-D uint8."""


@dataclass
class _Weight:
    """A parameter of the module, and ``other``: the packed tensor that it is to become, then what it was before."""

    name: str
    parameter: nn.Parameter
    other: nn.Parameter | None
    format: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool


class PackedWeights:
    """Those of a module's parameters that a format was chosen for.

    Built in steps, so that a failure in between leaves the module untouched: the constructor packs beside the module,
    ``put_in`` changes it, ``forget`` frees what the parameters were, ``take_out`` changes the module back.

    ``default`` is a format's name or "keep" (as None), ``patterns`` those for names. Packed tensors seem to be on
    ``device``. Raises ``ModuleError`` for formats that do not exist, for patterns that match nothing, and for those
    that name what cannot be packed.
    """

    def __init__(
        self, module: nn.Module, default: str | None, patterns: Mapping[str, str], device: torch.device, *, kept: bool
    ) -> None:
        self._conversions = Conversions()
        self._owners: list[nn.Module] = []
        self._inside = False
        self._kept = kept
        self._notes: list[str] = []
        self._weights: list[_Weight] = []
        found = _find(module)
        chosen = choose_formats([candidate.described for candidate in found], default, patterns)
        fused = {id(p) for child in module.modules() if isinstance(child, FUSED) for p in child.parameters()}
        scratch = Scratch()
        for candidate in found:
            name, described = candidate.entry.name, candidate.described
            format = chosen[described.names[0]]
            if format == KEEP:
                continue
            why_not = candidate.why_not or _clash(candidate.entry, format)
            if why_not and any(patterns.get(word, KEEP) != KEEP for word in words_of(described)):
                raise ModuleError(f"{name} cannot be packed as {format}: {why_not}: choose {KEEP!r} for it in formats=")
            if why_not:
                self._notes.append(f"{name} is not packed: {why_not}")
                continue
            unseen = id(candidate.entry.tensor) in fused
            self._weights.append(_pack(candidate.entry, format, scratch, device, unseen=unseen))
            self._owners += [location.owner for location in candidate.entry.locations]

    def notes(self) -> list[str]:
        """What a user should know from the start: what is packed, what is not and why, and what ``close()`` gives."""
        if not self._weights:
            return list(self._notes)
        number = "1 weight is" if len(self._weights) == 1 else f"{len(self._weights)} weights are"
        formats = " and ".join(dict.fromkeys(weight.format for weight in self._weights))
        after = (
            "close() brings their original values back from store="
            if self._kept
            else f"without store= their original values are gone: after close() they hold what {formats} kept"
        )
        return [f"{number} packed as {formats}; {after}", *self._notes]

    def put_in(self) -> None:
        """Let the parameters be packed: the same objects, wherever they are held."""
        with Uninterrupted():
            self._inside = True
            for weight in self._weights:
                assert weight.other is not None
                become(weight.parameter, weight.other)
            self._conversions.watch(self._owners)

    def originals(self) -> Iterator[tuple[TensorSpec, Source]]:
        """What the parameters were, for a store: each one's bytes, made when they are asked for."""
        for weight in self._weights:
            spec = TensorSpec(weight.name, "uint8", (weight.parameter.nbytes,))
            yield spec, partial(_bytes_of, weight)

    def forget(self) -> None:
        """Free what the parameters were, but for memory that somebody else sees: that takes part again at the end."""
        for weight in self._weights:
            assert weight.other is not None
            storage = weight.other.untyped_storage()
            if storage_users(storage) <= 2:  # the tensor's and this one
                weight.other = None

    def take_out(self, stored: Callable[[str], Tensor] | None) -> None:
        """Let the parameters be what they were. ``stored`` gives the bytes of ``originals`` by name, 1-D uint8 on the
        host; without it those that were forgotten have the values that their format kept. Idempotent.

        When ``stored`` fails for some, they get the kept values, and the error comes out when all are done."""
        self._conversions.unwatch()
        if not self._inside:
            return
        failed: Exception | None = None
        with Uninterrupted():
            self._inside = False
            for weight in self._weights:
                if isinstance(weight.parameter, PackedTensor):
                    original, error = _original(weight, stored)
                    failed = failed or error  # the other tensors come back all the same
                    if original is not None:
                        _become_plain(weight.parameter, original)
                weight.other = None
        if failed is not None:
            raise failed


@dataclass(frozen=True)
class _Candidate:
    """A parameter, what a choice is made by, and why it cannot be packed whatever is chosen."""

    entry: Entry
    described: Parameter
    why_not: str


def _find(module: nn.Module) -> list[_Candidate]:
    """Every parameter of the module."""
    entries = find_entries(module)
    sharing = Counter(entry.tensor.untyped_storage()._cdata for entry in entries if not entry.stays)
    plain = {id(entry.tensor): entry for entry in entries}
    found = []
    for parameter, described in parameters_of(module):
        class_ = f"its class is {type(parameter).__name__}"
        entry = plain.get(id(parameter)) or Entry(described.names[0], parameter, stays=class_)
        found.append(_Candidate(entry, described, _why_not(entry, sharing)))
    return found


def _why_not(entry: Entry, sharing: Mapping[int, int]) -> str:
    if entry.stays:
        return entry.stays
    if sharing[entry.tensor.untyped_storage()._cdata] > 1:
        return "it shares memory with another tensor of the module"
    if cast(Any, torch)._debug_has_internal_overlap(entry.tensor):
        return "its memory has gaps, or elements that share it"
    return ""


def _clash(entry: Entry, format: str) -> str:
    """Parts are attributes of the packed parameter, beside those it has already."""
    taken = vars(entry.tensor).keys() & {part.name for part in part_specs(format_named(format), entry.tensor.shape)}
    return f"it has an attribute {min(taken)!r}, which is the name of a part of {format}" if taken else ""


def _pack(entry: Entry, format: str, scratch: Scratch, device: torch.device, *, unseen: bool) -> _Weight:
    tensor = entry.tensor
    assert isinstance(tensor, nn.Parameter)
    form = format_named(format)
    try:
        with torch.no_grad():
            parts = pack_tensor(form, tensor.detach())
    except ModuleError as error:
        raise ModuleError(f"{entry.name}: {error}") from error
    shape = tuple(tensor.shape)
    packed = packed_parameter(form, parts, shape, tensor.dtype, scratch, device=device, unseen=unseen)
    return _Weight(
        entry.name, tensor, packed, format, shape, tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
    )


def _bytes_of(weight: _Weight) -> Tensor:
    assert weight.other is not None
    return weight.other.detach().contiguous().cpu().reshape(-1).view(torch.uint8)


def _original(weight: _Weight, stored: Callable[[str], Tensor] | None) -> tuple[nn.Parameter | None, Exception | None]:
    """What the parameter was, or has to make do with, and why."""
    if weight.other is not None:
        return weight.other, None
    try:
        return _restored(weight, None if stored is None else stored(weight.name)), None
    except Exception as error:
        with suppress(Exception):  # the first one tells more
            return _restored(weight, None), error
        return None, error


def _restored(weight: _Weight, data: Tensor | None) -> nn.Parameter:
    """A parameter as it was: of the values in ``data``, or of those that are packed."""
    with torch.no_grad():
        values = read(weight.parameter) if data is None else data.view(weight.dtype).view(weight.shape)
        if values.stride() != weight.strides or values.device != weight.device:
            memory = torch.empty_strided(weight.shape, weight.strides, dtype=weight.dtype, device=weight.device)
            values = memory.copy_(values)
    return nn.Parameter(values, weight.requires_grad)


def _become_plain(parameter: nn.Parameter, original: nn.Parameter) -> None:
    for name in attributes_of(parameter):
        del parameter.__dict__[name]
    become(parameter, original)
