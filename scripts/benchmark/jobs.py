"""What is measured, each in a process of its own: reads a job on stdin, prints what it found as a line of JSON.

With the argument ``fork`` it reads jobs until stdin ends, and forks a process for each of them.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM

import tierstore
import tierstore.hf.checkpoint  # which load would import
import tierstore.packing
from benchmark import batches, llama_cpp
from benchmark.decoding import Step, decode, prefill, prompt_of
from benchmark.job import DONE, FORK, PAUSE, Job
from tierstore import Budget

IMPORT_SECONDS = time.time() - psutil.Process().create_time()
"""From the start of the process until everything is imported: timed apart from the work."""
WARM = 3
"""Passes after the first that are not counted: what is made once is made in them."""


def resident(job: Job) -> dict[str, Any]:
    """The plain model wholly in memory: decoding, and the prefill that takes about ``seconds``."""
    module: Any = AutoModelForCausalLM.from_pretrained(job.checkpoint)
    prefill(module, _prompt(job))
    result = _decoded(list(decode(module, _prompt(job), 1 + WARM + job.groups * job.steps)))
    if job.seconds:
        length, probes = _find_length(module, job)
        prompt = prompt_of(_vocab(job), length)
        result |= {"length": length, "probes": probes}
        result["prefill"] = _decoded([prefill(module, prompt) for _ in range(5)])
    return result


def tierstore_decode(job: Job) -> dict[str, Any]:
    """Decoding from a cold start within ``hbm``: the first token, warm ones, then groups."""
    return _streamed(job, lambda module: decode(module, _prompt(job), 1 + WARM + job.groups * job.steps))


def tierstore_prefill(job: Job) -> dict[str, Any]:
    """The same for passes over one prompt of ``length``."""

    def passes(module: Any) -> Iterator[Step]:
        while True:
            yield prefill(module, _prompt(job))

    return _streamed(job, passes)


def _streamed(job: Job, run: Callable[[Any], Iterator[Step]]) -> dict[str, Any]:
    written = _Written()
    _pause()
    start = time.perf_counter()
    with tierstore.load(job.checkpoint, Budget(job.hbm), device="cpu") as session:
        opened = time.perf_counter()
        plan = session.plan
        moved, read = [_moved(session)], [_io("read_bytes")]
        steps: list[Step] = []
        running = run(session.module)
        counts = (1, WARM, *[job.steps] * job.groups)
        for count in counts:
            for step in islice(running, count):
                steps.append(step)
                moved.append(_moved(session))
                read.append(_io("read_bytes"))
            _pause()
        decoded = _decoded(steps)
        starts = range(1 + WARM, len(steps), job.steps)
        result = decoded | {
            "import_seconds": IMPORT_SECONDS,
            "open_seconds": opened - start,
            "first_token_seconds": opened - start + steps[0].seconds,
            "groups": [decoded["seconds"][start : start + job.steps] for start in starts],
            "streamed_nbytes": plan.streamed_nbytes,
            "moved_nbytes": _differences(moved),
            "read_nbytes": _differences(read),
            "written_nbytes": written.nbytes((1 + len(counts)) * len(f"{PAUSE}\n")),
            "units": len(plan.tier),
            "plan": plan.explain(),
            "report": json.loads(session.report().to_json()),
        }
    return result | {"peak_nbytes": _peak_nbytes()}


def accelerate_decode(job: Job) -> dict[str, Any]:
    """Decoding with Accelerate's disk offload, as from_pretrained sets it up, within ``hbm``."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=Path(job.checkpoint).parent) as folder:
        module: Any = AutoModelForCausalLM.from_pretrained(
            job.checkpoint, device_map="auto", max_memory={"cpu": job.hbm}, offload_folder=folder
        )
        on_disk = sum(place == "disk" for place in module.hf_device_map.values())
        opened = time.perf_counter() - start
        steps = list(decode(module, _prompt(job), job.steps))
        return _decoded(steps) | {"open_seconds": opened, "modules_on_disk": on_disk, "peak_nbytes": _peak_nbytes()}


def pack(job: Job) -> dict[str, Any]:
    """Packing the checkpoint."""
    done = tierstore.packing.pack(job.checkpoint, job.out, format=job.form)
    return {
        "seconds": done.seconds,
        "nbytes": done.nbytes,
        "source_nbytes": done.source_nbytes,
        "steps": {name: asdict(step) for name, step in done.steps.items()},
        "bound": done.bound,
        "peak_nbytes": _peak_nbytes(),
    }


def llama_cpp_pack(job: Job) -> dict[str, Any]:
    """The checkpoint as a GGUF file ``out``."""
    llama_cpp.write_q4_0(Path(job.checkpoint), Path(job.out))
    return {"nbytes": Path(job.out).stat().st_size}


def llama_cpp_decode(job: Job) -> dict[str, Any]:
    """Decoding a GGUF file with llama.cpp from memory."""
    return llama_cpp.decode(job)


