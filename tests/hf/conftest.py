"""Quiet transformers, and an ``opened`` that closes what it opened."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import transformers

from tierstore.hf.checkpoint import Checkpoint, open_checkpoint


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    progress: Any = transformers.logging
    progress.set_verbosity_error()
    progress.disable_progress_bar()


@pytest.fixture
def opened() -> Iterator[Callable[..., Checkpoint]]:
    with ExitStack() as stores:

        def open_one(*args: Any, **kwargs: Any) -> Checkpoint:
            checkpoint = open_checkpoint(*args, **kwargs)
            stores.callback(checkpoint.store.close)
            return checkpoint

        yield open_one
