"""Attentions are found by what a module calls, whatever its class."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.transformers.transformer_flux import FluxAttention
from support.helpers import randn
from torch import nn

from int8run.generate.capture_attention import watch_attention


class OwnCall(nn.Module):
    """An attention of a class of its own."""

    def forward(self, x):
        heads = x.unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(heads, heads, heads, scale=0.5).transpose(1, 2).flatten(2)


class OwnProducts(nn.Module):
    """An attention that multiplies its matrices itself."""

    def forward(self, x):
        return torch.softmax(x @ x.mT, dim=-1) @ x


class Experts(nn.Module):
    """A choice among experts, which is no attention."""

    def forward(self, x):
        return x * F.softmax(x.flatten(0, 1), dim=-1).amax()


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = FluxAttention(query_dim=32, heads=2, dim_head=16)
        self.second = nn.Sequential(nn.Linear(32, 32), OwnCall())
        self.third = OwnProducts()
        self.fourth = Experts()

    def forward(self, x):
        return self.fourth(self.third(self.second(x + self.first(x))))


@pytest.fixture
def denoiser():
    return Denoiser().eval().requires_grad_(False)


def run_watched(denoiser):
    calls, own_products = {}, []
    with watch_attention(
        denoiser, lambda name, call, output: calls.update({name: (call, output)}), own_products.append
    ):
        result = denoiser(randn(2, 5, 32))
    return calls, own_products, result


def test_each_attention_is_known_by_the_innermost_module(denoiser):
    calls, own_products, _ = run_watched(denoiser)

    assert list(calls) == ["first", "second.1"]
    assert own_products == ["third"]
    call, output = calls["second.1"]
    assert call.query.shape == output.shape == (2, 4, 5, 8)
    assert call.scale == 0.5


def test_watching_changes_no_number(denoiser):
    assert torch.equal(run_watched(denoiser)[2], denoiser(randn(2, 5, 32)))


def test_a_backend_that_the_user_chose_is_there_again_afterwards(denoiser):
    denoiser.first.processor._attention_backend = AttentionBackendName._NATIVE_MATH

    calls, _, _ = run_watched(denoiser)

    assert "first" in calls
    assert denoiser.first.processor._attention_backend is AttentionBackendName._NATIVE_MATH
    assert not denoiser.first._forward_pre_hooks


def test_everything_is_undone_after_an_error(denoiser):
    with pytest.raises(RuntimeError, match="shape"), watch_attention(denoiser, lambda *seen: None):
        denoiser(randn(2, 5, 31))

    assert not denoiser._forward_hooks
    assert torch.overrides._get_current_function_mode_stack() == []
