"""Which INT8 attention a model gets on a device, and what is said where it gets none."""

import logging
from types import SimpleNamespace

import pytest
import torch
from support.helpers import CPU, randn

from int8run.backends import attention as backends
from int8run.backends.attention import CpuAttention, ReferenceAttention
from int8run.backends.float import Float
from int8run.errors import BackendError
from int8run.kernels.cpu.library import BuildError
from int8run.layers.plan import Int8Settings
from int8run.pipeline import quantize_attention
from int8run.pipeline.quantize_attention import AttentionSettings, ModelAttentions, plan_attentions
from int8run.ptq.attention import TracedAttentions
from int8run.utils.attention_call import AttentionCall


class BrokenAttention(ReferenceAttention):
    """Cannot run."""

    name = "broken"

    def attend(self, call, method):
        raise RuntimeError("no kernel image")


def plan(monkeypatch, mode, *found):
    """Plan one attention where these backends come into question."""
    monkeypatch.setattr(quantize_attention, "list_attention_backends", lambda asked, device: found)
    monkeypatch.setattr(quantize_attention, "make_skip_rule", lambda family, denoiser: lambda name: None)
    traced = TracedAttentions()
    traced.note_call("attn", AttentionCall(*(randn(1, 2, 4, 8) for _ in range(3))), randn(1, 2, 4, 8))
    loaded = SimpleNamespace(family=None, denoiser=None, device=CPU)
    return plan_attentions(loaded, traced, settings(mode), probe=[])


def settings(mode):
    return AttentionSettings(Int8Settings(attention=mode), Float(), "native", torch.float32)


def test_where_no_backend_computes_attention_all_are_named(monkeypatch):
    with pytest.raises(BackendError) as error:
        plan(monkeypatch, "int8", BrokenAttention())

    assert str(error.value) == (
        "int8.attention=int8: no INT8 attention runs on cpu (broken: RuntimeError: no kernel image); "
        "set int8.attention=float"
    )


@pytest.mark.parametrize("mode", ["int8", "auto"])
def test_the_slow_definition_is_said_or_left_out(mode, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING):
        (attention,) = plan(monkeypatch, mode, BrokenAttention(), ReferenceAttention()).planned

    assert "INT8 attention leaves out broken: RuntimeError: no kernel image" in caplog.messages
    if mode == "auto":
        assert attention.layer is None
        assert attention.plan.skip_reason == "only the slow reference computes INT8 attention on cpu"
    else:
        assert attention.plan.backend_used == "reference"
        assert "int8.attention=int8 has none but reference, the slow definition, on cpu" in caplog.messages


def test_a_denoiser_without_attention_is_said(caplog):
    ModelAttentions([], settings("auto"), probe=[]).report()

    assert caplog.messages == ["int8.attention=auto: no attention was seen in a step of this denoiser"]


def test_kernels_that_cannot_be_built_name_the_way_out(monkeypatch):
    def fail(instructions):
        raise BuildError("no C++ compiler")

    monkeypatch.setattr(backends, "load_attention_library", fail)

    with pytest.raises(BackendError, match=r"on the CPU: no C\+\+ compiler; set int8\.attention=float$"):
        _ = CpuAttention().instruction_set
