"""Names from files looked up in the modules of a model: cuts, swaps, fused modules, and what is not found."""

import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
)
from support.helpers import TinyModel, to_int8
from support.parameter_ids import name_parameter
from torch import nn

from int8run.errors import LoraError
from int8run.lora.module_names import NameTable, find_target, flatten_name, get_target_shape, get_weight_shape
from int8run.lora.row_slices import ModuleTarget, count_source_rows
from int8run.models.key_mapping import KeyMapping


def make_tiny_flux() -> FluxTransformer2DModel:
    """Width 8; on the CPU, as fusing copies weights."""
    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2),
    )


@pytest.fixture(scope="module")
def flux() -> NameTable:
    return NameTable.from_model(make_tiny_flux())


def make_tiny_wan() -> WanTransformer3DModel:
    """Two blocks; on the meta device."""
    with torch.device("meta"):
        return WanTransformer3DModel(
            in_channels=4, num_layers=2, attention_head_dim=12, num_attention_heads=1, ffn_dim=8
        )


def make_target(module: str, first: int, end: int) -> ModuleTarget:
    """Rows of the file for a whole module."""
    return ModuleTarget(module, slice(first, end))


Q, K, V = (f"transformer_blocks.1.attn.to_{x}" for x in "qkv")
ONE = "single_transformer_blocks.0"


@pytest.mark.parametrize(
    "name, places",
    [
        (Q, (ModuleTarget(Q),)),
        (
            "double_blocks.1.img_attn.qkv",
            (make_target(Q, 0, 8), make_target(K, 8, 16), make_target(V, 16, 24)),
        ),
        ("double_blocks.1.qkv_lora1", (make_target(Q, 0, 8), make_target(K, 8, 16), make_target(V, 16, 24))),
        (
            "transformer_blocks.1.attn.to_qkv",
            (make_target(Q, 0, 8), make_target(K, 8, 16), make_target(V, 16, 24)),
        ),
        (
            "single_blocks.0.linear1",
            (
                make_target(f"{ONE}.attn.to_q", 0, 8),
                make_target(f"{ONE}.attn.to_k", 8, 16),
                make_target(f"{ONE}.attn.to_v", 16, 24),
                make_target(f"{ONE}.proj_mlp", 24, 56),
            ),
        ),
        (
            "single_blocks.0.qkv_lora",
            (
                make_target(f"{ONE}.attn.to_q", 0, 8),
                make_target(f"{ONE}.attn.to_k", 8, 16),
                make_target(f"{ONE}.attn.to_v", 16, 24),
            ),
        ),
        ("single_blocks.0.proj_lora", (ModuleTarget(f"{ONE}.proj_out"),)),
        ("double_blocks.0.proj_lora2", (ModuleTarget("transformer_blocks.0.attn.to_add_out"),)),
        ("transformer_blocks.0.attn.to_out.0", (ModuleTarget("transformer_blocks.0.attn.to_out.0"),)),
        ("transformer_blocks.0.attn.to_out", (ModuleTarget("transformer_blocks.0.attn.to_out.0"),)),
        ("double_blocks.0.img_mlp.2", (ModuleTarget("transformer_blocks.0.ff.net.2"),)),
        ("double_blocks.0.txt_attn.norm.key_norm", (ModuleTarget("transformer_blocks.0.attn.norm_added_k"),)),
        ("final_layer.adaLN_modulation.1", (ModuleTarget("norm_out.linear", swap_halves=True),)),
        ("norm_out.linear", (ModuleTarget("norm_out.linear"),)),
        ("guidance_in.out_layer", (ModuleTarget("time_text_embed.guidance_embedder.linear_2"),)),
    ],
    ids=name_parameter,
)
def test_flux_names_have_their_targets(flux, name, places):
    assert flux.find_targets(name) == places
    assert flux.find_targets(flatten_name(name)) == places
    assert flux.find_all_targets([name, "nothing"]) == {name: places, "nothing": None}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "lora",
        "transformer_blocks",
        "transformer_blocks.0",
        "transformer_blocks.0.attn",
        "transformer_blocks.0.attn.to_o",
        "transformer_blocks.2.attn.to_q",
        "double_blocks.2.img_attn.qkv",
        "double_blocks.x.img_attn.qkv",
        "double_blocks.0",
        "double_blocks.0.img_attn",
        "single_blocks.0.linear3",
        "transformer_blocks.0.ff.net.0",
        "transformer_blocks.0.norm1.norm",
        "prefix.img_in",
        "img_in.weight",
        "double_blocks.*.img_attn.qkv",
        "TRANSFORMER_BLOCKS.0.attn.to_q",
    ],
)
def test_names_without_a_weight_have_no_target(flux, name):
    assert flux.find_targets(name) is None and flux.find_targets(flatten_name(name)) is None


