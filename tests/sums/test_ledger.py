"""The ledger never passes its limit, whoever asks."""

from __future__ import annotations

from threading import Barrier, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tierstore.ledger import Ledger


@given(limit=st.integers(0, 12), steps=st.lists(st.tuples(st.booleans(), st.integers(0, 6))))
def test_agrees_with_a_plain_count(limit: int, steps: list[tuple[bool, int]]) -> None:
    ledger = Ledger(limit, "hbm")
    live = peak = 0
    for take, nbytes in steps:
        if take:
            fits = live + nbytes <= limit
            assert ledger.take(nbytes) is fits
            live += nbytes if fits else 0
            peak = max(peak, live)
        elif nbytes <= live:
            ledger.give(nbytes)
            live -= nbytes
        else:
            with pytest.raises(ValueError, match="are live"):
                ledger.give(nbytes)
        assert (ledger.live, ledger.peak) == (live, peak)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="limit"):
        Ledger(-1, "ram")
    ledger = Ledger(10, "ram")
    with pytest.raises(ValueError, match="ram"):
        ledger.take(-1)
    with pytest.raises(ValueError, match="ram"):
        ledger.give(-1)
    assert ledger.live == 0


def test_threads_together_never_pass_the_limit() -> None:
    ledger = Ledger(100, "hbm")
    start = Barrier(4)
    granted: list[int] = []

    def work() -> None:
        start.wait()
        for _ in range(500):
            if ledger.take(30):
                granted.append(ledger.live)
                ledger.give(30)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert granted
    assert max(granted) <= 100
    assert ledger.peak <= 90
    assert ledger.live == 0
