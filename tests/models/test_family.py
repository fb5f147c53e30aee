"""What is known about models: which Linears stay float, how a family is chosen, sampling and its ranges."""

import re

import pytest
import torch
from support.helpers import shipped
from torch import nn

from int8run.errors import ConfigError
from int8run.models.family import (
    AutoFamily,
    DeferredGelu,
    DeferredNorm,
    IgnoreRule,
    ModelFamily,
    ModelSource,
    build_conservative_family,
    load_families,
)
from int8run.models.fingerprint import Fingerprint
from int8run.models.loader import list_block_prefixes
from int8run.models.sampling import Sampling

FAMILIES = {name: family for name, family in shipped("model_type").items() if name != "auto"}
FLUX = FAMILIES["flux"]
AUTO = AutoFamily()

FLUX_FLOAT = {
    "x_embedder": "input embedder",
    "context_embedder": "text embedder",
    "time_text_embed.timestep_embedder.linear_1": "time and text embedder",
    "time_text_embed.guidance_embedder.linear_2": "time and text embedder",
    "time_text_embed.text_embedder.linear_1": "time and text embedder",
    "transformer_blocks.0.norm1.linear": "modulation output of a norm",
    "transformer_blocks.18.norm1_context.linear": "modulation output of a norm",
    "single_transformer_blocks.37.norm.linear": "modulation output of a norm",
    "norm_out.linear": "modulation output of a norm",
    "proj_out": "final projection",
}
FLUX_INT8 = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn.add_k_proj",
    "transformer_blocks.0.attn.to_add_out",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.0.attn.to_v",
]


@pytest.mark.parametrize(("layer", "why"), FLUX_FLOAT.items())
def test_flux_layers_outside_the_blocks_stay_float(layer, why):
    assert FLUX.find_skip_reason(layer) == why


@pytest.mark.parametrize("layer", FLUX_INT8)
def test_flux_layers_of_the_blocks_become_int8(layer):
    assert FLUX.find_skip_reason(layer) is None


def test_every_flux_rule_matches_a_layer_of_the_model():
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        denoiser = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    linears = [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear)]

    for rule in FLUX.ignore:
        assert any(ModelFamily("one", ignore=[rule]).find_skip_reason(name) for name in linears), rule.pattern

    first = {name.replace(".18.", ".0.").replace(".37.", ".0.") for name in (*FLUX_FLOAT, *FLUX_INT8)}

    assert first <= set(linears)
    assert {n for n in linears if FLUX.find_skip_reason(n) is None} <= {
        n for n in linears if "transformer_blocks." in n
    }


def test_first_matching_rule_gives_the_reason():
    family = ModelFamily("x", ignore=[IgnoreRule("a.*", "first"), IgnoreRule("*", "second")])
    assert (family.find_skip_reason("a.b"), family.find_skip_reason("b")) == ("first", "second")


def test_family_none_keeps_nothing_float(caplog):
    none = FAMILIES["none"].resolve_family("SomethingElse", [], {"x_embedder": 64})

    assert none.find_skip_reason("x_embedder") is None
    assert not caplog.records


def test_auto_chooses_the_family_by_class(caplog):
    assert AUTO.resolve_family("FluxTransformer2DModel", [], {}).name == "flux"
    assert not caplog.records


@pytest.mark.parametrize("denoiser", ["FluxTransformer2DModel", "Unknown"])
@pytest.mark.parametrize("mixed_precision", ["none", "auto"])
def test_auto_passes_mixed_precision_to_the_chosen_family(denoiser, mixed_precision):
    auto = AutoFamily(mixed_precision)
    found = auto.resolve_family(denoiser, ["a.0.", "a.1.", "a.2."], {"a.0.q": 8, "a.1.q": 8})

    assert found.mixed_precision == mixed_precision
    # the layers that are listed stay float besides
    assert found.find_skip_reason({"FluxTransformer2DModel": "x_embedder", "Unknown": "a.0.q"}[denoiser])


@pytest.mark.parametrize(
    "family",
    [lambda value: ModelFamily("x", mixed_precision=value), lambda value: AutoFamily(value)],
    ids=["ModelFamily", "AutoFamily"],
)
@pytest.mark.parametrize("value", ["automatic", [], [IgnoreRule("a", "b")], None, True], ids=str)
def test_mixed_precision_takes_none_or_auto(family, value):
    with pytest.raises(ConfigError, match=r"^model_type\.mixed_precision is .*choose from auto, none$"):
        family(value)


