"""Tiny decoders, and a paged cache for one of them."""

# transformers' stubs say little of what generate takes and gives.
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.hf.zoo import ZOO
from tierstore.backends import Backend, backend_for
from tierstore.budget import Budget
from tierstore.errors import PlanError
from tierstore.events import Event
from tierstore.hf.kv.generating import KvGeneration, make_kv

PAGE = 8
AMPLE = 1 << 24
"""Bytes with which everything is resident, and whole layers fit the scratch."""

_LONG = {"max_position_embeddings": 512}
_WINDOW = {**_LONG, "sliding_window": 12}
CHANGES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": _LONG,
    "MistralForCausalLM": _WINDOW,
    "Gemma2ForCausalLM": _WINDOW,
    "GptOssForCausalLM": _WINDOW,
    "GPTBigCodeForCausalLM": {**ZOO["GPT2LMHeadModel"], "n_positions": 512, "multi_query": True},
    "GPT2LMHeadModel": {"n_positions": 512},
    "FalconForCausalLM": _LONG,
    "DeepseekV3ForCausalLM": {**_LONG, "v_head_dim": 8},
    "DeepseekV2ForCausalLM": {**ZOO["DeepseekV3ForCausalLM"], **_LONG, "topk_method": "greedy", "v_head_dim": 24},
}
"""Grouped queries; windows; windows in some layers, and scores that are capped; attention sinks; one head of keys for
all queries; no rotation; a model with attention of its own; and two that keep what keys and values are made from."""
ARCHITECTURES = tuple(CHANGES)


def decoder(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model that never ends a text by itself."""
    model_class: Any = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**ZOO.get(name, {}), **CHANGES[name], **changes}))
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.05)
    model.generation_config.eos_token_id = None
    return model.eval().to(dtype)


def ignore(event: Event) -> None:
    """Takes no notice."""


@contextmanager
def paged(
    model: Any,
    folder: Path | None = None,
    *,
    format: str | None = None,
    backend: Backend | None = None,
    page_tokens: int = PAGE,
    **budget: Any,
) -> Iterator[KvGeneration]:
    """``model`` generates with pages of 8 tokens, within; all of them resident where no budget is given."""
    bounds: dict[str, Any] = budget or {"kv_hbm": AMPLE}
    made = make_kv(
        model,
        Budget(hbm=1, **bounds),
        format=format,
        backend=backend or backend_for("cpu"),
        recorder=ignore,
        folder=folder,
        notes=[],
        page_tokens=page_tokens,
    )
    try:
        yield made
    finally:
        made.close()


def smallest(model: Any, format: str | None = None, **below: Any) -> int:
    """The smallest ``kv_hbm`` for ``model``."""
    try:
        with paged(model, Path("unused"), format=format, kv_hbm=1, **below):
            raise AssertionError("a byte does not do")
    except PlanError as error:
        return error.needed


def prompt(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Random tokens, int64 [rows, length]."""
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(lengths: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Rows of different lengths, with padding in front."""
    ids = prompt(max(lengths), len(lengths), seed)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def generated(model: Any, new: int = 9, seed: int = 0, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Tokens, and the logits of each step."""
    torch.manual_seed(seed)
    found = model.generate(
        max_new_tokens=new, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **kwargs
    )
    return found.sequences, found.logits


Way = Callable[[Any], tuple[Tensor, tuple[Tensor, ...]]]


def ways(assistant: Any) -> dict[str, Way]:
    """Every way to generate."""
    one, rows = prompt(27), left_padded((19, 14, 8))
    return {
        "greedy": lambda model: generated(model, input_ids=one),
        "padded": lambda model: generated(model, **rows),
        "beams": lambda model: generated(model, input_ids=one, num_beams=4),
        "padded beams": lambda model: generated(model, **rows, num_beams=2),
        "samples": lambda model: generated(model, input_ids=one, do_sample=True, num_return_sequences=3),
        "lookup": lambda model: generated(model, input_ids=one, prompt_lookup_num_tokens=3),
        "assisted": lambda model: generated(model, input_ids=one, assistant_model=assistant),
    }
