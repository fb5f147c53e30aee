"""Which denoiser a file holds: every family by its files of both kinds, and nothing else."""

import pytest
from support.original_families import FAMILIES, tiny

from int8run.errors import ConfigError
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import ModelFamily, load_families
from int8run.models.fingerprint import Fingerprint
from int8run.models.state_dict_adapter import find_denoiser_keys, to_original

# families by the keys of FAMILIES where the words differ; None: no family, so a file must be unknown
FAMILY = {
    "qwen_image_21": "qwen_image",
    "sana_sprint": "sana",
    "wan_first_last": "wan",
    "wan_vace": None,
    "wan_animate": None,
    "hunyuan_video": None,
    "framepack": None,
}
# built alike: nothing in a file tells them from Wan
TWINS = {"skyreels": "wan", "chronoedit": "wan"}


def shapes_of(key: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tiny(FAMILIES[key]).state_dict().items()}


def authors_keys(key: str) -> list[str]:
    """What a file of the model's authors holds, with prefix."""
    family = FAMILIES[key]
    more = ["llm_adapter.blocks.0.mlp.0.weight"] if key == "anima" else []
    return [
        *to_original(shapes_of(key), family.cls),
        *(family.prefix + name for name in (*family.dropped, *more)),
    ]


def found(keys, shapes=None):
    """Names of the family and the class."""
    result = detect_denoiser(keys, load_families().values(), shapes)
    return result and (result[0].name, result[1])


@pytest.mark.parametrize("key", [key for key in FAMILIES if key not in TWINS])
def test_files_of_authors_and_of_diffusers(key):
    family = FAMILY.get(key, key)
    expected = family and (family, FAMILIES[key].cls)
    assert found(find_denoiser_keys(authors_keys(key))) == expected
    # Anima's denoiser is one of Cosmos; only its authors' files have the part that is its own
    assert found(shapes_of(key)) == (None if key == "anima" else expected)


@pytest.mark.parametrize("key", TWINS)
def test_twins_of_wan_are_indistinguishable(key):
    assert set(shapes_of(key)) <= set(shapes_of("wan"))
    assert found(shapes_of(key)) == found(authors_keys(key)) == ("wan", "WanTransformer3DModel")


def test_a_cosmos_that_is_not_anima_is_unknown():
    assert (
        found(
            name.removeprefix("net.") for name in to_original(shapes_of("anima"), "CosmosTransformer3DModel")
        )
        is None
    )


def test_every_family_has_a_file_here():
    assert {FAMILY.get(key, key) for key in FAMILIES if key not in TWINS} - {None} == set(load_families())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width, family", [(768, "sd15"), (1024, None)])
def test_stable_diffusion_2_is_told_from_1_by_its_widths(native, width, family):
    shapes = {
        name: (*s[:1], width) if name.endswith("attn2.to_k.weight") else s
        for name, s in shapes_of("sd15").items()
    }
    if native:
        parts = to_original(shapes, "UNet2DConditionModel")
        shapes = {name.removeprefix("model.diffusion_model."): shapes[parts[name][0].key] for name in parts}
    assert found(shapes, shapes) == (family and (family, "UNet2DConditionModel"))
    assert found(shapes) == ("sd15", "UNet2DConditionModel")


def one(name: str, *fingerprints: Fingerprint, **fields) -> ModelFamily:
    return ModelFamily(name, fingerprints=fingerprints, **fields)


def test_all_patterns_and_none_of_the_others():
    family = one("a", Fingerprint("A", ["x.*.weight", "y"], ["z?", "w"]))
    assert detect_denoiser(["x.1.weight", "y"], [family]) == (family, "A")
    assert detect_denoiser((key for key in ["y", "x.1.weight", "z", "ww"]), [family]) == (family, "A")
    for keys in (
        ["x.1.weight"],
        ["y"],
        ["x.1.weight", "y", "z1"],
        ["x.1.weight", "y", "w"],
        ["x.1.weights", "y"],
        ["X.1.weight", "y"],
    ):
        assert detect_denoiser(keys, [family]) is None


def test_several_fingerprints_of_one_denoiser():
    family = one("a", Fingerprint("A", ["x"]), Fingerprint("A", ["y"]), Fingerprint("B", ["z"]))
    assert detect_denoiser(["x", "y"], [family]) == (family, "A") and detect_denoiser(["z"], [family]) == (
        family,
        "B",
    )


@pytest.mark.parametrize(
    "families, message",
    [
        (
            (one("a", Fingerprint("A", ["x"])), one("b", Fingerprint("B", ["*"]))),
            r"those of a \(A\) or b \(B\); say .* model_type=a or model_type=b",
        ),
        (
            (one("a", Fingerprint("A", ["x"]), Fingerprint("B", ["x"])),),
            r"those of a \(A\) or a \(B\); say which it is with model_type=a$",
        ),
    ],
)
def test_two_that_match_are_named(families, message):
    with pytest.raises(ConfigError, match=message):
        detect_denoiser(["x"], families)


def test_widths_choose_between_two():
    wide = one("wide", Fingerprint("FluxTransformer2DModel", ["img_in.weight"]), inputs={"x_embedder": 8})
    slim = one("slim", Fingerprint("FluxTransformer2DModel", ["img_in.weight"]), inputs={"x_embedder": 4})
    shapes = {"img_in.weight": (2, 4), "img_in.bias": (8,)}
    assert detect_denoiser(shapes, [wide, slim], shapes) == (slim, "FluxTransformer2DModel")
    # a convolution is no Linear
    assert detect_denoiser(shapes, [wide, slim], {"img_in.weight": (2, 4, 1, 1)}) is None
    with pytest.raises(ConfigError, match=r"wide .* or slim"):
        detect_denoiser(shapes, [wide, slim])
