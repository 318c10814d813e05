"""A program: kills a writer of the spill store before each of its system calls in turn, and looks at what is left.

Usage: ``killed.py FOLDER create|write``. Prints how many places it was killed at; fails where anything but the
whole, the old, or a clear refusal is left.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tierstore.errors import StoreError, StoreIncompleteError
from tierstore.stores.zarr import SpillStore
from tierstore.testing.store_contract import read_tensor

CALLS = ("open", "pwrite", "ftruncate", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")
OLD = {name: torch.full((size,), 1, dtype=torch.uint8) for name, size in (("a", 10_000), ("b", 1), ("c", 0))}
NEW = {name: torch.full_like(tensor, 2) for name, tensor in OLD.items()}


def create(root: Path) -> None:
    SpillStore.create(root, OLD.items(), fingerprint="model", threads=1)


def write(root: Path) -> None:
    SpillStore.open(root, threads=1).write("a", NEW["a"])


def kill_before(call: int) -> None:
    """From now on this process dies before its ``call``-th system call."""
    left = call

    def deadly(plain: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return plain(*arguments, **options)

        return run

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def survived(scenario: Callable[[Path], None], root: Path, call: int) -> bool:
    child = os.fork()
    if child == 0:
        kill_before(call)
        scenario(root)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.waitstatus_to_exitcode(status) == 0, status
    return not os.WIFSIGNALED(status)


def look(scenario: Callable[[Path], None], root: Path) -> str:
    """What is left: in a process of its own, so that this one stays without threads."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(there, found(scenario, root).encode())
        os._exit(0)
    os.close(there)
    _, status = os.waitpid(child, 0)
    with os.fdopen(here) as text:
        assert os.waitstatus_to_exitcode(status) == 0
        return text.read()


def found(scenario: Callable[[Path], None], root: Path) -> str:
    try:
        store = SpillStore.open(root, fingerprint="model", threads=1)
    except StoreIncompleteError as error:
        if "delete that folder" not in str(error):
            raise
        return "incomplete"
    except StoreError as error:
        if "does not exist" not in str(error):
            raise
        return "nothing"
    was_new = torch.equal(read_tensor(store, "a"), NEW["a"])
    truth = OLD | {"a": NEW["a"]} if was_new else OLD
    for name, data in truth.items():
        assert torch.equal(read_tensor(store, name), data), name
    for name, data in NEW.items():  # and it is as good as one that nobody interrupted
        store.write(name, data)
        assert torch.equal(read_tensor(store, name), data), name
    store.close()
    create(root)  # leftovers of the same model are replaced
    return "new" if was_new else "old"


def main(folder: Path, scenario: Callable[[Path], None], may_find: set[str]) -> None:
    seen = set()
    for call in range(1000):
        root = folder / str(call)
        if scenario is write:
            child = os.fork()
            if child == 0:
                create(root)
                os._exit(0)
            os.waitpid(child, 0)
        whole = survived(scenario, root, call)
        seen.add(what := look(scenario, root))
        shutil.rmtree(root, ignore_errors=True)
        if whole:
            assert what == ("new" if scenario is write else "old")
            break
    assert seen == may_find, seen
    print(call)


if __name__ == "__main__":
    os.fsync = lambda fd: None  # a killed process loses nothing that the system has: only the order matters here
    if sys.argv[2] == "create":
        main(Path(sys.argv[1]), create, {"nothing", "incomplete", "old"})
    else:
        main(Path(sys.argv[1]), write, {"old", "new"})
