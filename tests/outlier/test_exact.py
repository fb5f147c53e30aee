"""Every outlier method: exact before rounding, the same on every backend, and as its source defines it."""

import math
from typing import ClassVar

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from support.compare import assert_close
from support.helpers import CPU, full_range, randn, shipped, usable

from int8run.backends.reference import Reference
from int8run.errors import ConfigError
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer, center_rows
from int8run.outlier.base import LayerStatistics, OutlierTransform
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.outlier.smoothquant import SmoothQuant
from int8run.quant.weight import quantize_weight

# auto is made of other options, so it has to be composed; its candidates have settings of their own
with initialize_config_module("int8run.conf", version_base="1.3"):
    AUTO = instantiate(compose("config", ["outlier=auto"]).outlier, _convert_="all")
SHIPPED = {**shipped("outlier"), **AUTO.candidates}
METHODS = {**SHIPPED, "quarot_2": QuaRot(2), "hadanorm_4": HadaNorm(4, alpha=0.25)}
# divided by 256, by 128, by a smaller power of 4, by 4 only, by 2 only, by none
WIDTHS = [256, 1024, 384, 1920, 48, 12, 20, 18, 7, 1]
TAKEN = [
    (name, width)
    for name, method in METHODS.items()
    for width in WIDTHS
    if method.unsupported_reason(width) is None
]
BACKENDS = {name: backend for name, backend in shipped("backend").items() if usable(backend, CPU)}
HALF = [torch.bfloat16, torch.float16]


def fitted(method, weight, x=None):
    """The method's transform for a layer that a calibration saw this input of."""
    x = randn(4, 5, weight.shape[1], seed=99) if x is None else x
    return method.fit(
        weight, LayerStatistics(x, x.flatten(0, -2).abs().amax(0).float(), weight.abs().amax(0).float())
    )


def int8(weight, transform, backend=None, bias=None):
    return Int8Linear(
        QuantizedLayer(quantize_weight(transform.transform_weight(weight)), transform, bias),
        backend or Reference(),
        weight.dtype,
    )


def test_the_walk_finds_the_methods():
    assert {m.name for m in METHODS.values()} == {"none", "convrot", "quarot", "hadanorm", "smoothquant"}
    assert {name for name, _ in TAKEN} == set(METHODS) and AUTO.name == "auto"


@pytest.mark.parametrize("name", METHODS)
def test_a_width_is_taken_or_rejected_with_its_reason(name):
    for width in WIDTHS:
        why = METHODS[name].unsupported_reason(width)
        assert why is None or why.startswith(f"in_features={width} is not a multiple of ")


# --- exact before rounding


@pytest.mark.parametrize(("name", "width"), TAKEN)
def test_the_product_does_not_change_before_rounding(name, width):
    x, weight = randn(3, width), randn(5, width, seed=1)
    transform = fitted(METHODS[name], weight)

    assert transform.method == METHODS[name].name and transform.settings == METHODS[name].get_settings(width)

    product = transform.transform_input(x).double() @ transform.transform_weight(weight).double().T

    assert_close(f"{name} at {width}", product, x.double() @ weight.double().T, 1e-6)


@pytest.mark.parametrize(("name", "width"), TAKEN)
def test_the_weight_can_be_had_back(name, width):
    weight = randn(5, width, seed=1)
    transform = fitted(METHODS[name], weight)
    assert_close(
        f"{name} at {width}", transform.restore_weight(transform.transform_weight(weight)), weight, 1e-6
    )


