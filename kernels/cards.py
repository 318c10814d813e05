"""Which cards Triton makes kernels for, and whether it can make them on this machine."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec

import torch

LEAST_CAPABILITY = (8, 0)
"""Of a card: those below have no bfloat16 and too little shared memory for the tiles, and Triton supports none."""


@cache
def runs_triton(device: torch.device) -> bool:
    """Whether kernels run on ``device``: a card of CUDA that is new enough, where Triton is installed. Asked once.

    Where Triton cannot build what launches kernels, for which it needs a C compiler and Python's headers, a warning
    says so."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        return False
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever a compiler that is not there, or half there, makes of it
        warnings.warn(
            f"Triton makes no kernels on this machine, torch's slower operations stand in for them: {error}: install "
            "gcc and the headers of this Python",
            stacklevel=2,
        )
        return False
    return True
