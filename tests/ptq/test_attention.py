"""Which attentions become INT8, and why the others do not."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.helpers import CPU, randn
from torch import nn

from int8run.backends import float_comparison
from int8run.backends.attention import (
    ReferenceAttention,
    TritonAttention,
    choose_attention_method,
    list_attention_backends,
    make_attention_backends,
)
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.cpu import Cpu
from int8run.backends.registry import make_backend
from int8run.errors import ConfigError
from int8run.generate.capture_attention import watch_attention
from int8run.kernels.int8_attention.tile import choose_attention_tile
from int8run.layers.int8_attention import Int8Attention
from int8run.models import attention_calls
from int8run.models.attention_calls import compute_float_attention
from int8run.ptq.attention import (
    OWN_PRODUCTS,
    TracedAttentions,
    give_backend,
    leave_inexact_float,
    measure_attentions,
    plan_traced,
    read_shape,
)
from int8run.ptq.attention_check import find_attention_fault
from int8run.ptq.attention_speed import AttentionSpeed, draw_attention_call, leave_slow_float
from int8run.utils.attention_call import AttentionCall


class Heads(nn.Module):
    """Attention of a number of heads, computed in a way that a test chooses."""

    def __init__(self, heads, attend=F.scaled_dot_product_attention):
        super().__init__()
        self.heads, self.attend = heads, attend

    def forward(self, x):
        heads = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return self.attend(heads, heads, heads).transpose(1, 2).flatten(2)


def attend_in_three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0])[None]


def attend_with_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, dropout_p=0.1)


def attend_by_itself(q, k, v):
    return torch.softmax(q @ k.mT, dim=-1) @ v


def plan(model, find_skip_reason=lambda name: None):
    traced = TracedAttentions()
    with watch_attention(model, traced.note_call, traced.note_softmax):
        model(randn(1, 6, 32))
    planned = plan_traced(traced, find_skip_reason)
    give_backend(planned, ReferenceAttention(), asked="auto")
    return planned, traced


def test_a_row_has_all_that_decides():
    (planned,), traced = plan(nn.Sequential(Heads(2)))

    row = planned.plan
    assert (row.name, row.kind, row.in_features, row.out_features) == ("0", "attention", 16, 16)
    assert row.shape == "2 heads, 6 x 6 tokens"
    assert (row.outlier, row.backend_asked, row.backend_used) == ("rotated 16", "auto", "reference")
    assert row.skip_reason is None
    assert traced.macs == {"0": 2 * 2 * 6 * 6 * 16}


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (attend_in_three_dimensions, "its queries have 3 dimensions, not 4"),
        (attend_with_dropout, "drops 10% of its probabilities at random"),
        (attend_by_itself, OWN_PRODUCTS),
    ],
)
def test_what_int8_cannot_have_stays_float(attend, reason):
    (planned,), _ = plan(nn.Sequential(Heads(2, attend)))

    assert planned.plan.skip_reason == reason
    assert planned.layer is None


def test_the_familys_rules_count_for_attention_too():
    planned, _ = plan(nn.Sequential(Heads(2), Heads(2)), {"1": "last block"}.get)

    assert [one.plan.skip_reason for one in planned] == [None, "last block"]


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Heads(2)

    def forward(self, x):
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0] + self.inner(x)


def test_an_attention_around_others_stays_float():
    planned, _ = plan(nn.Sequential(Outer()))

    assert {one.plan.name: one.plan.skip_reason for one in planned} == {
        "0": "other attentions run inside it",
        "0.inner": None,
    }


# -- auto ----------------------------------------------------------------------------------------------


def test_an_output_below_the_limit_leaves_it_float():
    model = nn.Sequential(Heads(2))
    planned, _ = plan(model)

    measure_attentions(model, [{"input": randn(1, 6, 32)}], planned)
    measured = planned[0].plan.measured["output_sqnr_db"]
    leave_inexact_float(planned, measured - 1)
    assert planned[0].layer is not None

    leave_inexact_float(planned, measured + 1)

    assert 30 < measured < 70
    assert planned[0].layer is None
    assert planned[0].plan.skip_reason == (
        f"its output has {measured:.1f} dB in INT8, int8.attention_min_sqnr_db asks for {measured + 1:g}"
    )
    assert planned[0].plan.measured["output_sqnr_db"] == measured, "the table shows what it would have had"


def test_of_several_steps_the_worst_counts():
    model = nn.Sequential(Heads(2))
    kind, cruel = randn(1, 6, 32), randn(1, 6, 32, seed=1)
    cruel[:, 0] *= 300  # one token whose values leave the others few steps of int8
    ratios = []
    for calls in ([kind], [cruel], [kind, cruel], [cruel, kind]):
        planned, _ = plan(model)
        measure_attentions(model, [{"input": x} for x in calls], planned)
        ratios.append(planned[0].plan.measured["output_sqnr_db"])

    assert ratios[1] < ratios[0] - 3
    assert ratios[2:] == [ratios[1]] * 2


def test_nan_of_int8_alone_is_an_error():
    model = nn.Sequential(Heads(2))
    planned, _ = plan(model)
    planned[0].layer.attend = lambda call: torch.full_like(call.query, math.nan)

    with pytest.raises(ConfigError, match="0: the INT8 attention computes NaN"):
        measure_attentions(model, [{"input": randn(1, 6, 32)}], planned)


@pytest.mark.parametrize(
    ("float_seconds", "int8_seconds", "reason"),
    [
        ([1.0] * 7, [2.0] * 7, "float is 2.00 times as fast as reference at 6 x 6 tokens here"),
        ([2.0] * 7, [1.0] * 7, None),
        ([1.0] * 7, [1.02] * 7, None),  # as good as equal
        ([1.0] * 7, [0.9, *[2.0] * 6], None),  # was as fast once: no clear answer
        ([0.1, *[1.0] * 6], [2.0] * 7, None),  # the times scatter
    ],
)
def test_what_is_clearly_faster_in_float_stays_float(
    float_seconds, int8_seconds, reason, tmp_path, monkeypatch
):
    planned, _ = plan(nn.Sequential(Heads(2)))
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    monkeypatch.setattr(float_comparison, "time_in_turns", lambda *_: [float_seconds, int8_seconds])
    cache = AutotuneCache(tmp_path / "choices.json", CPU, torch.float32)

    leave_slow_float(planned, AttentionSpeed(cache, CPU, torch.float32))

    assert planned[0].plan.skip_reason == reason
    assert planned[0].plan.is_float_by_choice is (reason is not None)


def test_a_ratio_is_measured_once(tmp_path, monkeypatch):
    timed = []
    monkeypatch.setattr(
        float_comparison, "time_in_turns", lambda *_: timed.append(1) or [[2.0] * 7, [1.0] * 7]
    )

    for _ in range(2):
        planned, _ = plan(nn.Sequential(Heads(2), Heads(2)))
        cache = AutotuneCache(tmp_path / "choices.json", CPU, torch.float32)
        leave_slow_float(planned, AttentionSpeed(cache, CPU, torch.float32))

    assert len(timed) == 1
    assert [one.plan.speedup for one in planned] == [2.0, 2.0]


def test_a_float_attention_that_cannot_run_is_not_measured_and_int8_stays(tmp_path, monkeypatch, caplog):
    def refuse(*args, **options):
        raise ValueError("`attn_mask` is not supported for flash-attn 2.")

    monkeypatch.setattr(attention_calls, "dispatch_attention_fn", refuse)
    planned, _ = plan(nn.Sequential(Heads(2)))
    cache = AutotuneCache(tmp_path / "choices.json", CPU, torch.float32)

    leave_slow_float(planned, AttentionSpeed(cache, CPU, torch.float32, "flash"))

    (attention,) = planned
    reason = "float was not measured: attention=flash: `attn_mask` is not supported for flash-attn 2."
    assert attention.layer is not None and attention.plan.speedup is None
    assert attention.plan.backends_left_out == reason
    assert reason in caplog.text
    assert not (tmp_path / "choices.json").exists()


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(1, 1, 6, 6, dtype=torch.bool), torch.zeros(2, 6), torch.zeros(1, 1, 1, 6)],
    ids=["none", "rows", "two dimensions", "keys"],
)
def test_what_is_timed_has_a_mask_of_the_shape_that_was_seen(mask):
    query = randn(1, 2, 6, 8)
    if mask is not None and mask.dim() == 2:
        query, mask = randn(1, 2, 2, 8), mask
    seen = AttentionCall(query, randn(1, 2, 6, 8), randn(1, 2, 6, 4), mask)

    drawn = draw_attention_call(read_shape(seen), CPU, torch.float32)

    assert [tensor.shape for tensor in drawn[:3]] == [tensor.shape for tensor in seen[:3]]
    if mask is None:
        assert drawn.attn_mask is None
    else:
        assert (drawn.attn_mask.shape, drawn.attn_mask.dtype) == (mask.shape, mask.dtype)
        assert torch.equal(
            compute_float_attention(drawn), compute_float_attention(drawn._replace(attn_mask=None))
        )


# -- backends ------------------------------------------------------------------------------------------


class Wrong(ReferenceAttention):
    """Forgets the scale."""

    name = "wrong"

    def attend(self, call, method):
        return super().attend(call._replace(query=call.query * 3), method)


class Failing(ReferenceAttention):
    name = "failing"

    def attend(self, call, method):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("backend", "fault"),
    [
        (ReferenceAttention(), None),
        (Wrong(), "computes something else at heads of 40 channels"),
        (Failing(), "RuntimeError: out of memory"),
    ],
)
def test_a_backend_is_tried_before_a_model_is_given_to_it(backend, fault):
    found = find_attention_fault(backend, [(40, 48)], CPU, torch.float32)

    assert found == fault if fault is None else found.startswith(fault)


def test_the_triton_kernel_gets_what_a_call_has(monkeypatch):
    kernel = pytest.importorskip("int8run.kernels.int8_attention.kernel", reason="Triton is not installed")
    got = {}

    def launch(*tensors, **options):
        got.update(options)
        return tensors[0]

    monkeypatch.setattr(kernel, "int8_attention", launch)
    backend = TritonAttention("sm_90")
    q, k = randn(1, 2, 100, 72), randn(1, 2, 5, 72)
    mask = torch.ones(1, 1, 100, 5, dtype=torch.bool)

    Int8Attention(backend, choose_attention_method(72)).attend(AttentionCall(q, k, k, mask, scale=0.5))

    assert got.pop("mask") is mask
    assert got.pop("tile") == choose_attention_tile("sm_90", 72, 100, has_row_mask=True)
    assert got == {"is_causal": False, "scale": 0.5, "rotation": 8, "center_keys": True}
    assert (
        backend.unsupported_width_reason(64, 320) == "a head has 320 channels, backend triton takes up to 256"
    )


@pytest.mark.parametrize(
    ("option", "names"),
    [("auto", ["cpu", "reference"]), ("reference", ["reference"]), ("onednn", ["cpu", "reference"])],
)
def test_a_backend_of_the_same_name_takes_attention(option, names):
    found = [backend.name for backend in list_attention_backends(make_backend(option), CPU)]

    assert found == names


def test_attention_has_the_instructions_that_were_asked_for():
    asked = Cpu(instructions="avx2")

    assert make_attention_backends(asked, CPU)["cpu"].instructions == "avx2"