@pytest.mark.parametrize(("name", "width"), [(name, width) for name, width in TAKEN if name != "none"])
def test_a_method_that_is_not_none_does_something(name, width):
    x, weight = randn(3, width), randn(5, width, seed=1)
    transform = fitted(METHODS[name], weight)

    assert (transform.transform_input(x) - x).norm() > 0.01 * x.norm()
    assert (transform.transform_weight(weight) - weight).norm() > 0.01 * weight.norm()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("name", "width"), [(name, width) for name, width in TAKEN if width in (256, 384, 7)]
)
def test_half_precision_input_keeps_its_dtype_and_loses_one_rounding_a_step(name, width, dtype):
    x, weight = randn(4, width, dtype=dtype), randn(5, width, seed=1)
    transform = fitted(METHODS[name], weight)
    moved = transform.transform_input(x)

    assert moved.dtype == dtype

    product = moved.double() @ transform.transform_weight(weight).double().T

    assert_close(f"{name} in {dtype}", product, x.double() @ weight.double().T, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_half_precision_weight_is_transformed_in_float32(name, dtype):
    weight = randn(5, 256, seed=1, dtype=dtype)
    transform = fitted(METHODS[name], weight)

    assert transform.factor is None or transform.factor.dtype == torch.float32

    x = randn(3, 256)
    product = transform.transform_input(x).double() @ transform.transform_weight(weight.float()).double().T

    assert_close(f"{name} in {dtype}", product, x.double() @ weight.double().T, 1e-6)


@pytest.mark.parametrize("width", [width for width in WIDTHS if not ConvRot().unsupported_reason(width)])
def test_convrot_is_exact_on_whole_numbers(width):
    x, weight = full_range(3, width).float(), full_range(5, width, seed=1).float()
    transform = ConvRot().fit(weight)
    product = transform.transform_input(x).double() @ transform.transform_weight(weight).double().T

    assert torch.equal(product, x.double() @ weight.double().T)


# --- centering: the mean over tokens goes its own way

SHAPES = [(5, 16), (2, 5, 16), (3, 2, 5, 16), (4, 1, 16), (1, 1, 16), (1, 16), (2, 3, 1, 16)]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_centering_is_exact_before_rounding(shape, dtype):
    weight, bias = randn(6, 16, seed=1), randn(6, seed=2)
    # images far from each other, so that a mean that went to another one is seen
    x = (randn(*shape) + 10 * randn(*shape[:-2], 1, 16, seed=3)).to(dtype)
    transform = HadaNorm(4).fit(weight)
    rows = center_rows(x)
    images = math.prod(shape[:-2])

    assert rows.dtype == torch.float32 and rows.shape == (math.prod(shape[:-1]) + images, 16)

    # in float64, since `with_mean` takes the products in any float dtype
    products = transform.transform_input(rows.double()) @ transform.transform_weight(weight).double().T
    y = int8(weight, transform, bias=bias).add_mean_product(products, x.shape)

    assert_close(f"{shape}", y.reshape(*shape[:-1], 6), x.double() @ weight.double().T + bias, 1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_image_is_centered_on_its_own_mean(shape):
    x = randn(*shape) + 10 * randn(*shape[:-2], 1, 16, seed=3)
    rows, tokens = center_rows(x), math.prod(shape[:-1])

    assert rows[:tokens].reshape(shape).mean(-2).abs().max() < 1e-5
    torch.testing.assert_close(rows[tokens:], x.mean(-2).reshape(-1, 16))


class Rows(Reference):
    """Notes how many rows it quantizes."""

    name: ClassVar[str] = "rows"

    def __init__(self):
        self.seen = []

    def quantize(self, x, **steps):
        self.seen.append(len(x))
        return super().quantize(x, **steps)


@pytest.mark.parametrize(
    ("shape", "rows"),
    [((16,), 1), ((5, 16), 5), ((1, 16), 1), ((2, 5, 16), 12), ((3, 2, 5, 16), 36), ((1, 1, 16), 2)],
    ids=str,
)
def test_without_a_token_axis_nothing_is_centered(shape, rows):
    weight, x = randn(6, 16, seed=1), randn(*shape) + 3
    transform = HadaNorm(4).fit(weight)
    plain = OutlierTransform(factor=transform.factor, rotation=transform.rotation)
    backend = Rows()
    y = int8(weight, transform, backend)(x)

    assert backend.seen == [rows]
    assert torch.equal(y, int8(weight, plain)(x)) == (len(shape) < 3 or shape[-2] == 1)
    assert_close("layer", y, x @ weight.T, 0.02)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS)
def test_an_image_is_the_same_alone_and_in_a_batch(name, backend):
    weight, x = randn(24, 256, seed=1), randn(3, 5, 256)
    # one image would drown the others if they were looked at together
    x[1] = 1000 * x[1] + 5000
    layer = int8(weight, fitted(METHODS[name], weight), BACKENDS[backend])
    together = layer(x)
    for i in range(3):
        # a sum in another order moves an integer at a tie now and then
        assert_close(f"image {i}", together[i : i + 1], layer(x[i : i + 1]), 1e-3)

    assert_close("two batch axes", layer(x[None].expand(2, 3, 5, 256))[1], together, 1e-3)


def test_rows_without_a_token_axis_are_the_same_alone_and_together():
    weight, x = randn(24, 256, seed=1), randn(3, 256)
    x[1] = 1000 * x[1] + 5000
    layer = int8(weight, HadaNorm().fit(weight))
    together = layer(x)
    for i in range(3):
        assert_close(f"row {i}", together[i], layer(x[i]), 1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("shape", [(0, 256), (2, 0, 256), (0, 3, 256)], ids=str)
def test_no_rows_give_no_rows(name, shape):
    weight = randn(6, 256, seed=1)
    assert int8(weight, fitted(METHODS[name], weight), bias=randn(6))(torch.zeros(shape)).shape == (
        *shape[:-1],
        6,
    )


def test_centering_pays_where_tokens_have_a_mean_in_common():
    weight = randn(24, 256, seed=1)
    x = randn(2, 40, 256) + 30 * randn(2, 1, 256, seed=3)
    # what differs between the tokens of an image is what the layer has to tell apart
    expected = x @ weight.T
    expected -= expected.mean(1, keepdim=True)
    transform = HadaNorm().fit(weight)
    plain = OutlierTransform(factor=transform.factor, rotation=transform.rotation)

    def error(transform):
        y = int8(weight, transform)(x)
        return (y - y.mean(1, keepdim=True) - expected).norm()

    assert error(transform) < 0.1 * error(plain)


# --- every backend does it alike


def dequantized(quantized, width):
    """What the codes of a backend stand for; unsigned ones have their zero at 128, and rows may be padded."""
    qdata = quantized.q.float() - (128 if quantized.q.dtype == torch.uint8 else 0)
    return qdata[:, :width] * quantized.scale.reshape(-1, 1)


@pytest.mark.parametrize(("name", "width"), TAKEN)
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "comfy_kitchen"]
)  # it quantizes inside its product
def test_a_backend_rounds_what_the_transform_defines(backend, name, width):
    x = randn(9, width)
    x[4] = 0
    x[5] *= 1e-4
    x[6] *= 1e4
    transform = fitted(METHODS[name], randn(5, width, seed=1))
    quantized = BACKENDS[backend].quantize(x, factor=transform.factor, rotation=transform.rotation)
    exact = transform.transform_input(x)
    scale = quantized.scale.reshape(-1, 1)

    torch.testing.assert_close(
        scale, (exact.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30), rtol=1e-5, atol=0
    )

    off = (dequantized(quantized, width) - exact).abs() / scale

    assert off.max() <= 0.5 + 1e-3


