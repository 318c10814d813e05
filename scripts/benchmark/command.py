"""What the commands of the benches have in common."""

from __future__ import annotations

import argparse
import sys
import time

from tierstore.budget import parse_nbytes
from tierstore.errors import BudgetError


def nbytes(text: str) -> int:
    """The bytes that an argument such as ``4GiB`` means."""
    try:
        return parse_nbytes(text)
    except BudgetError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def say(what: str) -> None:
    """Tell whoever watches what is under way."""
    print(f"{time.strftime('%H:%M:%S')} {what} ...", file=sys.stderr, flush=True)
