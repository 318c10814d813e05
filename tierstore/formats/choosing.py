"""Which parameter is packed in which format: a decision from names, shapes and dtypes alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import translate
from math import prod
from typing import Literal

from tierstore.errors import ModuleError
from tierstore.formats.format import part_specs
from tierstore.formats.named import FORMATS, format_named
from tierstore.tensors import ITEMSIZE, KEEP

PACKABLE = ("float64", "float32", "float16", "bfloat16")
"""Dtypes of what can be packed. Smaller floats are packed already."""

FEWEST_ELEMENTS = 4096
"""What has fewer is packed only where a pattern says so: it would save nothing worth an error."""

TABLE_FORMAT = "int8"
"""Of tables under every format that is coarser, or as coarse without groups: it costs nothing that can be measured."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: all its full names, the first one its key; ``dtype`` is torch's name.

    ``kind`` is ``"table"`` for an embedding's, ``"tied"`` for one that a linear layer multiplies with too.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Literal["table", "tied", "weight"] = "weight"


def choose_formats(parameters: Sequence[Parameter], default: str | None, patterns: Mapping[str, str]) -> dict[str, str]:
    """For each parameter, by its first name, the name of a format or ``"keep"``.

    The first of ``patterns`` (as ``fnmatch`` has them, with case) that matches decides: either any of the parameter's
    names or the path of a module that holds it, such as ``"lm_head"`` or ``"*experts*"``. Where it also matches what
    cannot be packed, such as biases, that is kept. ``"bf16"`` keeps what has 16 bits already.

    Without a pattern: ``default``, where it makes the parameter smaller and that has at least ``FEWEST_ELEMENTS``.
    Tables become ``TABLE_FORMAT``, but bfloat16 under ``"bf16"``, and under the 8-bit integers as those do; there a
    tied one is kept: as a head it would add more error than all else together. ``None`` is ``"keep"``.

    Raises ``ModuleError`` for an unknown format, for a pattern that decides nothing, and for one that decides only what
    cannot be packed, unless it says ``"keep"``.
    """
    default = default or KEEP
    for name in (default, *patterns.values()):
        if name != KEEP:
            format_named(name)
    matchers = {pattern: re.compile(translate(pattern)).match for pattern in patterns}
    matched: set[str] = set()
    decided: dict[str, list[Parameter]] = {pattern: [] for pattern in patterns}
    chosen = {}
    for parameter in parameters:
        words = words_of(parameter)
        matching = [pattern for pattern, match in matchers.items() if any(map(match, words))]
        matched.update(matching)
        if matching:
            decided[matching[0]].append(parameter)
            chosen[parameter.names[0]] = asked(parameter, patterns[matching[0]])
        else:
            chosen[parameter.names[0]] = usual(parameter, default)
    for pattern, name in patterns.items():
        if pattern not in matched:
            raise ModuleError(_unmatched(pattern, parameters))
        if not decided[pattern]:
            raise ModuleError(
                f"all that the pattern {pattern!r} matches is decided by patterns before it: put it first"
            )
        if name != KEEP:
            _check_packable(pattern, name, decided[pattern])
    return chosen


def words_of(parameter: Parameter) -> list[str]:
    """What patterns are held against: the parameter's names, and the paths of the modules that hold it."""
    return [*parameter.names, *(path for name in parameter.names if (path := name.rpartition(".")[0]))]


def asked(parameter: Parameter, name: str) -> str:
    """The format of a parameter for which a pattern says ``name``."""
    as_it_is = name == "bf16" and ITEMSIZE.get(parameter.dtype, 0) <= ITEMSIZE["bfloat16"]
    return KEEP if as_it_is or hindrance(parameter) else name


def usual(parameter: Parameter, default: str) -> str:
    """The format of a parameter that no pattern matches."""
    if default == KEEP or hindrance(parameter) or prod(parameter.shape) < FEWEST_ELEMENTS:
        return KEEP
    name = default
    # Measured with SmolLM2-135M, whose table is tied, as KL from the unpacked model: an int8 table adds 0.0008 to the
    # 0.1907 of int4, and 0.0004 to the 0.0007 of int8.
    if parameter.kind != "weight" and default != "bf16":
        if default not in ("int8", "int8-row"):
            name = TABLE_FORMAT
        elif parameter.kind == "tied":
            return KEEP
    packed_nbytes = sum(part.nbytes for part in part_specs(FORMATS[name], parameter.shape))
    return name if packed_nbytes < prod(parameter.shape) * ITEMSIZE[parameter.dtype] else KEEP


def hindrance(parameter: Parameter) -> str:
    """Why a parameter cannot be packed; empty where it can."""
    if parameter.dtype not in PACKABLE:
        return f"is {parameter.dtype}, not one of {', '.join(PACKABLE)}"
    if len(parameter.shape) < 2:
        return f"has the shape {list(parameter.shape)}, without two axes"
    if not prod(parameter.shape):
        return "has no elements"
    return ""


def _check_packable(pattern: str, name: str, parameters: Sequence[Parameter]) -> None:
    if all(map(hindrance, parameters)):
        raise ModuleError(
            f"{parameters[0].names[0]!r} cannot be packed as {name}, which the pattern {pattern!r} asks for: it "
            f"{hindrance(parameters[0])}: leave it out, or give it {KEEP!r}"
        )


def _unmatched(pattern: str, parameters: Sequence[Parameter]) -> str:
    words = dict.fromkeys(word for parameter in parameters for word in words_of(parameter))
    near = get_close_matches(pattern, words, n=3, cutoff=0) or ["none at all"]
    return (
        f"the pattern {pattern!r} matches no parameter and no module that holds one: there are {', '.join(near)}, ..."
    )
