"""A text ends with the token that completes a stop string, wherever that began."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tierstore.jobs.ending import Ending

END = 256


def decode(tokens: Sequence[int]) -> str:
    """A token a byte of UTF-8; the end token is special."""
    return bytes(token for token in tokens if token != END).decode(errors="replace")


def ended(tokens: Sequence[int], ending: Ending) -> tuple[int, str | None]:
    """After how many tokens a text ends, and why."""
    for count in range(1, len(tokens) + 1):
        if reason := ending.reason(tokens[:count]):
            return count, reason
    return len(tokens), None


letters = st.text(st.sampled_from("aaabé🙂"), max_size=30)


@settings(max_examples=100)
@given(text=letters, stop=st.lists(letters.filter(bool).map(lambda text: text[:4]), min_size=1, max_size=3))
def test_the_first_stop_string_ends_it(text: str, stop: list[str]) -> None:
    tokens = list(text.encode())
    ending = Ending(decode, ends=(), stop=stop, most=1000)
    naive = next((n for n in range(1, len(tokens) + 1) if any(s in decode(tokens[:n]) for s in stop)), None)
    count, reason = ended(tokens, ending)
    assert (count, reason) == ((naive, "stop") if naive else (len(tokens), None))
    cut = ending.text(tokens[:count])
    assert text.startswith(cut)
    assert not any(s in cut for s in stop)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([97, END, 97], (2, "stop")),
        ([97] * 5, (4, "length")),
        ([97, 97, 97, END], (4, "stop")),  # at its length too
        ([97, 97], (2, None)),
    ],
)
def test_end_tokens_and_length(tokens: list[int], expected: tuple[int, str | None]) -> None:
    assert ended(tokens, Ending(decode, ends={END}, stop=(), most=4)) == expected


def test_end_tokens_can_be_ignored() -> None:
    ending = Ending(decode, ends=(), stop=(), most=4)
    assert ended([END, END, 97, 97, 97], ending) == (4, "length")
    assert ending.text([END, END, 97, 97]) == "aa"


def test_a_text_that_is_cut_has_stopped() -> None:
    """Special tokens, which nobody sees, have parted the stop string."""
    tokens = [97, *[END] * 50, 98]
    ending = Ending(decode, ends=(), stop=["ab"], most=len(tokens))
    assert ended(tokens, ending) == (len(tokens), "stop")
    assert ending.text(tokens) == ""