def test_auto_knows_every_shipped_family_as_its_file_defines_it():
    assert load_families() == {
        name: family for name, family in FAMILIES.items() if family.denoisers or family.fingerprints
    }


def test_items_of_lists_may_be_mappings():
    given = {"pattern": "a", "reason": "b"}

    assert ModelFamily("x", ignore=[given]) == ModelFamily("x", ignore=[IgnoreRule("a", "b")])

    printed = Fingerprint("C", ["a.weight"], ["b.*"])

    assert ModelFamily(
        "x", fingerprints=[{"denoiser": "C", "all": ["a.weight"], "none": ["b.*"]}]
    ).fingerprints == (printed,)


@pytest.mark.parametrize(
    ("table", "row", "message"),
    [
        (
            "ignore",
            {"patern": "a", "reason": "b"},
            "no setting called 'model_type.ignore.1.patern'; did you mean",
        ),
        ("ignore", "a", "model_type.ignore.1 is 'a'; it takes pattern, reason"),
        (
            "deferred_gelu",
            {"activation": "a"},
            "model_type.deferred_gelu.1 is {'activation': 'a'}; it needs activation, source, into",
        ),
        (
            "deferred_norms",
            {"norm": "a"},
            "model_type.deferred_norms.1 is {'norm': 'a'}; it needs norm, activation, into, where",
        ),
        (
            "fingerprints",
            {"all": ["a"]},
            "model_type.fingerprints.1 is {'all': ['a']}; it needs denoiser, all, none",
        ),
    ],
)
def test_malformed_item_is_an_error(table, row, message):
    good = {
        "ignore": IgnoreRule("a", "b"),
        "deferred_gelu": DeferredGelu("a", "b", "c"),
        "deferred_norms": DeferredNorm("a", "b", "c"),
        "fingerprints": Fingerprint("C", ["a"]),
    }
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        ModelFamily("x", **{table: [good[table], row]})


def test_named_family_is_used_for_another_class_with_a_warning(caplog):
    assert FLUX.resolve_family("UNet2DConditionModel", [], {}) is FLUX
    assert (
        "model_type=flux is for FluxTransformer2DModel, the denoiser is a UNet2DConditionModel" in caplog.text
    )


NARROW = ModelFamily(
    "narrow", denoisers=["Shared"], inputs={"*.to_k": 768}, ignore=[IgnoreRule("narrow", "")]
)
WIDE = ModelFamily(
    "wide", denoisers=["Shared"], inputs={"*.to_k": 2048, "add.in": 16}, ignore=[IgnoreRule("wide", "")]
)


@pytest.mark.parametrize(
    ("linears", "name"),
    [
        ({"a.to_k": 768, "a.to_q": 5}, "narrow"),
        ({"a.to_k": 2048, "b.to_k": 2048, "add.in": 16}, "wide"),
        ({"a.to_k": 2048, "b.to_k": 768, "add.in": 16}, "unknown"),  # all that match are this wide
        ({"a.to_k": 2048}, "unknown"),  # each pattern matches
        ({}, "unknown"),
    ],
)
def test_families_of_one_class_are_told_apart_by_input_widths(linears, name):
    assert (
        AutoFamily(families={"narrow": NARROW, "wide": WIDE}).resolve_family("Shared", [], linears).name
        == name
    )


def test_named_family_is_used_for_other_widths_with_a_warning(caplog):
    assert WIDE.resolve_family("Shared", [], {"a.to_k": 768, "b.to_k": 2048, "add.in": 16}) is WIDE
    assert (
        "model_type=wide does not fit this Shared: *.to_k takes 2048 inputs, the denoiser has 768/2048"
        in caplog.text
    )

    NARROW.resolve_family("Shared", [], {"a": 768})

    assert (
        "model_type=narrow does not fit this Shared: *.to_k takes 768 inputs, the denoiser has none"
        in caplog.text
    )

    caplog.clear()
    NARROW.resolve_family("Shared", [], {"a.to_k": 768})

    assert not caplog.records


class Unknown(nn.Module):
    """A denoiser that nobody described: twelve blocks, so that `blocks.1.` is a prefix of no other."""

    def __init__(self):
        super().__init__()

        def block():
            return nn.ModuleDict({"to_q": nn.Linear(2, 2)})

        self.embed = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(block() for _ in range(12))
        self.head = nn.ModuleList([nn.Linear(2, 2)])


