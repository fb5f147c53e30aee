"""Triton kernels on CPU tensors: cases run in a process of their own, where Triton interprets them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


def run_cases(file: Path, interpret: bool) -> None:
    """Run a file of cases with pytest; it fails with their output. Without `interpret` they run on the GPU.

    Triton reads TRITON_INTERPRET when it is imported, its own library functions included, so that one process
    cannot do both.
    """
    env = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def case_device() -> torch.device:
    """Where the cases of this process run; the interpreter is repaired on the way."""
    import triton

    if not triton.knobs.runtime.interpret:
        return torch.device("cuda")
    repair_index()
    _repair_bfloat16()
    return torch.device("cpu")


def repair_index() -> None:
    """Take the one number out of an array where Python wants an integer, as for the bounds of `range`.

    The interpreter of Triton 3.6 gives numpy the array, and numpy refuses from 2.4 on.
    """
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        patch_language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_lang_tensor


def _repair_bfloat16() -> None:
    """Round to nearest and multiply: the interpreter of Triton 3.6 and 3.9 truncates, and its dot multiplies
    the bits as integers.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, to):
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def create_dot(self, a, b, *rest):
        def widen(h):
            return cast(self, h, tl.float32) if h.dtype.scalar == tl.bfloat16 else h

        return dot(self, widen(a), widen(b), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a CUDA device the tests marked gpu run the kernels themselves"
)
