"""Cases for test_triton_int8_attention.py, which runs this file in a process of its own."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.helpers import randn
from support.triton_process import case_device
from torch import Tensor

from int8run.kernels.int8_attention.kernel import int8_attention
from int8run.kernels.int8_attention.reference import compute_scores, mask_scores
from int8run.kernels.int8_attention.reference import int8_attention as reference
from int8run.kernels.int8_attention.tile import TILES, AttentionTile

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DEVICE = case_device()
ON_GPU = DEVICE.type == "cuda"
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
FEW, SMALL = AttentionTile(16, 32, 1, 2), AttentionTile(32, 32, 2, 2)
# values and probabilities are rounded to 16 bit, the output to its dtype; float32 values become bfloat16
ROUNDING = {FULL: 6e-3, HALF: 2e-3, BRAIN: 8e-3}
# beside it the definition rounds values and probabilities to 8 bit
DEFINITION_ROUNDING = 2e-2


@dataclass(frozen=True)
class Heads:
    """Sizes of one call.

    Args:
        heads: of queries.
        kv_heads: of keys and values.
        queries: Lq.
        keys: Lk.
        width: channels of queries and keys.
        v_width: of values.
        batch: B.
        options: of the call.
    """

    heads: int = 2
    kv_heads: int = 2
    queries: int = 19
    keys: int = 45
    width: int = 64
    v_width: int = 64
    batch: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def make_inputs(sizes: Heads, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys with a common mean and some larger channels, values."""
    q = randn(sizes.batch, sizes.heads, sizes.queries, sizes.width)
    k = randn(sizes.batch, sizes.kv_heads, sizes.keys, sizes.width, seed=1)
    k = (k + randn(sizes.width, seed=2)) * randn(sizes.width, seed=3).exp()
    v = randn(sizes.batch, sizes.kv_heads, sizes.keys, sizes.v_width, seed=4) + 0.5
    return q.to(DEVICE, dtype), (k / k.std()).to(DEVICE, dtype), v.to(DEVICE, dtype)