@pytest.mark.parametrize(("name", "width"), TAKEN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_layer_is_as_close_to_float_on_every_backend(backend, name, width):
    x, weight, bias = (
        randn(2, 9, width) + randn(2, 1, width, seed=4),
        randn(20, width, seed=1),
        randn(20, seed=2),
    )
    transform = fitted(METHODS[name], weight)
    exact = x @ weight.T + bias
    ours, reference = (
        (int8(weight, transform, b, bias)(x) - exact).norm() for b in (BACKENDS[backend], Reference())
    )

    # comfy-kitchen rounds otherwise; of 360 numbers the error scatters
    assert ours <= (1.3 if backend == "comfy_kitchen" else 1.01) * reference + 1e-6 * exact.norm()


# --- convrot


@pytest.mark.parametrize(
    ("width", "group"), [(256, 256), (1024, 256), (1920, 64), (384, 64), (48, 16), (20, 4), (12, 4)]
)
def test_convrot_takes_the_largest_power_of_4_that_divides(width, group):
    transform = ConvRot().fit(torch.zeros(2, width))
    assert ConvRot().unsupported_reason(width) is None and ConvRot().get_settings(width) == {
        "group_size": group
    }
    assert transform.group_size == group and transform.label == f"convrot group_size={group}"


@pytest.mark.parametrize("width", [18, 7, 1])
def test_convrot_rejects_a_width_that_4_does_not_divide(width):
    assert ConvRot().unsupported_reason(width) == f"in_features={width} is not a multiple of 4"


@pytest.mark.parametrize(
    ("asked", "width", "group"), [(1024, 2048, 1024), (1024, 256, 256), (16, 256, 16), (4, 256, 4)]
)
def test_convrot_group_size_is_the_upper_limit(asked, width, group):
    assert ConvRot(asked).fit(torch.zeros(2, width)).group_size == group


@pytest.mark.parametrize("size", [0, 8, 128, 257, 4096, 256.0, "256"])
def test_convrot_rejects_other_group_sizes(size):
    with pytest.raises(
        ConfigError, match=rf"^outlier\.group_size is {size!r}; convrot takes 4, 16, 64, 256 or 1024$"
    ):
        ConvRot(size)


@pytest.mark.parametrize(
    ("row", "rotated"),
    [
        ([1, 0, 0, 0], [0.5, 0.5, 0.5, -0.5]),
        ([0, 0, 1, 0], [0.5, -0.5, 0.5, 0.5]),
        ([1, 2, 3, 4], [1, 2, 3, 4]),
    ],
)
def test_convrot_of_the_vectors_that_other_tools_agree_on(row, rotated):
    row, rotated = torch.tensor([row]).float(), torch.tensor([rotated]).float()
    transform = ConvRot(4).fit(torch.zeros(2, 4))

    assert torch.equal(transform.transform_input(row), rotated) and torch.equal(
        transform.transform_weight(row), rotated
    )
    assert torch.equal(transform.restore_weight(rotated), row)


def test_convrot_of_the_first_unit_vector_of_16():
    row = torch.eye(16)[:1]
    rotated = torch.tensor([1, 1, 1, -1] * 3 + [-1, -1, -1, 1]) / 4
    assert torch.equal(ConvRot(16).fit(row).transform_input(row)[0], rotated)


# --- quarot


def sylvester(size):
    """By bits, not Kronecker products: an entry's sign is the parity of the ones row and column share."""
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def by_group(x, matrix):
    """Every group of columns times the matrix, one after another."""
    size = matrix.shape[0]
    return torch.cat([part @ matrix for part in x.split(size, dim=-1)], dim=-1)


@pytest.mark.parametrize("group", [2, 8, 128, 512])
def test_quarot_is_sylvesters_matrix(group):
    torch.testing.assert_close(
        QuaRot(group).fit(torch.zeros(1, group)).matrix, sylvester(group).float(), rtol=1e-6, atol=0
    )


def test_quarot_rotates_groups_of_128():
    assert QuaRot().group_size == 128

    x, weight = randn(3, 384), randn(5, 384, seed=1)
    transform, matrix = QuaRot().fit(weight), sylvester(128)

    assert (
        transform.label == "quarot group_size=128"
        and transform.sylvester
        and not transform.centered
        and transform.factor is None
    )
    assert_close("input", transform.transform_input(x), by_group(x.double(), matrix), 1e-6)
    assert_close("weight", transform.transform_weight(weight), by_group(weight.double(), matrix.T), 1e-6)


@pytest.mark.parametrize("method", [QuaRot(), HadaNorm()], ids=lambda m: m.name)
def test_quarot_and_hadanorm_reject_a_width_that_their_group_does_not_divide(method):
    assert [method.unsupported_reason(width) for width in (128, 3072)] == [None, None]
    assert [method.unsupported_reason(width) for width in (64, 200)] == [
        f"in_features={w} is not a multiple of 128" for w in (64, 200)
    ]


@pytest.mark.parametrize("size", [0, 1, 3, 96, 2048, -2, 128.0, "128"])
@pytest.mark.parametrize("method", [QuaRot, HadaNorm], ids=lambda m: m.name)
def test_quarot_and_hadanorm_take_powers_of_2_only(method, size):
    with pytest.raises(
        ConfigError, match=rf"^outlier\.group_size is {size!r}; choose a power of 2 from 2 to 1024$"
    ):
        method(group_size=size)


def test_a_group_of_another_matrix_is_another_treatment():
    regular, other = ConvRot(64).fit(torch.zeros(1, 64)), QuaRot(64).fit(torch.zeros(1, 64))
    assert (
        regular.group_size == other.group_size
        and not regular.has_same_input_transform(other)
        and not other.has_same_input_transform(regular)
    )
    assert other.has_same_input_transform(
        QuaRot(64).fit(randn(3, 64))
    ) and not other.has_same_input_transform(QuaRot(32).fit(randn(3, 64)))


# --- hadanorm, as the INT8-Toolkit has it


def sigma_of(weight, alpha):
    """One column after another."""
    return torch.tensor(
        [max(max(max(abs(w) for w in column), 1e-6) ** (alpha - 1), 1e-6) for column in weight.T.tolist()]
    ).double()


def rounded(x):
    """Rows to integers and back, in float64."""
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


def toolkit_hadanorm(x, weight, bias, alpha, group):
    """The whole layer: weight times sigma, input over sigma, both rotated; the mean is separate."""
    sigma, matrix = sigma_of(weight, alpha), sylvester(group)
    q_weight = rounded(by_group(weight.double() * sigma, matrix.T))
    moved = by_group(x.double() / sigma, matrix)
    c = moved.mean(-2, keepdim=True)
    return rounded(moved - c) @ q_weight.T + rounded(c) @ q_weight.T + bias


@pytest.mark.parametrize("alpha", [0.5, 0.0, 0.25, 1.0])
@pytest.mark.parametrize("shape", [(2, 7, 256), (3, 2, 7, 256), (1, 1, 256)], ids=str)
def test_hadanorm_is_the_toolkits_layer(shape, alpha):
    weight, bias = randn(24, 256, seed=1), randn(24, seed=2)
    weight[:, 3] *= 50
    weight[:, 5] = 0
    weight[:, 7] = 1e-9
    x = randn(*shape) + 4 * randn(*shape[:-2], 1, 256, seed=3)
    transform = HadaNorm(alpha=alpha).fit(weight)
    sigma = sigma_of(weight, alpha)

    torch.testing.assert_close(transform.factor.double(), 1 / sigma, rtol=1e-5, atol=0)
    assert_close(
        "weight",
        transform.transform_weight(weight),
        by_group(weight.double() * sigma, sylvester(128).T),
        1e-6,
    )

    expected = toolkit_hadanorm(x, weight, bias, alpha, 128)

    # a number at a tie may go to the other integer
    assert_close("layer", int8(weight, transform, bias=bias)(x).double(), expected, 1e-3)
    assert_close("float", expected, x @ weight.T + bias, 0.05)


def test_hadanorm_holds_on_to_a_column_of_zeros():
    weight = randn(6, 128, seed=1)
    weight[:, 9] = 0
    transform = HadaNorm().fit(weight)

    # 1000 is 1e-6 to the power of -1/2
    assert 1 / transform.factor[9].item() == pytest.approx(1000, rel=1e-5)
    assert (transform.restore_weight(transform.transform_weight(weight))[:, 9].abs() < 1e-6).all()


def test_hadanorms_sigma_has_a_floor():
    weight = torch.full((2, 128), 1e14)
    # 1e14 ** -0.5 is 1e-7
    assert (1 / HadaNorm().fit(weight).factor).tolist() == pytest.approx([1e-6] * 128)


def test_hadanorm_needs_no_calibration_and_does_not_look_at_one():
    weight = randn(6, 128, seed=1)
    assert not HadaNorm.needs_calibration and torch.equal(
        fitted(HadaNorm(), weight).factor, HadaNorm().fit(weight).factor
    )
    assert HadaNorm().fit(weight).label == "hadanorm group_size=128 alpha=0.5"


def test_layers_of_other_weights_do_not_share_under_hadanorm():
    a, b = randn(6, 128, seed=1), randn(6, 128, seed=2)

    assert not HadaNorm().fit(a).has_same_input_transform(HadaNorm().fit(b)) and HadaNorm().fit(
        a
    ).has_same_input_transform(HadaNorm().fit(a))

    uncentered = OutlierTransform(factor=HadaNorm().fit(a).factor, rotation=HadaNorm().fit(a).rotation)

    assert not HadaNorm().fit(a).has_same_input_transform(uncentered)


# --- smoothquant


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.75, 1.0])
def test_smoothquant_is_the_papers_formula(alpha):
    x, weight = randn(4, 5, 12), randn(5, 12, seed=1)
    x[..., 3] *= 60
    transform = fitted(SmoothQuant(alpha), weight, x)
    s = []
    for j in range(12):
        x_max, w_max = (
            max(abs(v) for v in x[..., j].flatten().tolist()),
            max(abs(v) for v in weight[:, j].tolist()),
        )
        s.append(x_max**alpha / w_max ** (1 - alpha))
    s = torch.tensor(s)

    torch.testing.assert_close(transform.transform_input(x), x / s, rtol=1e-5, atol=0)
    torch.testing.assert_close(transform.transform_weight(weight), weight * s, rtol=1e-5, atol=0)
    assert transform.label == f"smoothquant alpha={alpha:g}"


