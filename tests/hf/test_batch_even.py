"""How many tokens make every row of float32 alike on a CPU, wherever it stands in a micro-batch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.hf.paged import decoder
from tests.jobs.small import settings_of, write_prompts
from tests.torch_threads import threads
from tierstore.hf.batch.even import even_tokens
from tierstore.jobs.opening import MAY_DEPEND, OpenJob, open_job
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.workload import Workload
from tierstore.sampling import Sampling


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("function", [F.silu, partial(F.gelu, approximate="tanh"), F.softplus])
def test_even_rows_have_the_same_bits_everywhere(function: Any, count: int) -> None:
    def rows_differ(tokens: int, width: int) -> bool:
        row = torch.randn(width, generator=torch.Generator().manual_seed(width))
        rows = row.expand(tokens, width).contiguous()
        with threads(count):
            found = function(rows)
        return not torch.equal(found, found[:1].expand_as(found))

    for width in (100, 2560, 3000):
        tokens = even_tokens(torch.nn.Linear(1, width), 30, count)
        assert tokens is not None
        assert not rows_differ(tokens, width)
    assert any(rows_differ(7, width) for width in range(101, 132))  # so there is something to be even for
    assert even_tokens(decoder("LlamaForCausalLM", torch.bfloat16), 33, count) == 33
    assert even_tokens(torch.nn.Linear(1, 1), 7, count) in (32, 96)


def test_a_job_chooses_them_and_says_where_it_cannot(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def opened(tokens: int | None) -> OpenJob:
        settings, defaults = settings_of(tiny_checkpoint, tokens=tokens), Sampling(max_new_tokens=6)
        with PromptFile(write_prompts(tmp_path), defaults) as prompts:
            workload = Workload.of(prompts.rows(), prompts.samples_total, defaults)
            with open_job(settings, workload) as job:
                assert job.tokens == even_tokens(job.session.module, job.tokens, 3) or tokens is not None
                return job

    with threads(3):
        chosen, odd = opened(None), opened(7)
    assert chosen.tokens % 3 == 0
    assert not any(MAY_DEPEND in note for note in chosen.notes)
    assert any(MAY_DEPEND in note and "3 threads" in note for note in odd.notes)
