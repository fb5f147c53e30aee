"""How weights become integers: absmax, the scale with the least error, and GPTQ."""

import pytest
import torch
from support.compare import assert_close
from support.helpers import full_range, randn, shipped

from int8run.errors import ConfigError
from int8run.quant.rounding import REFINEMENTS, AbsMax, Gptq, Mse
from int8run.quant.weight import QuantizedWeight

ROUNDINGS = shipped("rounding")
# little damping: what it does to these inputs is what counts here
GPTQ = Gptq(damping=0.01)


def make_heavy_tailed(*shape, seed=0):
    return randn(*shape, seed=seed) / randn(*shape, seed=seed + 1000).abs().clamp(min=0.02)


def make_row_with_outlier(columns, size):
    """Small numbers and one that sets the scale for all of them."""
    row = randn(columns, seed=11).clamp(-3, 3)
    row[columns // 2] = size
    return row


# one of each kind of row that a weight may have
ROWS = torch.cat(
    [
        randn(6, 96),
        make_heavy_tailed(6, 96, seed=1),
        make_row_with_outlier(96, 6.0)[None],
        make_row_with_outlier(96, -50.0)[None],
        torch.zeros(1, 96),
        torch.full((1, 96), 0.3),
        torch.full((1, 96), -7.0),
        torch.eye(96)[5:6],
        1e-6 * randn(1, 96, seed=2),
        1e-36 * randn(1, 96, seed=3),
        1e12 * randn(1, 96, seed=4),
        full_range(1, 96, seed=5).float(),
        randn(1, 96, seed=6).sign(),
        torch.linspace(-1, 1, 96)[None],
        randn(1, 96, seed=7).abs(),
    ]
)


def compute_row_errors(weight, rounded):
    """Squared, of each row."""
    return (weight.double() - rounded.qdata.double() * rounded.scale.double()).square().sum(1)


def make_inputs(rows, columns, kind, seed=0):
    x = randn(rows, columns, seed=seed)
    if kind == "mixed":
        # features that depend on each other, as those of a network do
        mix = randn(columns, columns, seed=seed + 1) / columns**0.5
        x = x @ mix @ mix
    if kind == "outliers":
        x[:, :3] = 100 * x[:, :1] * torch.tensor([1.0, -0.8, 0.3]) + x[:, :3]
    return x


def compute_output_error(weight, rounded, x):
    exact = x.double() @ weight.double().T
    return (
        (x.double() @ (rounded.qdata.double() * rounded.scale.double()).T - exact).norm() / exact.norm()
    ).item()


def assert_valid(rounded, weight):
    assert isinstance(rounded, QuantizedWeight)
    assert rounded.qdata.dtype == torch.int8
    assert rounded.qdata.shape == weight.shape
    assert rounded.qdata.min() >= -127
    assert rounded.scale.dtype == torch.float32
    assert rounded.scale.shape == (len(weight), 1)
    assert rounded.scale.isfinite().all()
    assert (rounded.scale > 0).all()


# --- all of them


@pytest.mark.parametrize("name", ROUNDINGS)
def test_option_and_class_have_the_same_name(name):
    assert ROUNDINGS[name].name == name
    assert ROUNDINGS[name].needs_calibration == (name == "gptq")


@pytest.mark.parametrize("name", ROUNDINGS)
def test_round_weight_is_valid_and_repeatable(name):
    before, x = ROWS.clone(), make_inputs(64, 96, "mixed")
    rounded = ROUNDINGS[name].round_weight(ROWS, x)

    assert_valid(rounded, ROWS)
    assert torch.equal(ROWS, before)

    zeros = (ROWS == 0).all(1)

    assert zeros.any()
    assert (rounded.qdata[zeros] == 0).all()

    again = ROUNDINGS[name].round_weight(ROWS.clone(), x.clone())

    assert torch.equal(again.qdata, rounded.qdata)
    assert torch.equal(again.scale, rounded.scale)


@pytest.mark.parametrize("name", ROUNDINGS)
def test_rows_are_rounded_independently(name):
    x = make_inputs(64, 96, "mixed")
    together = ROUNDINGS[name].round_weight(ROWS, x)

    for i in (0, 7, 13, 18):
        alone = ROUNDINGS[name].round_weight(ROWS[i : i + 1], x)
        # sums of another length add up in another order: a tie may fall to the other side, and with gptq what
        # follows
        assert (alone.qdata[0].int() - together.qdata[i].int()).abs().max() <= 1
        torch.testing.assert_close(alone.scale[0], together.scale[i], rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ROUNDINGS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 5)], ids=str)
