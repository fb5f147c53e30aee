"""Comparisons that hold on every CPU: numbers by their relative error, integers up to ties of the rounding.

Two CPUs, two versions of a BLAS or two numbers of threads add the same float32 numbers in different orders,
so their
sums differ in the last bits. A sum half way between two integers is then rounded to one of them here and to
the other
there. Nothing else may differ.
"""

import torch
from torch import Tensor

from int8run.kernels.int8_linear.reference import int8_linear
from int8run.kernels.quantize_rowwise.reference import INT8_MAX, transform_rows
from int8run.layers.int8_linear import Int8Linear

# in steps of the integers: float32 sums of up to 1024 numbers, and up to 127 steps
TIE_WIDTH = 1e-3


def compute_rms(x: Tensor) -> float:
    """The root of the mean of the squares."""
    return x.double().square().mean().sqrt().item()


def assert_close(name: str, actual: Tensor, reference: Tensor, max_rel_err: float) -> None:
    """Compare the RMS of the difference with the RMS of the reference."""
    assert actual.shape == reference.shape, (
        f"{name}: shape {list(actual.shape)}, the reference has {list(reference.shape)}"
    )
    difference, size = compute_rms(actual.double() - reference.double()), compute_rms(reference)
    # written so that NaN fails
    assert difference <= max_rel_err * size, (
        f"{name}: RMS of the difference {difference:.4g}, RMS of the reference {size:.4g}, "
        f"allowed ratio {max_rel_err:g}"
    )


def assert_same_integers(name: str, q: Tensor, exact: Tensor, scale: Tensor) -> None:
    """Assert that rows were rounded right: to the nearest integer, at a tie to either neighbor.

    Args:
        q: int8 [M, K], the integers.
        exact: float64 [M, K], the numbers before the rounding, computed in float64.
        scale: [M, 1], what they are divided by.
    """
    steps = exact / scale.double()
    apart = (q.double() - steps.round()).abs()
    from_tie = (steps - steps.floor() - 0.5).abs()
    # written so that NaN fails
    right = (apart == 0) | ((apart == 1) & (from_tie < TIE_WIDTH))
    assert right.all(), (
        f"{name}: {int((~right).sum())} of {right.numel()} integers are wrong; "
        f"the first one is {int(q[~right][0])} for {steps[~right][0]:.6f}"
    )


@torch.no_grad()
def assert_runs_like_the_reference(name: str, layer: Int8Linear, x: Tensor) -> None:
    """Assert that a layer's backend rounds its input right and multiplies what it rounded as the reference
    does.

    Args:
        x: float [M, K].
    """
    steps = {
        "factor": layer.transform.factor,
        "rotation": layer.transform.rotation,
        "gelu_from": layer.gelu_from,
    }
    quantized = layer.backend.quantize(x, **steps)
    q, scale = to_signed(quantized.q, *x.shape), quantized.scale.view(-1, 1)

    exact = transform_rows(x.double(), **steps)
    exact_scale = exact.abs().amax(-1, keepdim=True) / INT8_MAX

    torch.testing.assert_close(scale.double(), exact_scale, rtol=1e-6, atol=0)
    assert_same_integers(name, q, exact, exact_scale)
    product = int8_linear(q, scale, layer.read_qdata(), layer.scale, layer.bias)
    assert_close(name, layer(x), product, 1e-6)


def to_signed(q: Tensor, rows: int, columns: int) -> Tensor:
    """A backend's integers as int8: some pad them, and some store `q + 128` as bytes."""
    q = q[:rows, :columns]
    return (q.short() - 128).to(torch.int8) if q.dtype == torch.uint8 else q
