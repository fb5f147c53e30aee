"""INT8 attention inside a model: the same module, the same float model, another product."""

import io

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_flux import FluxAttention
from support.helpers import randn
from torch import nn

from int8run.backends.attention import AttentionMethod, ReferenceAttention, choose_attention_method
from int8run.kernels.int8_attention.reference import int8_attention
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_attention import Int8Attention, install_attention
from int8run.utils.attention_call import AttentionCall

METHOD = AttentionMethod(rotation=16)


class Block(nn.Module):
    """One attention of either kind: its processor asks diffusers' dispatch, or calls torch itself."""

    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.attn = kind(query_dim=32, heads=2, dim_head=16, bias=False)

    def forward(self, x):
        return x + self.attn(x)


KINDS = {"dispatch": FluxAttention, "own call": Attention}
pytestmark = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)


@pytest.fixture
def model(kind):
    return Block(kind).eval().requires_grad_(False)


def install(model):
    copy = copy_sharing_tensors(model)
    install_attention(copy, {"attn": Int8Attention(ReferenceAttention(), METHOD)})
    return copy


def int8_by_hand(model, x):
    """What the block computes when its attention is the definition's."""
    attn = model.attn

    def normed(norm, projected):
        heads = projected.unflatten(-1, (2, 16))
        return (heads if norm is None else norm(heads)).transpose(1, 2)

    q, k = normed(attn.norm_q, attn.to_q(x)), normed(attn.norm_k, attn.to_k(x))
    v = attn.to_v(x).unflatten(-1, (2, 16)).transpose(1, 2)
    attended = int8_attention(q, k, v, rotation=16).transpose(1, 2).flatten(2)
    # FLUX projects the output of an attention without a prompt outside it
    return x + (attended if isinstance(attn, FluxAttention) else attn.to_out[0](attended))


def test_the_products_are_those_of_the_definition(model):
    x = randn(2, 9, 32)

    computed = install(model)(x)

    torch.testing.assert_close(computed, int8_by_hand(model, x))
    assert not torch.equal(computed, model(x))


def test_a_model_is_pickled_with_its_attention(model):
    x = randn(2, 9, 32)
    int8 = install(model)

    buffer = io.BytesIO()
    torch.save(int8, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)

    assert type(loaded.attn) is type(int8.attn) and loaded.attn.int8_attention is not int8.attn.int8_attention
    assert loaded.state_dict().keys() == int8.state_dict().keys()
    assert torch.equal(loaded(x), int8(x))


def test_the_float_model_stays_as_it_was(model):
    x = randn(2, 9, 32)
    before = model(x)
    kind, processor = type(model.attn), model.attn.processor
    asked = getattr(processor, "_attention_backend", None)

    copy = install(model)

    assert torch.equal(model(x), before)
    assert type(model.attn) is kind
    assert model.attn.processor is processor
    assert getattr(processor, "_attention_backend", None) is asked
    assert copy.attn.to_q.weight is model.attn.to_q.weight


def test_other_programs_find_the_class_of_the_module(model):
    attn = install(model).attn

    assert isinstance(attn, type(model.attn))
    assert type(attn).__name__ == type(model.attn).__name__


def test_a_copy_of_the_int8_model_computes_the_same(model):
    x = randn(2, 9, 32)
    int8 = install(model)

    assert torch.equal(copy_sharing_tensors(int8)(x), int8(x))


def test_it_ends_with_the_module(model):
    int8 = install(model)
    q = randn(1, 2, 9, 16)
    int8(randn(1, 9, 32))

    expected = torch.softmax(q @ q.mT / 4, dim=-1) @ q

    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), expected)


def test_torch_compile_sees_it_whole(model):
    x = randn(2, 9, 32)
    int8 = install(model)
    expected = int8(x)
    torch.compiler.reset()

    compiled = torch.compile(int8, fullgraph=True, backend="eager")

    torch.testing.assert_close(compiled(x), expected)


def test_a_mask_of_the_call_counts(kind):
    q, k, v = randn(1, 2, 3, 16), randn(1, 2, 5, 16, seed=1), randn(1, 2, 5, 16, seed=2)
    mask = torch.tensor([True, True, False, True, False])
    layer = Int8Attention(ReferenceAttention(), METHOD)

    masked = layer.attend(AttentionCall(q, k, v, attn_mask=mask.expand(1, 1, 3, 5), scale=0.5))

    without = layer.attend(AttentionCall(q, k[:, :, mask], v[:, :, mask], scale=0.5))
    torch.testing.assert_close(masked, without, atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("width", "label"),
    [(64, "rotated 64"), (128, "rotated 128"), (72, "rotated 8, centered"), (65, "centered")],
)
def test_the_method_follows_from_the_head_width(kind, width, label):
    assert choose_attention_method(width).label == label
