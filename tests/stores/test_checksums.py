"""CRC32C of host memory: as google_crc32c has it, whatever the way, for few bytes and for many."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.stores import checksums
from tierstore.stores.checksums import crc32c, locked

BYTES = np.random.default_rng(0).integers(0, 256, 5 << 20, dtype=np.uint8)


@given(st.integers(0, 1 << 17), st.integers(0, 1 << 10), st.integers(0, 2**32 - 1))
def test_any_bytes(nbytes: int, start: int, crc: int) -> None:
    want = google_crc32c.extend(crc, BYTES[start : start + nbytes].tobytes())
    at = BYTES.ctypes.data + start
    assert crc32c(at, nbytes, crc) == want
    assert locked(crc, at, nbytes) == want


def test_known_values() -> None:
    text = np.frombuffer(b"123456789", dtype=np.uint8)  # the check value of RFC 3720's CRC
    assert crc32c(text.ctypes.data, 9) == locked(0, text.ctypes.data, 9) == 0xE3069283
    assert crc32c(text.ctypes.data, 0) == 0


def test_many_bytes_in_parts() -> None:
    want = google_crc32c.value(BYTES.tobytes())
    at = BYTES.ctypes.data
    assert locked(0, at, len(BYTES)) == want
    assert crc32c(at + 100, len(BYTES) - 100, crc32c(at, 100)) == want


def test_a_library_without_functions_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    checksums._ways.cache_clear()
    monkeypatch.setattr(checksums, "find_spec", lambda name: None)
    try:
        assert checksums._ways() == (locked, locked)
        assert crc32c(BYTES.ctypes.data, 1 << 20) == google_crc32c.value(BYTES[: 1 << 20].tobytes())
    finally:
        checksums._ways.cache_clear()
