"""How many bytes each tier may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from tierstore.errors import BudgetError

_UNITS = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", re.ASCII)


class Tier(StrEnum):
    """Where bytes rest."""

    HBM = "hbm"
    RAM = "ram"
    NVME = "nvme"


def parse_nbytes(value: int | str, *, what: str = "size") -> int:
    """Bytes from an int or from text such as ``"8GiB"`` (2**30), ``"8GB"`` (10**9), ``"512MiB"``.

    Fractions of a unit are rounded down to bytes. Raises ``BudgetError`` for anything else: negative numbers,
    fractional bytes, booleans, unknown units.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise BudgetError(
            f"{what} must be an int of bytes or text such as '8GiB', got {value!r} ({type(value).__name__})"
        )
    if isinstance(value, int):
        if value < 0:
            raise BudgetError(f"{what} must not be negative, got {value}: give the bytes it may hold, or 0")
        return value
    match = _NUMBER.fullmatch(value.strip())
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _UNITS:
        raise BudgetError(f"{what} is {value!r}: write a number and a unit, such as '8GiB', '8GB' or '512MiB'")
    number, scale = match.group(1), _UNITS[unit]
    if "." in number and scale == 1:
        raise BudgetError(f"{what} is {value!r}, which is not a whole number of bytes")
    return int(Decimal(number) * scale)


def format_nbytes(nbytes: float) -> str:
    """Bytes for people: ``"1.50 GiB"``."""
    size = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB"


@dataclass(frozen=True, init=False, slots=True)
class Budget:
    """Hard bounds, in bytes, validated at once.

    ``hbm``: all weight bytes on the compute device at any moment (on a machine without a GPU: the
    compute working set in RAM). ``ram``: pinned host memory (without a GPU: a second cache of
    weights in RAM, used in place). ``nvme``: what may be written below ``store=``; None is no bound.

    A KV cache has bounds of its own, beside those: ``kv_hbm`` of pages, and of room to work on them, on the compute
    device; ``kv_ram`` of pages in pinned host memory (without a GPU: further pages, used in place); ``kv_nvme`` of
    pages on disk. ``kv_hbm=0`` leaves the cache to whoever runs the model. ``activations`` bounds the intermediate
    results of a long input, which is then worked on in chunks; None is no bound.

    Each is an int or text such as ``"8GiB"``, ``"8GB"`` or ``"512MiB"``.
    """

    hbm: int
    ram: int
    nvme: int | None
    kv_hbm: int
    kv_ram: int
    kv_nvme: int
    activations: int | None

    def __init__(
        self,
        hbm: int | str,
        ram: int | str = 0,
        nvme: int | str | None = None,
        *,
        kv_hbm: int | str = 0,
        kv_ram: int | str = 0,
        kv_nvme: int | str = 0,
        activations: int | str | None = None,
    ) -> None:
        bounded = {"hbm": hbm, "ram": ram, "kv_hbm": kv_hbm, "kv_ram": kv_ram, "kv_nvme": kv_nvme}
        for name, value in bounded.items():
            object.__setattr__(self, name, parse_nbytes(value, what=f"Budget.{name}"))
        for name, bound in {"nvme": nvme, "activations": activations}.items():
            object.__setattr__(self, name, None if bound is None else parse_nbytes(bound, what=f"Budget.{name}"))
        if self.hbm == 0:
            raise BudgetError("Budget.hbm is 0: weights must stand somewhere to be computed with, give at least 1 byte")
        lower = "Budget.kv_ram" if self.kv_ram else "Budget.kv_nvme" if self.kv_nvme else None
        if lower is not None and self.kv_hbm == 0:
            raise BudgetError(f"{lower} is given and Budget.kv_hbm is 0: pages are written there first, give it bytes")
        if self.activations == 0:
            raise BudgetError("Budget.activations is 0: nothing can be computed without them, give bytes or None")
