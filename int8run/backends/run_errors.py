"""What is raised where a program cannot run a layer on this machine, whoever wrote the program.

`backend=auto` and the tuner leave such a candidate out and say why. Anything else is a fault and stays one.
"""

import subprocess
import sys
from collections.abc import Callable

import torch

from int8run.errors import BackendError
from int8run.utils.text import shorten_error
from int8run.utils.timing import read_clock

MAX_REASON_LENGTH = 160
# Triton asserts that it has found the driver's library, which torch may have found in another way
NO_DRIVER_LIBRARY = "libcuda.so"
# after these a GPU refuses whatever runs next; torch and Triton word them alike, with CUDA and HIP
LOST_DEVICE = (
    "illegal memory access",
    "illegal instruction",
    "device-side assert",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
)
RUN_ERRORS: tuple[type[Exception], ...] = (
    BackendError,  # ours: kernels that cannot be built
    MemoryError,  # ours on a CPU
    # torch: out of memory, no kernel for the device, a shape that `_int_mm` refuses, cuBLAS's NOT_SUPPORTED;
    # Triton: no C compiler for its launcher, no ptxas, a pass that fails
    RuntimeError,
    subprocess.CalledProcessError,  # Triton: the C compiler fails, such as without Python's headers
    OSError,  # Triton: a compiler that is not there, a cache that cannot be written
    ImportError,  # a package whose compiled part the system does not load
)


def list_run_errors() -> tuple[type[Exception], ...]:
    """The classes of these errors; Triton's own only once somebody has imported Triton."""
    triton_errors = sys.modules.get("triton.errors")
    if triton_errors is None:
        return RUN_ERRORS
    # OutOfResources, CompilationError, PTXASError
    return (*RUN_ERRORS, triton_errors.TritonError)


def find_run_failure(call: Callable[[], object], device: torch.device) -> str | None:
    """Call a program and wait for the device.

    Returns:
        Why it cannot run here, in one line; None: it ran.

    Raises:
        RuntimeError: for a fault after which the GPU takes no more work.
    """
    try:
        call()
        read_clock(device)  # a GPU reports some errors only then
    except AssertionError as error:
        if NO_DRIVER_LIBRARY not in str(error):
            raise
        return describe_run_error(error)
    except list_run_errors() as error:
        if has_lost_device(error):
            raise
        return describe_run_error(error)
    return None


def has_lost_device(error: Exception) -> bool:
    """Whether a GPU takes no more work after an error: no other candidate can run then either."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in LOST_DEVICE)


def describe_run_error(error: Exception) -> str:
    """The reason in one line; errors of other programs begin with the name of their class."""
    if isinstance(error, BackendError):
        return str(error)
    reason = shorten_error(error, MAX_REASON_LENGTH)
    return f"{type(error).__name__}: {reason}"
