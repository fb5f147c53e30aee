"""INT8 attention beside float attention: every mask, shape and dtype that occurs, and NaN stays visible."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_close
from support.helpers import randn

from int8run.kernels.int8_attention.reference import int8_attention

# 26 dB: outputs are means of Gaussian values, which nearly cancel; 35 dB and more where there is a signal
MAX_REL_ERR = 10 ** (-26 / 20)


def make_operands(heads=4, key_heads=4, queries=37, keys=53, width=64, value_width=None):
    """q [2, heads, queries, width], k and v [2, key_heads, keys, ...]."""
    return (
        randn(2, heads, queries, width, seed=1),
        randn(2, key_heads, keys, width, seed=2),
        randn(2, key_heads, keys, value_width or width, seed=3),
    )


def attend_in_float(q, k, v, **options):
    """torch's attention in float64; rows that attend to nothing are 0."""
    mask = options.pop("mask", None)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.double()
    output = F.scaled_dot_product_attention(
        q.double(), k.double(), v.double(), attn_mask=mask, enable_gqa=True, **options
    )
    return output.nan_to_num(0.0)


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 300), (70, 77), (5, 513)])
@pytest.mark.parametrize("width, value_width", [(64, 64), (128, 128), (1, 1), (7, 3), (40, 72)])
def test_any_length_and_width_is_close_to_float_attention(queries, keys, width, value_width):
    operands = make_operands(queries=queries, keys=keys, width=width, value_width=value_width)

    assert_close("attention", int8_attention(*operands), attend_in_float(*operands), MAX_REL_ERR)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_heads_that_share_keys_are_grouped_as_torch_groups_them(key_heads):
    operands = make_operands(key_heads=key_heads)

    assert_close("attention", int8_attention(*operands), attend_in_float(*operands), MAX_REL_ERR)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"scale": -0.1}], ids=str)
@pytest.mark.parametrize("queries, keys", [(37, 53), (53, 37)])
def test_options_mean_what_they_mean_in_torch(options, queries, keys):
    operands = make_operands(queries=queries, keys=keys)

    actual = int8_attention(*operands, **options)

    assert_close("attention", actual, attend_in_float(*operands, **options), MAX_REL_ERR)


def make_mask(shape):
    """A bool mask that hides a third of what it covers, all of the first row included where it has rows."""
    mask = randn(*shape, seed=4) > -0.4
    if shape[-2] > 1:
        mask[..., 0, :] = False
    return mask


@pytest.mark.parametrize("shape", [(37, 53), (2, 1, 1, 53), (1, 4, 37, 53), (2, 4, 37, 1)], ids=str)
def test_masks_of_every_kind_hide_the_same_keys(shape):
    operands, mask = make_operands(), make_mask(shape)

    hidden = int8_attention(*operands, mask=mask)
    added = int8_attention(*operands, mask=torch.zeros(shape).masked_fill(~mask, -torch.inf))

    assert_close("attention", hidden, attend_in_float(*operands, mask=mask), MAX_REL_ERR)
    assert_close("attention", added, hidden, 1e-6)


def test_a_float_mask_is_added_to_the_scores():
    operands, mask = make_operands(), 2 * randn(4, 37, 53, seed=4)

    actual = int8_attention(*operands, mask=mask)

    assert_close("attention", actual, attend_in_float(*operands, mask=mask), MAX_REL_ERR)


def test_rows_that_attend_to_nothing_are_zero():
    mask = torch.ones(37, 53, dtype=torch.bool)
    mask[3] = False

    output = int8_attention(*make_operands(), mask=mask)

    assert (output[:, :, 3] == 0).all()
    assert (output[:, :, 4] != 0).any()


@pytest.mark.parametrize("options", [{"rotation": 16}, {"rotation": 64}, {"center_keys": True}], ids=str)
def test_outliers_in_keys_cost_less_when_they_are_rotated_or_centered(options):
    q, k, v = make_operands()
    k[..., 5] += 30  # of every key: what a softmax does not see
    expected = attend_in_float(q, k, v)

    plain = int8_attention(q, k, v) - expected
    treated = int8_attention(q, k, v, **options) - expected

    assert treated.square().sum() < plain.square().sum() / 2


def test_a_nan_stays_visible_where_float_attention_shows_it_and_nowhere_else():
    q, k, v = make_operands(key_heads=2)
    q[0, 0, 3, 1] = torch.nan
    k[1, 1, 5, 2] = torch.nan
    v[0, 1, 7, 4] = torch.nan

    is_nan = int8_attention(q, k, v).isnan()

    expected = torch.zeros_like(is_nan)
    expected[0, 0, 3] = True
    expected[1, 2:] = True
    expected[0, 2:, :, 4] = True
    assert torch.equal(is_nan, expected)


def test_a_nan_in_a_key_that_is_hidden_is_hidden():
    q, k, v = make_operands()
    k[:, :, 50] = torch.nan
    mask = torch.ones(53, dtype=torch.bool)
    mask[50] = False

    output = int8_attention(q, k, v, mask=mask.expand(37, 53))

    assert output.isfinite().all()


def test_mixed_dtypes_batches_of_none_and_transposed_views_are_taken():
    q, k, v = make_operands()
    expected = int8_attention(q.bfloat16(), k.half(), v)

    transposed = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in (q.bfloat16(), k.half(), v)]

    assert torch.equal(int8_attention(*transposed), expected)
    assert expected.dtype == torch.bfloat16
    assert int8_attention(q[:0], k[:0], v[:0]).shape == (0, 4, 37, 64)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": (2, 3, 53, 64), "v": (2, 3, 53, 64)}, "4 heads of q cannot share 3 heads of k and v evenly"),
        ({"k": (2, 4, 53, 32)}, "must share B, Hkv, Lk and D"),
        ({"v": (2, 4, 52, 64)}, "must share B, Hkv, Lk and D"),
        ({"q": (4, 37, 64)}, "must have 4 dimensions, not 3, 4 and 4"),
        ({"k": (2, 4, 0, 64), "v": (2, 4, 0, 64)}, "at least one head, query, key and channel"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(change, message):
    shapes = {"q": (2, 4, 37, 64), "k": (2, 4, 53, 64), "v": (2, 4, 53, 64)} | change

    with pytest.raises(ValueError, match=message):
        int8_attention(*(torch.zeros(shape) for shape in shapes.values()))


@pytest.mark.parametrize("rotation", [3, 48, 128, -4])
def test_a_rotation_that_does_not_fit_is_refused(rotation):
    message = f"power of 2 that divides a head's 64 channels, not {rotation}"

    with pytest.raises(ValueError, match=message):
        int8_attention(*make_operands(), rotation=rotation)