def test_smallest_weights_are_rounded(name, shape):
    weight = randn(*shape)
    rounded = ROUNDINGS[name].round_weight(weight, randn(4, shape[1], seed=1))

    assert_valid(rounded, weight)
    assert_close(name, rounded.dequantize(), weight, 0.01)


# --- absmax


def test_absmax_published_vector():
    rounded = AbsMax().round_weight(torch.tensor([[1, -2, 0.5, 0]]))
    # 63.5 and 31.75
    assert rounded.qdata.tolist() == [[64, -127, 32, 0]]
    assert rounded.scale.item() == pytest.approx(2 / 127)


def test_absmax_rounds_ties_to_even():
    row = torch.tensor([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5, 0.49, 0.51]])
    assert AbsMax().round_weight(row).qdata.tolist() == [[127, 0, 2, 2, 0, -2, -126, 0, 1]]


def test_absmax_equals_its_definition():
    rounded = AbsMax().round_weight(ROWS)
    largest = ROWS.abs().amax(1, keepdim=True)

    torch.testing.assert_close(rounded.scale, (largest / 127).clamp(min=1e-30), rtol=1e-6, atol=0)
    assert ((ROWS - rounded.dequantize()).abs() <= rounded.scale * (0.5 + 1e-4)).all()

    some = largest[:, 0] > 1e-20

    assert (rounded.qdata[some].abs().amax(1) == 127).all()


# --- mse


@pytest.mark.parametrize("settings", [{}, {"candidates": 2}, {"smallest": 1.0}, {"smallest": 0.1}], ids=str)
def test_mse_never_increases_the_error_of_a_row(settings):
    for weight in (ROWS, make_heavy_tailed(200, 48, seed=3), randn(200, 48, seed=4), randn(200, 5, seed=5)):
        rounded = Mse(**settings).round_weight(weight)
        assert_valid(rounded, weight)
        assert (
            compute_row_errors(weight, rounded)
            <= compute_row_errors(weight, AbsMax().round_weight(weight)) * (1 + 1e-5)
        ).all()


@pytest.mark.parametrize(
    ("columns", "size", "most"), [(16_384, 5.0, 0.95), (16_384, -7.0, 0.95), (40_000, 30.0, 0.85)]
)
def test_mse_clips_a_far_outlier_where_that_reduces_the_error(columns, size, most):
    # a clipped weight is off by all that it is too large: at 127 steps only many others with a finer grid
    # make up for that
    weight = make_row_with_outlier(columns, size)[None]
    rounded = Mse().round_weight(weight)

    assert compute_row_errors(weight, rounded) < most * compute_row_errors(
        weight, AbsMax().round_weight(weight)
    )
    # clipped: the largest code stands for less than the largest weight
    assert rounded.scale.item() * 127 < 0.99 * abs(size)
    assert rounded.qdata[0, columns // 2].item() == (127 if size > 0 else -127)


def test_mse_improves_ordinary_rows():
    weight = randn(64, 256, seed=8)
    plain, ours = (
        compute_row_errors(weight, AbsMax().round_weight(weight)),
        compute_row_errors(weight, Mse().round_weight(weight)),
    )

    assert ours.sum() < 0.99 * plain.sum()
    assert (ours < plain).float().mean() > 0.7


def test_mse_equals_grid_search_with_refinement():
    candidates, smallest = 9, 0.4
    for weight in (randn(8, 4, seed=1), make_heavy_tailed(8, 6, seed=2), randn(8, 40, seed=3)):
        rounded = Mse(candidates, smallest).round_weight(weight)
        for i, row in enumerate(weight.tolist()):

            def at(scale, row=row):
                codes = [max(-127, min(127, round(w / scale))) for w in row]
                return sum((w - scale * c) ** 2 for w, c in zip(row, codes, strict=True)), scale, codes

            shares = [1 - (1 - smallest) * step / (candidates - 1) for step in range(candidates)]
            best = min(at(max(map(abs, row)) / 127 * share) for share in shares)
            for _ in range(REFINEMENTS):
                best = min(
                    best,
                    at(sum(w * c for w, c in zip(row, best[2], strict=True)) / sum(c * c for c in best[2])),
                )

            assert compute_row_errors(weight, rounded)[i].item() == pytest.approx(
                best[0], rel=1e-3, abs=1e-12
            )
            assert rounded.qdata[i].tolist() == best[2]


def test_mse_does_not_depend_on_chunks(monkeypatch):
    weight = make_heavy_tailed(9, 48, seed=3)
    whole = Mse().round_weight(weight)

    for numbers in (1, 100, 48 * 4):
        monkeypatch.setattr("int8run.quant.rounding.CHUNK_ELEMENTS", numbers)
        rounded = Mse().round_weight(weight)
        assert torch.equal(rounded.qdata, whole.qdata)
        assert torch.equal(rounded.scale, whole.scale)


def test_mse_is_close_to_the_best_of_all_scales():
    weight = torch.stack(
        [make_row_with_outlier(512, 6.0), make_heavy_tailed(1, 512, seed=2)[0], randn(512, seed=3)]
    )
    largest = weight.abs().amax(1, keepdim=True) / 127
    best = torch.full((3,), float("inf"), dtype=torch.float64)
    for share in torch.linspace(0.3, 1.05, 1000):
        scale = largest * share
        best = torch.minimum(
            best,
            compute_row_errors(
                weight, QuantizedWeight((weight / scale).round().clamp(-127, 127).to(torch.int8), scale)
            ),
        )

    assert (
        compute_row_errors(weight, Mse(candidates=100, smallest=0.3).round_weight(weight)) < 1.02 * best
    ).all()


def test_mse_ignores_inputs():
    weight = randn(5, 32)
    assert torch.equal(
        Mse().round_weight(weight).qdata, Mse().round_weight(weight, randn(9, 32, seed=1)).qdata
    )


# --- gptq


def round_by_obq(weight, x, damping):
    """The paper's algorithm as it is derived, in float64: after each column the inverse Hessian loses it."""
    weight, x = weight.double().clone(), x.double()
    hessian = x.T @ x
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian))
    scale = weight.abs().amax(1) / 127
    inverse, codes = torch.linalg.inv(hessian), torch.zeros_like(weight)
    for j in sorted(range(len(hessian)), key=lambda j: -hessian[j, j].item()):
        codes[:, j] = (weight[:, j] / scale).round().clamp(-127, 127)
        off = (weight[:, j] - codes[:, j] * scale) / inverse[j, j]
        weight -= off[:, None] * inverse[j]
        inverse -= inverse[:, j : j + 1] * inverse[j] / inverse[j, j].clone()
    return codes.to(torch.int8)


