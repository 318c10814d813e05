"""A packed store as a checkpoint: the module its config.json describes, with packed weights in their places."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tierstore.contracts import Store
from tierstore.errors import CheckpointError
from tierstore.formats.format import Format, part_specs
from tierstore.formats.named import format_named
from tierstore.formats.packed import packed_parameter
from tierstore.formats.scratch import Scratch
from tierstore.hf.checkpoint import Checkpoint
from tierstore.hf.model import build, describe, ghost_of, lift, listed, read_config
from tierstore.hf.placement import Placed, Run
from tierstore.stores.manifest import PackedEntry, check_parts
from tierstore.stores.packed import PackedStore
from tierstore.tensors import KEEP, TensorSpec


def open_packed(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str | None = None,
    model_class: type | None = None,
    trust_remote_code: bool = False,
    device: torch.device | None = None,
) -> Checkpoint:
    """Open the packed store in folder ``path``: what ``pack`` made of a checkpoint, still packed.

    ``dtype`` may only name what the store was packed from. Packed weights seem to be on ``device``. Raises
    ``StoreFormatError`` for parts that do not fit their format, ``CheckpointError`` for a store of another model, and
    what ``PackedStore`` raises. The caller closes ``store``.
    """
    path = Path(path)
    store = PackedStore(path)
    try:
        entries = store.manifest.tensors
        config = read_config(path, model_class, trust_remote_code)
        module, ready = outline(path, config, specs_of(entries.values()), store, model_class, trust_remote_code)
        check_dtype(path, module, dtype)
        check_fit(path, module, entries, ready)
        check_parts(store.manifest, _parts_of, repr(str(path)))
        forms = {name: format_named(entry.format) for name, entry in entries.items() if entry.format != KEEP}
        _install(module, forms, device)
        pieces = {name: store.pieces(name) for name in store.specs}
        return Checkpoint(module, pieces, store, ready, tuple(_notes(forms)), path, packed=forms)
    except BaseException:
        store.close()
        raise


def specs_of(entries: Iterable[PackedEntry]) -> dict[str, TensorSpec]:
    """What the entries are to the model: shapes and dtypes before packing."""
    return {entry.name: TensorSpec(entry.name, entry.dtype, entry.shape) for entry in entries}


def outline(
    path: Path,
    config: Any,
    specs: Mapping[str, TensorSpec],
    store: Store,
    model_class: type | None,
    trust_remote_code: bool,
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The module wholly on meta, and the values of the buffers that it does not save, which transformers computes.

    ``specs`` are the tensors that are kept of it, by its own names, which also say what is tied and what is not.
    ``store`` is not read. Whether all of them fit is for ``check_fit``. Raises ``CheckpointError``.
    """
    # Each knows its place and has no bytes: transformers then fills nothing with random numbers.
    state = {}
    for name, spec in specs.items():
        form = torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device="meta")
        state[name] = Placed(form, (Run(0, 0, spec.nbytes, 0),), store)
    module, _ = build(path, config, state, None, model_class, trust_remote_code)
    saved = module.state_dict().keys()
    _, ready = lift(module)
    _untie(module, specs.keys())
    describe(module, path)
    return module, {name: value for name, value in ready.items() if name not in saved}


def check_dtype(path: Path, module: Any, asked: torch.dtype | str | None) -> None:
    """Raise ``CheckpointError`` if another dtype is ``asked`` for than the weights were packed from."""
    have = str(module.config.dtype).removeprefix("torch.")
    wanted = have if asked in (None, "auto") else str(asked).removeprefix("torch.")
    if wanted != have:
        raise CheckpointError(
            f"{str(path)!r} was packed from {have} weights, dtype={wanted!r} is asked for: leave dtype out, or pack "
            f"the checkpoint again with --dtype {wanted}"
        )


def check_fit(path: Path, module: nn.Module, entries: Mapping[str, PackedEntry], ready: Collection[str]) -> None:
    """Raise ``CheckpointError`` unless ``entries`` are exactly the tensors of ``module`` that are not ``ready``."""
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    kind = type(module).__name__
    if missing := sorted(tensors.keys() - entries.keys() - set(ready)):
        raise _other_model(path, f"lacks {len(missing)} tensors of {kind}: {listed(missing)}")
    if left := sorted(entries.keys() - tensors.keys()):
        raise _other_model(path, f"holds {len(left)} tensors that {kind} has not: {listed(left)}")
    wrong = [
        f"{name} is {entry.dtype} {tuple(entry.shape)}, {kind} needs {_dtype(tensor)} {tuple(tensor.shape)}"
        for name, entry in entries.items()
        if (entry.dtype, tuple(entry.shape)) != (_dtype(tensor := tensors[name]), tuple(tensor.shape))
    ]
    if wrong:
        raise _other_model(path, f"does not fit its config.json: {listed(wrong)}")


def _other_model(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"the packed store {str(path)!r} {what}: its config.json is of another model, or model_class is another than "
        "it was packed with: pack the checkpoint again"
    )


def _parts_of(form: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
    return part_specs(format_named(form), shape)


def _install(module: nn.Module, forms: Mapping[str, Format], device: torch.device | None) -> None:
    """Put packed parameters, their parts on meta, into every place of the parameters that are packed."""
    scratch = Scratch()
    made: dict[int, nn.Parameter] = {}  # by id of what stood there, so that what is tied stays one object
    for name, parameter in module.named_parameters():
        if name in forms:
            form, shape = forms[name], tuple(parameter.shape)
            parts = {
                part.name: torch.empty(part.shape, dtype=getattr(torch, part.dtype), device="meta")
                for part in part_specs(form, shape)
            }
            made[id(parameter)] = packed_parameter(form, parts, shape, parameter.dtype, scratch, device=device)
    for owner in list(module.modules()):
        for key, held in list(owner._parameters.items()):
            if id(held) in made:
                owner._parameters[key] = made[id(held)]


def _notes(forms: Mapping[str, Format]) -> Iterator[str]:
    count = Counter(form.name for form in forms.values())
    if count:
        yield f"packed weights: {', '.join(f'{number} as {name}' for name, number in count.most_common())}"


def _untie(module: Any, kept: Collection[str]) -> None:
    """Make parameters of their own of those that are kept under names of their own."""
    first: dict[int, str] = {}
    for name, parameter in list(module.named_parameters(remove_duplicate=False)):
        if name in kept and (other := first.setdefault(id(parameter), name)) != name:
            owner, _, key = name.rpartition(".")
            module.get_submodule(owner)._parameters[key] = ghost_of(parameter, parameter.requires_grad)
            for tied in (name, other):
                module.all_tied_weights_keys.pop(tied, None)


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
