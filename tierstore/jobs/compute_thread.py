"""A thread that computes as the one that makes it would."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

import torch


def compute_thread(work: Callable[[], None], name: str) -> Thread:
    """A daemon thread for ``work``, not begun, in which torch has as many threads as here: one that is new does not
    know, and other numbers may give other bits."""
    count = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(count)
        work()

    return Thread(target=begin, name=name, daemon=True)
