#!/usr/bin/env python
"""Writes a Llama-shaped checkpoint with random weights: sharded safetensors and config.json, as transformers does.

Memory stays small at any size: every tensor is cut from one block of random numbers, each from another place in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

BLOCK_ELEMENTS = 32 << 20
"""Random numbers that are made; larger tensors repeat them."""
STRIDE = 1_000_003
"""Elements between the places where two tensors begin in the block: a prime, so that places do not return soon."""
PIECE_NBYTES = 64 << 20
MADE_BY = "made_by.json"
"""Written last: what a complete checkpoint was made with."""
VERSION = 1
"""Changes when the same shape gives other bytes."""
DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}


@dataclass(frozen=True)
class Shape:
    """What is made. ``shard_nbytes`` bounds the weights of one file, unless a single tensor is larger."""

    hidden: int = 3072
    layers: int = 28
    ffn: int = 8192
    heads: int = 24
    kv_heads: int = 8
    vocab: int = 32000
    dtype: str = "bfloat16"
    shard_nbytes: int = 2 << 30
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}: one of {', '.join(DTYPES)} is needed")
        if min(self.hidden, self.layers, self.ffn, self.heads, self.kv_heads, self.vocab, self.shard_nbytes) < 1:
            raise ValueError("sizes and counts must be at least 1")
        if self.hidden % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads must divide hidden {self.hidden}, and {self.kv_heads} KV heads the heads"
            )

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight."""
        kv = self.hidden // self.heads * self.kv_heads
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            found[at + "input_layernorm.weight"] = (self.hidden,)
            found[at + "self_attn.q_proj.weight"] = (self.hidden, self.hidden)
            found[at + "self_attn.k_proj.weight"] = (kv, self.hidden)
            found[at + "self_attn.v_proj.weight"] = (kv, self.hidden)
            found[at + "self_attn.o_proj.weight"] = (self.hidden, self.hidden)
            found[at + "post_attention_layernorm.weight"] = (self.hidden,)
            found[at + "mlp.gate_proj.weight"] = (self.ffn, self.hidden)
            found[at + "mlp.up_proj.weight"] = (self.ffn, self.hidden)
            found[at + "mlp.down_proj.weight"] = (self.hidden, self.ffn)
        found["model.norm.weight"] = (self.hidden,)
        found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    def nbytes(self) -> int:
        """Bytes of all weights."""
        return sum(map(math.prod, self.tensors().values())) * DTYPES[self.dtype][1]

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": self.dtype,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What two checkpoints of the same bytes have in common."""
        return asdict(self) | {"version": VERSION}


def make_checkpoint(folder: Path, shape: Shape) -> None:
    """Write the checkpoint into ``folder``, which is made; files of an earlier one are overwritten.

    A folder that holds this very checkpoint, complete, is left as it is.
    """
    if is_made(folder, shape):
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MADE_BY).unlink(missing_ok=True)
    for old in folder.glob("*.safetensors*"):
        old.unlink()
    shards = list(_shards(shape))
    block = _random_block(shape)
    places = {name: number * STRIDE for number, name in enumerate(shape.tensors())}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file_name)
        with open(folder / file_name, "wb", buffering=0) as file:
            _write_shard(file, shape, names, block, places)
    index = {"metadata": {"total_size": shape.nbytes()}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=1) + "\n")
    (folder / MADE_BY).write_text(json.dumps(shape.fingerprint()) + "\n")


def is_made(folder: Path, shape: Shape) -> bool:
    """Whether ``folder`` holds this checkpoint, complete."""
    try:
        return bool(json.loads((folder / MADE_BY).read_text()) == shape.fingerprint())
    except (OSError, ValueError):
        return False


def _shards(shape: Shape) -> Iterator[list[str]]:
    """Names of the tensors of each file, sorted within a file as the safetensors library does."""
    names: list[str] = []
    nbytes = 0
    for name, dims in shape.tensors().items():
        size = math.prod(dims) * DTYPES[shape.dtype][1]
        if names and nbytes + size > shape.shard_nbytes:
            yield sorted(names)
            names, nbytes = [], 0
        names.append(name)
        nbytes += size
    yield sorted(names)


def _random_block(shape: Shape) -> np.ndarray[Any, Any]:
    """1-D numbers of the dtype (bfloat16 as its bits, uint16), normal with the deviation of a fresh Llama."""
    largest = max(map(math.prod, shape.tensors().values()))
    drawn = np.random.default_rng(shape.seed).standard_normal(min(BLOCK_ELEMENTS, largest), dtype=np.float32)
    drawn *= 0.02
    if shape.dtype == "bfloat16":
        return ((drawn.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)
    return drawn.astype(shape.dtype)


def _ones(shape: Shape, count: int) -> np.ndarray[Any, Any]:
    if shape.dtype == "bfloat16":
        return np.full(count, 0x3F80, np.uint16)
    return np.ones(count, shape.dtype)


def _write_shard(
    file: BinaryIO, shape: Shape, names: Sequence[str], block: np.ndarray[Any, Any], places: dict[str, int]
) -> None:
    kind, itemsize = DTYPES[shape.dtype]
    all_dims = shape.tensors()
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        end = at + math.prod(all_dims[name]) * itemsize
        header[name] = {"dtype": kind, "shape": all_dims[name], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(file, len(text).to_bytes(8, "little") + text)
    for name in names:
        count = math.prod(all_dims[name])
        if len(all_dims[name]) == 1:  # a norm
            _write(file, _ones(shape, count).tobytes())
            continue
        place = places[name] % block.size
        while count:
            run = block[place : place + min(count, PIECE_NBYTES // itemsize)]
            _write(file, run.data.cast("B"))
            count -= run.size
            place = (place + run.size) % block.size
    os.fsync(file.fileno())


def _write(file: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path)
    whole = Shape()
    for name in ("hidden", "layers", "ffn", "heads", "kv_heads", "vocab", "shard_nbytes", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(whole, name), help=" ")
    parser.add_argument("--dtype", choices=list(DTYPES), default=whole.dtype, help=" ")
    chosen = vars(parser.parse_args())
    folder: Path = chosen.pop("folder")
    try:
        shape = Shape(**chosen)
    except ValueError as error:
        parser.error(str(error))
    make_checkpoint(folder, shape)
    print(f"{folder}: {shape.nbytes() / 2**30:.2f} GiB in {len(list(_shards(shape)))} files")


if __name__ == "__main__":
    main()
