"""`model_type.keep_blocks`: how it is given, and which layers stay float by it."""

from dataclasses import replace

import pytest

from int8run.errors import ConfigError
from int8run.models.block_rules import keep_boundary_blocks, list_main_blocks
from int8run.models.boundary_blocks import BoundaryBlocks, parse_boundary_blocks
from int8run.models.family import AutoFamily, ModelFamily, load_families

FLUX_LAYERS = [
    "x_embedder",
    *(f"transformer_blocks.{number}.attn.to_q" for number in range(3)),
    *(f"single_transformer_blocks.{number}.proj_mlp" for number in range(12)),
]


@pytest.mark.parametrize(
    ("value", "blocks"),
    [
        ("first:2,last:3", BoundaryBlocks(2, 3)),
        ("last:3, first:2", BoundaryBlocks(2, 3)),
        ("first:1", BoundaryBlocks(1, 0)),
        ({"last": 4}, BoundaryBlocks(0, 4)),
    ],
)
def test_both_ends_or_one_of_them_are_given(value: object, blocks: BoundaryBlocks) -> None:
    assert parse_boundary_blocks(value) == blocks
    assert parse_boundary_blocks(str(blocks)) == blocks


@pytest.mark.parametrize(
    "value",
    ["2", "", "first", "first:2,first:3", "middle:1", "first:-1", "first:0", {}, {"middle": 1}, 2, [2]],
)
def test_what_names_no_block_is_refused(value: object) -> None:
    with pytest.raises(
        ConfigError, match=r"^model_type\.keep_blocks is .*; it takes the numbers of blocks that "
    ):
        ModelFamily("mine", keep_blocks=value)  # type: ignore[arg-type]


def test_a_number_must_be_whole() -> None:
    with pytest.raises(
        ConfigError, match=r"^first of model_type\.keep_blocks is 1\.5; allowed is a whole number "
    ):
        AutoFamily(keep_blocks={"first": 1.5})  # type: ignore[dict-item]


def test_the_first_blocks_and_the_last_ones_stay_float_and_say_so() -> None:
    flux = replace(load_families()["flux"], keep_blocks="first:2,last:1")

    found = keep_boundary_blocks(flux, [], FLUX_LAYERS)

    reasons = {name: found.find_skip_reason(name) for name in FLUX_LAYERS}
    assert reasons["transformer_blocks.0.attn.to_q"] == "kept float: block 0 of the first 2"
    assert reasons["transformer_blocks.1.attn.to_q"] == "kept float: block 1 of the first 2"
    assert reasons["transformer_blocks.2.attn.to_q"] is None
    # in the order of numbers, not of names
    assert reasons["single_transformer_blocks.11.proj_mlp"] == "kept float: block 14 of the last 1"
    assert reasons["single_transformer_blocks.1.proj_mlp"] is None
    assert reasons["x_embedder"] == flux.find_skip_reason("x_embedder"), "a rule of the family comes first"


@pytest.mark.parametrize("count", [8, 15])
def test_fewer_blocks_than_asked_are_refused(count: int) -> None:
    flux = replace(load_families()["flux"], keep_blocks={"first": count, "last": 8})
    message = (
        rf"^model_type\.keep_blocks=first:{count},last:8 keeps {count + 8} blocks float, and the denoiser "
        r"has 15 \(transformer_blocks, single_transformer_blocks\); ask for fewer$"
    )
    with pytest.raises(ConfigError, match=message):
        keep_boundary_blocks(flux, [], FLUX_LAYERS)


def test_a_family_without_lists_has_the_repeated_blocks() -> None:
    family = ModelFamily("mine", keep_blocks="last:1")

    found = keep_boundary_blocks(
        family, ["a.0.", "a.1.", "b.0.", "b.1."], ["a.0.q", "a.1.q", "b.0.q", "b.1.q"]
    )

    assert found.find_skip_reason("b.1.q") == "kept float: block 3 of the last 1"
    with pytest.raises(ConfigError, match=r"the denoiser has 0 \(no list of blocks\); ask for fewer$"):
        keep_boundary_blocks(family, [], ["q"])


def test_refiners_of_the_text_are_no_blocks_of_the_image() -> None:
    z_image = load_families()["z_image"]
    layers = ["context_refiner.0.q", "layers.0.q", "layers.1.q", "noise_refiner.0.q"]

    assert list_main_blocks(z_image, [], layers) == ["noise_refiner.0", "layers.0", "layers.1"]


def test_auto_gives_the_setting_to_the_family_that_it_finds() -> None:
    found = AutoFamily(keep_blocks="first:1").resolve_family("FluxTransformer2DModel", [], {})

    assert (found.name, found.keep_blocks) == ("flux", "first:1")


@pytest.mark.parametrize("family", load_families().values(), ids=lambda family: family.name)
def test_main_blocks_are_some_of_the_blocks(family: ModelFamily) -> None:
    assert family.blocks and set(family.main_blocks) <= set(family.blocks)
