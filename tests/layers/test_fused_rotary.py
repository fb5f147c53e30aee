"""Rotary embeddings of an INT8 model: which are computed by the backend, and that nothing else changes."""

import copy
import inspect
import pickle

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttention
from support.helpers import CPU, randn
from torch import nn

from int8run.backends.base import Backend
from int8run.backends.cpu import Cpu
from int8run.backends.reference import Reference
from int8run.layers.fused_rotary import install_rotary, make_rotary_function
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}")
WIDTH, HEADS, TOKENS = 16, 2, 5


def make_model(backend: Backend) -> nn.ModuleDict:
    torch.manual_seed(0)
    weight = randn(WIDTH, WIDTH)
    layer = QuantizedLayer(quantize_weight(weight), NoOutlier().fit(weight), None)
    flux = FluxAttention(WIDTH, heads=HEADS, dim_head=8, out_dim=WIDTH, processor=FluxAttnProcessor())
    wan = WanAttention(WIDTH, heads=HEADS, dim_head=8)
    return nn.ModuleDict({"int8": Int8Linear(layer, backend, torch.float32), "flux": flux, "wan": wan})


def count_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    calls: list[torch.Size] = []
    rotate = Cpu.rotate_positions

    def record(self, x, *rest, **options):
        calls.append(x.shape)
        return rotate(self, x, *rest, **options)

    monkeypatch.setattr(Cpu, "rotate_positions", record)
    return calls


@torch.no_grad()
def test_processors_that_call_diffusers_function_get_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(Cpu())
    plain = copy.deepcopy(model)
    calls = count_calls(monkeypatch)

    assert install_rotary(model) == 1

    processor, before = model["flux"].processor, plain["flux"].processor
    assert isinstance(processor, FluxAttnProcessor) and type(before) is FluxAttnProcessor
    assert inspect.signature(processor.__call__) == inspect.signature(before.__call__)
    angles = randn(TOKENS, 8)
    inputs = {"hidden_states": randn(1, TOKENS, WIDTH), "image_rotary_emb": (angles.cos(), angles.sin())}
    assert torch.equal(model["flux"](**inputs), plain["flux"](**inputs))
    assert calls == [(1, TOKENS, HEADS, 8)] * 2, "queries and keys; those of the float model are diffusers'"


@torch.no_grad()
def test_a_model_is_pickled_with_its_processors_and_rotates_as_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(Cpu())
    install_rotary(model)
    loaded = pickle.loads(pickle.dumps(model))
    calls = count_calls(monkeypatch)

    processor = loaded["flux"].processor
    assert type(processor) is type(model["flux"].processor) and processor is not model["flux"].processor
    angles = randn(TOKENS, 8)
    inputs = {"hidden_states": randn(1, TOKENS, WIDTH), "image_rotary_emb": (angles.cos(), angles.sin())}
    assert torch.equal(loaded["flux"](**inputs), model["flux"](**inputs))
    assert len(calls) == 4, "queries and keys of both"


def test_what_the_kernel_does_not_compute_stays_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_calls(monkeypatch)
    rotate = make_rotary_function(Cpu())
    x, angles = randn(1, TOKENS, HEADS, 8), randn(TOKENS, 8)
    pair = (angles.cos(), angles.sin())
    complex_angles = torch.polar(torch.ones(1, TOKENS, 4), angles[None, :, :4])

    for options in ({"use_real_unbind_dim": -2, "sequence_dim": 1}, {"sequence_dim": 1}):
        given = x if len(options) == 2 else x.transpose(2, 3).contiguous().transpose(2, 3)
        assert torch.equal(rotate(given, pair, **options), apply_rotary_emb(given, pair, **options))
    expected = apply_rotary_emb(x, complex_angles, use_real=False)
    assert torch.equal(rotate(x, complex_angles, use_real=False), expected)
    assert torch.equal(rotate(x, complex_angles, False), expected)
    assert calls == []


@pytest.mark.slow
@torch.no_grad()
def test_compiled_code_computes_diffusers_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(Cpu())
    install_rotary(model)
    angles = randn(TOKENS, 8)
    inputs = {"hidden_states": randn(1, TOKENS, WIDTH), "image_rotary_emb": (angles.cos(), angles.sin())}
    expected = model["flux"](**inputs)
    calls = count_calls(monkeypatch)

    compiled = torch.compile(model["flux"], fullgraph=True, backend="eager")

    assert torch.equal(compiled(**inputs), expected)
    assert calls == []


def test_other_backends_leave_processors_alone() -> None:
    model = make_model(Reference())

    assert install_rotary(model) == 0
    assert type(model["flux"].processor) is FluxAttnProcessor