def test_smoothquant_moves_all_of_one_range_into_the_other_at_the_ends():
    x, weight = randn(4, 5, 12), randn(5, 12, seed=1)
    whole, none = fitted(SmoothQuant(1.0), weight, x), fitted(SmoothQuant(0.0), weight, x)

    torch.testing.assert_close(whole.transform_input(x).flatten(0, 1).abs().amax(0), torch.ones(12))
    torch.testing.assert_close(none.transform_weight(weight).abs().amax(0), torch.ones(12))


def test_smoothquant_treats_layers_with_the_same_input_alike():
    x, weights = randn(4, 5, 12), [randn(5, 12, seed=1), randn(7, 12, seed=2)]
    x_max, together = x.flatten(0, 1).abs().amax(0), torch.cat(weights).abs().amax(0)
    one, two = (SmoothQuant().fit(w, LayerStatistics(x, x_max, together)) for w in weights)

    assert one.has_same_input_transform(two) and torch.equal(one.factor, two.factor)
    # each by its own weight, they would not
    assert not fitted(SmoothQuant(), weights[0], x).has_same_input_transform(
        fitted(SmoothQuant(), weights[1], x)
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_leaves_a_channel_that_was_always_0_alone(alpha):
    x, weight = randn(4, 5, 12), randn(5, 12, seed=1)
    x[..., 4] = 0
    transform = fitted(SmoothQuant(alpha), weight, x)

    assert transform.factor[4] == 1 and (transform.factor != 1).sum() == 11
    assert torch.equal(transform.transform_weight(weight)[:, 4], weight[:, 4])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_stays_finite_at_any_range(alpha):
    sizes = torch.tensor([0, 1e-40, 1e-12, 1e-5, 1, 1e5, 1e12])
    x, weight = sizes.repeat_interleave(7)[None, None], sizes.repeat(7)[None]
    transform = fitted(SmoothQuant(alpha), weight, x)

    assert transform.factor.isfinite().all() and (transform.factor > 0).all()

    moved, transformed = transform.transform_input(x[0]), transform.transform_weight(weight)

    assert moved.isfinite().all() and transformed.isfinite().all()

    products, expected = (moved.double() * transformed)[0], (x[0].double() * weight)[0]

    torch.testing.assert_close(products, expected, rtol=1e-5, atol=1e-30)


def test_smoothquant_asks_for_its_calibration():
    assert SmoothQuant.needs_calibration
    with pytest.raises(AssertionError, match="smoothquant is fitted to calibration statistics"):
        SmoothQuant().fit(randn(5, 12), None)


@pytest.mark.parametrize("method", [SmoothQuant, HadaNorm], ids=lambda m: m.name)
@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), "0.5", True])
def test_alpha_is_a_share(method, alpha):
    with pytest.raises(ConfigError, match=rf"^outlier\.alpha is {alpha!r}; allowed is a number from 0 to 1$"):
        method(alpha=alpha)


