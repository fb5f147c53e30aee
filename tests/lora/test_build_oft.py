"""OFT and BOFT as LyCORIS, kohya and PEFT store them: against PEFT itself, and formulas written out."""

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from safetensors.torch import load_file, save_file
from support.compare import assert_close
from support.helpers import TinyModel, randn
from support.parameter_ids import name_parameter
from torch import Tensor, nn

from int8run.errors import LoraError
from int8run.lora.adapters.change import LoraChange
from int8run.lora.build_oft import cayley
from int8run.lora.load import read_lora
from int8run.lora.parse import build_change
from int8run.lora.stack import LoraStack

LAYER = "blocks.0.1"  # 96 x 64
N, K = 96, 64


SERIES = {"use_cayley_neumann": True, "peft_version": "0.21.2"}


def build(tensors: dict[str, Tensor], settings: dict[str, Any] | None = None) -> LoraChange:
    return build_change(tensors, lambda rank: 1.0, settings)


def apply(file: Path, model: nn.Module, strength: float = 1.0) -> nn.Module:
    LoraStack(model).add(file, strength)
    return model


# -- PEFT ----------------------------------------------------------------------------------------------------


def write_oft(folder: Path, settings: dict[str, Any], metadata: dict[str, str] | None = None) -> Path:
    path = folder / "adapter_model.safetensors"
    save_file({"base_model.model.x.oft_R.weight": 0.1 * randn(4, 6)}, path, metadata)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "OFT", **settings}))
    return path


def test_identity_depends_on_the_settings_that_make_the_rotation(tmp_path: Path) -> None:
    exact = {"use_cayley_neumann": False}
    settings = [exact, exact | {"coft": True}, exact | {"coft": True, "eps": 1e-3}, SERIES]
    identities = {read_lora(write_oft(tmp_path, each)).identity for each in settings}
    assert len(identities) == len(settings), "the cache keeps layers with a LoRA baked in by it"

    once, again = (read_lora(write_oft(tmp_path, exact | {"r": rank})).identity for rank in (4, 8))
    assert once == again, "settings that do not matter do not count"


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    header = {"peft_config": json.dumps({"peft_type": "OFT", **SERIES})}
    path = write_oft(tmp_path, {"use_cayley_neumann": False}, header)
    with pytest.raises(LoraError, match="x is an OFT with use_cayley_neumann False in one place and True in"):
        read_lora(path)


class Convolution(nn.Module):
    """A kernel beside a Linear."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.conv, self.fc = nn.Conv2d(4, 6, 3), nn.Linear(8, 12)


def save_peft(model: nn.Module, config: peft.PeftConfig, folder: Path, std: float = 0.1) -> nn.Module:
    """An adapter of PEFT's own, with random numbers, saved by PEFT; returns the model that PEFT merged."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(4)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            start = 1.0 if "boft_s" in name else 0.0
            parameter.data = start + std * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(folder))
    return adapted.merge_and_unload()


OFT_SETTINGS = {
    "blocks of 16": {"oft_block_size": 16},
    "4 blocks": {"r": 4, "oft_block_size": 0},
    "exact": {"oft_block_size": 8, "use_cayley_neumann": False},
    "constrained": {"oft_block_size": 8, "coft": True, "eps": 0.5},
    "shared": {"oft_block_size": 8, "block_share": True},
    **{
        f"{terms} terms": {"oft_block_size": 8, "num_cayley_neumann_terms": terms}
        for terms in (1, 2, 3, 4, 6, 8)
    },
}


@pytest.mark.parametrize("case", OFT_SETTINGS)
def test_oft_of_peft(case: str, tmp_path: Path) -> None:
    config = peft.OFTConfig(target_modules=[LAYER, "proj_out"], **OFT_SETTINGS[case])
    merged = save_peft(TinyModel(), config, tmp_path)
    ours = apply(tmp_path / "adapter_model.safetensors", TinyModel())

    for name in (LAYER, "proj_out"):
        before = TinyModel().get_submodule(name).weight
        expected = merged.get_submodule(name).weight - before
        if case != "1 terms":  # which is no rotation at all
            assert expected.norm() > 0.05 * before.norm()
        assert_close(name, ours.get_submodule(name).weight - before, expected, 1e-4)