@pytest.mark.parametrize(
    "name",
    [
        f"model.{Q}",
        f"model.model.module.{Q}",
        f"net.model.{Q}",
        f"denoiser.{Q}",
        f"student.transformer.{Q}",
        "transformer_blocks.1.module.attn.model.to_q",
        f"model_{flatten_name(Q)}",
        f"model_module_{flatten_name(Q)}",
    ],
)
def test_objects_around_the_model_are_taken_off(flux, name):
    assert flux.find_targets(name) == (ModuleTarget(Q),)


@pytest.mark.parametrize(
    "name", [f"controlnet.{Q}", f"ema.vae.{Q}", f"vae_{flatten_name(Q)}", "model", "net"]
)
def test_other_objects_are_not_taken_off(flux, name):
    assert flux.find_targets(name) is None


def test_module_that_is_called_like_a_wrapper_is_itself():
    inner = nn.ModuleDict({"x": nn.Linear(2, 2)})
    model = nn.ModuleDict(
        {"model": inner, "x": nn.Linear(2, 3), "net": nn.ModuleDict({"x": nn.Linear(4, 4)})}
    )
    table = NameTable.from_model(model)

    assert table.find_targets("model.x") == (ModuleTarget("model.x"),)
    assert table.find_targets("net.x") == (ModuleTarget("net.x"),)
    assert table.find_targets("x") == (ModuleTarget("x"),)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("blocks.1.modulation", "blocks.1.scale_shift_table"),
        ("blocks_1_modulation", "blocks.1.scale_shift_table"),
        ("blocks.1.scale_shift_table", "blocks.1.scale_shift_table"),
        ("head.modulation", "scale_shift_table"),
    ],
)
def test_parameters_without_a_module_of_their_own_have_names(name, parameter):
    model = make_tiny_wan()
    (target,) = NameTable.from_model(model).find_targets(name)
    module, attribute = find_target(model, target.module)

    assert target == ModuleTarget(parameter)
    assert getattr(module, attribute) is model.get_parameter(parameter)
    assert get_target_shape(model, target.module) == tuple(model.get_parameter(parameter).shape)


def test_module_is_changed_in_its_weight():
    model = make_tiny_flux()

    assert find_target(model, Q) == (model.get_submodule(Q), "weight")
    assert get_target_shape(model, Q) == (8, 8)


def test_source_rows_are_counted(flux):
    assert count_source_rows(flux.find_targets("single_blocks.0.linear1")) == 56
    assert count_source_rows(flux.find_targets("single_blocks.0.linear2")) is None


def test_unequal_parts_are_cut_by_the_models_own_rows():
    with torch.device("meta"):
        model = Lumina2Transformer2DModel(
            in_channels=4,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=3,
            num_kv_heads=1,
            cap_feat_dim=8,
            axes_dim_rope=(4, 2, 2),
        )
    to = "layers.0.attn.to_"

    assert NameTable.from_model(model).find_targets("layers.0.attention.qkv") == (
        make_target(f"{to}q", 0, 24),
        make_target(f"{to}k", 24, 32),
        make_target(f"{to}v", 32, 40),
    )


