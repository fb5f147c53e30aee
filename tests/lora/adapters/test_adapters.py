"""Adapter types: each against a dense formula written out here, its branch beside a layer, and its rows.

Rows are taken, placed and swapped as a model needs that fuses or splits matrices.
"""

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from support.compare import assert_close
from support.helpers import randn
from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.lora.adapters.base import LoraDelta
from int8run.lora.adapters.change import LoraChange, is_same
from int8run.lora.adapters.diff import Diff, Replacement
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.ia3 import IA3
from int8run.lora.adapters.joined_columns import JoinedColumns, JoinedPart
from int8run.lora.adapters.loha import LoHa
from int8run.lora.adapters.lokr import LoKr
from int8run.lora.adapters.lora import LoRA
from int8run.lora.adapters.low_rank import LowRankPair

N, K, R = 12, 10, 2
A, B = randn(R, K, seed=1), randn(N, R, seed=2)
A2, B2 = randn(R, K, seed=3), randn(N, R, seed=4)
CONV_A, CONV_B, MID = randn(R, 5, 3, 3, seed=5), randn(N, R, 1, 1, seed=6), randn(R, R, 3, 3, seed=7)
MAGNITUDE = randn(N, seed=8).abs() + 1


@dataclass(frozen=True)
class Case:
    """A change, a weight's shape, and the change worked out another way."""

    weight_delta: LoraDelta
    shape: tuple[int, ...]
    expected: Callable[[Tensor], Tensor]
    rank: int | None = R
    has_branch: bool = True


def kron_by_blocks(w1: Tensor, w2: Tensor) -> Tensor:
    """Block (a, c) of the result is w1[a, c] * w2."""
    return torch.cat([torch.cat([x * w2 for x in row], dim=1) for row in w1])


