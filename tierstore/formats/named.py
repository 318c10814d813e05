"""The formats by the names that users write."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from tierstore.errors import ModuleError
from tierstore.formats.bf16 import Bf16
from tierstore.formats.format import Format
from tierstore.formats.fp4 import Fp4
from tierstore.formats.fp8 import Fp8
from tierstore.formats.int4 import Int4
from tierstore.formats.int8 import Int8
from tierstore.formats.int8_row import Int8Row
from tierstore.formats.mxfp4 import MxFp4
from tierstore.tensors import KEEP

_ALL: tuple[Format, ...] = (
    Int8(),
    Int8Row(),
    Int4(64),
    Int4(32),
    Int4(128),
    Fp8(),
    Fp4(),
    MxFp4(),
    Bf16(),
)

FORMATS: Mapping[str, Format] = MappingProxyType({form.name: form for form in _ALL})
"""Every format by its name, in the order in which documents list them."""

FORMAT_NAMES = tuple(FORMATS)
"""The names of all formats, in the order in which documents list them."""


def format_named(name: str) -> Format:
    """The format called ``name``. Raises ``ModuleError`` with the choices for any other."""
    form = FORMATS.get(name)
    if form is None:
        raise ModuleError(
            f"no format is called {name!r}: choose one of {', '.join(FORMAT_NAMES)}; "
            f"{KEEP!r} leaves a tensor as it is, in its own dtype"
        )
    return form