def test_only_the_last_text_norm_of_sd3_is_swapped():
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=4,
            in_channels=4,
            num_layers=12,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=6,
            out_channels=4,
            pos_embed_max_size=4,
        )
    table = NameTable.from_model(model)

    swapped = {name for name, meanings in table.targets_by_name.items() if meanings[0][0].swap_halves}

    assert swapped == {"joint_blocks.11.context_block.adaLN_modulation.1", "final_layer.adaLN_modulation.1"}
    assert table.find_targets("joint_blocks_9_context_block_adaLN_modulation_1") == (
        ModuleTarget("transformer_blocks.9.norm1_context.linear"),
    )


def test_fused_model_has_fused_and_split_names():
    model = make_tiny_flux()
    model.fuse_qkv_projections()
    table = NameTable.from_model(model)

    fused, added = "transformer_blocks.1.attn.to_qkv", "transformer_blocks.1.attn.to_added_qkv"

    assert hasattr(model.transformer_blocks[1].attn, "to_q")  # still there, but no longer used
    for name in ("double_blocks.1.img_attn.qkv", fused, "double_blocks_1_qkv_lora1"):
        assert table.find_targets(name) == (ModuleTarget(fused),)
    for i, x in enumerate("qkv"):
        assert table.find_targets(f"transformer_blocks.1.attn.to_{x}") == (
            ModuleTarget(fused, start=8 * i, total=24),
        )
        assert table.find_targets(f"transformer_blocks_1_attn_add_{x}_proj") == (
            ModuleTarget(added, start=8 * i, total=24),
        )
    assert table.find_targets("single_blocks.0.linear1") == (
        make_target(f"{ONE}.attn.to_qkv", 0, 24),
        make_target(f"{ONE}.proj_mlp", 24, 56),
    )

    hit = {place.module for meanings in table.targets_by_name.values() for place in meanings[0]}

    assert not {
        n for n in hit if n.endswith(("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"))
    }
    assert hit == {n for n, m in model.named_modules() if get_weight_shape(m)} - {
        f"{n}.{x}"
        for n, m in model.named_modules()
        if hasattr(m, "to_qkv")
        for x in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    }


def test_fusing_and_unfusing_restores_the_names():
    model = make_tiny_flux()
    before = NameTable.from_model(model).targets_by_name
    model.fuse_qkv_projections()

    model.unfuse_qkv_projections()

    assert NameTable.from_model(model).targets_by_name == before


def test_cross_attention_of_a_fused_unet_keeps_its_own_q():
    model = UNet2DConditionModel(
        block_out_channels=(4, 8),
        norm_num_groups=4,
        cross_attention_dim=6,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    model.fuse_qkv_projections()

    table, attention = NameTable.from_model(model), "down_blocks.0.attentions.0.transformer_blocks.0.attn2"

    assert table.find_targets(f"{attention}.to_q") == (ModuleTarget(f"{attention}.to_q"),)
    assert table.find_targets(f"{attention}.to_v") == (ModuleTarget(f"{attention}.to_kv", start=4, total=8),)
    assert table.find_targets(f"{attention}.to_kv") == (ModuleTarget(f"{attention}.to_kv"),)


def test_added_keys_and_values_of_fused_wan_are_rows():
    model = WanTransformer3DModel(
        in_channels=4,
        out_channels=4,
        text_dim=8,
        freq_dim=8,
        ffn_dim=16,
        num_layers=1,
        attention_head_dim=12,
        num_attention_heads=1,
        image_dim=8,
        added_kv_proj_dim=12,
    )
    model.blocks[0].attn2.fuse_projections()

    table, attention = NameTable.from_model(model), "blocks.0.attn2"

    assert table.find_targets("blocks.0.cross_attn.k_img") == (
        ModuleTarget(f"{attention}.to_added_kv", start=0, total=24),
    )
    assert table.find_targets("blocks.0.cross_attn.v_img") == (
        ModuleTarget(f"{attention}.to_added_kv", start=12, total=24),
    )
    assert table.find_targets("blocks.0.cross_attn.v") == (
        ModuleTarget(f"{attention}.to_kv", start=12, total=24),
    )
    assert table.find_targets("blocks.0.cross_attn.q") == (ModuleTarget(f"{attention}.to_q"),)


def test_index_after_to_out_may_be_missing():
    with torch.device("meta"):
        model = Flux2Transformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            axes_dims_rope=(1, 1, 1, 1),
        )
    table = NameTable.from_model(model)

    assert (
        table.find_targets(f"{ONE}.attn.to_out.0")
        == table.find_targets("single_blocks_0_linear2")
        == (ModuleTarget(f"{ONE}.attn.to_out"),)
    )