# --- worth their names after rounding


def rounded_error(method, x, weight):
    transform = fitted(method, weight, x)
    product = transform.round_input(x) @ quantize_weight(transform.transform_weight(weight)).dequantize().T
    exact = x.double() @ weight.double().T
    return ((product - exact).pow(2).mean() / exact.pow(2).mean()).sqrt().item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [128, 256, 384])
@pytest.mark.parametrize("name", [name for name in SHIPPED if name != "none"])
def test_every_method_beats_none_on_an_outlier_channel(name, width, seed):
    x, weight = randn(1, 32, width, seed=seed), randn(48, width, seed=seed + 100)
    x[..., 3] *= 100
    # a small column, as trained models have for such a channel; else the product is this one feature
    weight[:, 3] *= 0.01

    assert rounded_error(METHODS[name], x, weight) < 0.5 * rounded_error(NoOutlier(), x, weight)


@pytest.mark.parametrize("name", METHODS)
def test_the_rounded_input_is_what_a_layer_multiplies(name):
    x, weight = randn(2, 9, 256) + randn(2, 1, 256, seed=4), randn(20, 256, seed=1)
    transform = fitted(METHODS[name], weight)
    product = transform.round_input(x) @ quantize_weight(transform.transform_weight(weight)).dequantize().T

    # `Int8Linear` centers before the transform, this does as well: the same integers, but for ties
    assert_close(name, product, int8(weight, transform)(x), 1e-3)
    assert transform.round_input(x.bfloat16()).dtype == torch.float32
