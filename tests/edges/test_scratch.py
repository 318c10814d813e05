"""Memory that products of packed matrices use again."""

from __future__ import annotations

import gc
import threading

import torch

from tierstore.formats.scratch import Scratch


def test_purposes_share_no_memory() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    one = scratch.take("one", (8,), torch.int32, cpu).fill_(1)
    two = scratch.take("two", (4, 2), torch.int32, cpu).fill_(2)
    again = scratch.take("one", (2, 2), torch.int64, cpu)
    assert again.data_ptr() == one.data_ptr()
    assert one.eq(1).all()
    assert two.eq(2).all()
    assert scratch.nbytes == 64
    assert scratch.take("one", (0, 3), torch.bfloat16, cpu).shape == (0, 3)


def test_buffers_grow_and_what_is_too_small_goes() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    scratch.take("one", (8,), torch.uint8, cpu)
    scratch.take("two", (8,), torch.uint8, cpu)
    assert scratch.take("one", (100,), torch.uint8, cpu).numel() == 100
    assert scratch.nbytes == 108
    scratch.take("one", (8,), torch.uint8, cpu)
    assert scratch.nbytes == 108


def test_shapes_are_not_remembered_without_end() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    for length in range(3000):
        assert scratch.take("one", (length % 1500,), torch.uint8, cpu).numel() == length % 1500
    assert len(scratch._local.buffers.views) <= 1024


def test_buffers_made_in_inference_mode_serve_outside() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    with torch.inference_mode():
        first = scratch.take("one", (8,), torch.float32, cpu)
    assert not first.is_inference()
    scratch.take("one", (8,), torch.float32, cpu).add_(torch.ones(8))


def test_each_thread_has_buffers_of_its_own() -> None:
    scratch, cpu = Scratch(), torch.device("cpu")
    mine = scratch.take("one", (8,), torch.uint8, cpu)
    theirs: list[int] = []

    def work() -> None:
        theirs.append(scratch.take("one", (8,), torch.uint8, cpu).data_ptr())
        theirs.append(scratch.nbytes)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert theirs[0] != mine.data_ptr()
    assert theirs[1] == 16
    gc.collect()
    assert scratch.nbytes == 8
