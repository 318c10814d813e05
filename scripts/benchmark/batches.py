"""What the batch bench measures, each in a process of its own: see ``jobs.py``."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache

from benchmark.job import Job
from benchmark.words import prompt_of_words
from tierstore import Budget
from tierstore.jobs.opening import OpenJob, open_job
from tierstore.jobs.prompts import PromptFile
from tierstore.jobs.running import run
from tierstore.jobs.samples import Finished
from tierstore.jobs.settings import JobSettings
from tierstore.jobs.workload import Workload
from tierstore.packing import pack
from tierstore.sampling import Sampling


def batch(job: Job) -> dict[str, Any]:
    """A job of ``rows`` rows at once, ``steps`` tokens each, within ``hbm`` for weights and KV."""
    vocab = int(json.loads((Path(job.checkpoint) / "config.json").read_text())["vocab_size"])
    rows = [
        {"id": number, "prompt": prompt_of_words(number, job.length, vocab), "ignore_eos": True}
        for number in range(job.rows)
    ]
    defaults = Sampling.checked(max_new_tokens=job.steps)
    budget = Budget(job.hbm, kv_hbm=job.kv_hbm)
    settings = JobSettings(model=job.checkpoint, budget=budget, device="cpu", defaults=defaults, speculate="off")
    with _prompts(rows, defaults) as prompts:
        workload = Workload.of(prompts.rows(), prompts.samples_total, defaults)
        with open_job(settings, workload) as opened:
            moments = list(_moments(opened, prompts))
            report = opened.session.report()
            return {
                "moments": moments,
                "plan": {name: getattr(opened.plan, name) for name in PLANNED},
                "streamed_nbytes": opened.session.plan.streamed_nbytes,
                "notes": list(opened.notes),
                "report": json.loads(report.to_json()),
            }


PLANNED = ("tokens", "micro_batches", "sequences", "seconds_per_pass", "tokens_per_second", "seconds", "bound")


def _moments(opened: OpenJob, prompts: PromptFile) -> Iterator[tuple[float, int, int]]:
    """After each pass: seconds since the first began, tokens generated, and sequences finished."""
    began, finished = time.perf_counter(), 0
    for some in opened.engine.answer(prompts.rows()):
        finished += sum(isinstance(each, Finished) for each in some)
        yield time.perf_counter() - began, opened.engine.counts.generated_tokens, finished


@contextmanager
def _prompts(rows: Sequence[dict[str, Any]], defaults: Sampling) -> Iterator[PromptFile]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prompts.jsonl")
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        with PromptFile(file, defaults) as prompts:
            yield prompts


def accelerate_batch(job: Job) -> dict[str, Any]:
    """Greedy decoding of ``rows`` rows with Accelerate's disk offload, within ``hbm``."""
    vocab = int(json.loads((Path(job.checkpoint) / "config.json").read_text())["vocab_size"])
    tokens = torch.randint(3, vocab, (job.rows, job.length), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory(dir=Path(job.checkpoint).parent) as folder:
        module: Any = AutoModelForCausalLM.from_pretrained(
            job.checkpoint, device_map="auto", max_memory={"cpu": job.hbm}, offload_folder=folder
        )
        cache, seconds = DynamicCache(config=module.config), []
        for _ in range(job.steps):
            start = time.perf_counter()
            with torch.inference_mode():
                logits = module(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens = logits[:, -1].argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "tokens_per_second": job.rows / statistics.median(seconds[1:])}


def pack_draft(job: Job) -> dict[str, Any]:
    """The checkpoint in bfloat16, packed as ``form`` into ``out``, to draft for itself."""
    done = pack(job.checkpoint, job.out, format=job.form, dtype=DRAFTED)
    return {"nbytes": done.nbytes, "seconds": done.seconds}


DRAFTED = "bfloat16"
"""The dtype of the model whose texts are drafted."""


def speculate(job: Job) -> dict[str, Any]:
    """Texts of the file of prompts ``out``, one after another, with the way to draft that ``form`` says."""
    way, _, draft = job.form.partition(":")
    settings = JobSettings(
        model=job.checkpoint,
        budget=Budget(job.hbm, kv_hbm=job.kv_hbm),
        device="cpu",
        dtype=DRAFTED,
        store=job.out + ".store",
        defaults=Sampling.checked(max_new_tokens=job.steps),
        sequences=1,
        speculate=way,
        draft=draft or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.jsonl")
        report = run(job.out, results, settings)
        texts = {row["id"]: row["text"] for row in map(json.loads, results.read_text().splitlines())}
    return {"texts": texts, "tokens_per_second": report.generated_tokens / report.seconds} | {
        name: getattr(report, name) for name in ("passes", "seconds", "drafted_tokens", "accepted_tokens", "notes")
    }
