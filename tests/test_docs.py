"""What README.md and docs/ show is run, and what README.md says of the files is true."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TREES = ("tierstore", "kernels", "scripts", "docs")


def blocks(page: Path, kind: str) -> Iterator[str]:
    """Code blocks of a page, GiB read as MiB so that tiny models stand for large ones."""
    for language, text in BLOCK.findall(page.read_text()):
        if language == kind:
            yield re.sub(r"(\d)GiB", r"\1MiB", text)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path) -> Path:
    """A folder to stand in, with the checkpoint and the prompts that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "path" / "to").mkdir(parents=True)
    (tmp_path / "path" / "to" / "checkpoint").symlink_to(tiny_checkpoint)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why is the sky blue?"}\n{"prompt": "Why?", "n": 2}\n')
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {
        "module": torch.nn.Sequential(*(torch.nn.Linear(512, 512) for _ in range(12))),
        "x": torch.randn(2, 512),
        "inputs": {"input_ids": torch.arange(8).reshape(1, 8), "attention_mask": torch.ones(1, 8, dtype=torch.long)},
    }
    with torch.no_grad():
        plain = names["module"](names["x"])
        for text in blocks(page, "python"):
            exec(compile(text.replace("/nvme/", f"{here}/"), str(page), "exec"), names)
    assert "y" not in names or torch.equal(names["y"], plain)
    assert "out" not in names or 8 < names["out"].shape[1] <= 8 + 64


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_of_bash_blocks_run(page: Path, here: Path) -> None:
    from tierstore.cli import main

    for text in blocks(page, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            program, *arguments = shlex.split(line, comments=True) or [""]
            if program == "tierstore":
                with pytest.raises(SystemExit) as ended:
                    main(arguments)
                assert ended.value.code == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def tree_of_readme() -> Iterator[str]:
    """Paths that the last section names: one a line, folders end in ``/`` and hold what is indented below them."""
    section = (ROOT / "README.md").read_text().rpartition("\n## ")[2]
    assert section.startswith("Files\n")
    folders: list[str] = []
    for line in BLOCK.findall(section)[0][1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name, _, said = line.strip().partition(" ")
        assert said.strip(), f"{name} is not explained"
        del folders[depth:]
        yield "".join([*folders, name])
        if name.endswith("/"):
            folders.append(name)


def test_readme_names_every_file_and_nothing_else() -> None:
    named = list(tree_of_readme())
    assert [path for path in named if not (ROOT / path).exists()] == []
    assert len(named) == len(set(named))
    there = {
        str(path.relative_to(ROOT))
        for tree in TREES
        for path in (ROOT / tree).rglob("*")
        if path.is_file() and not path.name.endswith((".pyc", "__init__.py", "py.typed"))
    }
    # Caches are no files of ours, and what the link tierstore/kernels leads to is named where it is.
    there = {path for path in there if "/." not in path and not path.startswith("tierstore/kernels/")}
    trees = tuple(f"{tree}/" for tree in TREES)
    assert {path for path in named if path.startswith(trees) and not path.endswith("/")} == there | {
        "tierstore/kernels"
    }
