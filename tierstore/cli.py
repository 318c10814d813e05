"""The command ``tierstore``: generate text with a model larger than memory, pack one, and say what a machine has."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

from tierstore.budget import Budget, format_nbytes
from tierstore.errors import DeviceError, StoreReadError, TierstoreError

try:
    import typer
    from rich.console import Console
    from rich.live import Live

    from tierstore import cli_batch, cli_packed
except ModuleNotFoundError as missing:
    raise SystemExit(f"the tierstore command needs {missing.name}: pip install 'tierstore[hf]'") from None

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from tierstore.session import Session

app = typer.Typer(
    name="tierstore",
    help="Runs models bigger than the GPU, or than RAM, from HBM, pinned RAM and NVMe.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


app.command()(cli_packed.pack)
app.command()(cli_packed.verify)
app.command()(cli_batch.batch)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; always ends in ``SystemExit``. A ``TierstoreError`` is one line and exit code 2."""
    open_standard_files()
    try:
        app(args=arguments)
    except TierstoreError as error:
        print("tierstore:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def open_standard_files() -> None:
    """Have the numbers 0 to 2 taken where the shell closed them: a file of ours must not get one of them, which
    libraries write to."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


@app.command()
def generate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, a .gguf file, or a packed store.")],
    prompt: Annotated[str, typer.Option(help="What the model continues, or answers when it has a chat template.")],
    hbm: Annotated[str, typer.Option(help="Weight bytes on the compute device, such as 20GiB.")],
    ram: Annotated[str, typer.Option(help="Pinned host memory, such as 48GiB.")] = "0",
    nvme: Annotated[str | None, typer.Option(help="The most to write below --store.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where what must be converted is kept.")] = None,
    kv_hbm: Annotated[str, typer.Option(help="A KV cache in pages: its bytes on the compute device.")] = "0",
    kv_ram: Annotated[str, typer.Option(help="Pages of the KV cache in pinned host memory.")] = "0",
    kv_nvme: Annotated[str, typer.Option(help="Pages of the KV cache on disk.")] = "0",
    kv_format: Annotated[str | None, typer.Option(help="What full pages are kept in, such as int8.")] = None,
    activations: Annotated[str | None, typer.Option(help="Bound on what a long prompt needs beside the rest.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    device: Annotated[str | None, typer.Option(help="Where to compute, such as cuda:1 or cpu.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the weights, such as bfloat16.")] = None,
    chat: Annotated[bool, typer.Option(help="Use the tokenizer's chat template when it has one.")] = True,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON: text and report.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that the checkpoint brings.")] = False,
) -> None:
    """Stream a checkpoint through the tiers and print what it says, then what moved."""
    budget = Budget(hbm, ram, nvme, kv_hbm=kv_hbm, kv_ram=kv_ram, kv_nvme=kv_nvme, activations=activations)
    with _Progress() as progress:
        import torch

        import tierstore
        from tierstore.hf.tokenizer import load_tokenizer

        opened = tierstore.load(
            checkpoint,
            budget,
            device=device,
            dtype=_torch_dtype(dtype),
            kv_format=kv_format,
            store=store,
            trust_remote_code=trust_remote_code,
        )
        with opened as session:
            progress.follow(session)
            tokenizer = load_tokenizer(session.checkpoint_path or checkpoint, trust_remote_code)
            model: Any = session.module
            where = next(model.parameters()).device
            inputs = {name: value.to(where) for name, value in _encode(tokenizer, prompt, chat).items()}
            torch.manual_seed(seed)
            written = model.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
                streamer=None if as_json else _printer(tokenizer, progress),
                **_sampling(temperature),
            )
            report = session.report()
    if as_json:
        text = tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        print(json.dumps({"text": text, "report": json.loads(report.to_json())}))
    else:
        print(f"\n{report}", file=sys.stderr)


@app.command()
def info(
    path: Annotated[
        Path | None, typer.Argument(help="A packed store, or what else lies on the disk to measure.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Say what a packed store holds, or this machine: memory and caps, GPUs, link speeds, GPUDirect Storage."""
    from tierstore.stores.packed import is_packed

    if path is not None and is_packed(path):
        cli_packed.describe(path, as_json)
        return
    import torch

    from tierstore.machine import inspect_machine, measure_links

    machine = inspect_machine(path)
    sample = None if path is None else _largest_file(path)
    links = measure_links(sample, torch.device("cuda", machine.gpus[0].index) if machine.gpus else torch.device("cpu"))
    if as_json:
        print(json.dumps({"machine": asdict(machine), "links": asdict(links)}))
        return
    cap = machine.cgroup_limit_nbytes
    rows = [
        ("RAM", f"{format_nbytes(machine.ram_nbytes)}, {format_nbytes(machine.ram_available_nbytes)} available"),
        ("memory cap", "none" if cap is None else f"{format_nbytes(cap)} (cgroup)"),
        *(
            (
                f"GPU {gpu.index}",
                f"{gpu.name}, {format_nbytes(gpu.total_nbytes)}, {format_nbytes(gpu.free_nbytes)} free",
            )
            for gpu in machine.gpus
        ),
        ("pinnable", f"{format_nbytes(machine.pinnable_nbytes)}"),
        ("disk to RAM", f"{format_nbytes(links.disk)}/s, measured on {sample or 'a temporary file'}"),
        ("RAM to RAM", f"{format_nbytes(links.memcpy)}/s"),
        ("GPUDirect", machine.gds if machine.gds == "real" else f"falls back to RAM: {machine.gds}"),
    ]
    if machine.gpus:
        rows.insert(-1, (f"RAM to GPU {machine.gpus[0].index}", f"{format_nbytes(links.device)}/s, pinned"))
    else:
        rows.insert(2, ("GPU", "none that torch can use"))
    for name, value in rows:
        print(f"{name:<14}{value}")


def _largest_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = [file for file in path.rglob("*") if file.is_file()]
    if not files:
        raise StoreReadError(f"{path} holds no file to read, so its disk cannot be measured: name a large file")
    return max(files, key=lambda file: file.stat().st_size)


class _Progress:
    """A line on stderr, on a terminal, until the first text comes: what the first pass has read so far."""

    def __init__(self) -> None:
        self._session: Session | None = None
        # Live asks for the line from a thread of its own, so nothing here has to poll.
        self._live = Live(
            get_renderable=self.line,
            console=Console(stderr=True, highlight=False),
            transient=True,
            redirect_stdout=False,
        )

    def __enter__(self) -> _Progress:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def follow(self, session: Session) -> None:
        self._session = session

    def stop(self) -> None:
        """Take the line away. Idempotent."""
        self._live.stop()

    def line(self) -> str:
        """What there is to say now."""
        if self._session is None:
            return "opening the checkpoint"
        report = self._session.report()
        done, total = self._session.progress()
        rate = report.bytes_moved / report.seconds if report.seconds > 0 else 0.0
        return (
            f"first pass: {min(done, total)} of {total} units, "
            f"{format_nbytes(report.bytes_moved)} read, {format_nbytes(rate)}/s"
        )


def _torch_dtype(name: str | None) -> torch.dtype | None:
    import torch

    dtype = None if name is None else getattr(torch, name, None)
    if name is not None and not isinstance(dtype, torch.dtype):
        raise DeviceError(f"--dtype {name!r} is no dtype of torch: write one such as bfloat16, float16 or float32")
    return dtype


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str, chat: bool) -> Mapping[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask``, int64 of shape (1, length)."""
    if chat and tokenizer.chat_template is not None:
        turns = [{"role": "user", "content": prompt}]
        encoded: Any = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        encoded = tokenizer(prompt, return_tensors="pt")
    if encoded["input_ids"].numel() == 0:
        raise typer.BadParameter("the prompt has no tokens: write some text", param_hint="--prompt")
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _sampling(temperature: float) -> dict[str, Any]:
    """Arguments of ``generate``; greedy ones also undo what the checkpoint's own configuration says."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def _printer(tokenizer: PreTrainedTokenizerBase, progress: _Progress) -> Any:
    """A streamer that prints text to stdout as it comes, the progress line gone first."""
    from transformers import TextStreamer

    class Printer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            progress.stop()
            super().on_finalized_text(text, stream_end)

    return Printer(tokenizer, skip_prompt=True, skip_special_tokens=True)


if __name__ == "__main__":
    main()
