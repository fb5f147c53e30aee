"""How far embeddings are from each other, against plain formulas."""

import math

import pytest
import torch
from support.helpers import randn

from int8run.layers.plan import LayerPlan
from int8run.metrics.embeddings import (
    compare_embeddings,
    compute_embedding_cosine,
    compute_encoder_metrics,
    compute_relative_error,
)


def test_the_cosine_is_a_mean_over_tokens() -> None:
    a, b = torch.tensor([[[3.0, 4.0], [1000.0, 0.0]]]), torch.tensor([[[4.0, 3.0], [1000.0, 0.0]]])

    assert compute_embedding_cosine(a, b) == pytest.approx((24 / 25 + 1) / 2), (
        "the huge token counts no more than the other"
    )
    assert compute_embedding_cosine(a, -a) == pytest.approx(-1) and compute_embedding_cosine(
        a[0, 0], b[0, 0]
    ) == pytest.approx(24 / 25)

    half = randn(5, 64).bfloat16()

    assert compute_embedding_cosine(half, half) == pytest.approx(1, abs=1e-12), "in float64"


def test_the_error_is_over_all_tokens() -> None:
    a = torch.tensor([[3.0, 4.0], [0.0, 12.0]])

    assert compute_relative_error(a, a + torch.tensor([[0.0, 5.0], [0.0, 0.0]])) == pytest.approx(5 / 13)
    assert (
        compute_relative_error(a, torch.zeros(2, 2)) == pytest.approx(1) and compute_relative_error(a, a) == 0
    )


def test_only_embeddings_are_compared() -> None:
    """Embeddings: not ids, masks, coordinates, nor what is 0 or of another length."""
    wide = randn(2, 3, 8)
    left_out = [
        torch.ones(2, 8, dtype=torch.int64),
        torch.ones(5, 4),
        torch.zeros(2, 8),
        torch.ones(2, 8, dtype=torch.bool),
    ]

    assert len(list(compare_embeddings((wide, *left_out), (wide + 1, *left_out)))) == 1
    assert len(list(compare_embeddings([wide, randn(2, 5)], [wide, randn(2, 5, seed=1)]))) == 2, (
        "5 numbers are an embedding"
    )
    assert list(compare_embeddings(wide, wide[:1])) == []
    assert list(compare_embeddings(wide, 2 * wide)) == [(pytest.approx(1), pytest.approx(1))]

    with pytest.raises(ValueError, match="zip"):
        list(compare_embeddings([wide, wide], [wide]))


def make_plan(name: str, keep_float: str | None = None, **measured: float) -> LayerPlan:
    made = LayerPlan(name, 8, 8, keep_float)
    made.measured.update(measured)
    return made


def test_the_metrics_of_quantized_encoders() -> None:
    plans = [
        make_plan("a", weight_sqnr_db=20.0),
        make_plan("b", weight_sqnr_db=30.0),
        make_plan("c", "a table", weight_sqnr_db=1.0),
        make_plan("d"),
    ]
    turned = torch.tensor([[0.0] * 4 + [1.0]])
    one = torch.tensor([[1.0] + [0.0] * 4])
    found = compute_encoder_metrics(plans, iter([(one, one), ((one, one), (turned, 2 * one))]))

    assert found == {
        "clip/layers_quantized": 3,
        "clip/layers_float": 1,
        "clip/weight_sqnr_db_mean": 25.0,
        "clip/weight_sqnr_db_min": 20.0,
        "clip/cosine_mean": pytest.approx(2 / 3),
        "clip/cosine_min": pytest.approx(0, abs=1e-9),
        "clip/rel_err": pytest.approx((0 + math.sqrt(2) + 1) / 3),
    }


def test_the_metrics_without_a_float_model_or_rounding() -> None:
    assert compute_encoder_metrics([make_plan("a"), make_plan("b", "why")], []) == {
        "clip/layers_quantized": 1,
        "clip/layers_float": 1,
    }
    assert compute_encoder_metrics([], []) == {"clip/layers_quantized": 0, "clip/layers_float": 0}
