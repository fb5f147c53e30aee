"""The CPU convolution beside its definition: pixels, sums, layouts, and the same bits on every set."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.helpers import CPU, full_range, randn

from int8run.backends.cpu import Cpu
from int8run.kernels.cpu import conv, pixels
from int8run.kernels.cpu.instructions import find_unusable_reason, list_instruction_sets
from int8run.kernels.cpu.library import OUT_OF_MEMORY
from int8run.kernels.cpu.pixels import PixelSteps
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.kernels.int8_conv.reference import (
    GroupNorm,
    int8_conv,
    measure_norm,
    normalize,
    quantize_pixels,
)

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}"),
]
FOUND = [name for name in list_instruction_sets() if find_unusable_reason((name,)) is None]
DTYPES = list(conv.DTYPES)
# float32 sums of taps; half precision: that may move a rounding of the output
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
# shape, outputs, kernel, stride, padding, groups: tails of 4, 16 and 64, of a tile and of a block of pixels
CASES = [
    ((1, 1, 1, 1), 1, (1, 1), 1, 0, 1),
    ((3, 5, 1, 1), 7, (3, 3), 1, 1, 1),
    ((2, 13, 9, 7), 70, (3, 3), 1, 1, 1),
    ((1, 40, 20, 20), 130, (3, 3), 2, 1, 1),
    ((1, 64, 15, 15), 64, (1, 1), 1, 0, 1),
    ((1, 8, 6, 5), 9, (3, 1), (1, 2), (1, 0), 1),
    ((1, 7, 4, 4), 3, (2, 2), 2, 0, 1),
    ((1, 4, 5, 5), 6, (7, 7), 1, 6, 1),
    ((2, 16, 3, 5, 6), 10, (3, 3, 3), (1, 2, 1), 1, 2),
    ((1, 6, 4, 3, 3), 5, (3, 1, 1), 1, (1, 0, 0), 1),
    ((1, 12, 6, 6), 8, (3, 3), 1, 1, 4),
]


def make_case(case, dtype=torch.float32):
    """x, the weight's integers, scales and bias, and the options of the definition."""
    shape, outputs, kernel, stride, padding, groups = case
    x = F.silu(2 * randn(*shape, dtype=dtype))
    qdata = full_range(outputs, shape[1] // groups, *kernel, seed=1)
    qdata.view(-1)[0] = -128
    w_scale, bias = 0.01 * randn(outputs, seed=2).abs(), randn(outputs, seed=3)
    return x, qdata, w_scale, bias, {"stride": stride, "padding": padding, "groups": groups}


def run(x, qdata, w_scale, bias, options, **more):
    """The kernel, as the definition is called."""
    packed = conv.pack_conv_weight(qdata, options["groups"])
    given = {"stride": options["stride"], "padding": options["padding"], **more}
    return conv.int8_conv(x, packed, w_scale, bias, kernel=qdata.shape[2:], **given)


def lay_out(rows):
    """Pixels [pixels, C] as images [B, C, pixels], in each layout that is read as it is."""
    planes = rows.T.contiguous()[None]
    return {
        "rows": rows.T[None],
        "planes": planes,
        "images": rows[..., None],
        "padded": F.pad(planes, (0, 5))[..., :-5],
    }


def measure_difference(y, expected):
    """The largest, as a share of the largest result."""
    return (y.double() - expected.double()).abs().max() / expected.double().abs().max()


@pytest.mark.parametrize("instructions", FOUND)
def test_it_equals_the_definition(instructions):
    for case, dtype in itertools.product(CASES, DTYPES):
        x, qdata, w_scale, bias, options = make_case(case, dtype)
        for given in (bias, None):
            y = run(x, qdata, w_scale, given, options, instructions=instructions)
            expected = int8_conv(x, qdata, w_scale, given, **options)
            assert y.dtype == dtype
            assert y.shape == expected.shape
            assert y.is_contiguous(memory_format=conv.CHANNELS_LAST[x.dim()])
            assert measure_difference(y, expected) < TOLERANCE[dtype], (case, dtype)


@pytest.mark.parametrize("instructions", FOUND[1:])
def test_results_have_the_same_bits_on_every_set(instructions):
    for case, dtype in itertools.product(CASES, DTYPES):
        arguments = make_case(case, dtype)
        best = run(*arguments, instructions=FOUND[0], silu=True)
        assert torch.equal(run(*arguments, instructions=instructions, silu=True), best), (case, dtype)


def test_whole_numbers_are_exact():
    # from -127 to 127 in each pixel: scale 1, center 0
    x = full_range(1, 300, 4, 4).float()
    x[:, 0], x[:, 1] = 127, -127
    qdata = full_range(70, 300, 3, 3, seed=1)
    y = run(x, qdata, torch.ones(70), None, {"stride": 1, "padding": 1, "groups": 1})

    assert torch.equal(y, F.conv2d(x.double(), qdata.double(), padding=1).float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instructions", FOUND)
def test_pixels_have_the_bits_of_the_definition(instructions, dtype):
    for channels in (1, 2, 5, 15, 16, 17, 63, 64, 320):
        x = 3 * randn(9, channels, dtype=dtype) + 1
        x[0] *= 1e-38 if dtype != torch.float16 else 1e-7  # denormal numbers
        x[1] = 0
        x[2] = x[2, 0]
        x[3, 0] = torch.finfo(dtype).max
        x[3, -1] = -torch.finfo(dtype).max
        expected = quantize_pixels(x[..., None, None])
        for layout, image in lay_out(x).items():
            q, scale, center = pixels.quantize_pixels(image, PixelSteps(instructions=instructions))

            assert torch.equal(scale, expected.scale.flatten()), (channels, layout)
            assert torch.equal(center, expected.center.flatten()), (channels, layout)
            integers = q[:, :channels].short() - 128
            assert torch.equal(integers, expected.q[..., 0, 0].short()), (channels, layout)


@pytest.mark.parametrize(
    ("rotation", "sylvester", "silu"),
    [(0, False, True), (16, False, False), (16, False, True), (8, True, False), (32, True, True)],
)
def test_silu_and_rotation_come_first(rotation, sylvester, silu):
    x = 3 * randn(20, 96)
    images = lay_out(x).values()
    by = None
    if rotation:
        by = Rotation((sylvester_hadamard if sylvester else regular_hadamard)(rotation), sylvester)
    expected = quantize_pixels(x[..., None, None].double(), by, silu=silu)
    results = [
        pixels.quantize_pixels(
            image, PixelSteps(rotation=rotation, sylvester=sylvester, silu=silu, instructions=name)
        )
        for name, image in itertools.product(FOUND, images)
    ]
    q, scale, center = results[0]

    assert all(all(map(torch.equal, result, results[0])) for result in results)
    torch.testing.assert_close(scale, expected.scale.flatten(), rtol=1e-5, atol=0)
    torch.testing.assert_close(center, expected.center.flatten(), rtol=1e-5, atol=1e-6)
    # a rounding of the range or of a number near a tie
    assert ((q.short() - 128 - expected.q[..., 0, 0].short()).abs() <= 1).all()
    assert (q.short() - 128 != expected.q[..., 0, 0].short()).float().mean() < 0.01


# shape of the image, groups; one, some and more than a chunk of pixels
NORMS = [((2, 5, 1, 1), 5), ((2, 13, 9, 7), 1), ((1, 96, 20, 20), 32), ((1, 40, 3, 11, 13), 8)]


def make_norm(channels, groups):
    return GroupNorm(groups, 1 + randn(channels, seed=8), randn(channels, seed=9), 1e-5)


@pytest.mark.parametrize(("shape", "groups"), NORMS, ids=str)
def test_a_norm_is_torchs(shape, groups):
    # a mean far from 0, in some channels farther
    x = 3 * randn(*shape) + 20 * randn(1, shape[1], *[1] * (len(shape) - 2), seed=1)
    norm = make_norm(shape[1], groups)
    expected = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), norm.eps)
    expected_steps = measure_norm(x, norm)
    of_layout = {}
    for name, last in itertools.product(FOUND, (False, True)):
        laid_out = x.flatten(2)
        if last:
            laid_out = laid_out.transpose(1, 2).contiguous().transpose(1, 2)
        steps = pixels.measure_norm(laid_out, norm, name)

        assert all(map(torch.equal, steps, of_layout.setdefault(last, steps)))
        for found, exact in zip(steps, expected_steps, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        made = laid_out.double() * steps[0][..., None] + steps[1][..., None]
        torch.testing.assert_close(made, expected.flatten(2), rtol=1e-3, atol=1e-3)


def test_a_pixel_far_from_all_others_costs_a_norm_no_digits():
    x = randn(1, 4, 64, 64)
    x[0, :2, 0, 0] = 1000.0
    x[0, 2:, -1, -1] = -1000.0
    norm = make_norm(4, 2)
    expected = measure_norm(x, norm)
    planes = x.flatten(2)
    rows = planes.transpose(1, 2).contiguous().transpose(1, 2)
    for name, laid_out in itertools.product(FOUND, (planes, rows)):
        for found, exact in zip(pixels.measure_norm(laid_out, norm, name), expected, strict=True):
            torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("instructions", FOUND)
def test_norm_and_silu_come_before_the_pixels_are_rounded(instructions):
    for case, dtype in itertools.product([CASES[2], CASES[8], CASES[10]], DTYPES):
        x, qdata, w_scale, bias, options = make_case(case, dtype)
        norm = make_norm(x.shape[1], 1)
        for silu in (False, True):
            y = run(x, qdata, w_scale, bias, options, norm=norm, silu=silu, instructions=instructions)
            best = run(x, qdata, w_scale, bias, options, norm=norm, silu=silu)
            prepared = normalize(x, norm)
            expected = int8_conv(prepared, qdata, w_scale, bias, silu=silu, **options)

            assert torch.equal(y, best)
            # a number near a tie may be rounded otherwise
            assert measure_difference(y, expected) < 0.01


def test_a_norm_that_does_not_fit_is_refused():
    x, qdata, w_scale, bias, options = make_case(CASES[2])

    for norm in (make_norm(13, 2), make_norm(12, 1)):
        with pytest.raises(ValueError, match="must fit 13 channels"):
            run(x, qdata, w_scale, bias, options, norm=norm)


def test_any_layout_of_the_image_gives_the_same_bits():
    x, qdata, w_scale, bias, options = make_case(CASES[2])
    expected = run(x, qdata, w_scale, bias, options)
    wide = torch.zeros(2, 20, 11, 9)
    wide[:, 3:16, 1:10, 1:8] = x

    for laid_out in (
        x.contiguous(memory_format=torch.channels_last),
        wide[:, 3:16, 1:10, 1:8],
        wide.contiguous(memory_format=torch.channels_last)[:, 3:16, 1:10, 1:8],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.repeat(1, 2, 1, 1)[:, :13],
    ):
        assert torch.equal(run(laid_out, qdata, w_scale, bias, options), expected)


def test_padding_of_one_side_is_padded_before():
    x, qdata, w_scale, bias, _ = make_case(CASES[2])
    options = {"stride": 2, "padding": 0, "groups": 1}
    padded = F.pad(x, (0, 1, 0, 1))
    expected = int8_conv(padded, qdata, w_scale, bias, **options)

    assert measure_difference(run(padded, qdata, w_scale, bias, options), expected) < 1e-6


@pytest.mark.parametrize("instructions", FOUND)
def test_any_number_of_threads_gives_the_same_bits(instructions):
    before = torch.get_num_threads()
    arguments = make_case(CASES[3])
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(run(*arguments, norm=make_norm(40, 8), instructions=instructions))
    torch.set_num_threads(before)

    assert torch.equal(*results)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_is_no_number_stays_with_the_pixels_that_meet_it(value, silu):
    x, qdata, w_scale, bias, options = make_case(((1, 21, 5, 5), 8, (3, 3), 1, 1, 1))
    finite = run(x, qdata, w_scale, bias, options, silu=silu)
    x[0, 17, 1, 1] = value
    y = run(x, qdata, w_scale, bias, options, silu=silu)

    meets = torch.zeros(5, 5, dtype=torch.bool)
    meets[:3, :3] = True
    assert (y.isfinite() == ~meets).all()
    assert torch.equal(y[..., ~meets], finite[..., ~meets])


@pytest.mark.parametrize("batch", [0, 1])
def test_an_empty_batch_and_an_empty_image_give_what_padding_gives(batch):
    x = randn(batch, 4, 3, 0)
    y = run(x, full_range(5, 4, 1, 1), torch.ones(5), randn(5), {"stride": 1, "padding": 1, "groups": 1})

    assert torch.equal(y, randn(5).view(1, 5, 1, 1).expand(batch, 5, 5, 2))


def test_a_kernel_without_memory_raises(monkeypatch):
    x, qdata, w_scale, bias, options = make_case(CASES[2])
    working = vars(conv.load_conv_library().functions)
    names = ("int8run_group_norm", "int8run_quantize_pixels", "int8run_conv")

    def fail(*arguments):
        return OUT_OF_MEMORY

    for failing in names:
        library = SimpleNamespace(functions=SimpleNamespace(**{**working, failing: fail}))
        for module in (conv, pixels):
            monkeypatch.setattr(module, "load_conv_library", lambda name, library=library: library)
        with pytest.raises(MemoryError, match="the CPU kernels ran out of memory"):
            run(x, qdata, w_scale, bias, options, norm=GroupNorm(1, None, None, 1e-5))


def test_packed_weights_come_back():
    for shape, outputs, kernel, *_, groups in CASES:
        qdata = full_range(outputs, shape[1] // groups, *kernel)
        packed = conv.pack_conv_weight(qdata, groups)

        assert torch.equal(conv.unpack_conv_weight(packed, outputs, shape[1] // groups, kernel), qdata)


def test_float64_is_computed_as_float32():
    x, qdata, w_scale, bias, options = make_case(CASES[2])
    y = run(x.double(), qdata, w_scale, bias, options)

    assert y.dtype == torch.float64
    assert torch.equal(y, run(x, qdata, w_scale, bias, options).double())


def test_the_operator_keeps_its_promises_to_torch_compile():
    x, qdata, w_scale, bias, _ = make_case(CASES[3])
    arguments = (
        x,
        conv.pack_conv_weight(qdata),
        w_scale,
        bias,
        [3, 3],
        [2, 2],
        [1, 1],
        *(0, False),
        *(4, randn(40, seed=4), randn(40, seed=5), 1e-5),
        *(True, "auto"),
    )

    torch.library.opcheck(
        torch.ops.int8run.cpu_conv.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.slow
def test_it_compiles_as_a_whole():
    x, qdata, w_scale, bias, _ = make_case(CASES[2])
    packed = conv.pack_conv_weight(qdata)

    def compute(x):
        y = conv.int8_conv(2 * x, packed, w_scale, bias, kernel=(3, 3), padding=1)
        return y + 1

    compiled = torch.compile(compute, fullgraph=True)
    assert torch.equal(compiled(x), compute(x))
    # another size of the image
    assert torch.equal(compiled(x[..., :5]), compute(x[..., :5]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": (1, 1)}, "as from pack_conv_weight"),
        ({"kernel": (3, 3, 3)}, "one number or 2"),
        ({"padding": -1}, "padding 0 or more"),
        ({"stride": 20, "padding": 0, "x": (1, 13, 2, 9)}, "smaller than the kernel"),
        ({"x": (1, 17, 9, 7)}, "as from pack_conv_weight"),
        ({"x": (13, 9, 7)}, r"not \[13, 9, 7\]"),
        ({"rotation": 4}, "rotation must be 0 or a power of 4 that divides 13"),
        ({"bias": randn(3)}, "bias must have 70 numbers"),
        ({"w_scale": torch.ones(70).double()}, "w_scale must be contiguous float32"),
    ],
    ids=str,
)
def test_operands_that_do_not_fit_are_refused(changes, message):
    _, qdata, w_scale, bias, _ = make_case(CASES[2])
    given = {"w_scale": w_scale, "bias": bias, "kernel": (3, 3), "padding": 1, **changes}
    x = randn(*given.pop("x", (2, 13, 9, 7)))

    with pytest.raises(ValueError, match=message):
        conv.int8_conv(x, conv.pack_conv_weight(qdata), given.pop("w_scale"), given.pop("bias"), **given)