def compute_exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    rotation: int = 0,
    center_keys: bool = False,
) -> Tensor:
    """Softmax of the definition's scores and its product with the values as they are, in float64."""
    scores = compute_scores(q, k, scale=scale, rotation=rotation, center_keys=center_keys)
    weights = mask_scores(scores, mask, is_causal=is_causal).double().softmax(dim=-1).nan_to_num(0.0)
    return weights @ v.double().repeat_interleave(q.shape[1] // k.shape[1], 1)


def assert_right(sizes: Heads, dtype: torch.dtype = FULL, tile: AttentionTile = SMALL) -> None:
    """Compare a call with the exact softmax, closely, and with the definition."""
    q, k, v = make_inputs(sizes, dtype)
    y = int8_attention(q, k, v, **sizes.options, tile=tile)

    assert y.dtype == dtype
    assert_close("y", y, compute_exact(q, k, v, **sizes.options), ROUNDING[dtype])
    assert_close("y", y, reference(q, k, v, **sizes.options), ROUNDING[dtype] + DEFINITION_ROUNDING)


@pytest.mark.parametrize("tile", [FEW, SMALL], ids=["few", "small"])
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
def test_attention_equals_the_definition_in_every_dtype(dtype: torch.dtype, tile: AttentionTile) -> None:
    assert_right(Heads(), dtype, tile)


@pytest.mark.parametrize(
    "sizes",
    [
        Heads(queries=1, keys=1),
        Heads(queries=1, keys=64),
        Heads(queries=70, keys=1),
        Heads(queries=32, keys=96, batch=2),
        Heads(heads=6, kv_heads=2, batch=2),
        Heads(heads=3, kv_heads=1, queries=40),
    ],
    ids=str,
)
def test_lengths_batches_and_shared_heads_equal_the_definition(sizes: Heads) -> None:
    assert_right(sizes)


@pytest.mark.parametrize(
    ("width", "v_width"), [(32, 32), (40, 40), (72, 72), (96, 64), (128, 128), (64, 80), (256, 256)]
)
def test_every_width_equals_the_definition(width: int, v_width: int) -> None:
    assert_right(Heads(heads=1, kv_heads=1, width=width, v_width=v_width), BRAIN)


@pytest.mark.parametrize(
    ("width", "rotation"), [(40, 4), (40, 8), (96, 32), (80, 16), (128, 64), (128, 128), (256, 256), (64, 2)]
)
@pytest.mark.parametrize("center_keys", [False, True])
def test_rotated_and_centered_keys_equal_the_definition(width: int, rotation: int, center_keys: bool) -> None:
    options = {"rotation": rotation, "center_keys": center_keys}
    assert_right(Heads(heads=1, kv_heads=1, width=width, options=options))


def test_centering_alone_equals_the_definition() -> None:
    assert_right(Heads(kv_heads=1, width=72, batch=2, options={"center_keys": True}), HALF)


@pytest.mark.parametrize("scale", [0.5, 0.0, -0.2])
def test_any_scale_equals_the_definition(scale: float) -> None:
    assert_right(Heads(options={"scale": scale}))


@pytest.mark.parametrize(("queries", "keys"), [(45, 45), (70, 33), (33, 70)])
def test_causal_attention_equals_the_definition(queries: int, keys: int) -> None:
    assert_right(Heads(queries=queries, keys=keys, options={"is_causal": True}))


def make_mask(*shape: int) -> Tensor:
    """A bool mask that leaves a third out."""
    return (randn(*shape, seed=7) > -0.4).to(DEVICE)


@pytest.mark.parametrize("shape", [(19, 45), (45,), (2, 1, 1, 45), (1, 2, 19, 45), (2, 1, 19, 1)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_masks_equal_the_definition(shape: tuple[int, ...], is_causal: bool) -> None:
    mask = make_mask(*shape)
    assert_right(Heads(batch=2, options={"mask": mask, "is_causal": is_causal}))
    added = torch.where(mask, randn(*shape, seed=8).to(DEVICE), float("-inf"))
    assert_right(Heads(batch=2, options={"mask": added, "is_causal": is_causal}))


def test_rows_masked_whole_are_zero() -> None:
    q, k, v = make_inputs(Heads(), FULL)
    mask = make_mask(19, 45)
    mask[3], mask[18] = False, False
    added = torch.zeros_like(mask, dtype=FULL).masked_fill(~mask, float("-inf"))
    for each in (mask, added):
        y = int8_attention(q, k, v, mask=each, tile=SMALL)
        assert not y[:, :, [3, 18]].any()
        assert_close("y", y, compute_exact(q, k, v, mask=each), ROUNDING[FULL])


def test_the_lowest_float_masks_like_a_float_and_not_like_infinity() -> None:
    q, k, v = make_inputs(Heads(), FULL)
    added = torch.zeros(19, 45, device=DEVICE)
    added[:, 20:] = torch.finfo(FULL).min
    added[5] = torch.finfo(FULL).min
    y = int8_attention(q, k, v, mask=added, tile=SMALL)

    assert_close("y", y, compute_exact(q, k, v, mask=added), ROUNDING[FULL])
    assert y[:, :, 5].any()


@pytest.mark.parametrize("dtype", [BRAIN, FULL], ids=str)
def test_strides_change_nothing(dtype: torch.dtype) -> None:
    q, k, v = make_inputs(Heads(queries=45), dtype)
    packed = (
        torch.stack([q, k, v]).permute(1, 3, 0, 2, 4).contiguous()
    )  # [B, L, 3, H, D], as one product makes it
    strided = [packed[:, :, i].transpose(1, 2) for i in range(3)]
    apart = [each.mT.contiguous().mT for each in (q, k, v)]
    expected = int8_attention(q, k, v, tile=SMALL)

    assert not strided[0].is_contiguous() and apart[0].stride(3) != 1
    assert torch.equal(int8_attention(*strided, tile=SMALL), expected)
    assert torch.equal(int8_attention(*apart, tile=SMALL), expected)


def test_the_heads_of_a_token_lie_side_by_side() -> None:
    q, k, v = make_inputs(Heads(), FULL)
    assert int8_attention(q, k, v, tile=SMALL).transpose(1, 2).is_contiguous()


def test_nan_reaches_the_rows_that_see_it() -> None:
    q, k, v = make_inputs(Heads(), FULL)
    q[0, 0, 4, 7] = float("nan")
    k[0, 1, 30, 0] = float("nan")
    mask = torch.ones(19, 45, dtype=torch.bool, device=DEVICE)
    mask[:6, 30] = False
    is_finite = int8_attention(q, k, v, mask=mask, tile=SMALL).isfinite()

    assert is_finite.all(-1).tolist() == is_finite.any(-1).tolist()
    assert is_finite[0, 0].all(-1).tolist() == [row != 4 for row in range(19)]
    assert is_finite[0, 1].all(-1).tolist() == [row < 6 for row in range(19)]


def test_no_batch_has_no_output() -> None:
    q, k, v = make_inputs(Heads(batch=0), BRAIN)
    assert int8_attention(q, k, v, tile=SMALL).shape == (0, 2, 19, 64)


# -- exact results -----------------------------------------------------------------------------------------


TILES_HERE = sorted(
    {tile for gpu in TILES.values() for tile in (*gpu.many, *gpu.row_mask, *gpu.few)}, key=str
)
LENGTHS = ((4099, 4099), (1, 77), (63, 1024)) if ON_GPU else ((37, 37), (1, 33), (20, 64))


@pytest.mark.parametrize("queries_keys", LENGTHS, ids=str)
@pytest.mark.parametrize("tile", TILES_HERE if ON_GPU else [SMALL], ids=str)
@pytest.mark.parametrize("width", [64, 128, 256] if ON_GPU else [64])
def test_each_row_finds_the_one_key_that_it_equals(
    width: int, tile: AttentionTile, queries_keys: tuple[int, int]
) -> None:
    queries, keys = queries_keys
    generator = torch.Generator().manual_seed(5)
    k = (2.0 * torch.randint(2, (2, 3, keys, width), generator=generator) - 1).to(DEVICE, BRAIN)
    v = torch.randint(-128, 128, (2, 3, keys, width), generator=generator).to(DEVICE, BRAIN)
    wanted = (torch.rand(2, 3, queries, generator=generator) * (torch.arange(queries) + 1)).long()
    wanted = wanted.clamp(max=keys - 1)[..., None].expand(-1, -1, -1, width).to(DEVICE)  # none after its row
    q = k.gather(2, wanted)
    for is_causal in (False, True):
        # scores of other keys are at least 2000 lower: their weights are 0 in float32
        y = int8_attention(q, k, v, scale=1000.0, is_causal=is_causal, tile=tile)
        assert torch.equal(y, v.gather(2, wanted))


@pytest.mark.parametrize("tile", TILES_HERE if ON_GPU else [SMALL], ids=str)
def test_equal_weights_give_the_exact_mean(tile: AttentionTile) -> None:
    q = torch.zeros(1, 2, 19, 64, device=DEVICE, dtype=BRAIN)
    k = randn(1, 2, 64, 64, dtype=BRAIN).to(DEVICE)
    v = torch.randint(-64, 65, (1, 2, 64, 64), generator=torch.Generator().manual_seed(5)).to(DEVICE, BRAIN)
    y = int8_attention(q, k, v, tile=tile)

    expected = v.float().mean(dim=2, keepdim=True).to(BRAIN)
    assert torch.equal(y, expected.expand_as(y))


# -- what is refused, and what a compiler sees -------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"k": torch.zeros(1, 2, 4, 16)}, "must share B, Hkv, Lk and D"),
        ({"q": torch.zeros(1, 2, 3, 32, dtype=torch.float64)}, "q must be bfloat16, float16 or float32"),
        ({"mask": torch.zeros(3, 4, dtype=torch.int32)}, "mask must be bool, bfloat16, float16 or float32"),
        ({"rotation": 64}, "rotation must be 0 or a power of 2"),
        ({"v": torch.zeros(1, 2, 4, 320)}, "a head has 320 channels; the kernel takes up to 256"),
    ],
)
def test_arguments_that_do_not_fit_raise(changed: dict[str, Any], message: str) -> None:
    tensors = {"q": torch.zeros(1, 2, 3, 32), "k": torch.zeros(1, 2, 4, 32), "v": torch.zeros(1, 2, 4, 32)}
    with pytest.raises(ValueError, match=message):
        int8_attention(**{**tensors, **changed}, tile=SMALL)


def test_operator_passes_opcheck_and_compiles() -> None:
    q, k, v = make_inputs(Heads(), HALF)
    op = torch.ops.int8run.triton_int8_attention.default
    rest = (make_mask(19, 45), False, None, 16, True, SMALL.as_list())
    torch.library.opcheck(op, (q, k, v, *rest), test_utils=("test_schema", "test_faketensor"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return int8_attention(q, k, v, rotation=16, tile=SMALL).transpose(1, 2).flatten(2)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)

    for queries in (5, 9):
        q, k, v = make_inputs(Heads(queries=queries), HALF)
        assert torch.equal(compiled(q, k, v), attend(q, k, v))
