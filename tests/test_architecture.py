"""Imports go down the floors only, and no file outgrows its purpose."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 350
FLOORS = {
    0: "errors extents tensors budget moves events sampling",
    1: "contracts fences trips arena order pages page_contents page_kinds page_needs page_plan page_shares slots "
    "ledger plan simulate activation_plan batch_plan batch_schedule drafting waiting_plan kernels",
    2: "machine stores pools copies feeds formats kvformats",
    3: "prefetch paging",
    4: "binding hf",
    5: "session generation offloading spilling loading composing feeding measuring runtime backends packing assembly "
    "calibrating cli cli_batch cli_packed jobs report __init__",
    6: "testing",
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts.split()}
SHELL, MOTION, EDGES, WORDS_AND_SUMS = 5, 3, 2, 1


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a file imports when it runs: those below ``if TYPE_CHECKING:`` are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            where = "." * node.level + (node.module or "")
            yield from (f"{where}.{alias.name}" if where == "tierstore" else where for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []))
        else:
            yield from imports(node)


def problems(module: str, source: str) -> Iterator[str]:
    """What is wrong with the file of ``module``, named below ``tierstore``, such as ``"stores.reader"``."""
    part, folder = module.split(".")[0], module.rpartition(".")[0]
    if part not in FLOOR_OF:
        yield f"{module} belongs to no floor"
        return
    floor, tree = FLOOR_OF[part], ast.parse(source)
    if len(source.splitlines()) > MAX_LINES:
        yield f"{module} has more than {MAX_LINES} lines"
    if module != "cli" and any(f"os.{word}" in ast.unparse(tree) for word in ("environ", "getenv")):
        yield f"{module} reads environment variables: only cli does"
    for name in imports(tree):
        top, *inner = name.split(".")
        if top == "tierstore":
            their_part = inner[0] if inner and inner[0] in FLOOR_OF else "__init__"
            theirs, their_folder = FLOOR_OF[their_part], inner[0] if len(inner) > 1 else ""
            beside = theirs == floor and (
                floor == SHELL
                or part == their_part
                or folder == their_folder == ""
                or (part, their_part) == ("hf", "binding")  # transformers' modules are torch's
            )
            if (theirs >= floor and not beside) or (floor == MOTION and theirs == EDGES):
                yield f"{module} (floor {floor}) imports {name} (floor {theirs})"
        elif not top:
            yield f"{module} imports {name}: write it from the root"
        elif floor <= WORDS_AND_SUMS and part != "kernels" and top not in sys.stdlib_module_names:
            yield f"{module} (floor {floor}) imports {name}: floors 0 and 1 know the standard library only"


def package_files() -> dict[str, Path]:
    found = {}
    for folder in (ROOT / "tierstore", ROOT / "kernels"):
        for path in folder.rglob("*.py"):
            inside = path.relative_to(ROOT if folder.name == "kernels" else folder).with_suffix("")
            found[".".join(inside.parts)] = path
    return found


@pytest.mark.parametrize("module", sorted(package_files()))
def test_file_keeps_to_its_floor(module: str) -> None:
    assert list(problems(module, package_files()[module].read_text())) == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("arena", "import torch", "standard library only"),
        (
            "budget",
            "def f():\n    from tierstore.session import Session",
            "floor 0) imports tierstore.session (floor 5)",
        ),
        ("prefetch", "from tierstore.stores.memory import MemoryStore", "floor 2"),
        (
            "stores.reader",
            "from tierstore.pools.host import HostPool",
            "floor 2) imports tierstore.pools.host (floor 2)",
        ),
        ("pools.host", "from tierstore import offload", "floor 5"),
        ("hf.cache", "from .experts import x", "from the root"),
        ("binding.turns", "from tierstore.hf.layers import x", "floor 4) imports tierstore.hf.layers (floor 4)"),
        ("session", "from tierstore.testing import x", "floor 6"),
        ("machine", "import os\nos.environ['X']", "environment"),
        ("plan", "\n" * 400, "lines"),
        ("helpers", "", "no floor"),
    ],
)
def test_the_checker_can_fail(module: str, source: str, complaint: str) -> None:
    assert complaint in "\n".join(problems(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("arena", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("plan", "from tierstore.ledger import Ledger\nfrom tierstore import extents"),
        ("stores.safetensors", "from tierstore.stores.reader import Reader"),
        ("session", "from tierstore.report.tally import Tally"),
        ("hf.prefill", "from tierstore.binding.forwards import interpose"),
        ("kernels.int4.triton", "import torch"),
        ("testing.stores", "from tierstore.stores.memory import MemoryStore"),
    ],
)
def test_the_checker_lets_good_files_pass(module: str, source: str) -> None:
    assert list(problems(module, source)) == []
