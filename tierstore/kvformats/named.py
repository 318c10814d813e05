"""The formats of KV pages by the names that users write."""

from __future__ import annotations

import torch

from tierstore.errors import ModuleError
from tierstore.kvformats.format import KvFormat
from tierstore.kvformats.int8 import Int8
from tierstore.kvformats.plain import Raw

PLAIN = "plain"
KV_FORMAT_NAMES = (PLAIN, "bf16", "int8")
"""The names of all formats, in the order in which documents list them."""


def kv_format(name: str | None, dtype: torch.dtype) -> KvFormat:
    """The format called ``name`` for a model whose keys and values are ``dtype``; None is ``"plain"``.

    A format that keeps this dtype as it is says so by ``plain``. Raises ``ModuleError`` with the choices for any other
    name."""
    match name:
        case None | "plain":
            return Raw(PLAIN, dtype, plain=True)
        case "bf16":
            return Raw("bf16", torch.bfloat16, plain=dtype == torch.bfloat16)
        case "int8":
            return Int8()
    raise ModuleError(f"no KV format is called {name!r}: choose one of {', '.join(KV_FORMAT_NAMES)}")
