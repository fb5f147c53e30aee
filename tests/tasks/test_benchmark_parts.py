"""task=bench beside Linears: which convolutions and attentions are timed, and what is kept for `auto`."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.helpers import CPU, randn
from torch import nn

from int8run.backends import float_comparison, layer_timer
from int8run.backends.attention import ReferenceAttention, choose_attention_method
from int8run.backends.autotune_cache import open_cache_of
from int8run.backends.base import LayerTimes
from int8run.backends.convolution import ReferenceConv, read_geometry
from int8run.backends.layer_timer import LayerTimer
from int8run.backends.reference import Reference
from int8run.generate.capture_attention import answered_by_zeros
from int8run.layers.int8_attention import Int8Attention
from int8run.layers.int8_linear import QuantizedLayer
from int8run.layers.plan import CONV, Int8Settings, LayerPlan
from int8run.outlier.base import OutlierTransform
from int8run.ptq.attention import AttentionShape
from int8run.ptq.attention_speed import AttentionSpeed
from int8run.ptq.convolutions import ConvolutionBinder
from int8run.quant.weight import quantize_weight
from int8run.report.console import Progress
from int8run.tasks.benchmark_parts import PartTimer, format_attention
from int8run.tasks.benchmark_shapes import ConvShape, StepShapes
from int8run.tasks.benchmark_table import BenchmarkResult, TimedParts, build_result_table, make_record
from int8run.utils.dtypes import FLOAT_DTYPES

CONVOLUTION = nn.Conv2d(4, 6, 3, stride=2, padding=1)
CONV_SHAPE = ConvShape((1, 4, 6, 6), 6, read_geometry(CONVOLUTION), has_bias=True)
ATTENTION = AttentionShape(1, 4, 2, 6, 5, 8, 8, "bool", mask_shape=(1, 1, 1, 5))


class WithTable(Reference):
    """The definition, with a file of its own for measured choices."""

    def __init__(self, table):
        self.table = table


@pytest.fixture
def backend(tmp_path):
    return WithTable(str(tmp_path / "choices.json"))


@pytest.fixture
def measured(backend, monkeypatch):
    """One convolution and one attention, timed; INT8 takes twice as long as float."""

    def in_turns(calls, device, rounds):
        for call in calls:
            call()
        return [[1.0] * rounds] * 3 + [[2.0] * rounds] * (len(calls) - 3)

    monkeypatch.setattr(layer_timer, "time_in_turns", in_turns)
    monkeypatch.setattr(layer_timer, "HOPELESS", 1e9)
    cache = open_cache_of(backend, CPU, torch.float32)
    timer = PartTimer(backend, LayerTimer(CPU, torch.float32, rounds=1), cache, "native")
    shapes = StepShapes(Counter(), Counter({CONV_SHAPE: 3}), Counter({ATTENTION: 2}))
    return timer.measure(shapes, Progress(enabled=False))


def test_both_are_timed_in_every_float_dtype_and_in_int8(measured):
    convolutions, attentions = measured

    assert (convolutions.title, attentions.title) == ("convolutions", "attention")
    assert convolutions.counts == {"1×4×6×6→6 3x3 stride 2": 3}
    assert attentions.counts == {"1×4 on 2 heads of 8, 6×5 masked": 2}
    for part in measured:
        (seconds,) = part.seconds.values()
        assert seconds == {**dict.fromkeys(FLOAT_DTYPES, 1.0), "reference": 2.0}


def test_what_was_timed_is_not_timed_again_by_auto(measured, backend, monkeypatch):
    monkeypatch.setattr(float_comparison, "time_in_turns", lambda *_: pytest.fail("timed again"))
    weight = CONVOLUTION.weight.detach().flatten(1)
    layer = QuantizedLayer(quantize_weight(weight), OutlierTransform(), CONVOLUTION.bias)
    plan = LayerPlan("conv", 36, 6, None, kind=CONV)
    settings = Int8Settings(convolutions="auto")

    ConvolutionBinder(backend, CPU, settings, {"conv": CONV_SHAPE.input_shape}).bind(plan, layer, CONVOLUTION)
    speed = AttentionSpeed(open_cache_of(backend, CPU, torch.float32), CPU, torch.float32)
    attention = Int8Attention(ReferenceAttention(), choose_attention_method(8))

    assert plan.speedup == speed.compare(ATTENTION, attention).speedup == 0.5


def test_where_only_the_definition_computes_them_that_is_said(monkeypatch, tmp_path):
    """Of sizes that models have it takes hours."""
    backend = WithTable(str(tmp_path / "choices.json"))
    backend.name = "onednn"
    monkeypatch.setattr("int8run.tasks.benchmark_parts.choose_conv_backend", lambda *_: ReferenceConv())
    monkeypatch.setattr(
        "int8run.tasks.benchmark_parts.list_attention_backends", lambda *_: [ReferenceAttention()]
    )
    timer = PartTimer(
        backend, LayerTimer(CPU, torch.float32, 1), open_cache_of(backend, CPU, torch.float32), "native"
    )

    assert timer.choose_conv_backend() is None and timer.list_attention_backends() == []
    assert timer.left_out == {
        "INT8 convolutions": "only the slow definition computes them on cpu",
        "INT8 attention": "only the slow definition computes it on cpu",
    }


def test_a_convolution_is_built_as_it_was():
    for conv in (CONVOLUTION, nn.Conv3d(4, 8, (3, 1, 1), padding=(1, 0, 0), groups=2, bias=False)):
        shape = ConvShape((1, 4), conv.out_channels, read_geometry(conv), has_bias=conv.bias is not None)
        built = shape.build()
        assert built.weight.is_meta and built.weight.shape == conv.weight.shape
        assert read_geometry(built) == read_geometry(conv)
        assert (built.bias is None) == (conv.bias is None)


def test_what_an_attention_has_is_said():
    assert format_attention(AttentionShape(2, 24, 24, 4608, 512, 128, 128)) == "2×24 heads of 128, 4608×512"
    assert format_attention(AttentionShape(1, 8, 8, 6, 6, 64, 64, is_causal=True)).endswith("6×6 causal")


class Attends(nn.Module):
    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x) + 1


def test_attention_of_these_models_is_zeros_meanwhile_and_of_no_other():
    model, other, x = Attends(), Attends(), randn(1, 2, 3, 4)
    expected = other(x)

    with answered_by_zeros([model]):
        zeros, untouched = model(x), other(x)

    assert torch.equal(zeros, torch.ones(1, 2, 3, 4))
    assert torch.equal(untouched, expected) and torch.equal(model(x), expected)


def test_parts_have_rows_of_their_own_and_count_in_the_whole():
    part = TimedParts("attention")
    part.add("8 heads", 2, LayerTimes({"float32": 0.004, "a": 0.001}, {}, is_steady=False))
    part.add("8 heads", 1, LayerTimes({"float32": 9.0, "a": 9.0}, {}, is_steady=True))
    part.instructions["a"] = "avx2"
    linears = {(8, 64, 32): {"float32": 0.002, "a": 0.002, "b": 0.001}}
    result = BenchmarkResult(linears, {(8, 64, 32): 4}, {}, (), [part], {"a": "avx2", "b": ""})

    table = build_result_table("t", result)

    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert [str(column.header) for column in table.columns][2:5] == ["b", "fp32", "a"]
    assert rows[-3:] == [
        ("8 heads", "3", "–", "4.00", "1.00", "?"),  # its times scatter
        ("all attention", "3", "–", "12.0", "3.00", "?"),
        ("all of these", "7", "–", "20.0", "11.0", "2.86×"),  # 8 + 12 beside 4 + 3
    ]
    record = make_record(result, "here", {})
    assert record["attention"] == {"8 heads": {"calls": 3, "milliseconds": {"float32": 4.0, "a": 1.0}}}
    assert record["instructions"] == {"Linears": {"a": "avx2"}, "attention": {"a": "avx2"}}
    assert record["all_milliseconds"]["int8"] == pytest.approx(7.0)
    assert part.unsteady == ["8 heads"]
