"""Triton's kernels on the CPU, by Triton's interpreter, in a process of its own.

Whether kernels are compiled or interpreted is decided for a whole process when triton is first imported, by an
environment variable. Tests talk to that process through ``Interpreter``.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
_BYTES_OF_LENGTH = 8


class Interpreter:
    """Calls functions of kernels in a process where they are interpreted."""

    def __init__(self) -> None:
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def matmul(self, operation: str, *arguments: Tensor | int) -> Tensor:
        """What ``kernels/<operation>/triton.py`` computes; strides and storage offsets are kept."""
        found = self.call(f"{operation}.triton", "matmul", *arguments)
        assert isinstance(found, Tensor)
        return found

    def call(self, module: str, function: str, *arguments: Any, **options: Any) -> Any:
        """What a function of ``kernels/<module>`` returns; if it returns nothing, its arguments as it left them."""
        assert self._process.stdin
        assert self._process.stdout
        _send(self._process.stdin, (module, function, arguments, options))
        found = _receive(self._process.stdout)
        assert found is not None, f"the interpreter's process ended with {self._process.wait()}"
        assert not isinstance(found, str), found
        return found

    def close(self) -> None:
        self._process.communicate(timeout=30)


def _send(pipe: IO[bytes], what: object) -> None:
    buffer = io.BytesIO()
    torch.save(what, buffer)
    pipe.write(len(buffer.getvalue()).to_bytes(_BYTES_OF_LENGTH))
    pipe.write(buffer.getvalue())
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    """None at the end."""
    length = pipe.read(_BYTES_OF_LENGTH)
    return torch.load(io.BytesIO(pipe.read(int.from_bytes(length))), weights_only=True) if length else None


def _make_bfloat16_right() -> None:
    """To the interpreter bfloat16 are integers when it multiplies, and it rounds to them towards zero. No GPU does."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def convert_float(values: Any, from_dtype: Any, to_dtype: Any, mode: Any) -> Any:
        if (from_dtype, to_dtype) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.array(values)).bfloat16().view(torch.uint16).numpy()
        if (from_dtype, to_dtype) == (tl.bfloat16, tl.float32):
            return torch.from_numpy(np.array(values)).view(torch.bfloat16).float().view(torch.uint32).numpy()
        return convert(values, from_dtype, to_dtype, mode)

    def create_dot(builder: Any, a: Any, b: Any, *others: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (builder.cast_impl(operand, tl.float32) for operand in (a, b))
        return dot(builder, a, b, *others)

    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def main() -> None:
    """Answer until the pipe is closed; what goes wrong is sent back as a text."""
    answers, sys.stdout = sys.stdout.buffer, sys.stderr
    torch.set_num_threads(1)
    _make_bfloat16_right()
    while (asked := _receive(sys.stdin.buffer)) is not None:
        module, function, arguments, options = asked
        try:
            answer = getattr(import_module(f"tierstore.kernels.{module}"), function)(*arguments, **options)
            answer = arguments if answer is None else tuple(answer) if isinstance(answer, tuple) else answer
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        _send(answers, answer)


if __name__ == "__main__":
    main()
