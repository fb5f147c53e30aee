"""Whether oneDNN multiplies int8 right in this process, found out by doing it.

Before VNNI, a CPU's byte instruction adds two products of unsigned by signed bytes into 16 bits, and a sum
above 32767 stays there: it saturates. oneDNN uses that instruction where it may use no better one, and the
CPU's own list of instructions does not tell: ONEDNN_MAX_CPU_ISA keeps oneDNN from what the CPU has.

`backends.base.Limits` asks, for the backends whose products are oneDNN's.
"""

import functools

import torch

# of the products below: enough for oneDNN to take the kernels that layers get
ROWS, COLUMNS, INNER = 16, 16, 64


@functools.lru_cache(maxsize=1)
def onednn_saturates() -> bool:
    """Whether oneDNN's int8 products are wrong here; tried once per process, in well under a millisecond."""
    return not (is_signed_product_exact() and is_unsigned_product_exact())


def is_signed_product_exact() -> bool:
    """Whether the largest sums of `torch._int_mm`, signed by signed bytes, come out right."""
    q = torch.full((ROWS, INNER), 127, dtype=torch.int8)
    weight = torch.full((COLUMNS, INNER), 127, dtype=torch.int8)
    sums = torch._int_mm(q, weight.T)  # int32 [ROWS, COLUMNS]
    return bool((sums == INNER * 127 * 127).all())


def is_unsigned_product_exact() -> bool:
    """Whether the largest sums of torch's quantized linear operator, unsigned by signed bytes, do."""
    if not torch.backends.mkldnn.is_available():  # oneDNN's former name; without it the operator is missing
        return True
    q = torch.full((ROWS, INNER), 255, dtype=torch.uint8)
    weight = torch.full((COLUMNS, INNER), 127, dtype=torch.int8)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    ones, zeros = torch.ones(COLUMNS), torch.zeros(COLUMNS, dtype=torch.int32)
    sums = torch.ops.onednn.qlinear_pointwise(
        q, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )  # float32 [ROWS, COLUMNS], exact below 2**24
    return bool((sums == INNER * 255 * 127).all())