def test_oft_of_peft_on_a_kernel(tmp_path: Path) -> None:
    config = peft.OFTConfig(target_modules=["conv", "fc"], oft_block_size=4)
    merged = save_peft(Convolution(), config, tmp_path)
    ours = apply(tmp_path / "adapter_model.safetensors", Convolution())

    assert_close("kernel", ours.conv.weight, merged.conv.weight, 1e-5)
    assert_close("matrix", ours.fc.weight, merged.fc.weight, 1e-5)
    assert not torch.equal(ours.conv.weight, Convolution().conv.weight)


class BlockDiagonal:
    """PEFT's CUDA function in PyTorch: [stages, D, b, b] -> [stages, D b, D b]."""

    @staticmethod
    def apply(blocks: Tensor) -> Tensor:
        return torch.stack([torch.block_diag(*stage) for stage in blocks])


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("blocks", [{"boft_block_size": 8}, {"boft_block_num": 4, "boft_block_size": 0}])
def test_boft_of_peft(
    blocks: dict[str, int], num_stages: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if num_stages > 1:
        monkeypatch.setattr(boft_layer, "get_fbd_cuda", lambda: True)
        monkeypatch.setattr(boft_layer, "FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(target_modules=[LAYER], boft_n_butterfly_factor=num_stages, **blocks)
    merged = save_peft(TinyModel(), config, tmp_path, std=0.3)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert saved[f"base_model.model.{LAYER}.boft_R"].shape[0] == num_stages

    ours = apply(tmp_path / "adapter_model.safetensors", TinyModel())

    assert_close("BOFT", ours.get_submodule(LAYER).weight, merged.get_submodule(LAYER).weight, 1e-5)


def test_oft_of_peft_needs_its_settings(tmp_path: Path) -> None:
    """Its series and its exact transform turn to opposite sides."""
    save_peft(TinyModel(), peft.OFTConfig(target_modules=[LAYER], oft_block_size=8), tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(LoraError, match=r"blocks\.0\.1 is an OFT of PEFT, and use_cayley_neumann, .* put"):
        read_lora(tmp_path / "adapter_model.safetensors")


# -- LyCORIS and kohya ---------------------------------------------------------------------------------------


def rotate(block: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 with Q = block - blockᵀ, in float64."""
    skew = (block - block.T).double()
    identity = torch.eye(len(skew), dtype=torch.float64)
    return (identity + skew) @ torch.linalg.inv(identity - skew)


def rotate_rows(weight: Tensor, blocks: Tensor, factor: float = 1.0) -> Tensor:
    """Row m of block k is the sum over n of R[k][n, m] times row n, with `blocks` times a factor."""
    size = blocks.shape[-1]
    rows = []
    for k, block in enumerate(blocks):
        rotation = rotate(block * factor)
        part = weight[k * size : (k + 1) * size].double()
        rows += [sum(rotation[n, m] * part[n] for n in range(size)) for m in range(size)]
    return torch.stack(rows).float()


def get_norm(blocks: Tensor) -> float:
    return math.sqrt(sum(float((block - block.T).square().sum()) for block in blocks))


BLOCKS = randn(12, 8, 8, seed=3) * 0.1


@pytest.mark.parametrize("bound", [0.0, 0.5, 1e9], ids=["unbounded", "bounded", "far bound"])
def test_oft_of_lycoris(bound: float, tmp_path: Path) -> None:
    model, rescale = TinyModel(), 1 + 0.1 * randn(N, 1, seed=5)
    tensors = {"oft_blocks": BLOCKS, "rescale": rescale, "alpha": torch.tensor(bound / N)}
    save_file({f"lycoris_blocks_0_1.{part}": t for part, t in tensors.items()}, tmp_path / "x.safetensors")
    factor = min(1.0, bound / get_norm(BLOCKS)) if bound else 1.0
    before = model.get_submodule(LAYER).weight.clone()
    expected = rescale * rotate_rows(before, BLOCKS, factor) - before

    apply(tmp_path / "x.safetensors", model, 0.5)

    assert_close("OFT", model.get_submodule(LAYER).weight - before, 0.5 * expected, 1e-5)


@pytest.mark.parametrize(
    "bound", [0.5, 1e9, 1e39], ids=["bounded", "far bound", "beyond float32 with its rows"]
)
def test_oft_of_kohya(bound: float, tmp_path: Path) -> None:
    model = TinyModel()
    tensors = {"oft_blocks": BLOCKS, "alpha": torch.tensor(bound / N)}
    save_file({f"oft_unet_blocks_0_1.{part}": t for part, t in tensors.items()}, tmp_path / "x.safetensors")
    before = model.get_submodule(LAYER).weight.clone()
    expected = rotate_rows(before, BLOCKS, min(1.0, bound / get_norm(BLOCKS)))

    apply(tmp_path / "x.safetensors", model)

    assert_close("OFT", model.get_submodule(LAYER).weight, expected, 1e-5)


def test_bound_of_0_means_no_bound_for_lycoris_and_no_change_for_kohya() -> None:
    weight, alpha = randn(N, K), torch.tensor(0.0)
    by_lycoris = build({"oft_blocks": BLOCKS, "alpha": alpha}).weight_delta.compute_delta(weight)
    by_kohya = build({"kohya_oft_blocks_0": BLOCKS, "alpha": alpha}).weight_delta.compute_delta(weight)
    assert_close("LyCORIS", by_lycoris, rotate_rows(weight, BLOCKS) - weight, 1e-5)
    assert by_kohya.norm() < 1e-4 * weight.norm()


def test_parts_of_a_matrix_are_bounded_apart() -> None:
    """kohya's OFT of FLUX has blocks of q, k, v each, with as many blocks and another bound."""
    parts = [randn(4, size, size, seed=size) * 0.2 for size in (4, 4, 8)]
    tensors = {f"kohya_oft_blocks_{i}": blocks for i, blocks in enumerate(parts)}
    delta = build(tensors | {"alpha": torch.tensor(0.01)}).weight_delta
    weight = randn(64, 10, seed=6)
    pieces = weight.split([16, 16, 32])
    expected = torch.cat(
        [
            rotate_rows(piece, blocks, min(1.0, 0.01 * len(piece) / get_norm(blocks)))
            for piece, blocks in zip(pieces, parts, strict=True)
        ]
    )
    assert delta.shape_mismatch((64, 10)) is None
    assert_close("all", delta.compute_delta(weight), expected - weight, 1e-4)

    second = delta.select_rows(torch.arange(16, 32))
    assert_close("k", second.compute_delta(pieces[1]), (expected - weight)[16:32], 1e-4)
    last_two = delta.select_rows(torch.arange(16, 64))
    assert_close("k and v", last_two.compute_delta(weight[16:]), (expected - weight)[16:], 1e-4)


def mix_butterfly(weight: Tensor, blocks: Tensor) -> Tensor:
    """LyCORIS's BOFT: in stage i, block d takes b/2 pairs of rows that lie 2^i b/2 apart."""
    size = blocks.shape[-1]
    x = weight.double()
    for i, stage in enumerate(blocks):
        distance = 2**i * size // 2
        pairs = []  # in the order of the blocks
        for start in range(0, len(x), 2 * distance):
            for offset in range(distance):
                pairs += [start + offset, start + distance + offset]
        mixed = torch.empty_like(x)
        for d, block in enumerate(stage):
            rows = pairs[d * size : (d + 1) * size]
            mixed[rows] = rotate(block) @ x[rows]
        x = mixed
    return x.float()


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_boft_of_lycoris(num_stages: int) -> None:
    blocks, weight = randn(num_stages, 8, 4, 4, seed=8) * 0.2, randn(32, 10, seed=9)
    rescale = 1 + 0.1 * randn(32, 1, seed=5)
    delta = build({"oft_blocks": blocks, "rescale": rescale}).weight_delta
    assert delta.adapter_type == "BOFT"
    expected = rescale * mix_butterfly(weight, blocks)
    assert_close("BOFT", delta.compute_delta(weight), expected - weight, 1e-5)
    kernel = weight.reshape(32, 2, 5, 1)
    assert_close("kernel", delta.compute_delta(kernel).flatten(1), expected - weight, 1e-5)


# -- rows of a fused matrix ----------------------------------------------------------------------------------


def test_matrix_that_the_model_splits_is_cut_between_blocks() -> None:
    weight, rescale = randn(N, K), 1 + 0.1 * randn(N, 1, seed=5)
    change = build({"oft_blocks": BLOCKS, "rescale": rescale})
    whole = change.weight_delta.compute_delta(weight)
    for rows in (slice(0, 32), slice(32, 64), slice(64, 96)):
        part = change.take_rows(rows).weight_delta
        assert part.shape_mismatch((32, K)) is None
        assert_close("rows", part.compute_delta(weight[rows]), whole[rows], 1e-5)


@pytest.mark.parametrize("blocks", [BLOCKS, randn(1, 12, 8, 8)], ids=["inside a block", "butterfly"])
def test_rows_that_are_mixed_with_others_are_not_cut(blocks: Tensor) -> None:
    change = build({"oft_blocks": blocks})
    with pytest.raises(LoraError, match=r"^is a B?OFT whose rotation mixes rows of a matrix that the mod"):
        change.take_rows(slice(0, 36 if blocks.dim() == 3 else 32))


@pytest.mark.parametrize("blocks", [BLOCKS, randn(2, 12, 8, 8) * 0.1], ids=["OFT", "BOFT"])
def test_rows_of_a_larger_matrix(blocks: Tensor) -> None:
    change, weight = build({"oft_blocks": blocks}), randn(N + 20, K)
    placed = change.place_rows(7, N + 20).weight_delta.compute_delta(weight)
    alone = change.weight_delta.compute_delta(weight[7 : 7 + N])
    assert_close("inside", placed[7 : 7 + N], alone, 1e-5)
    assert placed[:7].abs().max() == 0 and placed[7 + N :].abs().max() == 0

    swapped = change.swap_halves().weight_delta.compute_delta(weight[:N].roll(N // 2, 0))
    assert_close("halves", swapped, change.weight_delta.compute_delta(weight[:N]).roll(N // 2, 0), 1e-5)


def test_rotated_inputs_are_the_same_for_all_rows() -> None:
    weight, scale = randn(N, K), 1 + 0.1 * randn(N, 1, seed=5)
    change = build({"boft_R": randn(1, 8, 8, 8), "boft_s": scale})
    whole = change.weight_delta.compute_delta(weight)
    part = change.take_rows(slice(5, 40)).weight_delta
    assert_close("rows", part.compute_delta(weight[5:40]), whole[5:40], 1e-5)
    without_scale = build({"oft_R": randn(8, 28) * 0.1}, SERIES)
    assert without_scale.take_rows(slice(5, 40)).weight_delta.shape_mismatch((35, K)) is None


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"rescale": randn(8)}, {}, "has no oft_blocks; the file is incomplete"),
        ({"boft_s": randn(8)}, {}, "has no boft_R; the file is incomplete"),
        ({"boft_R": randn(1, 2, 4, 4)}, {}, "has no boft_s; the file is incomplete"),
        ({"oft_blocks": randn(8, 8)}, {}, r"has oft_blocks of \[8, 8\]; they are square blocks"),
        ({"oft_blocks": randn(2, 8, 4)}, {}, r"has oft_blocks of \[2, 8, 4\]; they are square blocks"),
        (
            {"oft_blocks": BLOCKS, "rescale": randn(5)},
            {},
            r"has 5 factors \(rescale\) for 96 rows; the file is broken",
        ),
        ({"oft_blocks": BLOCKS, "alpha": randn(2)}, {}, r"has an alpha of shape \[2\]; it is one number"),
        (
            {"oft_blocks": randn(3, 3, 4, 4)},
            {},
            "is a BOFT whose stage 2 does not fit 12 rows in blocks",
        ),
        (
            {"boft_R": randn(2, 3, 4, 4), "boft_s": randn(8)},
            {},
            "is a BOFT whose stage 2 does not fit 12 inputs in blocks of 4",
        ),
        (
            {"oft_R": torch.full((2, 28), 9e5)},
            SERIES | {"num_cayley_neumann_terms": 100},
            "has an oft_R whose powers are not finite numbers",
        ),
        ({"kohya_oft_blocks_0": BLOCKS}, {}, "is an OFT of kohya without its alpha, which bounds it"),
        ({"kohya_oft_blocks_1": BLOCKS, "alpha": randn(1)}, {}, r"has no oft_blocks\.0; the file is incompl"),
        (
            {"oft_blocks": BLOCKS, "oft_R": randn(2, 28)},
            {},
            "has parts of several programs' OFT: oft_R, o",
        ),
        ({"oft_R": randn(2, 27)}, SERIES, "has 27 numbers for each block of oft_R"),
        (
            {"oft_R": randn(28)},
            SERIES,
            r"has an oft_R of \[28\]; it is \[blocks, nu",
        ),
        (
            {"oft_R": randn(2, 28)},
            SERIES | {"num_cayley_neumann_terms": 10**9},
            "has num_cayley_neumann_terms 1000000000; allowed is 1 to 100",
        ),
        *(
            (
                {"oft_R": randn(2, 28)},
                {"use_cayley_neumann": True} | version,
                r"is an OFT by PEFT (0\.17\.1|not stated|abc), whose series \(use_cayley_neumann\) is an",
            )
            for version in ({}, {"peft_version": "0.17.1"}, {"peft_version": "abc"})
        ),
        (
            {"oft_R": randn(2, 28)},
            SERIES | {"num_cayley_neumann_terms": "five"},
            "has num_cayley_neumann_terms 'five' in its settings, which is not a number",
        ),
        (
            {"oft_blocks": BLOCKS, "down": randn(2, 8)},
            {},
            "has parts of several adapter types: down, oft_",
        ),
    ],
    ids=name_parameter,
)
def test_what_does_not_fit_is_refused(
    tensors: dict[str, Tensor], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(LoraError, match=f"^{message}"):
        build(tensors, settings)


@pytest.mark.parametrize(
    ("tensors", "shape", "message"),
    [
        ({"oft_blocks": BLOCKS}, (80, K), "rotates 96 rows, the model's weight is 80x64"),
        (
            {"boft_R": randn(1, 8, 8, 8), "boft_s": randn(N)},
            (N, 32),
            "rotates 64 inputs, the model's",
        ),
        (
            {"boft_R": randn(1, 8, 8, 8), "boft_s": randn(N)},
            (80, K),
            "rescales 96 rows, the model's",
        ),
        (
            {"kohya_oft_blocks_0": BLOCKS, "kohya_oft_blocks_1": BLOCKS},
            (N, K),
            "rotates 192 rows, the mod",
        ),
    ],
    ids=name_parameter,
)
def test_another_shape_is_refused(tensors: dict[str, Tensor], shape: tuple[int, ...], message: str) -> None:
    delta = build(tensors | {"alpha": torch.tensor(1.0)}).weight_delta
    assert delta.shape_mismatch(shape).startswith(message)


def test_untrained_rotation_has_no_effect(tmp_path: Path) -> None:
    tensors = {"oft_blocks": torch.zeros(12, 8, 8), "rescale": torch.ones(N, 1)}
    for changed, has_effect in ((1.0, False), (1.5, True)):
        tensors["rescale"][3] = changed
        path = tmp_path / f"{changed}.safetensors"
        save_file({f"lycoris_blocks_0_1.{part}": t for part, t in tensors.items()}, path)
        assert any("has no effect" in note for note in read_lora(path).notes) is not has_effect


def test_numbers_too_large_for_a_rotation_are_refused() -> None:
    """As the difference of two numbers near the largest of float32."""
    skew = torch.tensor([[0.0, math.inf], [-math.inf, 0.0]])

    with pytest.raises(LoraError, match="has numbers too large for a rotation in float32"):
        cayley(skew)
