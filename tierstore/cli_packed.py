"""The commands about packed stores: pack one, verify it, say what is in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tierstore.budget import format_nbytes
from tierstore.errors import ModuleError

if TYPE_CHECKING:
    from tierstore.stores.manifest import Manifest, PackedEntry


def pack(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder, or a .gguf file.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    form: Annotated[str, typer.Option("--format", help="Of the weights: int8, int4, fp8, fp4, ... or keep.")] = "int4",
    formats: Annotated[
        list[str] | None, typer.Option(help="A format for some weights: PATTERN=FORMAT. May be given often.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Cast the weights to this first, such as bfloat16.")] = None,
    calibrate: Annotated[
        Path | None, typer.Option(help="A text file to lessen the error on, such as what the model will read.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to pack, such as cuda:1 or cpu.")] = None,
    store: Annotated[Path | None, typer.Option(help="Where a .gguf is imported.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run Python code that the checkpoint brings.")] = False,
) -> None:
    """Pack the weights of a checkpoint into fewer bytes. What a kill interrupted goes on where it stopped."""
    patterns = dict(_pattern(text) for text in formats or ())
    with _bar("opening the checkpoint") as show:
        from tierstore.packing import pack as pack_store

        done = pack_store(
            checkpoint,
            out,
            format=form,
            formats=patterns,
            dtype=dtype,
            calibrate=calibrate,
            device=device,
            store=store,
            trust_remote_code=trust_remote_code,
            progress=lambda at: show(at.tensor, at.done_nbytes, at.total_nbytes),
        )
    if as_json:
        steps = {name: {"nbytes": s.nbytes, "seconds": s.seconds} for name, s in done.steps.items()}
        said = {"path": str(done.path), "nbytes": done.nbytes, "source_nbytes": done.source_nbytes, "ratio": done.ratio}
        run = {"seconds": done.seconds, "steps": steps, "bound": done.bound, "notes": done.notes}
        print(json.dumps({**said, **run}))
    else:
        print(done)
        for note in done.notes:
            print(note, file=sys.stderr)


def verify(
    store: Annotated[Path, typer.Argument(help="The folder of a packed store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Read every byte of a packed store again and compare checksums. Exit code 1 when something is wrong."""
    from tierstore.stores.packed_files import find_group, read_manifest
    from tierstore.stores.verifying import verify as faults_of

    manifest = read_manifest(find_group(store))
    with _bar("verifying") as show:
        faults = faults_of(store, progress=lambda done, total: show("verifying", done, total))
    if as_json:
        print(json.dumps({"path": str(store), "nbytes": manifest.nbytes, "faults": faults}))
    elif faults:
        print("\n".join(faults))
    else:
        print(f"{store}: {format_nbytes(manifest.nbytes)} in {len(manifest.units)} units, every checksum is right")
    raise typer.Exit(1 if faults else 0)


def describe(path: Path, as_json: bool) -> None:
    """Print what is in a packed store: formats, bytes, ratio, and the error that packing made in each weight."""
    from tierstore.stores.packed_files import find_group, read_manifest

    manifest = read_manifest(find_group(path))
    if as_json:
        print(json.dumps({"store": _all_of(manifest, path)}))
        return
    entries = list(manifest.tensors.values())
    before = manifest.source_nbytes
    source = manifest.source
    lines = [
        ("packed from", f"{source.get('checkpoint', '?')}, {source.get('model', '?')}, {source.get('dtype', '?')}"),
        (
            "bytes",
            f"{format_nbytes(manifest.nbytes)}, {manifest.nbytes / max(before, 1):.3f} of {format_nbytes(before)}",
        ),
        ("format", manifest.default_format),
    ]
    for name, value in lines:
        print(f"{name:<14}{value}")
    rows = [("weights", "format", "number", "bytes", "bits each", "error", "largest"), *map(_row, _alike(entries))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print()
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))


def _pattern(text: str) -> tuple[str, str]:
    pattern, sign, form = text.rpartition("=")
    if not sign or not pattern or not form:
        raise ModuleError(f"--formats {text!r} names no format: write PATTERN=FORMAT, such as 'lm_head*=bf16'")
    return pattern, form


def _all_of(manifest: Manifest, path: Path) -> dict[str, Any]:
    """Everything that a manifest says, for JSON."""
    before = manifest.source_nbytes
    return {
        "path": str(path),
        "layout_version": manifest.layout_version,
        "source": dict(manifest.source),
        "default_format": manifest.default_format,
        "nbytes": manifest.nbytes,
        "source_nbytes": before,
        "ratio": manifest.nbytes / max(before, 1),
        "units": len(manifest.units),
        "tensors": [
            {
                "name": entry.name,
                "format": entry.format,
                "dtype": entry.dtype,
                "shape": entry.shape,
                "nbytes": entry.nbytes,
                "source_nbytes": entry.source_nbytes,
                "relative_error": entry.relative_error,
            }
            for entry in manifest.tensors.values()
        ],
    }


def _alike(entries: list[PackedEntry]) -> list[tuple[str, list[PackedEntry]]]:
    """Entries of the same place in every layer together: numbers in names become stars."""
    found: dict[tuple[str, str, tuple[int, ...]], list[PackedEntry]] = {}
    for entry in entries:
        place = ".".join("*" if part.isdigit() else part for part in entry.name.split("."))
        found.setdefault((place, entry.format, entry.shape), []).append(entry)
    return [(place, alike) for (place, _, _), alike in found.items()]


def _row(alike: tuple[str, list[PackedEntry]]) -> tuple[str, ...]:
    place, entries = alike
    nbytes, number = sum(entry.nbytes for entry in entries), sum(prod(entry.shape) for entry in entries)
    errors = [entry.relative_error for entry in entries if entry.relative_error is not None]
    mean, largest = (f"{sum(errors) / len(errors):.5f}", f"{max(errors):.5f}") if errors else ("0", "0")
    bits = f"{8 * nbytes / max(number, 1):.2f}"
    return place, entries[0].format, str(len(entries)), format_nbytes(nbytes), bits, mean, largest


@contextmanager
def _bar(text: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, where that is a terminal; what is given tells it a text, bytes done and bytes in all."""
    console = Console(stderr=True, highlight=False)
    columns = (
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(text, total=None)
        yield lambda text, done, total: progress.update(task, description=text, completed=done, total=total)
