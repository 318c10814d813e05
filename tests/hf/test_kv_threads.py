"""Threads that generate with pages of one memory take turns, and closing waits for the forward that is under way."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.paged import decoder, generated, left_padded, paged, prompt, smallest
from tierstore.errors import SessionClosedError


@pytest.fixture(scope="module")
def llama() -> Any:
    return decoder("LlamaForCausalLM")


def test_threads_get_the_plain_models_tokens(llama: Any, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"input_ids": prompt(60)},
        left_padded((50, 21)),
        {"input_ids": prompt(45, seed=1), "num_beams": 2},
    ]
    wanted = [generated(llama, **each)[0] for each in asked]
    start = Barrier(len(asked))

    def work(given: dict[str, Any]) -> Tensor:
        start.wait()
        return generated(llama, **given)[0]

    below: dict[str, Any] = {"kv_nvme": 1 << 21}
    with paged(llama, tmp_path, kv_hbm=8 * smallest(llama, **below), **below):
        with ThreadPoolExecutor(len(asked)) as threads:
            found = list(threads.map(work, asked))
        assert all(map(torch.equal, found, wanted))
        assert all(torch.equal(generated(llama, **each)[0], want) for each, want in zip(asked, wanted, strict=True))
    assert llama.config._attn_implementation == "sdpa"


def test_memory_is_not_released_under_a_forward(llama: Any) -> None:
    want, _ = generated(llama, input_ids=prompt(20), new=1)
    with paged(llama) as made, ThreadPoolExecutor(2) as threads:
        closing: list[Future[None]] = []

        def close_elsewhere(*_: Any) -> None:
            assert not threads.submit(made.memory.turn.acquire, blocking=False).result()
            closing.append(threads.submit(made.memory.close))

        hook = llama.model.layers[0].register_forward_pre_hook(close_elsewhere)
        found, _ = generated(llama, input_ids=prompt(20), new=1)
        hook.remove()
        closing[0].result()
        assert torch.equal(found, want)
        with pytest.raises(SessionClosedError):
            generated(llama, input_ids=prompt(20))
