"""Fields of parsed JSON that must be of one kind, for the documents of a packed store."""

from __future__ import annotations

import re
from math import prod

from tierstore.errors import StoreFormatError
from tierstore.stores.json_files import kind_of
from tierstore.stores.safetensors import MAX_RANK
from tierstore.tensors import ITEMSIZE, TensorSpec

SPEC_KEYS = frozenset(("name", "dtype", "shape"))
_NO_TEXT = re.compile("[\x00-\x1f\ud800-\udfff]")  # control characters, and halves of characters
_CRC = re.compile("[0-9a-f]{8}")
AGAIN = "copy the store again, or pack it again"
"""The next step where a document is wrong."""


def need_object(value: object, keys: frozenset[str], what: str) -> dict[str, object]:
    """An object with exactly ``keys``, or ``StoreFormatError``, as below."""
    if not isinstance(value, dict):
        raise StoreFormatError(f"{what} is a JSON {kind_of(value)}, an object is needed: {AGAIN}")
    if value.keys() != keys:
        raise StoreFormatError(f"{what} needs exactly {', '.join(sorted(keys))}, has {short(sorted(value))}: {AGAIN}")
    return value


def need_list(value: object, what: str) -> list[object]:
    """An array."""
    if not isinstance(value, list):
        raise StoreFormatError(f"{what} are a JSON {kind_of(value)}, an array is needed: {AGAIN}")
    return value


def need_text(value: object, what: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise StoreFormatError(f"{what} is a JSON {kind_of(value)}, a string is needed: {AGAIN}")
    return value


def need_texts(value: object, what: str) -> dict[str, str]:
    """An object from strings to strings."""
    if not isinstance(value, dict):
        raise StoreFormatError(f"{what} is a JSON {kind_of(value)}, an object is needed: {AGAIN}")
    return {key: need_text(text, f"{short(key)} in {what}") for key, text in value.items()}


def need_whole(value: object, what: str) -> int:
    """An int from 0 that 63 bits hold."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise StoreFormatError(f"{what} is {short(value)}, a whole number from 0 below 2**63 is needed: {AGAIN}")
    return value


def need_crc(value: object, what: str) -> int:
    """A CRC32C as 8 hexadecimal digits."""
    if not isinstance(value, str) or not _CRC.fullmatch(value):
        raise StoreFormatError(f"{what} is {short(value)}, 8 hexadecimal digits are needed: {AGAIN}")
    return int(value, 16)


def need_spec(value: object, what: str) -> TensorSpec:
    """A tensor's name, dtype and shape, such as torch can have."""
    table = need_object(value, SPEC_KEYS, what)
    name, dtype, shape = need_text(table["name"], f"the name of {what}"), table["dtype"], table["shape"]
    if not name or len(name) > 4096 or _NO_TEXT.search(name):
        raise StoreFormatError(
            f"{what} has a name of {len(name)} characters, 1 to 4096 are needed, none of them control characters or "
            f"surrogates: {AGAIN}"
        )
    what = f"{short(name)}, {what},"
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise StoreFormatError(f"{what} has dtype {short(dtype)}, one of {', '.join(ITEMSIZE)} is needed: {AGAIN}")
    if not isinstance(shape, list) or not all(type(size) is int and size >= 0 for size in shape):
        raise StoreFormatError(f"{what} has shape {short(shape)}, a list of ints from 0 is needed: {AGAIN}")
    if len(shape) > MAX_RANK:
        raise StoreFormatError(f"{what} has {len(shape)} dimensions, at most {MAX_RANK} are possible: {AGAIN}")
    # Zeros left out: torch multiplies the sizes it is given, in 64 bits, before it sees the zero.
    if any(size >= 1 << 62 for size in shape) or prod(filter(None, shape)) * ITEMSIZE[dtype] >= 1 << 62:
        raise StoreFormatError(f"{what} has shape {short(shape)}, which overflows 64 bits: {AGAIN}")
    return TensorSpec(name, dtype, tuple(shape))


def check_file_name(name: str, what: str) -> None:
    """``StoreFormatError`` unless ``name`` is a relative path that stays in its folder, apart from the weights."""
    parts = name.split("/")
    bad = len(name) > 1000 or "\\" in name or _NO_TEXT.search(name) or parts[0] == "weights.zarr"
    if bad or any(part in ("", ".", "..") or len(part) > 255 for part in parts):
        raise StoreFormatError(
            f"{what} the file {short(name)}, a relative path beside weights.zarr that stays in the folder is needed: "
            "do not trust this store"
        )


def short(value: object) -> str:
    """What a value is, for a message."""
    return text if len(text := repr(value)) <= 100 else f"{text[:100]}..."
