"""CRC32C (RFC 3720) of host memory, past the interpreter lock where the library lets us."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import google_crc32c
import numpy as np

from tierstore.stores.workers import SMALL, view_of

Crc = int

Extend = Callable[[int, int, int], int]
"""The CRC32C of some bytes that come after others: from the CRC of these, an address and a number of bytes."""

_AT_ONCE = 1 << 20  # google_crc32c holds the interpreter lock: let others in between


def crc32c(address: int, nbytes: int, crc: Crc = 0) -> Crc:
    """CRC32C of ``nbytes`` of host memory at ``address``, after bytes whose CRC is ``crc``."""
    brief, long = _ways()
    return (brief if nbytes < SMALL else long)(crc, address, nbytes)


@cache
def _ways() -> tuple[Extend, Extend]:
    """For few bytes, and for many: these let other threads compute meanwhile, which costs more than few bytes take."""
    spec = find_spec("google_crc32c._crc32c")
    try:
        if spec is None or spec.origin is None:
            raise OSError("google_crc32c has no compiled part here")
        return _of_library(ctypes.PyDLL(spec.origin)), _of_library(ctypes.CDLL(spec.origin))
    except (OSError, AttributeError):  # the C functions are not there to be called
        return locked, locked


def _of_library(library: ctypes.CDLL) -> Extend:
    function = library.crc32c_extend
    function.argtypes, function.restype = (ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_uint32
    return function


def locked(crc: Crc, address: int, nbytes: int) -> Crc:
    """By way of google_crc32c's own function of Python."""
    for at in range(0, nbytes, _AT_ONCE):
        part = np.frombuffer(view_of(address + at, min(_AT_ONCE, nbytes - at)), dtype=np.uint8)
        part.flags.writeable = False  # it refuses what could change
        crc = google_crc32c.extend(crc, part)
    return crc
