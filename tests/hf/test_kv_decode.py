"""Where there are kernels, a query is answered by the pages where they lie: with the numbers of the gathered ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.edges.interpreter import Interpreter
from tests.hf.paged import decoder, generated, left_padded, paged, prompt, smallest
from tierstore.hf.kv import decoding
from tierstore.kernels.machine_code import can_compile
from tierstore.kernels.paged_attention import compiled, triton
from tierstore.kernels.paged_attention.partial import Partial

needs_compiler = pytest.mark.skipif(
    not can_compile(), reason="needs llvmlite, the extra `fast`, and a processor with AVX2"
)


class Kernels:
    """Triton's, interpreted."""

    PREFERRED, BESIDE = True, False
    fits, combine = staticmethod(triton.fits), staticmethod(triton.combine)

    def __init__(self, interpreter: Interpreter) -> None:
        self.interpreter = interpreter
        self.calls = {"decode": 0, "decode_raw": 0}

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self.calls["decode"] += 1
        return Partial(*self.interpreter.call("paged_attention.triton", "decode", *args, **kwargs))

    def decode_raw(self, *args: Any, **kwargs: Any) -> Any:
        self.calls["decode_raw"] += 1
        return Partial(*self.interpreter.call("paged_attention.triton", "decode_raw", *args, **kwargs))


@pytest.fixture(scope="module")
def kernels(interpreter: Interpreter) -> Kernels:
    return Kernels(interpreter)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("LlamaForCausalLM", None),
        ("MistralForCausalLM", "bf16"),
        ("GptOssForCausalLM", "int4"),
    ],
)
def test_pages_answer_where_they_lie(
    name: str, format: str | None, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = decoder(name)
    rows, next_one = left_padded((150, 146)), prompt(1, rows=2, seed=1)
    mask = torch.cat([rows["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    found = []
    for engaged in (None, kernels):
        with paged(model, tmp_path, format=format, page_tokens=16) as made, torch.no_grad():
            model(**rows, cache=made.cache)
            monkeypatch.setattr(decoding, "kernels_for", lambda device, these=engaged: these)
            found.append(model(input_ids=next_one, attention_mask=mask, cache=made.cache).logits)
            monkeypatch.undo()
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)
    assert not torch.equal(*found)
    assert kernels.calls["decode_raw"]


def test_packed_pages_were_read_packed(kernels: Kernels) -> None:
    assert kernels.calls["decode"]


def test_a_dtype_without_kernels_is_gathered(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("LlamaForCausalLM", torch.float64, num_hidden_layers=1)
    monkeypatch.setattr(decoding, "kernels_for", lambda device: kernels)
    before = dict(kernels.calls)
    with paged(model) as made, torch.no_grad():
        found = [model(input_ids=part, cache=made.cache).logits for part in (prompt(9)[:, :8], prompt(9)[:, 8:])]
    assert torch.equal(torch.cat(found, 1)[:, :8], model(input_ids=prompt(9)[:, :8]).logits)
    assert kernels.calls == before


class Counted:
    """Kernels compiled for this processor, and how often they were called."""

    PREFERRED, BESIDE = compiled.PREFERRED, compiled.BESIDE
    fits, combine = staticmethod(compiled.fits), staticmethod(compiled.combine)

    def __init__(self) -> None:
        self.calls = 0

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return compiled.decode(*args, **kwargs)

    def decode_raw(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return compiled.decode_raw(*args, **kwargs)


@needs_compiler
@pytest.mark.parametrize(
    ("name", "dtype", "format"),
    [
        ("LlamaForCausalLM", torch.bfloat16, None),
        ("LlamaForCausalLM", torch.float32, "bf16"),
        ("MistralForCausalLM", torch.float32, None),
        ("Gemma2ForCausalLM", torch.float32, None),
        ("GptOssForCausalLM", torch.bfloat16, None),
        ("LlamaForCausalLM", torch.float32, "int8"),
        ("LlamaForCausalLM", torch.bfloat16, "int4"),
        ("GptOssForCausalLM", torch.float32, "fp4"),
    ],
)
def test_compiled_kernels_say_what_torch_says(
    name: str, dtype: torch.dtype, format: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Over pages that do not fit, most of them on disk: rows of different lengths, with padding."""
    model, rows, counted = decoder(name, dtype), left_padded((330, 301)), Counted()
    next_one = prompt(1, rows=2, seed=1)
    mask = torch.cat([rows["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    nvme = 1 << 24
    found = []
    for engaged in (None, counted):
        kv_hbm = (3 if format else 2) * smallest(model, format, kv_nvme=nvme)
        with paged(model, tmp_path, format=format, kv_hbm=kv_hbm, kv_nvme=nvme) as made, torch.no_grad():
            monkeypatch.setattr(decoding, "kernels_for", lambda device, these=engaged: these)
            model(**rows, cache=made.cache)
            found.append(model(input_ids=next_one, attention_mask=mask, cache=made.cache).logits)
            monkeypatch.undo()
    assert counted.calls
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-3)
    torch.testing.assert_close(found[1], found[0], rtol=rtol, atol=atol)


@needs_compiler
def test_pages_that_fit_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that numbers are those of the plain model."""
    model, counted = decoder("LlamaForCausalLM"), Counted()
    monkeypatch.setattr(decoding, "kernels_for", lambda device: counted)
    with paged(model) as made:
        found = generated(model, inputs=prompt(100), cache=made.cache)
    monkeypatch.undo()
    expected = generated(model, inputs=prompt(100))
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))
    assert not counted.calls


def test_heads_that_are_no_vectors_are_left_to_torch() -> None:
    assert compiled.fits(64, 128)
    assert not compiled.fits(20, 16)
    assert not compiled.fits(16, 12)
