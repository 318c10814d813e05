"""What every test gets: one compute thread, skips where the hardware is missing, and no leak let through."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tests.edges.interpreter import Interpreter
from tierstore.machine import gds_is_real

torch.set_num_threads(1)


LONG = ("test_benches.py", "test_gpu_check.py", "test_ray.py")
"""Files with tests of half a minute: they begin first, so that no process is alone with one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    missing = {}
    if not torch.cuda.is_available():
        missing["cuda"] = "torch finds no CUDA GPU here"
    if any(item.get_closest_marker("gds") for item in items) and not gds_is_real(tempfile.gettempdir()):
        missing["gds"] = "no real GPUDirect Storage here"
    for item in items:
        for marker, reason in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def our_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("tierstore")}


def files_open_below(folder: Path) -> list[str]:
    """Paths below ``folder`` that a file descriptor of this process points at."""
    found = []
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this very listing
            target = os.readlink(entry.path)
            if target.startswith(f"{folder}/"):
                found.append(target)
    return found


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a thread of ours running, or a file below its ``tmp_path`` open."""
    folder: Path | None = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    before = our_threads()
    yield
    left = our_threads() - before
    for thread in left:
        thread.join(timeout=5)  # closing need not wait for a thread's last instruction
    alive = sorted(thread.name for thread in left if thread.is_alive())
    assert not alive, f"threads left running: {alive}"
    if folder is not None and files_open_below(folder):
        gc.collect()  # what only the traceback of an expected error still holds is no leak
        assert not files_open_below(folder), "files left open"


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """The process in which kernels are interpreted: one for all files, since it imports torch and triton."""
    made = Interpreter()
    yield made
    made.close()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as transformers saves it: a Llama of 4 layers and about 13 MiB, float32, with a byte-level tokenizer
    and a chat template. Read only."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny_checkpoint")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = cast(Any, PreTrainedTokenizerFast)(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = "{% for turn in messages %}<{{ turn['role'] }}>{{ turn['content'] }}\n{% endfor %}<assistant>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=fast.eos_token_id,
        bos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
