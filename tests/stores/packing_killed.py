"""A program: kills a writer of a packed store before each system call that changes something, and lets another go on.

Usage: ``packing_killed.py FOLDER``. Prints how many places it was killed at; fails where what is there is not nothing,
a clear refusal or the whole store, and where the store in the end is not, byte for byte, that of a writer that nobody
killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from tests.stores.packed_hostile import plan_of
from tierstore.errors import StoreError, StoreIncompleteError
from tierstore.stores import streamed
from tierstore.stores.packed import PackedStore
from tierstore.stores.packed_writer import PackedWriter, find_packed

CALLS = ("open", "pwrite", "mkdir", "rename", "replace", "unlink", "rmdir")
OPEN = os.open
TENSORS: dict[str, Tensor | dict[str, Tensor]] = {
    "wide": torch.arange(160_000).view(torch.uint8),  # more than one write
    "norm": torch.ones(3),
    "packed": {"codes": torch.arange(9000, dtype=torch.int16), "scales": torch.ones(5, 1)},
    "last": torch.zeros(1),
}
PLAN = plan_of(TENSORS, (("wide", "norm"), ("packed",), ("last",)))


def pack(out: Path) -> None:
    if find_packed(out, PLAN) is not None:
        return
    with PackedWriter(out, PLAN) as writer:
        for number in writer.left:
            with writer.unit(number) as unit:
                for entry in PLAN.units[number].tensors:
                    unit.add(entry.name, TENSORS[entry.name], relative_error=0.5)
        writer.add_file("config.json", b"{}")
        writer.finish()


def kill_before(call: int) -> None:
    """From now on this process dies before its ``call``-th system call that changes something."""
    left = call

    def deadly(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if plain is not OPEN or arguments[1] & os.O_CREAT:
                left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        return run

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def survived(out: Path, call: int) -> bool:
    """Whether a process that packs comes to its end before that call."""
    child = os.fork()
    if child == 0:
        try:
            kill_before(call)
            pack(out)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return not os.WIFSIGNALED(status)


def found(out: Path) -> str:
    """What a reader says of the folder."""
    try:
        PackedStore(out).close()
    except StoreIncompleteError as error:
        return "half" if "goes on where it stopped" in str(error) else str(error)
    except StoreError as error:
        return "nothing" if "holds no weights.zarr" in str(error) else str(error)
    return "whole"


def content(out: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(out)): p.read_bytes() if p.is_file() else None for p in sorted(out.rglob("*"))}


def main(folder: Path) -> None:
    pack(folder / "reference")
    wanted = content(folder / "reference")
    random, seen = Random(0), set()
    for call in range(1000):
        root = folder / str(call)
        root.mkdir()
        whole = survived(root / "OUT", call)
        seen.add(what := found(root / "OUT"))
        assert what == "whole" or not whole
        if call % 3 == 0:
            survived(root / "OUT", random.randrange(call + 1))  # killed again, or not
        pack(root / "OUT")
        assert content(root / "OUT") == wanted
        assert os.listdir(root) == ["OUT"], os.listdir(root)
        shutil.rmtree(root)
        if whole:
            break
    assert seen == {"nothing", "half", "whole"}, seen
    print(call)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # a killed process loses nothing that the system has: only the order matters here
    streamed.CHUNK = 1 << 20
    main(Path(sys.argv[1]))