def test_norms_of_wan_change_their_index():
    with torch.device("meta"):
        model = WanTransformer3DModel(
            in_channels=4, num_layers=1, attention_head_dim=12, num_attention_heads=1
        )
    table = NameTable.from_model(model)

    assert (
        table.find_targets("blocks.0.norm2")
        == table.find_targets("blocks.0.norm3")
        == (ModuleTarget("blocks.0.norm2"),)
    )
    # the other two have no weight on either side, so no file can mean them
    assert not get_weight_shape(model.blocks[0].norm3) and not get_weight_shape(model.blocks[0].norm1)


@pytest.mark.parametrize("change", ["no parts", "one part missing", "rows do not add up"])
def test_rows_of_a_part_are_never_guessed(change):
    attention = nn.Module()
    attention.to_qkv = nn.Linear(4, 12)
    if change != "no parts":
        attention.to_q, attention.to_k = nn.Linear(4, 4), nn.Linear(4, 4)
    if change == "rows do not add up":
        attention.to_v = nn.Linear(4, 5)
    model = nn.Module()
    model.attn = attention

    table = NameTable.from_model(model)

    assert table.find_targets("attn.to_qkv") == (ModuleTarget("attn.to_qkv"),)
    assert [table.find_targets(f"attn.to_{x}") for x in "qkv"] == [None, None, None]


def test_rows_of_a_fused_module_in_another_order_stay_apart():
    model = nn.Module()
    model.to_qkv, model.to_q, model.to_k, model.to_v = (
        nn.Linear(4, 9),
        nn.Linear(4, 2),
        nn.Linear(4, 3),
        nn.Linear(4, 4),
    )
    fused, odd = KeyMapping("to_qkv", ("to_q", "to_k", "to_v")), KeyMapping("odd", ("to_k", "to_v", "to_q"))

    table = NameTable(dict(model.named_modules()), (fused, odd))

    assert table.find_targets("odd") == (
        ModuleTarget("to_qkv", slice(0, 7), 2, 9),
        ModuleTarget("to_qkv", slice(7, 9), 0, 9),
    )


def test_fused_name_needs_all_parts():
    model = nn.Module()
    model.attn = nn.Module()

    model.attn.to_q, model.attn.to_k = nn.Linear(4, 4), nn.Linear(4, 4)

    assert NameTable.from_model(model).find_targets("attn.to_qkv") is None


def test_unknown_class_has_its_own_names_only():
    table = NameTable.from_model(TinyModel())

    assert (
        table.find_targets("blocks.1.3") == table.find_targets("blocks_1_3") == (ModuleTarget("blocks.1.3"),)
    )
    assert table.find_targets("img_in") is None
    assert set(table.targets_by_name) == {
        "proj_in",
        "proj_out",
        *(f"blocks.{i}.{j}" for i in range(2) for j in (0, 1, 3)),
    }


