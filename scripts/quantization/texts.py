"""Fixed English texts that ship with Python, so that everybody measures on the same words."""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEAST_DOCSTRING = 200
"""Characters. Shorter ones are hardly sentences."""
NO_LIBRARY = ("test", "pydoc_data", "site-packages", "idlelib", "lib2to3", "encodings")


def topics() -> str:
    """Help on the language, which models are compared on."""
    from pydoc_data.topics import topics as found

    return "\n".join(found[name] for name in sorted(found))


def license_text() -> str:
    """Python's license: English of another kind than help on Python."""
    return (_library() / "LICENSE.txt").read_text()


def docstrings() -> str:
    """Docstrings of the standard library, for calibration: none is part of the other texts."""
    return "\n\n".join(_docstrings())


def source_code() -> str:
    """The modules of the standard library, for calibration on what is no English."""
    return "\n".join(path.read_text() for path in sorted(_library().glob("*.py")))


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _docstrings() -> Iterator[str]:
    library = _library()
    for path in [*sorted(library.glob("*.py")), *sorted(library.glob("[a-z]*/*.py"))]:
        if path.relative_to(library).parts[0].startswith(NO_LIBRARY):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > LEAST_DOCSTRING:
                    yield text
