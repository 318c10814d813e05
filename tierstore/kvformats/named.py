"""The formats of KV pages by the names that users write."""

from __future__ import annotations

import torch

from tierstore.errors import ModuleError
from tierstore.kernels.kv_pages.layout import CODE_BITS
from tierstore.kvformats.format import KvFormat
from tierstore.kvformats.packed import Packed
from tierstore.kvformats.plain import Raw

PLAIN = "plain"
RECENT_TOKENS = 128
"""The newest tokens of a sequence, which stay unpacked: much attention is on them."""
KV_FORMAT_NAMES = (PLAIN, "bf16", *CODE_BITS)
"""The names of all formats, in the order in which documents list them."""


def kv_format(name: str | None, dtype: torch.dtype) -> KvFormat:
    """The format called ``name`` for a model whose keys and values are ``dtype``; None is ``"plain"``.

    A format that keeps this dtype as it is says so by ``plain``. Raises ``ModuleError`` with the choices for any other
    name."""
    if name is None or name == PLAIN:
        return Raw(PLAIN, dtype, plain=True)
    if name == "bf16":
        return Raw(name, torch.bfloat16, plain=dtype == torch.bfloat16)
    if name in CODE_BITS:
        return Packed(name, RECENT_TOKENS)
    raise ModuleError(f"no KV format is called {name!r}: choose one of {', '.join(KV_FORMAT_NAMES)}")
