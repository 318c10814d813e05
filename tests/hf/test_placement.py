"""Whatever is done to placed tensors, reading them later gives what the same does to real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import core_model_loading as ops

from tierstore.contracts import ReadRequest
from tierstore.extents import Extent
from tierstore.hf.placement import MIN_RUN, Computed, Placed, contiguous_runs, materialise, stored
from tierstore.stores.memory import MemoryStore


@pytest.fixture
def store() -> Iterator[MemoryStore]:
    torch.manual_seed(0)
    made = MemoryStore(
        {
            **{f"wide.{i}": torch.randn(4, 64, 32) for i in range(3)},
            **{f"thin.{i}": torch.randn(8, 6) for i in range(3)},
            "half": torch.randn(64, 32).to(torch.bfloat16),
            "empty": torch.empty(0, 5),
            "one": torch.tensor(3.0),
        }
    )
    yield made
    made.close()


def real(name: str, store: MemoryStore) -> torch.Tensor:
    return materialise(stored(name, store))


def by_runs(placed: Placed) -> torch.Tensor:
    """The bytes that the runs of ``placed`` say it is made of, put where they say."""
    flat = torch.empty(placed.nbytes, dtype=torch.uint8)
    end = 0
    for run in contiguous_runs(placed):
        assert run.at == end
        end += run.nbytes
        into = flat[run.at : end]
        if isinstance(run.source, Computed):
            into.copy_(materialise(run.source).reshape(-1).view(torch.uint8)[run.start : run.start + run.nbytes])
        else:
            placed.store.read([ReadRequest(run.source, Extent(run.start, run.nbytes), into)]).wait()
    assert end == placed.nbytes
    return flat.view(placed.dtype).view(placed.shape)


Op = Callable[[Sequence[torch.Tensor]], torch.Tensor]
SAME_SHAPE: dict[str, Op] = {
    "clone": lambda x: x[0].clone(),
    "to itself": lambda x: x[-1].to("cpu", x[-1].dtype),
    "add": lambda x: x[0] + x[1],
    "scale": lambda x: x[2] * 3,
    "flip": lambda x: x[1].flip(0),
    "detach": lambda x: x[0].detach()[...],
}
RESHAPING: dict[str, Op] = {
    "stack": lambda x: torch.stack(list(x), 0),
    "stack 1": lambda x: torch.stack(list(x), 1),
    "cat": lambda x: torch.cat(list(x), 0),
    "cat -1": lambda x: torch.cat(list(x), -1),
    "chunk": lambda x: x[1].chunk(2, 0)[1],
    "chunk -1": lambda x: x[1].chunk(2, -1)[0].contiguous(),
    "split": lambda x: x[0].tensor_split([1])[1],
    "select": lambda x: x[2][1],
    "narrow": lambda x: x[0][1:, ..., :-1],
    "transpose": lambda x: x[0].transpose(0, -1),
    "transposed": lambda x: x[0].transpose(0, -1).contiguous(),
    "flatten": lambda x: x[0].flatten(),
    "twisted": lambda x: x[2].transpose(0, 1).reshape(-1),
    "unsqueeze": lambda x: x[0].unsqueeze(1),
    "expand": lambda x: x[0].unsqueeze(0).expand(2, *x[0].shape),
    "bytes": lambda x: x[1].contiguous().view(torch.uint8),
    "cast": lambda x: x[0].to(torch.float16),
}


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["wide", "thin"]),
    same=st.lists(st.tuples(st.sampled_from(sorted(SAME_SHAPE)), st.permutations([0, 1, 2])), max_size=4),
    last=st.lists(st.sampled_from(sorted(RESHAPING)), min_size=1, max_size=3),
)
def test_placed_and_real_tensors_agree(kind: str, same: list[tuple[str, list[int]]], last: list[str]) -> None:
    with_store = MemoryStore({f"{kind}.{i}": torch.randn((4, 64, 32) if kind == "wide" else (8, 6)) for i in range(3)})
    try:
        placed: list[torch.Tensor] = [stored(f"{kind}.{i}", with_store) for i in range(3)]
        actual = [real(f"{kind}.{i}", with_store) for i in range(3)]
        for name, order in same:
            for values in (placed, actual):
                values[order[0]] = SAME_SHAPE[name]([values[i] for i in order])
        for name in last:
            if actual[0].dim() < 2 or min(actual[0].shape) < 2:
                break
            want = RESHAPING[name](actual)
            have = RESHAPING[name](placed)
            assert isinstance(have, Placed)
            assert (have.shape, have.dtype) == (want.shape, want.dtype)
            assert torch.equal(materialise(have), want)
            assert torch.equal(by_runs(have), want.contiguous())
            placed, actual = [have] * 3, [want] * 3
    finally:
        with_store.close()


CONFIG = type("Config", (), {"num_attention_heads": 4, "get_text_config": lambda self: self})()
CONVERSIONS: dict[str, tuple[list[Any], list[str], list[str], dict[str, list[str]]]] = {
    "experts": (
        [ops.MergeModulelist(0), ops.Concatenate(1)],
        ["a", "b"],
        ["out"],
        {"a": ["wide.0", "wide.1"], "b": ["wide.2", "wide.0"]},
    ),
    "merged": ([ops.MergeModulelist(0)], ["a"], ["out"], {"a": ["wide.0", "wide.1", "wide.2"]}),
    "joined": ([ops.Concatenate(0)], ["a", "b"], ["out"], {"a": ["half"], "b": ["half"]}),
    "joined inside": ([ops.Concatenate(2)], ["a", "b"], ["out"], {"a": ["wide.0"], "b": ["wide.1"]}),
    "chunked": ([ops.Chunk(0)], ["a"], ["x", "y"], {"a": ["wide.1"]}),
    "chunked inside": ([ops.Chunk(1)], ["a"], ["x", "y"], {"a": ["wide.1"]}),
    "transposed": ([ops.Transpose(1, 2)], ["a"], ["out"], {"a": ["wide.2"]}),
    "interleaved": ([ops.Interleave(1)], ["a"], ["out"], {"a": ["wide.2"]}),
    "interleaved rows": ([ops.Interleave(0), ops.Chunk(0)], ["a"], ["x", "y"], {"a": ["wide.2"]}),
    "for rope": ([ops.PermuteForRope()], ["a"], ["out"], {"a": ["half"]}),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_conversions_of_transformers(name: str, store: MemoryStore) -> None:
    chain, sources, targets, inputs = CONVERSIONS[name]

    def run(tensors: dict[str, list[Any]]) -> dict[str, Any]:
        for op in chain:
            tensors = op.convert(tensors, source_patterns=sources, target_patterns=targets, config=CONFIG)
        return {key: value[0] if isinstance(value, list) else value for key, value in tensors.items()}

    have = run({key: [stored(part, store) for part in parts] for key, parts in inputs.items()})
    want = run({key: [real(part, store) for part in parts] for key, parts in inputs.items()})
    assert have.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(by_runs(have[key]), value)
    placement = {"experts", "merged", "joined", "chunked", "chunked inside", "interleaved rows"}
    arithmetic = any(isinstance(run.source, Computed) for value in have.values() for run in contiguous_runs(value))
    assert arithmetic is (name not in placement)


def test_runs_that_follow_each_other_are_one(store: MemoryStore) -> None:
    halves = stored("wide.0", store).chunk(2, 0)
    (run,) = contiguous_runs(torch.cat(halves, 0))  # type: ignore[arg-type]
    assert run.nbytes == 4 * 64 * 32 * 4


def test_the_shortest_runs_that_stay(store: MemoryStore) -> None:
    rows = stored("wide.0", store).transpose(0, 1)  # runs of one row: 128 bytes
    (run,) = contiguous_runs(rows)  # type: ignore[arg-type]
    assert isinstance(run.source, Computed)
    blocks = torch.stack([stored("wide.0", store), stored("wide.1", store)], 1)  # runs of 64 rows: 8 KiB
    runs = contiguous_runs(blocks)  # type: ignore[arg-type]
    assert len(runs) == 8
    assert min(run.nbytes for run in runs) >= MIN_RUN


@pytest.mark.parametrize("name", ["empty", "one"])
def test_tensors_of_odd_sizes(name: str, store: MemoryStore) -> None:
    placed = stored(name, store)
    assert torch.equal(by_runs(placed), real(name, store))
    assert torch.equal(by_runs(placed.clone()), real(name, store))  # type: ignore[arg-type]


def test_equal_reads_the_bytes(store: MemoryStore) -> None:
    one, other = stored("wide.0", store), stored("wide.1", store)
    assert torch.equal(one, stored("wide.0", store))
    assert not torch.equal(one, other)
    assert not torch.equal(one, stored("thin.0", store))
    assert torch.equal(one + other, other + one)
    assert torch.equal(torch.cat([one, other])[:4], one)


def test_nothing_writes_into_what_is_on_disk(store: MemoryStore) -> None:
    with pytest.raises(NotImplementedError, match="still on disk"):
        stored("half", store).zero_()


def test_what_takes_only_the_shape_is_real(store: MemoryStore) -> None:
    made = torch.zeros_like(stored("half", store))
    assert type(made) is torch.Tensor
    assert torch.equal(made.add_(1), torch.ones(64, 32, dtype=torch.bfloat16))
    assert stored("half", store).new_zeros(3).device.type == "cpu"