def fits(job: Job) -> dict[str, Any]:
    """A checkpoint that fits in ``hbm``, beside the bare module: median seconds of a pass of each."""
    bare: Any = AutoModelForCausalLM.from_pretrained(job.checkpoint)
    held = copy.deepcopy(bare)
    prompt = _prompt(job)
    budget = Budget(job.hbm)
    with (
        tierstore.load(job.checkpoint, budget, device="cpu") as loaded,
        tierstore.offload(held, budget, device="cpu") as offloaded,
    ):
        modules = {"bare": bare, "load": loaded.module, "offload": offloaded.module}
        equal = all(len({prefill(module, prompt).digest for module in modules.values()}) == 1 for _ in range(WARM))
        seconds: dict[str, list[float]] = {name: [] for name in modules}
        names, stop = list(modules), time.perf_counter() + job.seconds
        while time.perf_counter() < stop:
            names.append(names.pop(0))  # none always runs after the same other
            for name in names:
                seconds[name].append(prefill(modules[name], prompt).seconds)
        medians = {name: statistics.median(found) for name, found in seconds.items()}
        units = {"load": len(loaded.plan.tier), "offload": len(offloaded.plan.tier)}
    return {"seconds": medians, "passes": len(seconds["bare"]), "units": units, "equal": equal}


def _find_length(module: Any, job: Job) -> tuple[int, list[tuple[int, float]]]:
    """The prompt length whose prefill takes about ``seconds``, and the (length, seconds) that were tried."""
    probes: list[tuple[int, float]] = []
    for length in (8, 16, 32, 64, 128, 256):
        prompt = prompt_of(_vocab(job), length)
        probes.append((length, min(prefill(module, prompt).seconds for _ in range(2))))
        if probes[-1][1] >= job.seconds:
            break
    if len(probes) == 1:
        return probes[0][0], probes
    (short, quick), (long, slow) = probes[-2:]
    share = (job.seconds - quick) / (slow - quick) if slow > quick else 1.0
    return round(short + min(max(share, 0.0), 1.0) * (long - short)), probes


def _decoded(steps: list[Step]) -> dict[str, Any]:
    return {
        "seconds": [step.seconds for step in steps],
        "tokens": [step.token for step in steps],
        "digests": [step.digest for step in steps],
    }


def _prompt(job: Job) -> torch.Tensor:
    return prompt_of(_vocab(job), job.length)


def _vocab(job: Job) -> int:
    return int(json.loads((Path(job.checkpoint) / "config.json").read_text())["vocab_size"])


def _moved(session: tierstore.Session) -> int:
    return session.report().bytes_moved


def _differences(readings: list[int]) -> list[int]:
    return [after - before for before, after in pairwise(readings)]


class _Written:
    """Bytes that this process wrote to files since.

    The kernel counts them twice: as what system calls were given, where lines for the parent count too, and as blocks
    made dirty, where a note of a file's last access counts too. What only one of them counts was no write to a file.
    """

    def __init__(self) -> None:
        self._calls, self._blocks = _io("wchar"), _io("write_bytes")

    def nbytes(self, said_nbytes: int) -> int:
        """``said_nbytes`` were printed meanwhile."""
        return max(0, min(_io("wchar") - self._calls - said_nbytes, _io("write_bytes") - self._blocks))


def _io(what: str) -> int:
    """What this process read from or wrote to disks, in bytes, as the kernel counts it."""
    found = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(found[what])


def _peak_nbytes() -> int:
    """The most memory this process had at once."""
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


JOBS: dict[str, Callable[[Job], dict[str, Any]]] = {
    job.__name__: job
    for job in (
        resident,
        tierstore_decode,
        tierstore_prefill,
        accelerate_decode,
        pack,
        llama_cpp_decode,
        llama_cpp_pack,
        fits,
        batches.batch,
        batches.accelerate_batch,
        batches.pack_draft,
        batches.speculate,
    )
}


def _pause() -> None:
    print(PAUSE, flush=True)
    sys.stdin.readline()


def _do(line: str) -> None:
    job = Job(**json.loads(line))
    torch.set_num_threads(job.threads)
    print(json.dumps(JOBS[job.kind](job)), flush=True)


def _fork(line: str) -> None:
    """Do the job in a process that begins with what is imported here. One that fails ends this one."""
    child = os.fork()
    if not child:
        _do(line)
        sys.exit()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        os.kill(os.getpid(), -status)
    if status:
        sys.exit(status)
    print(DONE, flush=True)


def main() -> None:
    if sys.argv[1:] != [FORK]:
        _do(sys.stdin.readline())
        return
    import_module("transformers.models.llama.modeling_llama")  # which jobs would import
    for line in iter(sys.stdin.readline, ""):
        _fork(line)


if __name__ == "__main__":
    main()
