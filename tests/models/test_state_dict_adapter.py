"""Layouts: every family's files against diffusers' own converters, both ways, and what is refused."""

import re
from dataclasses import replace
from functools import cache
from math import prod

import pytest
import torch
from support.original_families import FAMILIES, Family, tiny
from support.parameter_ids import name_parameter
from torch import Tensor

from int8run.errors import ConfigError, FileError
from int8run.models import original_names, state_dict_adapter
from int8run.models.key_mapping import KeyMapping, KeyMappingSet
from int8run.models.original_names import to_original
from int8run.models.state_dict_adapter import find_denoiser_keys, find_prefix, find_targets, to_model
from int8run.models.tensor_part import TensorPart, join_shapes

FLUX = "FluxTransformer2DModel"
QKV = [f"transformer_blocks.0.attn.to_{x}.weight" for x in "qkv"]


@cache
def random_state_dict(key: str) -> dict[str, Tensor]:
    """A family's `state_dict()` with another number in every place.

    Very wide matrices have one column: converters move rows.
    """
    numbers, first = {}, 0
    for name, value in tiny(FAMILIES[key]).state_dict().items():
        shape = (len(value), 1) if value.dim() == 2 and value.shape[1] > 512 else tuple(value.shape)
        numbers[name] = torch.arange(first, first + prod(shape), dtype=torch.int32).reshape(shape)
        first += prod(shape)
    return numbers


def shapes_of(values: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in values.items()}