def test_int8_layers_are_found_and_cut_alike():
    model, _ = to_int8(TinyModel())
    rules = (KeyMapping("both.*", ("blocks.*.1", "blocks.*.3")),)

    modules = dict(model.named_modules())

    assert get_weight_shape(modules["blocks.0.1"]) == (96, 64) and get_weight_shape(modules["blocks.0"]) == ()
    assert get_weight_shape(modules["blocks.0.0"]) == (64,)
    assert NameTable(modules, rules).find_targets("both_0") == (
        make_target("blocks.0.1", 0, 96),
        make_target("blocks.0.3", 96, 160),
    )
    assert get_weight_shape(nn.Conv2d(3, 5, 2)) == (5, 3, 2, 2)


def test_mappings_of_blocks_and_modules_combine():
    model = nn.ModuleDict({"down": nn.ModuleDict({"conv": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})})
    rules = (
        KeyMapping("in.**", ("down.**",)),
        KeyMapping("in.0", ("in.conv",)),
        KeyMapping("all.**", ("in.**",)),
    )

    table = NameTable(dict(model.named_modules()), rules)

    assert [table.find_targets(n) for n in ("in.conv", "in.0", "all.0", "all.conv")] == 4 * [
        (ModuleTarget("down.conv"),)
    ]
    assert table.find_targets("all.norm") == (ModuleTarget("down.norm"),)


def test_two_swaps_cancel():
    rules = (KeyMapping("b", ("a",), True), KeyMapping("c", ("b",), True))
    table = NameTable({"a": nn.Linear(2, 2)}, rules)

    assert table.find_targets("b") == (ModuleTarget("a", swap_halves=True),) and table.find_targets("c") == (
        ModuleTarget("a"),
    )


def test_mapping_that_adds_a_level_ends():
    table = NameTable({"a": nn.Linear(2, 2)}, (KeyMapping("x.**", ("**",)), KeyMapping("**", ("x.**",))))

    assert set(table.targets_by_name) == {"a", "x.a"}


@pytest.mark.parametrize(
    "names, rules, asked",
    [
        (("a.b_c", "a_b.c"), (), "a_b_c"),
        (("a.b_c", "a_b.c"), (), "a.b.c"),
        (("a", "b"), (KeyMapping("n", ("a",)), KeyMapping("n", ("b",))), "n"),
        (("norm2", "norm3"), (KeyMapping("norm3", ("norm2",)),), "norm3"),
        (("a", "b"), (KeyMapping("n_m", ("a",)), KeyMapping("n.m", ("b",))), "n.m"),
    ],
    ids=name_parameter,
)
def test_ambiguous_name_alone_is_rejected(names, rules, asked):
    table = NameTable({"other": nn.Linear(2, 2), **{name: nn.Linear(2, 2) for name in names}}, rules)

    with pytest.raises(
        LoraError, match=rf"the name {asked} can mean {names[0]} or {names[1]} of this model; rename the key"
    ):
        table.find_targets(asked)
    assert table.find_targets("other") == (ModuleTarget("other"),)


def test_two_ways_to_one_meaning_are_accepted():
    table = NameTable(
        {"a": nn.Linear(2, 2)}, (KeyMapping("n", ("a",)), KeyMapping("m", ("a",)), KeyMapping("n", ("m",)))
    )

    assert table.find_targets("n") == (ModuleTarget("a"),)

    table = NameTable({"a": nn.Linear(2, 2)}, (KeyMapping("n.m", ("a",)), KeyMapping("n_m", ("a",))))

    assert table.find_targets("n.m") == (ModuleTarget("a"),)


def test_table_of_a_large_model_is_built_quickly():
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=19, num_single_layers=38, guidance_embeds=True)
    table = NameTable.from_model(model)

    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]

    assert len(linears) == 504 and all(table.find_targets(n) == (ModuleTarget(n),) for n in linears)
    assert (
        count_source_rows(table.find_targets("lora_unet_single_blocks_37_linear1".removeprefix("lora_unet_")))
        == 21504
    )