def test_unknown_denoiser_gets_the_conservative_family_with_a_warning(caplog):
    model = Unknown()
    linears = {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    family = AUTO.resolve_family("Unknown", list_block_prefixes(model), linears)

    int8 = [name for name in linears if family.find_skip_reason(name) is None]

    assert int8 == [f"blocks.{i}.to_q" for i in range(1, 11)]
    assert {family.find_skip_reason(n) for n in linears.keys() - set(int8)} == {
        "unknown architecture: outside the middle blocks"
    }
    assert family.name == "unknown"
    assert "model_type=auto does not know Unknown;" in caplog.text
    assert "Name one with model_type= (" in caplog.text


def test_prefix_of_block_1_does_not_match_block_10():
    linears = [f"blocks.{i}.to_q" for i in range(12)]
    family = build_conservative_family(["blocks.0.", "blocks.1.", "blocks.2."], linears)

    assert [n for n in linears if family.find_skip_reason(n) is None] == ["blocks.1.to_q"]


def test_conservative_family_keeps_the_first_and_the_last_block_of_all_lists():
    blocks = [f"{kind}.{i}." for kind in ("double", "single") for i in range(3)]
    family = build_conservative_family(blocks, [f"{b}q" for b in blocks])

    assert family.find_skip_reason("double.0.q")
    assert family.find_skip_reason("single.2.q")
    assert family.find_skip_reason("double.1.q") is None
    assert family.find_skip_reason("single.1.q") is None


@pytest.mark.parametrize("count", [0, 1, 2])
def test_conservative_family_without_a_middle_block_keeps_everything(count):
    blocks = [f"blocks.{i}." for i in range(count)]
    linears = [*(f"{b}to_q" for b in blocks), "embed"]

    family = build_conservative_family(blocks, linears)

    assert all(family.find_skip_reason(n) for n in linears)


def test_with_defaults_fills_fields_that_are_none():
    model = Sampling(28, 3.5, 1024, 768, extra={"shift": 3.0, "max_sequence_length": 512})
    asked = Sampling(steps=4, guidance=0.0, batch=2, extra={"max_sequence_length": 64})

    assert asked.with_defaults(model) == Sampling(
        4, 0.0, 1024, 768, 2, {"shift": 3.0, "max_sequence_length": 64}
    )
    assert Sampling().with_defaults(model) == model


def test_input_images_are_fitted_where_the_model_or_the_user_says_so():
    model = Sampling(height=64, width=64, fit_inputs=True)

    assert Sampling().with_defaults(model).input_size == (64, 64)
    assert Sampling(fit_inputs=False).with_defaults(model).input_size is None
    assert Sampling(fit_inputs=True).input_size is None, "a size that is not known"
    with pytest.raises(ConfigError, match=r"sampler\.fit_inputs is 'yes'"):
        Sampling(fit_inputs="yes")


@pytest.mark.parametrize(
    ("setting", "value", "low", "high"),
    [
        ("steps", 0, 1, 1000),
        ("steps", 1001, 1, 1000),
        ("guidance", -0.1, 0, 100),
        ("guidance", float("nan"), 0, 100),
        ("height", 7, 8, 16384),
        ("width", 16385, 8, 16384),
        ("batch", 0, 1, 1024),
        ("steps", "4", 1, 1000),
        ("batch", True, 1, 1024),
    ],
)
def test_sampling_number_outside_its_range_is_an_error(setting, value, low, high):
    with pytest.raises(
        ConfigError,
        match=rf"sampler\.{setting} is {value!r}; allowed is a (whole )?number from {low} to {high}$",
    ):
        Sampling(**{setting: value})


@pytest.mark.parametrize(
    ("setting", "value"), [("steps", 2.5), ("height", 64.5), ("width", 64.5), ("batch", 1.5)]
)
def test_sampling_count_must_be_a_whole_number(setting, value):
    with pytest.raises(ConfigError, match=rf"sampler\.{setting} is {value}; .*whole number"):
        Sampling(**{setting: value})


def test_sampling_range_includes_its_ends():
    assert Sampling(1, 0, 8, 16384, 1024).steps == 1
    assert Sampling(1000, 100.0, 16384, 8, 1).guidance == 100.0


@pytest.mark.parametrize("location", [None, ""])
def test_model_without_a_location_is_an_error(location):
    with pytest.raises(
        ConfigError, match=r"model has no location; set model\.location=<hub id or diffusers folder>"
    ):
        ModelSource(location, "flux", Sampling())


def test_model_with_an_unknown_dtype_is_an_error():
    with pytest.raises(
        ConfigError,
        match=r"model\.dtype is 'bfloat'; did you mean 'bfloat16'\? choose from bfloat16, float16, float32",
    ):
        ModelSource("somewhere", "flux", Sampling(), dtype="bfloat")