def compute_equal_share(a, b):
    return (a == b).float().mean().item()


@pytest.mark.parametrize("damping", [0.01, 0.1])
@pytest.mark.parametrize("kind", ["independent", "mixed", "outliers"])
def test_gptq_equals_the_papers_algorithm(kind, damping):
    weight, x = randn(16, 24, seed=1), make_inputs(100, 24, kind)
    # float32 moves a number across a tie now and then, and what follows with it
    assert (
        compute_equal_share(Gptq(damping).round_weight(weight, x).qdata, round_by_obq(weight, x, damping))
        > 0.97
    )


@pytest.mark.parametrize(("kind", "most"), [("independent", 0.97), ("mixed", 0.65), ("outliers", 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_reduces_the_output_error(kind, most, seed):
    weight, x = randn(32, 96, seed=seed + 50), make_inputs(400, 96, kind, seed=2 * seed)
    rounded, plain = GPTQ.round_weight(weight, x), AbsMax().round_weight(weight)

    assert_valid(rounded, weight)
    assert torch.equal(rounded.scale, plain.scale)
    assert compute_output_error(weight, rounded, x) < most * compute_output_error(weight, plain, x)


@pytest.mark.parametrize("damping", [0.01, ROUNDINGS["gptq"].damping])
def test_gptq_reduces_the_output_error_on_unseen_inputs(damping):
    weight, x = randn(32, 96, seed=1), make_inputs(800, 96, "mixed")
    seen, fresh = x[:400], x[400:]

    assert compute_output_error(
        weight, Gptq(damping).round_weight(weight, seen), fresh
    ) < 0.75 * compute_output_error(weight, AbsMax().round_weight(weight), fresh)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_gptq_works_with_fewer_rows_than_columns(rows):
    weight, x = randn(32, 96, seed=1), make_inputs(rows, 96, "independent")
    rounded = GPTQ.round_weight(weight, x)

    assert_valid(rounded, weight)
    assert compute_output_error(weight, rounded, x) < 0.6 * compute_output_error(
        weight, AbsMax().round_weight(weight), x
    )


@pytest.mark.parametrize("size", [1e-8, 1.0, 1e8])
def test_gptq_equals_absmax_for_independent_inputs(size):
    weight = randn(32, 96, seed=1)
    plain = AbsMax().round_weight(weight).qdata

    assert torch.equal(GPTQ.round_weight(weight, size * torch.eye(96)).qdata, plain)
    # each of another size: the order changes, nothing else
    assert torch.equal(
        GPTQ.round_weight(weight, torch.diag(size * (1 + randn(96, seed=2).abs()))).qdata, plain
    )


def test_gptq_does_not_depend_on_the_scale_of_its_inputs():
    weight, x = randn(32, 96, seed=1), make_inputs(200, 96, "mixed")
    assert (
        compute_equal_share(GPTQ.round_weight(weight, x).qdata, GPTQ.round_weight(weight, 1024 * x).qdata)
        > 0.99
    )


def test_gptq_rounds_columns_without_input_as_absmax_does():
    weight, x = randn(32, 96, seed=1), make_inputs(200, 96, "mixed")
    dead = [3, 50, 95]
    x[:, dead] = 0
    rounded, plain = GPTQ.round_weight(weight, x), AbsMax().round_weight(weight)

    assert torch.equal(rounded.qdata[:, dead], plain.qdata[:, dead])
    assert compute_output_error(weight, rounded, x) < 0.75 * compute_output_error(weight, plain, x)


def test_gptq_equals_absmax_for_zero_inputs():
    weight = randn(32, 96, seed=1)
    assert torch.equal(
        GPTQ.round_weight(weight, torch.zeros(9, 96)).qdata, AbsMax().round_weight(weight).qdata
    )


@pytest.mark.parametrize("kind", ["independent", "mixed"])
@pytest.mark.parametrize("columns", [100, 129])
def test_gptq_does_not_depend_on_its_block_size(columns, kind):
    weight, x = randn(16, columns, seed=1), make_inputs(300, columns, kind)
    whole = Gptq(0.01, block=4096).round_weight(weight, x)
    errors = [compute_output_error(weight, whole, x)]

    for block in (1, 7, 32, 128, columns):
        rounded = Gptq(0.01, block=block).round_weight(weight, x)
        errors.append(compute_output_error(weight, rounded, x))
        # the same sums in another order
        assert compute_equal_share(rounded.qdata, whole.qdata) > 0.97

    assert max(errors) < 1.02 * min(errors)


def test_gptq_does_not_depend_on_the_order_of_columns():
    weight, x = randn(16, 64, seed=1), make_inputs(300, 64, "mixed")
    moved = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    rounded, other = GPTQ.round_weight(weight, x), GPTQ.round_weight(weight[:, moved], x[:, moved])

    assert compute_equal_share(other.qdata, rounded.qdata[:, moved]) > 0.97


@pytest.mark.parametrize("damping", [1e-6, 0.01, 1])
@pytest.mark.parametrize("size", [1, 100, 1e4])
def test_gptq_is_stable_for_large_similar_columns(size, damping):
    weight = randn(8, 64, seed=1)
    for seed in range(3):
        x = randn(256, 64, seed=seed)
        x[:, :4] = size * x[:, :1] * torch.tensor([1.0, 1.3, -0.77, 0.11])
        rounded = Gptq(damping).round_weight(weight, x)

        assert_valid(rounded, weight)
        assert compute_output_error(weight, rounded, x) < compute_output_error(
            weight, AbsMax().round_weight(weight), x
        )


def test_gptq_clips_to_the_int8_range():
    weight, x = torch.full((1, 40), 0.9), randn(60, 1) * torch.ones(40) + 1e-3 * randn(60, 40, seed=1)
    weight[:, :20] = 1.0
    weight[:, 1::2] *= 0.9961
    rounded = Gptq(1e-6).round_weight(weight, x)

    assert_valid(rounded, weight)
    assert compute_output_error(weight, rounded, x) < 0.5 * compute_output_error(
        weight, AbsMax().round_weight(weight), x
    )


def test_gptq_requires_inputs():
    with pytest.raises(AssertionError, match="gptq needs calibration inputs"):
        GPTQ.round_weight(randn(3, 4))


# --- settings


@pytest.mark.parametrize(
    ("kind", "key", "value", "allowed"),
    [
        *[(Mse, "candidates", value, "whole number from 2 to 1000") for value in (1, 1001, 2.5, "64", True)],
        *[(Mse, "smallest", value, "number from 0.1 to 1") for value in (0, 1.1, "0.5", float("nan"))],
        *[(Gptq, "damping", value, "number from 1e-06 to 1") for value in (0, 1.1, "x", float("nan"))],
        *[(Gptq, "block", value, "whole number from 1 to 4096") for value in (0, 4097, 128.0, None)],
    ],
)
def test_settings_out_of_range_raise(kind, key, value, allowed):
    with pytest.raises(ConfigError, match=rf"^rounding\.{key} is {value!r}; allowed is a {allowed}$"):
        kind(**{key: value})
