"""The module a checkpoint describes, built by transformers itself, with every weight still on disk.

``from_pretrained`` runs on ``Placed`` tensors: class, dtype, renamings, stacking, ties and computed buffers
are what transformers makes of them, because it is transformers that makes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto import auto_factory
from transformers.utils import logging

from tierstore.contracts import Store
from tierstore.errors import CheckpointError, TierstoreError
from tierstore.hf.placement import Placed, stored

# Not annotated by transformers.
_factory: Any = auto_factory
_progress: Any = logging


@dataclass(frozen=True)
class Traced:
    """``placed`` by name of parameter or persistent buffer; ``ready`` are the values that no file holds."""

    module: nn.Module
    placed: Mapping[str, Placed]
    ready: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


def read_config(path: Path, model_class: type | None, trust_remote_code: bool) -> Any:
    """The configuration of the checkpoint at folder ``path``. Raises ``CheckpointError``."""
    where = path / "config.json"
    if path.is_file():
        raise CheckpointError(
            f"{str(path)!r} is a file, the folder of a checkpoint or a .gguf file is needed: give the folder it is in"
        )
    try:
        table = json.loads(where.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{str(path)!r} has no config.json, which says what model the weights are for: give the folder of a "
            "transformers checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{str(where)!r} cannot be read ({error}): fetch it again") from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{str(where)!r} holds no JSON object: fetch it again")
    reader = getattr(model_class, "config_class", None) or transformers.AutoConfig
    if reader is transformers.AutoConfig and not trust_remote_code:
        _refuse_code(path, table)
    try:
        return reader.from_pretrained(path, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(
            f"{str(where)!r} is no configuration that transformers {transformers.__version__} accepts: "
            f"{_first_line(error)}: fetch it again, or use the transformers release it was made for"
        ) from error


def trace(
    path: Path,
    config: Any,
    store: Store,
    *,
    dtype: torch.dtype | str | None,
    model_class: type | None,
    trust_remote_code: bool,
) -> Traced:
    """Build the module on meta and find where each of its weights lies. Reads bytes of ``store`` only to compare
    two copies of a tied weight. Raises ``CheckpointError``."""
    state = {name: stored(name, store) for name in store.specs}
    module, info = build(path, config, state, dtype, model_class, trust_remote_code)
    _check(path, module, info)
    computed = _compute_unfound(path, module)
    placed, ready = lift(module)
    describe(module, path)
    return Traced(module, placed, {**ready, **computed}, tuple(_notes(info, computed)))


def build(
    path: Path,
    config: Any,
    state: Mapping[str, torch.Tensor],
    dtype: torch.dtype | str | None,
    model_class: type | None,
    trust_remote_code: bool,
) -> tuple[Any, Mapping[str, Any]]:
    """The module with ``state`` in it, and what transformers says of missing, unexpected and mismatched names."""
    _refuse_quantized(path, config)
    chosen, config = _class_for(path, config, model_class, trust_remote_code)
    try:
        with _quiet(), torch.device("cpu"), _UnfoundStaysOnMeta():
            module, info = chosen.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype="auto" if dtype is None else dtype,
                ignore_mismatched_sizes=True,  # they are reported below, with both shapes
                output_loading_info=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
            )
    except TierstoreError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot make a {chosen.__name__} of {str(path)!r}: "
            f"{_first_line(error)}: check config.json, dtype and model_class"
        ) from error
    return module, info


class _UnfoundStaysOnMeta(TorchFunctionMode):
    """Gives no memory to a parameter that the checkpoint lacks: from_pretrained would fill it with random numbers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty_like and isinstance(args[0], nn.Parameter) and args[0].is_meta:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar for a loading that loads nothing."""
    shown = _progress.is_progress_bar_enabled()
    _progress.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            _progress.enable_progress_bar()


def _refuse_code(path: Path, table: Mapping[str, Any]) -> None:
    own = table.get("auto_map")
    if own and table.get("model_type") not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{str(path)!r} needs Python code of its own ({', '.join(sorted(own))}), which is not run unasked: read "
            "the .py files there and, if you trust them, pass trust_remote_code=True"
        )


def _refuse_quantized(path: Path, config: Any) -> None:
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found:
        method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
        raise CheckpointError(
            f"{str(path)!r} is quantized ({method or 'quantization_config is set'}), plain weights are needed: "
            "use the unquantized release, or load it with transformers, call dequantize() and save_pretrained()"
        )


def _class_for(path: Path, config: Any, wanted: type | None, trust_remote_code: bool) -> tuple[Any, Any]:
    """The class to build, and the part of the configuration it is for.

    Without ``wanted``: what AutoModelForCausalLM takes, unless ``architectures`` names a class that generates no text,
    or generates it with an encoder.
    """
    auto: Any = wanted or transformers.AutoModelForCausalLM
    if not hasattr(auto, "_model_mapping"):
        return auto, config
    own = (getattr(config, "auto_map", None) or {}).get(auto.__name__)
    if own and trust_remote_code:
        found: Any = get_class_from_dynamic_module(own, path, local_files_only=True)
        found.register_for_auto_class(auto_class=auto)
        return _factory.add_generation_mixin_to_remote_model(found), config
    names = getattr(config, "architectures", None) or [""]
    named = getattr(transformers, names[0], None)
    known = type(config) in auto._model_mapping
    causal = known and not config.is_encoder_decoder
    if wanted is None and named is not None and not (causal and named.can_generate()):
        return named, config
    if wanted is None and not known:
        auto = transformers.AutoModel
    if type(config) not in auto._model_mapping:
        if own:
            _refuse_code(path, {"auto_map": {auto.__name__: own}})
        raise CheckpointError(
            f"transformers {transformers.__version__} has no {auto.__name__} for {str(path)!r} (architectures: "
            f"{names[0] or None!r}, model_type: {config.model_type!r}): pass another model_class="
        )
    chosen = _factory._get_model_class(config, auto._model_mapping)
    text = config.sub_configs.get("text_config")
    if text is not None and getattr(chosen, "config_class", None) == text:
        return chosen, config.get_text_config()
    return chosen, config


def _check(path: Path, module: nn.Module, info: Mapping[str, Any]) -> None:
    kind = type(module).__name__
    if wrong := sorted(info["mismatched_keys"]):
        shapes = [f"{name} is {tuple(have)}, {kind} needs {tuple(need)}" for name, have, need in wrong]
        raise CheckpointError(f"shapes in {str(path)!r} do not fit its config.json: {listed(shapes)}: fetch both again")
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{str(path)!r} lacks {len(missing)} weights of {kind}: {listed(missing)}: fetch the missing shards, or "
            "pass the model_class that the checkpoint was saved from"
        )


def _compute_unfound(path: Path, module: Any) -> dict[str, torch.Tensor]:
    """Values of the parameters that transformers allows to be missing, because it computes them.

    A table of sinusoids is such a parameter. One that comes out different twice is random: ``CheckpointError``.
    """
    names = [name for name, tensor in module.named_parameters() if not isinstance(tensor, Placed)]
    if not names:
        return {}
    tries = []
    for _ in range(2):
        made = {}
        for name in names:
            owner, key = _owner(module, name)
            value = nn.Parameter(torch.empty_like(getattr(owner, key), device="cpu"))
            setattr(owner, key, value)
            made[name] = value
        for part in module.modules():
            part._is_hf_initialized = False
        with torch.random.fork_rng(devices=[]):
            module.initialize_weights()
        tries.append({name: value.detach() for name, value in made.items()})
    if chance := [name for name in names if not torch.equal(tries[0][name], tries[1][name])]:
        raise CheckpointError(
            f"{str(path)!r} lacks {listed(chance)}, which {type(module).__name__} would fill with random numbers: "
            "pass the model_class that the checkpoint was saved from"
        )
    return tries[0]


def lift(module: nn.Module) -> tuple[dict[str, Placed], dict[str, torch.Tensor]]:
    """Take what is placed and what is computed out of the module, leaving it wholly on meta, ties kept."""
    found: dict[int, torch.Tensor] = {}  # by id of what stood there: one object stays one object
    kept = dict(module.named_parameters()) | dict(module.named_buffers())
    for owner in list(module.modules()):
        for key, tensor in list(owner._parameters.items()):
            if tensor is not None:
                setattr(owner, key, found.setdefault(id(tensor), ghost_of(tensor, tensor.requires_grad)))
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[key] = found.setdefault(id(buffer), torch.empty_like(buffer, device="meta"))
    placed = {name: tensor for name, tensor in kept.items() if isinstance(tensor, Placed)}
    ready = {name: tensor for name, tensor in kept.items() if not isinstance(tensor, Placed | nn.Parameter)}
    return placed, ready


def ghost_of(tensor: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    """A parameter on meta like ``tensor``, which transformers takes for initialised."""
    ghost = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), requires_grad=requires_grad)
    ghost._is_hf_initialized = True  # type: ignore[attr-defined]  # else init_weights() would fill it with random numbers
    return ghost


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, key = name.rpartition(".")
    return module.get_submodule(path), key


def describe(module: Any, path: Path) -> None:
    """What from_pretrained sets when it is given the path: names, and how to generate."""
    module.config.name_or_path = str(path)
    for part in module.modules():
        if isinstance(part, transformers.PreTrainedModel):
            part.name_or_path = str(path)
    if not module.can_generate():
        return
    generation: Any = transformers.GenerationConfig
    try:
        if (path / "generation_config.json").exists():
            module.generation_config = generation.from_pretrained(path, local_files_only=True)
        else:
            module.generation_config = generation.from_pretrained(
                path, config_file_name="config.json", _from_model_config=True, local_files_only=True
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"generation_config.json of {str(path)!r} cannot be read: {_first_line(error)}: fetch it again"
        ) from error


def _notes(info: Mapping[str, Any], computed: Mapping[str, torch.Tensor]) -> Iterator[str]:
    if names := sorted(info["unexpected_keys"]):
        yield f"{len(names)} tensors of the checkpoint are not used by the model: {listed(names)}"
    if computed:
        yield f"{len(computed)} weights are in no file, transformers computes them: {listed(sorted(computed))}"


def listed(names: list[str], most: int = 6) -> str:
    """The first of ``names``, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
