"""Kernels are for cards and machines that Triton can make them for; elsewhere torch does the work."""

from __future__ import annotations

import pytest
import torch

from tierstore.formats import linear
from tierstore.hf.kv import decoding, moving
from tierstore.kernels import cards
from tierstore.kernels.kv_pages import reference
from tierstore.kvformats import packed

triton = pytest.importorskip("triton", reason="triton is not installed", exc_type=ImportError)

CARD = torch.device("cuda", 0)


class Driver:
    """Triton's, with what launches kernels or without."""

    def __init__(self, error: str) -> None:
        self._error = error

    def get_current_target(self) -> None:
        if self._error:
            raise RuntimeError(self._error)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A card of today in a machine with a compiler."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver(""))
    return monkeypatch


def ask(device: torch.device = CARD) -> bool:
    return cards.runs_triton.__wrapped__(device)


def test_a_card_of_today_runs_kernels(card: pytest.MonkeyPatch) -> None:
    assert ask()
    assert not ask(torch.device("cpu"))


def test_a_card_that_is_too_old_does_not(card: pytest.MonkeyPatch) -> None:
    card.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not ask()


def test_without_triton_there_are_none(card: pytest.MonkeyPatch) -> None:
    card.setattr(cards, "find_spec", lambda name: None)
    assert not ask()


def test_without_a_compiler_it_is_said(card: pytest.MonkeyPatch) -> None:
    card.setattr(triton.runtime.driver, "_active", Driver("Failed to find C compiler"))
    with pytest.warns(UserWarning, match="Failed to find C compiler: install gcc"):
        assert not ask()


@pytest.mark.parametrize("runs", [False, True])
def test_all_that_has_kernels_asks(monkeypatch: pytest.MonkeyPatch, runs: bool) -> None:
    for module in (linear, decoding, moving, packed):
        monkeypatch.setattr(module, "runs_triton", lambda device: runs and device == CARD)
    assert (linear._kernel.__wrapped__("int4_matmul", CARD) is not None) == runs
    assert linear._kernel.__wrapped__("", CARD) is None
    assert (decoding.kernels_for(CARD) is not None) == runs
    assert (moving.movers_for(CARD) is not None) == runs
    assert (packed._kernels.__wrapped__(CARD) is not reference) == runs
