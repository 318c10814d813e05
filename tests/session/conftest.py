"""A tiny checkpoint with sharded weights, and the backends every session must be right on."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import LlamaConfig, LlamaForCausalLM

from tierstore.backends import Backend, backend_for
from tierstore.stores.reader import Reader
from tierstore.testing.adversary import Adversary, adversary


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random bf16 Llama of 6 layers, 3.2 MiB, in several shards."""
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(path, max_shard_size="1MB")
    return path


@pytest.fixture(params=["cpu", "adversary-1", "adversary-2", "past-the-host-3"])
def make_backend(request: pytest.FixtureRequest) -> Iterator[Callable[[], Backend]]:
    """Makes a fresh backend a session; adversaries are asked for faults at the end.

    The last one reads shards straight into device memory, as GPUDirect Storage does.
    """
    made: list[Adversary] = []

    def make() -> Backend:
        if request.param == "cpu":
            return backend_for("cpu")
        adverse = adversary(int(request.param[-1]) + 100 * len(made))
        made.append(adverse)
        pool = adverse.pool
        past_the_host: Any = Reader if request.param.startswith("past") else lambda paths: None
        return Backend(torch.device("cpu"), adverse.engine, pool, pool, pool, past_the_host)

    yield make
    for adverse in made:
        adverse.engine.check()


@pytest.fixture
def alarm() -> Iterator[None]:
    """SIGALRM is a Ctrl-C whose moment a test can choose; a little later where Python would only print it."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _is_lost(frame):
            signal.setitimer(signal.ITIMER_REAL, 1e-4)
        else:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def _is_lost(frame: FrameType | None) -> bool:
    """Whether Python prints what is raised there: in a finalizer, or while torch makes a reference, whose finalizer
    fails where it is half made."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code is StorageWeakRef.__init__.__code__:
            return True
        frame = frame.f_back
    return False
