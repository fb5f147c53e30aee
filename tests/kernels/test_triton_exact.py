"""The Triton kernels to the last bit: every default tile on a GPU, the same calls in small interpreted."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.exact_kernels import (
    list_linear_cases,
    list_rowwise_cases,
    make_linear_inputs,
    make_rowwise_inputs,
    shrink_linear_cases,
)
from support.helpers import CPU
from support.triton_process import needs_gpu, needs_interpreter, run_cases

from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.int8_linear.tile import Tile

CASES = Path(__file__).with_name("cases_triton_exact.py")


@pytest.mark.slow
@needs_interpreter
def test_interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@needs_gpu
def test_on_the_gpu():
    run_cases(CASES, interpret=False)


def test_sums_need_more_bits_than_float32_has():
    # else nothing would show that they stay integers to the end
    case = list_linear_cases(Tile(128, 128, 64))[0]
    inputs = make_linear_inputs(case, 4, CPU)
    sums = inputs.q.double() @ inputs.qdata.double().T

    assert case.k == 15360 and not case.rank
    assert (sums.float().double() != sums).any()
    assert inputs.expected.isfinite().all()


def test_expected_results_are_those_of_the_reference():
    for case in shrink_linear_cases(Tile(32, 32, 64, warps=4)):
        inputs = make_linear_inputs(case, 5, CPU)
        y = int8_linear(inputs.q, inputs.x_scale, inputs.qdata, inputs.w_scale, inputs.bias)
        if inputs.h is not None:
            y = y + (inputs.h * inputs.strengths) @ inputs.up.float().T
        assert torch.equal(y.to(case.dtype), inputs.expected), str(case)


def test_inputs_of_rows_are_exact_in_their_dtype():
    for case in list_rowwise_cases():
        inputs = make_rowwise_inputs(case, 3, CPU)
        in_float32 = make_rowwise_inputs(replace(case, dtype=torch.float32), 3, CPU)
        assert torch.equal(inputs.x.float(), in_float32.x), str(case)
        assert (inputs.q.abs().amax(dim=1) == 127).all(), str(case)
