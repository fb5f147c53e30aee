"""Layers that are moved to another kind of device: what they hold goes along, and what could only fail there
is refused. The meta device stands for one that the backend runs on, a GPU is asked for by name alone.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from support.helpers import randn, shipped
from torch import Tensor

from int8run.backends.reference import Reference
from int8run.backends.torch_int_mm import TorchIntMM
from int8run.backends.triton import Triton
from int8run.errors import BackendError
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer, check_move
from int8run.layers.low_rank_branch import LowRankBranch
from int8run.layers.weight_only import PackedLayer
from int8run.outlier.base import OutlierTransform
from int8run.quant.packed_weight import PackedWeight
from int8run.quant.weight import quantize_weight


class OnlyCpu(Reference):
    """A backend with a layout of its own, as cpu has."""

    limits = replace(Reference.limits, devices=("cpu",))


def make_layer(backend: Any) -> Int8Linear:
    layer = QuantizedLayer(quantize_weight(randn(8, 16)), OutlierTransform(), randn(8))
    return Int8Linear(layer, backend, torch.float32)


def make_block_layer(backend: Any) -> BlockInt8Linear:
    weight = quantize_weight(randn(8, 16))
    packed = PackedWeight(weight.qdata, weight.scale, (8, 16))
    return BlockInt8Linear(PackedLayer(packed, OutlierTransform(), None), backend)


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_layer, make_block_layer])
def test_a_layer_of_a_cpu_backend_is_not_moved_to_a_gpu(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make(OnlyCpu())
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    moved_to_a_gpu = type("FakeGpuTensor", (), {"device": torch.device("cuda:1")})()

    with pytest.raises(BackendError) as raised:
        layer._apply(lambda tensor: moved_to_a_gpu)

    assert str(raised.value) == (
        "an INT8 layer of backend 'reference' cannot run on cuda:1, where it is moved; load the model anew "
        "and call quantize_(model, device='cuda:1'), which packs its weights for there"
    )
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("name", sorted(shipped("backend")))
def test_any_layer_may_wait_in_memory_and_go_where_its_backend_runs(name: str) -> None:
    backend = shipped("backend")[name]
    for device in ("cpu", "meta", *backend.limits.devices):
        check_move(backend, torch.device(device))
    with pytest.raises(BackendError, match=r"cannot run on vulkan, where it is moved"):
        check_move(backend, torch.device("vulkan"))


# -- what goes along -----------------------------------------------------------------------------------------


def test_the_operands_of_a_fused_branch_are_those_that_were_moved() -> None:
    branch = LowRankBranch([(randn(3, 16), randn(8, 3))], torch.float32, torch.device("cpu"))
    branch.fuse_into_backend(Triton(), OutlierTransform())
    assert branch.fused is not None and branch.fused.needs_input

    branch.to("meta")

    assert branch.fused.needs_input
    assert branch.fused.down.is_meta and branch.fused.up.is_meta
    assert branch.fused.down is branch._buffers["fused_down"]


def test_a_new_weight_is_written_into_the_tensors_that_are_there() -> None:
    layer, other = make_layer(Reference()), quantize_weight(randn(8, 16, seed=3))
    addresses = [tensor.data_ptr() for tensor in (layer.packed, layer.scale)]

    layer.set_weight(other)

    assert [tensor.data_ptr() for tensor in (layer.packed, layer.scale)] == addresses
    assert torch.equal(layer.packed, other.qdata) and torch.equal(layer.scale, other.scale[:, 0])
    assert layer.packed is not other.qdata, "a later weight would be written over it"


@pytest.mark.parametrize(("n", "k"), [(8, 16), (5, 16), (8, 1), (3, 7)])
def test_the_integers_of_torch_int_mm_lie_alike_on_every_device(n: int, k: int) -> None:
    weight = quantize_weight(randn(n, k))
    packed = TorchIntMM().pack_weight(weight)

    on_another_device = TorchIntMM().pack_weight(replace(weight, qdata=weight.qdata.to("meta")))

    assert packed.shape == on_another_device.shape == (8, 16 if k == 16 else 8)
    assert torch.equal(packed[:n, :k], weight.qdata) and int(packed.count_nonzero()) == count(weight.qdata)


def count(x: Tensor) -> int:
    return int(x.count_nonzero())
