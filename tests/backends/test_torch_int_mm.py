"""`backend=torch_int_mm` on many rows: its temporary memory does not grow with them."""

import pytest
import torch
from support.helpers import full_range, randn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from int8run.backends.base import run_plain_layer
from int8run.backends.onednn import OneDnn
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard
from int8run.kernels.quantize_rowwise import eager
from int8run.kernels.quantize_rowwise.eager import CHUNK_BYTES
from int8run.quant.weight import QuantizedWeight

# a video of Wan 2.2: the rows of 81 frames at 1280 x 720, and a layer of the feed-forward
ROWS, K, N = 75_600, 5120, 13_824


class Allocations(TorchDispatchMode):
    """Notes the bytes of every tensor that an operator makes, by shape and dtype."""

    def __init__(self):
        super().__init__()
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                self.sizes[tuple(tensor.shape), tensor.dtype] = tensor.nbytes
        return out


@pytest.mark.parametrize("rotated", [False, True], ids=["plain", "rotated"])
def test_many_rows_take_little_beside_what_goes_in_and_comes_out(rotated):
    backend = TorchIntMM()
    x = torch.empty(ROWS, K, dtype=torch.bfloat16, device="meta")
    packed = torch.empty(N, K, dtype=torch.int8, device="meta")
    scale, bias = torch.empty(2, N, device="meta")
    rotation = Rotation(regular_hadamard(256).to("meta")) if rotated else None
    with Allocations() as made:
        quantized = backend.quantize(x, rotation=rotation)
        y = backend.linear(quantized, packed, scale, dtype=torch.bfloat16, bias=bias)

    results = {(tuple(t.shape), t.dtype) for t in (quantized.q, quantized.scale, y)}
    assert results <= set(made.sizes)
    largest = max(size for made_as, size in made.sizes.items() if made_as not in results)
    assert CHUNK_BYTES / 2 < largest <= CHUNK_BYTES


@pytest.mark.parametrize("bias", [None, randn(40, seed=3)], ids=["no bias", "bias"])
@pytest.mark.parametrize("backend", [TorchIntMM(), OneDnn()], ids=lambda backend: backend.name)
def test_chunks_of_rows_give_the_same_bits(monkeypatch, backend, bias):
    if backend.limits.unsupported_reasons(torch.device("cpu")):
        pytest.skip("this CPU has no int8 instructions")
    x, scale = randn(67, 48), randn(40, seed=2).abs()
    packed = backend.pack_weight(make_weight(full_range(40, 48, seed=1)))
    whole = run_plain_layer(backend, x, packed, scale, bias)
    monkeypatch.setattr(eager, "CHUNK_BYTES", 4 * 48 * 20)

    assert eager.count_chunks(67, 48) == 4
    assert torch.equal(run_plain_layer(backend, x, packed, scale, bias), whole)


def make_weight(qdata):
    return QuantizedWeight(qdata, torch.ones(qdata.shape[0], 1))
