"""The Triton product with grouped weights against the definition: interpreted, compiled on a GPU."""

from pathlib import Path

import pytest
from support.triton_process import needs_gpu, needs_interpreter, run_cases

pytest.importorskip("triton", reason="Triton is not installed")
CASES = Path(__file__).with_name("cases_triton_grouped_linear.py")


@pytest.mark.slow
@needs_interpreter
def test_interpreted():
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@needs_gpu
def test_on_the_gpu():
    run_cases(CASES, interpret=False)
