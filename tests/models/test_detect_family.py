"""Which denoiser a file holds: every family by its files of both kinds, and nothing else."""

import pytest
from families.instance_sets import LONG_TAIL
from support.original_families import FAMILIES, tiny

from int8run.errors import ConfigError
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import ModelFamily, load_families
from int8run.models.fingerprint import Fingerprint
from int8run.models.original_names import to_original
from int8run.models.state_dict_adapter import find_denoiser_keys

# families by the keys of FAMILIES where the words differ; None: no family, so a file must be unknown
FAMILY = {
    "qwen_image_21": "qwen_image",
    "sana_sprint": "sana",
    "wan_first_last": "wan",
    "wan_vace": "wan",
    "wan_animate": "wan",
    "skyreels_df": "wan",
    "ltx25": "ltx2",
    "hunyuan_video": None,
    "framepack": None,
}
# built alike: nothing in a file tells them from Wan
TWINS = {"skyreels": "wan", "chronoedit": "wan"}


def shapes_of(key: str) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tiny(FAMILIES[key]).state_dict().items()}


def list_original_keys(key: str) -> list[str]:
    """What a file of the model's authors holds, with prefix."""
    family = FAMILIES[key]
    more = ["llm_adapter.blocks.0.mlp.0.weight"] if key == "anima" else []
    return [
        *to_original(shapes_of(key), family.cls),
        *(family.prefix + name for name in (*family.dropped, *more)),
    ]


def detect_names(keys, shapes=None):
    """Names of the family and the class."""
    result = detect_denoiser(keys, load_families().values(), shapes)
    return result and (result[0].name, result[1])


@pytest.mark.parametrize("key", [key for key in FAMILIES if key not in TWINS])
def test_denoiser_is_detected_by_original_and_by_diffusers_names(key):
    family = FAMILY.get(key, key)
    expected = family and (family, FAMILIES[key].cls)

    assert detect_names(find_denoiser_keys(list_original_keys(key))) == expected
    # Anima's denoiser is one of Cosmos; only its authors' files have the part that is its own
    assert detect_names(shapes_of(key)) == (None if key == "anima" else expected)


@pytest.mark.parametrize("key", TWINS)
def test_models_built_like_wan_are_detected_as_wan(key):
    assert set(shapes_of(key)) <= set(shapes_of("wan"))
    assert (
        detect_names(shapes_of(key))
        == detect_names(list_original_keys(key))
        == ("wan", "WanTransformer3DModel")
    )


def test_cosmos_that_is_not_anima_is_not_detected():
    assert (
        detect_names(
            name.removeprefix("net.") for name in to_original(shapes_of("anima"), "CosmosTransformer3DModel")
        )
        is None
    )


def test_every_family_is_covered_by_a_file():
    here = {FAMILY.get(key, key) for key in FAMILIES if key not in TWINS} - {None}
    # tests/families detects the files of all others by the names of diffusers
    elsewhere = {instance.family for instance in LONG_TAIL.values()}

    assert here | elsewhere == set(load_families())


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("width, family", [(768, "sd15"), (1024, None)])
def test_stable_diffusion_1_and_2_are_told_apart_by_input_widths(native, width, family):
    shapes = {
        name: (*s[:1], width) if name.endswith("attn2.to_k.weight") else s
        for name, s in shapes_of("sd15").items()
    }
    if native:
        parts = to_original(shapes, "UNet2DConditionModel")
        shapes = {name.removeprefix("model.diffusion_model."): shapes[parts[name][0].key] for name in parts}

    assert detect_names(shapes, shapes) == (family and (family, "UNet2DConditionModel"))
    assert detect_names(shapes) == ("sd15", "UNet2DConditionModel")


def make_family(name: str, *fingerprints: Fingerprint, **fields) -> ModelFamily:
    return ModelFamily(name, fingerprints=fingerprints, **fields)


def test_fingerprint_needs_all_its_patterns_and_none_of_the_forbidden():
    family = make_family("a", Fingerprint("A", ["x.*.weight", "y"], ["z?", "w"]))

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


def test_one_of_several_fingerprints_is_enough():
    family = make_family("a", Fingerprint("A", ["x"]), Fingerprint("A", ["y"]), Fingerprint("B", ["z"]))

    assert detect_denoiser(["x", "y"], [family]) == (family, "A")
    assert detect_denoiser(["z"], [family]) == (
        family,
        "B",
    )


@pytest.mark.parametrize(
    "families, message",
    [
        (
            (make_family("a", Fingerprint("A", ["x"])), make_family("b", Fingerprint("B", ["*"]))),
            r"those of a \(A\) or b \(B\); say .* model_type=a or model_type=b",
        ),
        (
            (make_family("a", Fingerprint("A", ["x"]), Fingerprint("B", ["x"])),),
            r"those of a \(A\) or a \(B\); say which it is with model_type=a$",
        ),
    ],
)
def test_ambiguous_names_are_an_error_that_lists_the_choices(families, message):
    with pytest.raises(ConfigError, match=message):
        detect_denoiser(["x"], families)


def test_input_widths_choose_between_families():
    wide = make_family(
        "wide", Fingerprint("FluxTransformer2DModel", ["img_in.weight"]), inputs={"x_embedder": 8}
    )
    slim = make_family(
        "slim", Fingerprint("FluxTransformer2DModel", ["img_in.weight"]), inputs={"x_embedder": 4}
    )
    shapes = {"img_in.weight": (2, 4), "img_in.bias": (8,)}

    assert detect_denoiser(shapes, [wide, slim], shapes) == (slim, "FluxTransformer2DModel")
    # a convolution is no Linear
    assert detect_denoiser(shapes, [wide, slim], {"img_in.weight": (2, 4, 1, 1)}) is None
    with pytest.raises(ConfigError, match=r"wide .* or slim"):
        detect_denoiser(shapes, [wide, slim])