def multiply_tucker(mid: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As LyCORIS: up [N, r], down [r, K], mid [r, r, kh, kw]."""
    return torch.einsum("mnhw,im,nj->ijhw", mid, up, down)


def apply_dora(weight: Tensor, change: Tensor, magnitude: Tensor, axis: int) -> Tensor:
    """`magnitude * (W + c) / ||W + c|| - W`, one norm for every index of `axis`."""
    changed = (weight + change).double()
    norm = changed.pow(2).sum([i for i in range(weight.dim()) if i != axis], keepdim=True).sqrt()
    return (magnitude.double().reshape(norm.shape) * changed / norm - weight).float()


W1, W2 = randn(3, 5, seed=9), randn(4, 2, seed=10)
W1_A, W1_B, W2_A, W2_B = (
    randn(3, 1, seed=11),
    randn(1, 5, seed=12),
    randn(4, 1, seed=13),
    randn(1, 2, seed=14),
)
T2, W2_DOWN, W2_UP = randn(R, R, 3, 3, seed=15), randn(R, 5, seed=16), randn(4, R, seed=17)
KERNEL = (N, 5, 3, 3)
HADA_T1, HADA_T2, DOWN5, DOWN5_2 = MID, randn(R, R, 3, 3, seed=18), randn(R, 5, seed=19), randn(R, 5, seed=20)

CASES = {
    "LoRA": Case(LoRA(A, B, 0.5), (N, K), lambda w: 0.5 * B @ A),
    "LoRA on a 1x1 convolution": Case(
        LoRA(A, B, 0.5), (N, K, 1, 1), lambda w: (0.5 * B @ A)[..., None, None]
    ),
    "LoCon 1x1 on a Linear": Case(
        LoRA(A[..., None, None], B[..., None, None], 3.0), (N, K), lambda w: 3 * B @ A
    ),
    "LoCon": Case(
        LoRA(CONV_A, CONV_B, 2.0),
        KERNEL,
        lambda w: 2 * torch.einsum("or,rihw->oihw", CONV_B[..., 0, 0], CONV_A),
    ),
    "LoCon written flat": Case(
        LoRA(CONV_A.flatten(1), CONV_B.flatten(1), 2.0),
        KERNEL,
        lambda w: 2 * torch.einsum("or,rihw->oihw", CONV_B[..., 0, 0], CONV_A),
    ),
    "LoCon with a core": Case(
        LoRA(DOWN5[..., None, None], CONV_B, 0.25, MID),
        KERNEL,
        lambda w: multiply_tucker(MID, CONV_B[..., 0, 0], DOWN5) / 4,
    ),
    "new value": Case(
        Replacement(randn(N, K, seed=40)),
        (N, K),
        lambda w: randn(N, K, seed=40) - w,
        rank=None,
        has_branch=False,
    ),
    "LoHa": Case(
        LoHa(LowRankPair(B, A), LowRankPair(B2, A2), 0.5), (N, K), lambda w: 0.5 * (B @ A) * (B2 @ A2)
    ),
    "LoHa too wide": Case(
        LoHa(
            LowRankPair(randn(N, 4), randn(4, K)), LowRankPair(randn(N, 4, seed=1), randn(4, K, seed=1)), 1.0
        ),
        (N, K),
        lambda w: (randn(N, 4) @ randn(4, K)) * (randn(N, 4, seed=1) @ randn(4, K, seed=1)),
        rank=4,
        has_branch=False,
    ),
    "LoHa with cores": Case(
        LoHa(LowRankPair(B, DOWN5, HADA_T1), LowRankPair(B2, DOWN5_2, HADA_T2), 0.5),
        KERNEL,
        lambda w: 0.5 * multiply_tucker(HADA_T1, B, DOWN5) * multiply_tucker(HADA_T2, B2, DOWN5_2),
    ),
    "LoKr, both full": Case(LoKr(W1, W2), (N, K), lambda w: kron_by_blocks(W1, W2), rank=None),
    "LoKr, both full and narrow": Case(
        LoKr(W1[:, :1], randn(4, K)), (N, K), lambda w: kron_by_blocks(W1[:, :1], randn(4, K)), rank=None
    ),
    "LoKr with a factor that is low-rank in name": Case(
        LoKr(W1[:, :1], LowRankPair(randn(4, 30), randn(30, K)), 0.1),
        (N, K),
        lambda w: 0.1 * kron_by_blocks(W1[:, :1], randn(4, 30) @ randn(30, K)),
        rank=30,
    ),
    "LoKr as wide as the weight": Case(
        LoKr(randn(N, K), torch.ones(1, 1)), (N, K), lambda w: randn(N, K), rank=None, has_branch=False
    ),
    "LoKr low-rank in name": Case(
        LoKr(W1[:1, :1], LowRankPair(randn(N, 30), randn(30, K))),
        (N, K),
        lambda w: W1[0, 0] * randn(N, 30) @ randn(30, K),
        rank=30,
        has_branch=False,
    ),
    "LoKr, second low-rank": Case(
        LoKr(W1, LowRankPair(W2_A, W2_B), 0.5),
        (N, K),
        lambda w: 0.5 * kron_by_blocks(W1, W2_A @ W2_B),
        rank=1,
    ),
    "LoKr, first low-rank": Case(
        LoKr(LowRankPair(W1_A, W1_B), W2, 4.0), (N, K), lambda w: 4 * kron_by_blocks(W1_A @ W1_B, W2), rank=1
    ),
    "LoKr, both low-rank": Case(
        LoKr(LowRankPair(W1_A, W1_B), LowRankPair(W2_A, W2_B), 3.0),
        (N, K),
        lambda w: 3 * kron_by_blocks(W1_A @ W1_B, W2_A @ W2_B),
        rank=1,
    ),
    "LoKr on a kernel, flat": Case(
        LoKr(randn(3, 1, seed=21), LowRankPair(randn(4, R, seed=22), randn(R, 45, seed=23)), 0.5),
        KERNEL,
        lambda w: (
            0.5
            * kron_by_blocks(randn(3, 1, seed=21), randn(4, R, seed=22) @ randn(R, 45, seed=23)).reshape(
                KERNEL
            )
        ),
    ),
    "LoKr on a kernel, full": Case(
        LoKr(randn(3, 5, seed=21), randn(4, 1, 3, 3, seed=22)),
        KERNEL,
        lambda w: torch.stack(
            [
                torch.stack(
                    [
                        kron_by_blocks(randn(3, 5, seed=21), randn(4, 1, 3, 3, seed=22)[:, :, i, j])
                        for j in range(3)
                    ],
                    -1,
                )
                for i in range(3)
            ],
            -2,
        ),
        rank=None,
        has_branch=False,
    ),
    "LoKr on a kernel with a core": Case(
        LoKr(randn(3, 1, seed=21), LowRankPair(W2_UP, W2_DOWN, T2), 0.5),
        KERNEL,
        lambda w: (
            0.5 * torch.cat([x * multiply_tucker(T2, W2_UP, W2_DOWN) for x in randn(3, 1, seed=21).flatten()])
        ),
        has_branch=False,
    ),
    "diff": Case(
        Diff(randn(N, K, seed=24)), (N, K), lambda w: randn(N, K, seed=24), rank=None, has_branch=False
    ),
    "norm": Case(
        Diff(randn(N, seed=24), "norm"), (N,), lambda w: randn(N, seed=24), rank=None, has_branch=False
    ),
    "IA3": Case(IA3(randn(N, seed=25)), (N, K), lambda w: torch.diag(randn(N, seed=25)) @ w, rank=None),
    "IA3 on inputs": Case(
        IA3(randn(K, seed=25), True),
        (N, K),
        lambda w: w @ torch.diag(randn(K, seed=25)),
        rank=None,
        has_branch=False,
    ),
    "IA3 on a kernel": Case(
        IA3(randn(5, seed=25), True),
        KERNEL,
        lambda w: torch.einsum("oihw,i->oihw", w, randn(5, seed=25)),
        rank=None,
        has_branch=False,
    ),
    "DoRA": Case(
        DoRA(LoRA(A, B, 0.5), MAGNITUDE), (N, K), lambda w: apply_dora(w, 0.5 * B @ A, MAGNITUDE, 0)
    ),
    "DoRA by columns": Case(
        DoRA(LoRA(A, B, 0.5), MAGNITUDE[:K], True),
        (N, K),
        lambda w: apply_dora(w, 0.5 * B @ A, MAGNITUDE[:K], 1),
        has_branch=False,
    ),
    "DoRA of a kernel": Case(
        DoRA(LoRA(CONV_A, CONV_B, 2.0), MAGNITUDE),
        KERNEL,
        lambda w: apply_dora(w, 2 * torch.einsum("or,rihw->oihw", CONV_B[..., 0, 0], CONV_A), MAGNITUDE, 0),
    ),
    "DoRA of a kernel by columns": Case(
        DoRA(LoRA(CONV_A, CONV_B, 2.0), MAGNITUDE[:5], True),
        KERNEL,
        lambda w: apply_dora(
            w, 2 * torch.einsum("or,rihw->oihw", CONV_B[..., 0, 0], CONV_A), MAGNITUDE[:5], 1
        ),
        has_branch=False,
    ),
    "DoRA of LoHa": Case(
        DoRA(LoHa(LowRankPair(B, A), LowRankPair(B2, A2), 0.5), MAGNITUDE),
        (N, K),
        lambda w: apply_dora(w, 0.5 * (B @ A) * (B2 @ A2), MAGNITUDE, 0),
    ),
    "DoRA of LoKr": Case(
        DoRA(LoKr(W1, LowRankPair(W2_A, W2_B), 0.5), MAGNITUDE),
        (N, K),
        lambda w: apply_dora(w, 0.5 * kron_by_blocks(W1, W2_A @ W2_B), MAGNITUDE, 0),
        rank=1,
    ),
}
# norms over all rows belong to the whole matrix
CUTTABLE = {
    name: case
    for name, case in CASES.items()
    if not (isinstance(case.weight_delta, DoRA) and case.weight_delta.on_input)
}


def parametrize_cases(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@pytest.fixture
def weight():
    return lambda case: randn(*case.shape, seed=99)


@parametrize_cases(CASES)
def test_delta_is_the_dense_formula(case, weight):
    w = weight(case)
    delta = case.weight_delta.compute_delta(w)

    assert delta.dtype == torch.float32
    assert_close("delta", delta, case.expected(w), 2e-6)
    assert case.weight_delta.shape_mismatch(case.shape) is None and case.weight_delta.rank == case.rank


@parametrize_cases(CASES)
def test_half_precision_is_computed_in_float32(case, weight):
    w = weight(case).bfloat16()

    assert case.weight_delta.compute_delta(w).dtype == torch.float32
    assert_close("delta", case.weight_delta.compute_delta(w), case.expected(w.float()), 1e-5)


@parametrize_cases(CASES)
def test_branch_is_the_same_change(case, weight):
    w = weight(case)

    assert case.weight_delta.has_branch == case.has_branch

    form = case.weight_delta.make_branch(w if case.weight_delta.needs_weight else None)

    assert (form is None) == (not case.weight_delta.has_branch)

    if form is not None:
        made = torch.zeros(w.flatten(1).shape)
        if form.lora_A is not None:
            assert form.lora_A.dtype == form.lora_B.dtype == torch.float32
            assert len(form.lora_A) < min(w.flatten(1).shape), "narrower than the weight, or it is no gain"
            made = made + form.lora_B @ form.lora_A
        if form.row_factor is not None:
            made = made + form.row_factor[:, None] * w.flatten(1)
        assert_close("dynamic", made, case.expected(w).flatten(1), 1e-5)


@parametrize_cases(CUTTABLE)
@pytest.mark.parametrize("rows", [slice(0, 4), slice(4, 12), slice(3, 8)], ids=str)
def test_taken_rows_are_those_of_the_whole_change(case, weight, rows):
    w = weight(case)
    part = LoraChange(case.weight_delta).take_rows(rows).weight_delta

    assert part.shape_mismatch((rows.stop - rows.start, *case.shape[1:])) is None
    assert (
        part.adapter_type == case.weight_delta.adapter_type
        and part.rank == case.rank
        and part.scale == case.weight_delta.scale
    )
    assert_close("rows", part.compute_delta(w[rows]), case.expected(w)[rows], 2e-6)


@parametrize_cases(
    {name: case for name, case in CUTTABLE.items() if case.weight_delta.out_features is not None}
)
@pytest.mark.parametrize("start", [0, 5, 9])
def test_placed_rows_are_zero_elsewhere(case, weight, start):
    tall = randn(N + 9, *case.shape[1:], seed=98)
    placed = LoraChange(case.weight_delta).place_rows(start, N + 9).weight_delta

    assert placed.shape_mismatch(tuple(tall.shape)) is None

    expected = torch.zeros(tall.shape)
    expected[start : start + N] = case.expected(tall[start : start + N])

    assert_close("placed", placed.compute_delta(tall), expected, 2e-6)

    form = placed.make_branch(tall if placed.needs_weight else None)

    assert (form is None) == (not placed.has_branch) == (not case.weight_delta.has_branch)

    if form is not None:
        made = torch.zeros(tall.flatten(1).shape) if form.lora_A is None else form.lora_B @ form.lora_A
        made = made if form.row_factor is None else made + form.row_factor[:, None] * tall.flatten(1)
        assert_close("placed beside", made, expected.flatten(1), 1e-5)


@parametrize_cases(CUTTABLE)
def test_swapped_halves_are_exchanged(case, weight):
    w = weight(case)

    def swap(t):
        return torch.cat([t[N // 2 :], t[: N // 2]])

    swapped = LoraChange(case.weight_delta).swap_halves().weight_delta

    assert_close("swapped", swapped.compute_delta(swap(w)), swap(case.expected(w)), 2e-6)


@parametrize_cases({name: CASES[name] for name in ("LoRA", "LoKr, second low-rank", "DoRA")})
def test_row_operations_combine(case, weight):
    tall = randn(20, *case.shape[1:], seed=98)
    part = (
        LoraChange(case.weight_delta)
        .take_rows(slice(2, 10))
        .swap_halves()
        .place_rows(1, 20)
        .take_rows(slice(0, 15))
        .weight_delta
    )
    expected = torch.zeros(15, *case.shape[1:])
    source = torch.tensor([6, 7, 8, 9, 2, 3, 4, 5])
    whole = torch.zeros(case.shape)
    whole[source] = tall[1:9]

    expected[1:9] = case.expected(whole)[source]

    assert_close("cut", part.compute_delta(tall[:15]), expected, 2e-6)


@pytest.mark.parametrize("split", [(3, 4, 5), (6, 6), (1, 11)], ids=str)
@pytest.mark.parametrize("placed_at", [None, 2])
def test_column_norms_run_over_all_parts_of_a_matrix(split, placed_at):
    """As OneTrainer trains q, k and v in one matrix, and computes the norms over it."""
    case = CASES["DoRA by columns"]
    dora, whole = case.weight_delta, randn(*case.shape, seed=99)
    bounds = [sum(split[:i]) for i in range(len(split) + 1)]
    slices = [slice(first, last) for first, last in itertools.pairwise(bounds)]
    weights, parts = {}, []
    for rows in slices:
        inner, name = LoraChange(dora.inner).take_rows(rows), str(rows.start)
        weights[name], reached = whole[rows], None
        if placed_at is not None:  # the model has them among other rows
            size = rows.stop - rows.start
            inner, reached = inner.place_rows(placed_at, 20), range(placed_at, placed_at + size)
            weights[name] = randn(20, K, seed=98)
            weights[name][reached.start : reached.stop] = whole[rows]
        parts.append(JoinedPart(name, inner.weight_delta, reached))
    joined = JoinedColumns(parts)
    joined.read(weights.__getitem__)
    cut = LoraChange(dataclasses.replace(dora, joined=joined))

    for rows, part in zip(slices, parts, strict=True):
        expected, change = case.expected(whole)[rows], cut.take_rows(rows)
        if placed_at is not None:
            change = change.place_rows(placed_at, 20)
            around = torch.zeros(20, K)
            around[part.rows.start : part.rows.stop] = expected
            expected = around
        assert_close("part", change.weight_delta.compute_delta(weights[part.module]), expected, 2e-6)


def test_column_norms_stay_where_all_rows_are_placed_or_swapped():
    case = CASES["DoRA by columns"]
    tall = randn(N + 9, K, seed=98)
    placed = LoraChange(case.weight_delta).place_rows(4, N + 9).weight_delta
    expected = torch.zeros(N + 9, K)
    expected[4 : 4 + N] = case.expected(tall[4 : 4 + N])
    swapped = LoraChange(case.weight_delta).swap_halves().weight_delta

    assert_close("placed", placed.compute_delta(tall), expected, 2e-6)
    assert_close(
        "swapped",
        swapped.compute_delta(tall[:N].roll(N // 2, 0)),
        case.expected(tall[:N]).roll(N // 2, 0),
        2e-6,
    )


def test_changes_are_compared_by_value():
    dora = CASES["DoRA"].weight_delta

    assert is_same(LoraChange(LoRA(A, B, 0.5)), LoraChange(LoRA(A.clone(), B.clone(), 0.5)))
    assert is_same(LoraChange(dora).place_rows(1, 20), LoraChange(dora).place_rows(1, 20))
    assert not is_same(LoraChange(dora).place_rows(1, 20), LoraChange(dora).place_rows(2, 20))
    assert not is_same(LoraChange(LoRA(A, B)), LoraChange(LoRA(A, B, 0.5)))
    assert not is_same(LoraChange(LoRA(A, B)), LoraChange(LoRA(A, B), torch.ones(N)))
    assert not is_same(LoraChange(LoRA(A, B)), LoraChange(LoRA(A, B2)))
    assert not is_same(LoraChange(LoRA(A, B)), LoraChange(Diff(B @ A)))


def test_bias_is_cut_as_well():
    change = LoraChange(LoRA(A, B), torch.arange(12.0))

    assert change.take_rows(slice(2, 5)).bias_delta.tolist() == [2, 3, 4]
    assert change.swap_halves().bias_delta.tolist() == [6, 7, 8, 9, 10, 11, 0, 1, 2, 3, 4, 5]
    assert change.place_rows(1, 14).bias_delta.tolist() == [0, *range(12), 0]

    alone = LoraChange(None, torch.arange(4.0))

    assert (
        alone.adapter_type == "bias"
        and alone.out_features == 4
        and alone.take_rows(slice(1, 3)).bias_delta.tolist() == [1, 2]
    )
    assert alone.place_rows(0, 6).weight_delta is None


def test_bias_tells_the_rows_of_an_input_factor():
    change = LoraChange(IA3(randn(K, seed=25), True), torch.ones(4)).place_rows(3, 9)
    tall = randn(9, K, seed=98)
    expected = torch.zeros(9, K)

    expected[3:7] = tall[3:7] * randn(K, seed=25)

    assert_close("placed", change.weight_delta.compute_delta(tall), expected, 2e-6)
    assert (
        change.shape_mismatch((9, K)) is None
        and change.shape_mismatch((8, K)) == f"changes 9 rows, the model's weight is 8x{K}"
    )


def test_cut_does_not_modify_the_change():
    before = B.clone()
    LoraChange(LoRA(A, B)).place_rows(3, 20)

    assert torch.equal(B, before)


class TestRefused:
    """What cannot be cut, with its words."""

    def test_column_norms_cannot_be_cut_alone(self):
        with pytest.raises(
            LoraError,
            match=r"its DoRA norms \(dora_scale \[1, in\]\) run over all rows .* use a file with row norms",
        ):
            LoraChange(CASES["DoRA by columns"].weight_delta).take_rows(slice(0, 4))

    def test_joined_column_norms_need_all_weights(self):
        joined = JoinedColumns([JoinedPart("a.q", LoRA(A, B)), JoinedPart("a.k", LoRA(A, B))])
        with pytest.raises(
            LoraError,
            match=r"the DoRA norms .* run over a\.q, a\.k together, and .* set lora\.mode=stochastic or auto",
        ):
            DoRA(LoRA(A, B), randn(K), True, joined).compute_delta(randn(N, K))

    def test_input_factors_cannot_be_placed(self):
        change = LoraChange(CASES["IA3 on inputs"].weight_delta)

        with pytest.raises(
            LoraError, match=r"is an IA3 on inputs, .*load the model without fused projections"
        ):
            change.place_rows(0, 24)
        assert change.swap_halves() is change and change.out_features is None

    @pytest.mark.parametrize("rows", [slice(8, 13), slice(-1, 3), slice(3, 3)], ids=str)
    def test_missing_rows_are_rejected(self, rows):
        with pytest.raises(
            LoraError, match=f"has 12 rows, the model's layers take rows {rows.start} to {rows.stop} of them"
        ):
            LoraChange(LoRA(A, B)).take_rows(rows)

    @pytest.mark.parametrize("start", [-1, 9])
    def test_matrix_that_is_too_small_is_rejected(self, start):
        with pytest.raises(
            LoraError,
            match=f"has 12 rows, which do not fit from row {start} on into the model's matrix of 20",
        ):
            LoraChange(LoRA(A, B)).place_rows(start, 20)

    def test_odd_number_of_rows_cannot_be_swapped(self):
        with pytest.raises(
            LoraError, match="has 3 rows, the model exchanges their halves: the number must be even"
        ):
            LoraChange(LoRA(A, B[:3])).swap_halves()


def spell_parameter(value: object) -> str:
    """Of a parameter: 12x10 for a shape, a name for a change, words as they are."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, LoraChange):
        return type(value.weight_delta).__name__
    return str(value)


@pytest.mark.parametrize(
    ("change", "shape", "words"),
    [
        (LoraChange(LoRA(A, B)), (12, 11), "changes a 12x10 weight, the model's is 12x11"),
        (LoraChange(LoRA(A, B)), (10, 12), "changes a 12x10 weight, the model's is 10x12"),
        (LoraChange(LoRA(A, B)), (120,), "changes a 12x10 weight, the model's is 120"),
        (LoraChange(LoRA(A[:, :1], B)), (12,), "changes a 12x1 weight, the model's is 12"),
        (LoraChange(LoRA(CONV_A, CONV_B)), (12, 5), "changes a 12x5x3x3 weight, the model's is 12x5"),
        (
            LoraChange(LoRA(CONV_A, CONV_B)),
            (12, 5, 1, 9),
            "changes a 12x5x3x3 weight, the model's is 12x5x1x9",
        ),
        (LoraChange(LoRA(CONV_A, CONV_B)), (12, 45), "changes a 12x5x3x3 weight, the model's is 12x45"),
        (LoraChange(CASES["LoHa"].weight_delta), (12, 11), "changes a 12x10 weight, the model's is 12x11"),
        (
            LoraChange(CASES["LoKr, both full"].weight_delta),
            (10, 12),
            "changes a 12x10 weight, the model's is 10x12",
        ),
        (LoraChange(CASES["diff"].weight_delta), (10, 12), "changes a 12x10 weight, the model's is 10x12"),
        (LoraChange(CASES["norm"].weight_delta), (10,), "changes a 12 weight, the model's is 10"),
        (LoraChange(CASES["norm"].weight_delta), (12, 1), "changes a 12 weight, the model's is 12x1"),
        (
            LoraChange(CASES["IA3"].weight_delta),
            (10, 12),
            "scales the 12 rows of a weight, the model's is 10x12",
        ),
        (
            LoraChange(CASES["IA3 on inputs"].weight_delta),
            (10, 12),
            "scales the 10 columns of a weight, the model's is 10x12",
        ),
        (
            LoraChange(CASES["IA3 on inputs"].weight_delta),
            (10,),
            "scales the 10 columns of a weight, the model's is 10",
        ),
        (LoraChange(CASES["DoRA"].weight_delta), (12, 11), "changes a 12x10 weight, the model's is 12x11"),
        (
            LoraChange(DoRA(LoRA(A, B), MAGNITUDE[:7], True)),
            (12, 10),
            "has DoRA norms for 7 columns, the model's weight is 12x10",
        ),
        (
            LoraChange(LoRA(A, B), torch.ones(11)),
            (12, 10),
            "changes a bias of 11, the model's weight is 12x10",
        ),
        (LoraChange(None, torch.ones(11)), (12, 10), "changes a bias of 11, the model's weight is 12x10"),
        (LoraChange(LoRA(A, B), torch.ones(12)), (12, 10), None),
        (
            LoraChange(LoKr(W1, W2)).take_rows(slice(0, 4)),
            (5, 10),
            "changes 4 rows, the model's weight is 5x10",
        ),
        (
            LoraChange(LoKr(W1, W2)).take_rows(slice(0, 4)),
            (4, 11),
            "changes a 12x10 weight, the model's is 12x11",
        ),
    ],
    ids=spell_parameter,
)
def test_shape_mismatch_has_both_shapes(change, shape, words):
    assert change.shape_mismatch(shape) == words


def test_float16_products_do_not_overflow():
    big_A, big_B = (
        torch.full((64, K), 200.0, dtype=torch.float16),
        torch.full((N, 64), 200.0, dtype=torch.float16),
    )
    w = torch.zeros(N, K, dtype=torch.float16)

    for core in (
        LoRA(big_A, big_B, 0.5),
        LoKr(W1.half(), LowRankPair(big_B[:4], big_A[:, :2]), 0.5),
        LoHa(LowRankPair(big_B, big_A), LowRankPair(big_B, big_A), 0.5),
    ):
        assert core.compute_delta(w).isfinite().all()

    form = LoRA(big_A, big_B * 256, 16.0).make_branch(None)

    assert form.lora_B.isfinite().all() and form.lora_B.dtype == torch.float32


def test_row_norms_are_exact_over_several_chunks(monkeypatch):
    monkeypatch.setattr("int8run.lora.adapters.dora.NORM_CHUNK_ROWS", 5)
    case = CASES["DoRA"]
    w = randn(*case.shape, seed=99).bfloat16()

    form = case.weight_delta.make_branch(w)

    assert_close(
        "blocks",
        form.lora_B @ form.lora_A + form.row_factor[:, None] * w.float(),
        case.expected(w.float()),
        1e-5,
    )


def test_row_of_zeros_stays_zero():
    # W + BA = 0 has no norm to divide by
    core = DoRA(LoRA(torch.zeros(1, K), torch.zeros(N, 1)), MAGNITUDE)

    assert core.compute_delta(torch.zeros(N, K)).abs().max() == 0


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv2d"])
def test_dora_matches_peft(conv):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.Conv2d(5, N, 3, padding=1) if conv else nn.Linear(K, N)
        model = peft.get_peft_model(
            nn.ModuleDict({"x": layer}),
            peft.LoraConfig(r=R, lora_alpha=3, target_modules=["x"], use_dora=True, init_lora_weights=False),
        )
    tuned = model.base_model.model["x"]
    with torch.no_grad():
        magnitude = tuned.lora_magnitude_vector["default"].weight
        magnitude.mul_(torch.linspace(0.5, 1.5, N).reshape([1, N, 1, 1] if conv else [N]))
    original = tuned.base_layer.weight.detach().clone()
    state = {k.split("x.")[-1]: v for k, v in peft.get_peft_model_state_dict(model).items()}
    core = DoRA(
        LoRA(state["lora_A.weight"], state["lora_B.weight"], 1.5), state["lora_magnitude_vector"].flatten()
    )
    x = randn(2, 5, 6, 6) if conv else randn(3, K)

    with torch.no_grad():
        expected = tuned(x)
        tuned.base_layer.weight.copy_(original + core.compute_delta(original))
        actual = tuned.base_layer(x)

    assert_close("DoRA", actual, expected, 1e-5)
