"""A ``.gguf`` file, imported once to a safetensors checkpoint through transformers' own loader.

The loader holds the whole dequantized model in memory while it imports; nothing does so afterwards.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers

from tierstore.errors import CheckpointError, StoreError
from tierstore.hf.durable import only_writer, require_room, written_whole

_SEAL = "tierstore.json"


def import_gguf(
    file: Path,
    *,
    dtype: torch.dtype | str | None = None,
    model_class: type | None = None,
    store_dir: Path | None = None,
    nvme: int | None = None,
) -> tuple[Path, int, str]:
    """The folder of the imported checkpoint (weights, config, tokenizer), the bytes written, and a note.

    It lies in ``<name>.tierstore/<dtype>`` beside the file, or below ``store_dir``, appears only when it is whole,
    and is used again while the file stays the same. ``dtype`` None or ``"auto"`` is what transformers' loader
    takes, float32 for quantized weights: scale times code does not fit in bfloat16. ``nvme`` bounds the bytes
    written. Raises ``CheckpointError`` if transformers cannot read the file, ``StoreFullError``, and
    ``StoreBusyError`` while another process imports it.
    """
    wanted = "auto" if dtype is None else str(dtype).removeprefix("torch.")
    seal = _seal_of(file, wanted, model_class)
    folder = (store_dir or file.resolve().parent) / f"{file.name}.tierstore" / wanted
    if _is_sealed(folder, seal):
        return folder, 0, f"{str(file)!r} was imported to {str(folder)!r} before"
    with only_writer(folder.parent):
        model, tokenizer = _load(file, wanted, model_class)
        need = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        require_room(folder.parent, need, nvme, what=f"the imported weights of {str(file)!r}")
        with written_whole(folder) as part:
            model.save_pretrained(part)
            if tokenizer is not None:
                tokenizer.save_pretrained(part)
            (part / _SEAL).write_text(seal)
    held = str(model.dtype).removeprefix("torch.")
    written = sum(made.stat().st_size for made in folder.iterdir())
    note = f"{str(file)!r} was imported to {str(folder)!r} once: weights dequantized to {held}"
    return folder, written, note + (", without a tokenizer: transformers could make none" if tokenizer is None else "")


def _load(file: Path, dtype: str, model_class: type | None) -> tuple[Any, Any]:
    """Model and tokenizer; the latter None where transformers cannot make it."""
    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    plain: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):  # releases that have it would keep the blocks packed
        plain["quantization_config"] = transformers.GgufConfig(dequantize=True)
    try:
        config = transformers.AutoConfig.from_pretrained(file.parent, **where)
        causal: Any = transformers.AutoModelForCausalLM
        auto: Any = model_class or (causal if type(config) in causal._model_mapping else transformers.AutoModel)
        model = auto.from_pretrained(file.parent, config=config, dtype=dtype, **where, **plain)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot import {str(file)!r}: {first[:300]}: it needs the "
            "packages gguf and accelerate, and an architecture that its GGUF loader knows"
        ) from error
    try:
        return model, transformers.AutoTokenizer.from_pretrained(file.parent, **where)
    except Exception:  # the weights are of use without one
        return model, None


def _seal_of(file: Path, wanted: str, model_class: type | None) -> str:
    """What the import is made from and with: where the same text is found, it need not be done again."""
    try:
        stat = file.stat()
        with file.open("rb") as opened:
            head = hashlib.sha256(opened.read(1 << 16)).hexdigest()
    except OSError as error:
        raise StoreError(f"cannot read {str(file)!r}: {error.strerror}: check the path and its rights") from error
    return json.dumps(
        {
            "source": {"name": file.name, "nbytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "head_sha256": head},
            "dtype": wanted,
            "model_class": getattr(model_class, "__name__", None),
            "transformers": transformers.__version__,
        },
        indent=1,
    )


def _is_sealed(folder: Path, seal: str) -> bool:
    try:
        return (folder / _SEAL).read_text() == seal
    except (OSError, ValueError):
        return False