def make_original_file(family: Family, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a file for other programs holds, without what the model has no place for."""
    native = to_original(shapes_of(values), family.cls)
    return {
        key: torch.cat([part.extract(values[part.key]) for part in parts]) for key, parts in native.items()
    }


def assert_same_tensors(values: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return values.keys() == others.keys() and all(torch.equal(values[name], others[name]) for name in values)


@pytest.mark.parametrize("key", FAMILIES)
def test_diffusers_converter_reads_written_files(key):
    family, values = FAMILIES[key], random_state_dict(key)
    file = make_original_file(family, values)
    file |= {family.prefix + name: torch.zeros(2) for name in family.dropped}

    arguments = {"config": dict(tiny(family).config)} if key in ("sd15", "sdxl") else {}

    assert assert_same_tensors(values, family.convert(file, **arguments))


@pytest.mark.parametrize("key", FAMILIES)
def test_original_file_becomes_the_model(key):
    family, values = FAMILIES[key], random_state_dict(key)
    file = {
        name.removeprefix(family.prefix): value for name, value in make_original_file(family, values).items()
    }
    file |= {name: torch.zeros(2) for name in family.dropped}
    file["an.unknown.weight"] = torch.zeros(2)

    found = to_model(shapes_of(file), shapes_of(values), family.cls)

    assert found.unused == ("an.unknown.weight",)
    assert found.missing == ()
    assert tuple(found.dropped) == family.dropped

    made = {
        name: torch.cat([part.extract(file[part.key]) for part in parts])
        for name, parts in found.parts.items()
    }

    assert assert_same_tensors({name: made[name] for name in values}, values)
    assert made.keys() == values.keys()


@pytest.mark.parametrize("key", FAMILIES)
def test_diffusers_names_are_kept(key):
    family, shapes = FAMILIES[key], shapes_of(random_state_dict(key))
    found = to_model(shapes, shapes, family.cls)

    assert found.parts == {name: (TensorPart(name),) for name in shapes}
    assert (found.unused, found.missing, found.dropped) == ((), (), {})


@pytest.mark.parametrize("key", FAMILIES)
def test_targets_are_found_by_names_alone(key):
    family, shapes = FAMILIES[key], shapes_of(random_state_dict(key))
    native = {
        name.removeprefix(family.prefix): parts for name, parts in to_original(shapes, family.cls).items()
    }
    found = find_targets([*native, *family.dropped], family.cls)
    own = find_targets(shapes, family.cls)
    if key == "sana_sprint":  # by names alone no different from Sana
        found |= {
            name: tuple(t.replace("emb.timestep", "timestep") for t in parts) for name, parts in found.items()
        }
        own = {
            name: tuple(t.replace("emb.timestep", "timestep") for t in parts) for name, parts in own.items()
        }

    assert found == {
        name: tuple(part.key for part in parts) for name, parts in native.items()
    } | dict.fromkeys(family.dropped, ())
    assert own == {name: (name,) for name in shapes}


@pytest.mark.parametrize("key", FAMILIES)
def test_key_of_no_rule_stands_for_itself(key):
    # a loose converter passes a name that it does not know; so which are the same in both worlds is said
    family, shapes = FAMILIES[key], shapes_of(random_state_dict(key))
    native = to_original(shapes, family.cls)
    stayed = {name for name in shapes if family.prefix + name in native}
    modules = {name: name.rpartition(".") for name in shapes}
    of_modules = {
        n
        for n, (module, _, p) in modules.items()
        if p in ("weight", "bias") and re.fullmatch(family.unchanged, module)
    }
    of_modules -= {
        name for name in of_modules if "distilled_guidance_layer.norms" in name
    }  # there the parameter is called scale

    assert stayed == of_modules | {name for name in shapes if re.fullmatch(family.same, name)}
    assert all(name.startswith(family.prefix) for name in native)


@pytest.mark.parametrize(
    "key, name", [("sd15", "output_blocks.2.1.conv"), ("sdxl", "output_blocks.2.2.conv")]
)
def test_upsampler_comes_after_the_attention(key, name):
    native = to_original(shapes_of(random_state_dict(key)), "UNet2DConditionModel")
    found = [name for name, parts in native.items() if parts[0].key == "up_blocks.0.upsamplers.0.conv.weight"]

    assert found == [f"model.diffusion_model.{name}.weight"]


@pytest.mark.parametrize("key", [key for key, family in FAMILIES.items() if family.words])
def test_written_names_are_the_original_ones(key):
    native = to_original(shapes_of(random_state_dict(key)), FAMILIES[key].cls)
    words = {word for name in native for word in name.split(".") if not word.isdigit()}

    assert words == set(FAMILIES[key].words.split())


def test_text_conditioner_of_anima_is_dropped():
    key = "llm_adapter.blocks.0.cross_attn.q_proj.weight"
    found = to_model({key: (8, 8)}, {"proj_out.weight": (4, 8)}, "CosmosTransformer3DModel")

    assert list(found.dropped) == [key]
    assert "text conditioner" in found.dropped[key]
    assert found.unused == ()


@pytest.mark.parametrize("key", FAMILIES)
def test_written_keys_are_in_the_order_of_the_model(key):
    names = list(random_state_dict(key))
    firsts = [
        names.index(parts[0].key)
        for parts in to_original(shapes_of(random_state_dict(key)), FAMILIES[key].cls).values()
    ]

    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    "key, shape",
    [
        ("double_blocks.0.img_attn.qkv.weight", (9216, 3072)),
        ("double_blocks.0.img_attn.qkv.bias", (9216,)),
        ("single_blocks.0.linear1.weight", (21504, 3072)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (128,)),
    ],
    ids=str,
)
def test_joined_tensors_have_the_original_shapes(key, shape):
    shapes = {name: tuple(value.shape) for name, value in tiny(FAMILIES["flux"]).state_dict().items()}
    assert join_shapes(to_original(shapes, FLUX)[key], shapes) == shape


def test_reshaped_tensors_have_the_original_shapes():
    for key, native, shape in (
        ("krea2", "blocks.1.mod.lin", (96,)),
        ("wan_animate", "motion_encoder.enc.net_app.convs.3.conv2.2.bias", (1, 4, 1, 1)),
        ("sd3", "pos_embed", (1, 16, 8)),
    ):
        shapes = shapes_of(random_state_dict(key))
        assert join_shapes(to_original(shapes, FAMILIES[key].cls)[native], shapes) == shape


def test_extract_takes_the_rows_of_weights_biases_and_scales():
    weight = torch.arange(24.0).reshape(12, 2)
    part = TensorPart("a", slice(4, 8), swap_halves=True)

    order = torch.tensor([6, 7, 4, 5])

    assert torch.equal(part.extract(weight), weight[order])
    assert torch.equal(part.extract(weight[:, 0]), weight[order, 0])
    assert torch.equal(part.extract(weight[:, :1]), weight[order, :1])

    one = torch.tensor([[3.0]])

    assert all(part.extract(scale) is scale for scale in (one, one[0], one[0, 0]))
    assert TensorPart("a").extract(weight) is weight
    assert TensorPart("a", shape=(1, -1, 1, 1)).extract(weight[:, 0]).shape == (1, 12, 1, 1)
    assert TensorPart("a", shape=(1,)).extract(one).shape == (1,)
    assert torch.equal(TensorPart("a", slice(0, 2), shape=(4,)).extract(weight), torch.arange(4.0))


def test_norm_called_weight_is_read_as_well():
    shapes = {"transformer_blocks.0.attn.norm_q.weight": (8,)}
    found = to_model({"double_blocks.0.img_attn.norm.query_norm.weight": (8,)}, shapes, FLUX)

    assert found.parts == {
        "transformer_blocks.0.attn.norm_q.weight": (
            TensorPart("double_blocks.0.img_attn.norm.query_norm.weight"),
        )
    }


def test_fused_qkv_is_split_by_the_rows_of_the_model():
    rows = {"q": 24, "k": 8, "v": 8}
    shapes = {f"layers.0.attn.to_{x}.weight": (n, 24) for x, n in rows.items()}
    found = to_model({"layers.0.attention.qkv.weight": (40, 24)}, shapes, "Lumina2Transformer2DModel")
    cuts = {"q": slice(0, 24), "k": slice(24, 32), "v": slice(32, 40)}

    assert found.parts == {
        f"layers.0.attn.to_{x}.weight": (TensorPart("layers.0.attention.qkv.weight", cut),)
        for x, cut in cuts.items()
    }


def test_only_the_last_text_norm_of_sd3_is_swapped():
    shapes = {f"transformer_blocks.{i}.norm1_context.linear.weight": (4, 2) for i in (9, 10, 11)}
    native = to_original(shapes, "SD3Transformer2DModel")
    swapped = [f"joint_blocks.{i}.context_block.adaLN_modulation.1.weight" for i in (9, 10, 11)]

    assert {key: parts[0].swap_halves for key, parts in native.items()} == dict(
        zip(swapped, (False, False, True), strict=True)
    )

    found = to_model(dict.fromkeys(swapped, (4, 2)), shapes, "SD3Transformer2DModel")

    assert [parts[0].swap_halves for parts in found.parts.values()] == [False, False, True]


def test_lora_names_are_not_used_for_checkpoints():
    shapes = shapes_of(random_state_dict("flux"))

    assert not any("lora" in key for key in to_original(shapes, FLUX))
    assert to_model({"double_blocks.0.proj_lora1.weight": (3072, 1)}, shapes, FLUX).unused == (
        "double_blocks.0.proj_lora1.weight",
    )


def test_class_without_mappings_keeps_its_names():
    shapes = {"a.weight": (2, 3), "b": ()}

    assert to_original(shapes, "Unknown") == {name: (TensorPart(name),) for name in shapes}
    assert to_model(shapes, shapes, "Unknown").parts == {name: (TensorPart(name),) for name in shapes}
    assert find_targets(shapes, "Unknown") == {name: (name,) for name in shapes}


@pytest.mark.parametrize(
    "file, message",
    [
        (
            {"double_blocks.0.img_attn.qkv.weight": (12, 8)},
            r"double_blocks.0.img_attn.qkv.weight of the file has the shape \[12, 8\], but "
            r"transformer_blocks.0.attn.to_q.weight \[8, 8\] "
            r"\+ .*to_k.weight \[8, 8\] \+ .*to_v.weight \[8, 8\] of the FluxTransformer2DModel need "
            r"\[24, 8\]: "
            "the file is of another architecture, or of another size of it; take the configuration that "
            "belongs to the file",
        ),
        (
            {"double_blocks.0.img_attn.qkv.weight": (24, 16)},
            r"the shape \[24, 16\], but .* need \[24, 8\]: the file is of another arch",
        ),
        (
            {"img_in.weight": (8, 4)},
            r"img_in.weight of the file has the shape \[8, 4\], but x_embedder.weight \[8, 6\] .* need "
            r"\[8, 6\]",
        ),
        ({"img_in.weight": (8, 6, 1)}, r"img_in.weight of the file has the shape \[8, 6, 1\]"),
        (
            {"x_embedder.weight": (8, 4)},
            r"x_embedder.weight of the file has the shape \[8, 4\], but x_embedder.weight \[8, 6\]",
        ),
        (
            {"double_blocks.0.txt_attn.qkv.weight": (24, 8)},
            "txt_attn.qkv.weight of the file holds several parameters, but the FluxTransformer2DModel has "
            "transformer_blocks.0.attn.add_q_proj.weight, has no "
            "transformer_blocks.0.attn.add_k_proj.weight, has no .*add_v_proj.weight: "
            "the file is of another architecture",
        ),
        (
            {"img_in.weight": (8, 6), "x_embedder.weight": (8, 6)},
            "the file holds x_embedder.weight of the FluxTransformer2DModel twice: as img_in.weight and "
            "as x_embedder.weight; remove one",
        ),
        ({"single_blocks.0.linear1.weight": (24, 8)}, r"need rows that do not go together"),
    ],
    ids=name_parameter,
)
def test_file_that_does_not_fit_is_an_error(file, message):
    shapes = {
        **dict.fromkeys(QKV, (8, 8)),
        "x_embedder.weight": (8, 6),
        "transformer_blocks.0.attn.add_q_proj.weight": (8, 8),
    }
    shapes |= {f"single_transformer_blocks.0.attn.to_{x}.weight": (8, 8) for x in "qkv"}
    shapes["single_transformer_blocks.0.proj_mlp.weight"] = (32, 9)

    with pytest.raises(FileError, match=message):
        to_model(file, shapes, FLUX)


@pytest.mark.parametrize("shape", [(95,), (6, 16), (1, 96)])
def test_reshaped_tensor_of_another_shape_is_an_error(shape):
    model = {"transformer_blocks.0.scale_shift_table": (6, 16)}
    with pytest.raises(
        FileError,
        match=r"blocks.0.mod.lin of the file has the shape .* \[6, 16\] of the Krea2Tr.* need \[96\]",
    ):
        to_model({"blocks.0.mod.lin": shape}, model, "Krea2Transformer2DModel")


def test_shape_that_no_number_completes_is_none():
    parts = (TensorPart("a", shape=(2, -1)),)

    assert join_shapes(parts, {"a": (2, 3)}) == (2, 3)
    assert join_shapes(parts, {"a": (7,)}) is None


def use_mappings(monkeypatch, mappings):
    """Give every class these key mappings, in both directions."""
    for module in (state_dict_adapter, original_names):
        monkeypatch.setattr(module, "load_mappings", lambda name: mappings)


def test_later_mappings_keep_a_change_of_shape(monkeypatch):
    flat = KeyMapping("inner.x.flat", ("inner.x.table",), shape=(-1,), whole_key=True)
    use_mappings(
        monkeypatch,
        KeyMappingSet((KeyMapping("outer.**", ("inner.**",)),), parameters=(flat,)),
    )
    shapes = {"inner.x.table": (2, 3)}

    assert to_original(shapes, "Any") == {"outer.x.flat": (TensorPart("inner.x.table", shape=(-1,)),)}
    assert to_model({"outer.x.flat": (6,)}, shapes, "Any").parts == {
        "inner.x.table": (TensorPart("outer.x.flat", shape=(2, 3)),)
    }


def test_transposed_and_joined_parameters_round_trip(monkeypatch):
    turned = KeyMapping("projection", ("projection.weight",), whole_key=True, transposed=True)
    rows = KeyMapping("*.in_proj_weight", ("*.q.weight", "*.k.weight"), whole_key=True)
    use_mappings(monkeypatch, KeyMappingSet(parameters=(turned, rows)))
    shapes = {"projection.weight": (2, 3), "0.q.weight": (4, 5), "0.k.weight": (2, 5)}
    file = {
        "projection": (TensorPart("projection.weight", transposed=True),),
        "0.in_proj_weight": (TensorPart("0.q.weight"), TensorPart("0.k.weight")),
    }

    assert to_original(shapes, "Any") == file
    assert {key: join_shapes(parts, shapes) for key, parts in file.items()} == {
        "projection": (3, 2),
        "0.in_proj_weight": (6, 5),
    }

    found = to_model({"projection": (3, 2), "0.in_proj_weight": (6, 5)}, shapes, "Any")
    key = "0.in_proj_weight"

    assert found.parts == {
        "projection.weight": (TensorPart("projection", transposed=True),),
        "0.q.weight": (TensorPart(key, slice(0, 4)),),
        "0.k.weight": (TensorPart(key, slice(4, 6)),),
    }

    tensor = torch.arange(6).reshape(3, 2)

    assert torch.equal(TensorPart("projection", transposed=True).extract(tensor), tensor.T)
    assert find_targets(file, "Any") == {
        "projection": ("projection.weight",),
        key: ("0.q.weight", "0.k.weight"),
    }
    with pytest.raises(
        FileError,
        match=r"projection of the file has the shape \[2, 3\], but projection.weight \[2, 3\] of the Any "
        r"need \[3, 2\]",
    ):
        to_model({"projection": (2, 3)}, shapes, "Any")


def test_transposing_twice_changes_nothing(monkeypatch):
    rules = tuple(KeyMapping(a, (b,), whole_key=True, transposed=True) for a, b in (("a", "b"), ("b", "c")))
    use_mappings(monkeypatch, KeyMappingSet(parameters=rules))

    assert to_original({"c": (2, 3)}, "Any") == {"a": (TensorPart("c"),)}
    assert to_model({"a": (2, 3)}, {"c": (2, 3)}, "Any").parts == {"c": (TensorPart("a"),)}


def test_mappings_that_undo_each_other_terminate():
    name = "encoder.layers.0.self_attn.q_proj.weight"

    assert to_original({name: (2, 2)}, "CLIPTextModel")
    assert find_targets([name], "CLIPTextModel")


def test_norms_of_flux2_are_written_as_scale():
    native = to_original(shapes_of(random_state_dict("flux2")), "Flux2Transformer2DModel")
    assert {name.rpartition(".")[2] for name in native if "_norm." in name} == {"scale"}


def test_missing_parameters_are_listed():
    found = to_model({"img_in.weight": (8, 6)}, {"x_embedder.weight": (8, 6), "x_embedder.bias": (8,)}, FLUX)

    assert found.missing == ("x_embedder.bias",)
    assert found.unused == ()


def test_key_that_the_model_has_is_not_dropped():
    shapes = {"pos_embed": (1, 4)}
    assert to_model(shapes, shapes, "SanaTransformer2DModel").parts == {
        "pos_embed": (TensorPart("pos_embed"),)
    }


def test_two_parameters_with_one_original_name_are_an_error():
    shapes = {"blocks.0.norm3.weight": (4,), "blocks.0.norm2.weight": (4,)}
    for order in (shapes, dict(reversed(shapes.items()))):
        with pytest.raises(
            ConfigError,
            match=r"blocks.0.norm[23].weight and .* WanTr.* would both be called blocks.0.norm3.weight: "
            r"it is ",
        ):
            to_original(order, "WanTransformer3DModel")


@pytest.mark.parametrize("missing", range(3))
def test_missing_part_of_a_fused_tensor_is_an_error(missing):
    there = [name for name in QKV if name != QKV[missing]]
    message = (
        f"this FluxTransformer2DModel has {there[0]}, but no {QKV[missing]} to be one tensor with "
        f"it: it is built unlike"
    )

    with pytest.raises(ConfigError, match=message):
        to_original(dict.fromkeys(there, (8, 8)), FLUX)


@pytest.mark.parametrize(
    "layers, message",
    [
        (1, "has no down_blocks.0.resnets.1.conv1: it is built unlike the models .* for; save to a folder"),
        (3, "has down_blocks.0.resnets.2.conv1: "),
    ],
)
def test_unet_with_other_levels_has_no_original_names(layers, message):
    family = FAMILIES["sdxl"]
    model = tiny(replace(family, config={**family.config, "layers_per_block": layers}))

    with pytest.raises(ConfigError, match=f"this UNet2DConditionModel {message}"):
        to_original(shapes_of(model.state_dict()), "UNet2DConditionModel")


@pytest.mark.parametrize(
    "prefix, found",
    [(p, p) for p in ("model.diffusion_model.", "model.model.", "net.", "diffusion_model.", "model.", "")]
    + [("other.", "")],
)
def test_prefix_is_found(prefix, found):
    names = [f"blocks.{i}.weight" for i in range(6)]
    keys = [prefix + name for name in names]

    assert find_prefix(keys) == found
    assert find_denoiser_keys(keys) == dict(zip(names if found else keys, keys, strict=True))


def test_prefix_is_found_in_a_whole_checkpoint():
    ours = [f"model.diffusion_model.input_blocks.{i}.0.weight" for i in range(9)]
    others = [f"first_stage_model.encoder.{i}.weight" for i in range(20)] + [
        f"net.{i}.weight" for i in range(6)
    ]

    assert find_prefix([*others, *ours]) == "model.diffusion_model."
    assert list(find_denoiser_keys([*others, *ours]).values()) == ours
    assert find_prefix([*others, *ours[:5]]) == "net."
    assert find_prefix([*others[:-1], *ours[:5]]) == ""
    assert find_prefix([]) == ""
    assert find_prefix(["model.a", "model.b", "other"]) == ""
