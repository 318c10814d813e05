"""Attention on other threads while pages come: bytes stay until it is over, and what it raises comes out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf.paged import decoder, left_padded, paged, prompt, smallest
from tierstore.hf.kv import decoding
from tierstore.hf.kv.beside import Beside, Task
from tierstore.kernels import machine_code
from tierstore.kernels.machine_code import can_compile, rest_between_work
from tierstore.kernels.paged_attention import compiled

NVME = 1 << 24
pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite, the extra `fast`, and a processor with AVX2")


class LateTask(Task[Any]):
    """Work that is done when somebody waits for it."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work: Callable[[], Any] | None = work
        self._result: Any = None

    def done(self) -> bool:
        return self._work is None

    def wait(self) -> None:
        if self._work is not None:
            work, self._work = self._work, None
            self._result = work()

    gate = wait

    def result(self) -> Any:
        self.wait()
        return self._result


class Late:
    """Threads that begin as late as they may."""

    def __init__(self) -> None:
        self.tasks = 0

    def start(self, work: Callable[[], Any]) -> LateTask:
        self.tasks += 1
        return LateTask(work)

    def close(self) -> None:
        pass


class Alone:
    """Compiled kernels, in the caller's thread."""

    BESIDE, PREFERRED = False, compiled.PREFERRED
    fits, combine = staticmethod(compiled.fits), staticmethod(compiled.combine)
    decode, decode_raw = staticmethod(compiled.decode), staticmethod(compiled.decode_raw)


def next_logits(made: Any, model: Any, tokens: int = 3) -> list[Tensor]:
    rows = left_padded((330, 301))
    mask = rows["attention_mask"]
    found = []
    with torch.no_grad():
        model(**rows, cache=made.cache)
        for number in range(tokens):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
            token = prompt(1, rows=2, seed=number)
            found.append(model(input_ids=token, attention_mask=mask, cache=made.cache).logits)
    return found


@pytest.mark.parametrize("format", [None, "int8"])
def test_pages_stay_until_they_are_read(format: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, late = decoder("LlamaForCausalLM"), Late()
    found, misses = [], []
    for beside in (None, late):
        kv_hbm = (3 if format else 2) * smallest(model, format, kv_nvme=NVME)
        with paged(model, tmp_path, format=format, kv_hbm=kv_hbm, kv_nvme=NVME) as made:
            if beside is None:
                monkeypatch.setattr(decoding, "kernels_for", lambda device: Alone)
            else:
                made.cache.memory.beside.close()
                monkeypatch.setattr(made.cache.memory, "beside", beside)
            found.append(next_logits(made, model))
            used = made.cache.memory.usage().cells[0]
            assert used.read_nbytes > 0
            misses.append(used.misses)
            monkeypatch.undo()
    assert late.tasks > 5
    assert misses[1] == misses[0]  # a slot that is still read is waited for: nothing was asked for out of order
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_an_error_comes_out_and_the_next_token_is_right(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = decoder("LlamaForCausalLM")
    kv_hbm = 2 * smallest(model, kv_nvme=NVME)
    want: Tensor | None = None
    for fails in (False, True):
        with paged(model, tmp_path, kv_hbm=kv_hbm, kv_nvme=NVME) as made:
            (_, last) = next_logits(made, model, 2)
            want = last if want is None else want
            if fails:
                token, mask = prompt(1, rows=2, seed=9), torch.ones(2, 333, dtype=torch.long)
                mask[1, :29] = 0
                with monkeypatch.context() as patch, torch.no_grad():
                    patch.setattr(compiled, "_carry_out", _wrong)
                    with pytest.raises(ArithmeticError, match="on purpose"):
                        model(input_ids=token, attention_mask=mask, cache=made.cache)
        torch.testing.assert_close(last, want, rtol=1e-5, atol=1e-6)
    with paged(model, tmp_path, kv_hbm=kv_hbm, kv_nvme=NVME) as made:
        torch.testing.assert_close(next_logits(made, model, 2)[1], want, rtol=1e-5, atol=1e-6)


def _wrong(*args: Any) -> Any:
    if threading.current_thread() is not threading.main_thread():
        raise ArithmeticError("on purpose")
    return CARRY_OUT(*args)


CARRY_OUT = compiled._carry_out


def test_a_task_is_a_fence_that_does_not_raise() -> None:
    beside, begun, go = Beside(), threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        go.wait()
        return 7

    task = beside.start(work)
    begun.wait()
    assert not task.done()
    go.set()
    task.wait()
    assert task.done()
    assert task.result() == 7

    def wrong() -> None:
        raise ArithmeticError("on purpose")

    failed: Task[None] = beside.start(wrong)
    failed.gate()
    with pytest.raises(ArithmeticError):
        failed.result()
    beside.close()
    beside.close()
    assert not [each for each in threading.enumerate() if each.name.startswith("tierstore-attention")]


def test_threads_rest_or_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An OpenMP team of its own, for a thread that has none; nothing where threads are not libgomp's."""
    x = torch.randn(512, 512)
    want = x @ x
    thread = threading.Thread(target=rest_between_work)
    thread.start()
    thread.join()
    assert torch.equal(x @ x, want)
    monkeypatch.setattr(machine_code, "_parallel", lambda: 0)
    rest_between_work()


def test_where_a_stream_computes_no_thread_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    triton = pytest.importorskip("tierstore.kernels.paged_attention.triton", exc_type=ImportError)
    assert triton.BESIDE is Alone.BESIDE is False
    model, late = decoder("LlamaForCausalLM"), Late()
    with paged(model, tmp_path, kv_hbm=2 * smallest(model, kv_nvme=NVME), kv_nvme=NVME) as made:
        monkeypatch.setattr(decoding, "kernels_for", lambda device: Alone)
        made.cache.memory.beside.close()
        monkeypatch.setattr(made.cache.memory, "beside", late)
        next_logits(made, model, 1)
        assert made.cache.memory.usage().cells[0].read_nbytes > 0
    assert not late.tasks
