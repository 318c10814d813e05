"""The command `tierstore batch`: a file of prompts becomes a file of results, with a model larger than memory."""

from __future__ import annotations

import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from tierstore.budget import Budget
from tierstore.sampling import Sampling


def batch(
    prompts: Annotated[Path, typer.Argument(help="JSON Lines: a row each, with a prompt or messages.")],
    results: Annotated[Path, typer.Argument(help="The file to write: a line for each text.")],
    model: Annotated[Path, typer.Option(help="A checkpoint folder, a .gguf file, or a packed store.")],
    hbm: Annotated[str, typer.Option(help="Bytes on the compute device for weights and KV cache, such as 20GiB.")],
    ram: Annotated[str, typer.Option(help="Pinned host memory for both, such as 48GiB.")] = "0",
    nvme: Annotated[str | None, typer.Option(help="The most to write below --store.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where what must be converted is kept, and pages.")] = None,
    kv_hbm: Annotated[str, typer.Option(help="Bytes of the KV cache on the device, beside --hbm.")] = "0",
    kv_ram: Annotated[str, typer.Option(help="Bytes of the KV cache in host memory, beside --ram.")] = "0",
    kv_nvme: Annotated[str, typer.Option(help="Bytes of the KV cache on disk.")] = "0",
    kv_format: Annotated[str | None, typer.Option(help="What full pages are kept in, such as int8.")] = None,
    errors: Annotated[
        Path | None, typer.Option(help="The file for rows that fail: RESULTS.errors if left out.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="End each text after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the likeliest tokens up to this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many of the likeliest tokens; 0 is all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens so much less likely than the likeliest.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of rows that have none.")] = 0,
    sequences: Annotated[int | None, typer.Option(min=1, help="The most texts at once.")] = None,
    tokens_per_micro_batch: Annotated[int | None, typer.Option(min=1, help="Tokens computed in one piece.")] = None,
    speculate: Annotated[str, typer.Option(help="Try tokens that the text suggests: auto, lookup or off.")] = "auto",
    draft: Annotated[Path | None, typer.Option(help="The checkpoint of a small model that suggests tokens.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda:1 or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights, such as bfloat16.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Take prompts as what a user says.")] = False,
    engine: Annotated[str, typer.Option(help="Where the job runs: local, or ray for a Ray cluster.")] = "local",
    workers: Annotated[int | None, typer.Option(min=1, help="Workers on the Ray cluster, a model each.")] = None,
    quiet: Annotated[bool, typer.Option(help="Say nothing while it runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON: what was done.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that the checkpoint brings.")] = False,
) -> None:
    """Answer every row of a file. Run again after a stop of any kind, the command goes on where it was."""
    try:
        from tierstore.jobs import JobSettings, run
        from tierstore.jobs.progress import ProgressLine

        defaults = Sampling.checked(
            max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p
        )
        settings = JobSettings(
            model=model,
            budget=Budget(hbm, ram, nvme, kv_hbm=kv_hbm, kv_ram=kv_ram, kv_nvme=kv_nvme),
            defaults=defaults,
            seed=seed,
            chat=chat,
            device=device,
            dtype=dtype,
            kv_format=kv_format,
            store=store,
            trust_remote_code=trust_remote_code,
            sequences=sequences,
            tokens=tokens_per_micro_batch,
            speculate=speculate,
            draft=draft,
        )
        with ExitStack() as closing:
            line = None if quiet else closing.enter_context(ProgressLine(sys.stderr))
            say = None if line is None else line.say
            closing.enter_context(redirect_stdout(sys.stderr))  # Ray says there what becomes of workers
            report = run(
                prompts,
                results,
                settings,
                errors=errors,
                engine=engine,
                workers=workers,
                progress=line,
                say=say,
            )
    except KeyboardInterrupt as interrupted:  # ``JobInterrupted``, or before there was a job
        said = f": {interrupted}" if str(interrupted) else ""
        print(f"tierstore: stopped{said}. The same command goes on with the rest.", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(report.to_json())
    elif not quiet:
        print(report, file=sys.stderr)
