"""The naming rules: their files, and every family's names against diffusers' own checkpoint converter."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import diffusers
import pytest
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as lora_converters
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

from int8run.errors import ConfigError
from int8run.lora.names import NameTable, Place, flatten, rows_in_file
from int8run.models.native import FOLDER, NamingRule, captures, fill, read_folder, read_rules, rules_for

# the converters of these families have the width of the real model written into them: on the meta device it costs nothing
HIDDEN = {"attention_head_dim": 128, "num_attention_heads": 24}
FLUX = {**HIDDEN, "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": 8}
WAN = {
    "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16, "num_layers": 2, "attention_head_dim": 12,
    "num_attention_heads": 2, "image_dim": 8, "added_kv_proj_dim": 24,
}  # fmt: skip
HUNYUAN = {
    **HIDDEN, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2, "text_embed_dim": 8,
    "pooled_projection_dim": 6,
}  # fmt: skip
LTX = {
    "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "cross_attention_dim": 8,
    "caption_channels": 6,
}  # fmt: skip
UNET = {"norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
DOWN, UP, DOWN_ATTENTION, UP_ATTENTION = "DownBlock2D", "UpBlock2D", "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"


@dataclass(frozen=True)
class Family:
    """One architecture: the diffusers class with a small configuration, and how diffusers converts its authors' checkpoints."""

    cls: str
    config: dict
    convert: Callable[..., dict]
    prefix: str = ""
    besides: tuple[str, ...] = ()  # parameters that a converter demands and that belong to no module
    left_out: str = r"$^"  # modules that have no rules
    unchanged: str = r"$^"  # modules whose authors' names are those of diffusers


FAMILIES = {
    "flux": Family(
        "FluxTransformer2DModel", {**FLUX, "pooled_projection_dim": 6, "guidance_embeds": True},
        converters.convert_flux_transformer_checkpoint_to_diffusers,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel", {**FLUX, "approximator_layers": 2, "approximator_hidden_dim": 8, "approximator_num_channels": 8},
        converters.convert_chroma_transformer_checkpoint_to_diffusers, unchanged=r"distilled_guidance_layer\.(in_proj|out_proj|norms\.\d+)",
    ),
    "flux2": Family("Flux2Transformer2DModel", FLUX, converters.convert_flux2_transformer_checkpoint_to_diffusers),
    "sd3": Family(
        "SD3Transformer2DModel",
        {
            "sample_size": 4, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 4, "num_attention_heads": 2,
            "joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 6, "dual_attention_layers": (0,),
            "qk_norm": "rms_norm", "pos_embed_max_size": 4,
        },
        converters.convert_sd3_transformer_checkpoint_to_diffusers, besides=("pos_embed",), unchanged="context_embedder",
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8},
        dict, unchanged=".*",
    ),
    "qwen_image_21": Family(
        "QwenImage21Transformer2DModel",
        {"in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 4, "num_attention_heads": 2, "context_in_dim": 8},
        converters.convert_qwen_image21_transformer_checkpoint_to_diffusers, unchanged=r"(?!.*img_mlp\.(gate_layer|proj)$).*",
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4, "dim": 16, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 8,
            "axes_dims": [2, 2, 4],
        },
        converters.convert_z_image_transformer_checkpoint_to_diffusers,
        unchanged=r"(cap_embedder|t_embedder)\..*|.*\.(attention_norm|ffn_norm)\d|.*\.feed_forward\.w\d|(layers|noise_refiner)\.\d\.adaLN_modulation\.0",
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel",
        {"in_channels": 4, "hidden_size": 2304, "num_layers": 2, "num_attention_heads": 24, "num_kv_heads": 8, "cap_feat_dim": 8},
        converters.convert_lumina2_to_diffusers, unchanged=r"x_embedder|.*\.ffn_norm\d",
    ),
    "wan": Family("WanTransformer3DModel", WAN, converters.convert_wan_transformer_to_diffusers, unchanged="patch_embedding"),
    "wan_vace": Family(
        "WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 1], "vace_in_channels": 4},
        converters.convert_wan_transformer_to_diffusers, unchanged="(vace_)?patch_embedding",
    ),
    "wan_animate": Family(
        "WanAnimateTransformer3DModel",
        {
            **WAN, "in_channels": 12, "latent_channels": 4, "face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 1, "motion_encoder_size": 8, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        },
        converters.convert_wan_transformer_to_diffusers, left_out=r"motion_encoder\.(conv|res_blocks)",
        unchanged=r"(pose_)?patch_embedding|face_encoder\.out_proj",
    ),
    "skyreels": Family("SkyReelsV2Transformer3DModel", WAN, converters.convert_wan_transformer_to_diffusers, unchanged="patch_embedding"),
    "chronoedit": Family("ChronoEditTransformer3DModel", WAN, converters.convert_wan_transformer_to_diffusers, unchanged="patch_embedding"),
    "hunyuan_video": Family("HunyuanVideoTransformer3DModel", HUNYUAN, converters.convert_hunyuan_video_transformer_to_diffusers),
    "framepack": Family("HunyuanVideoFramepackTransformer3DModel", HUNYUAN, converters.convert_hunyuan_video_transformer_to_diffusers),
    "ltx": Family(
        "LTXVideoTransformer3DModel", LTX, converters.convert_ltx_transformer_checkpoint_to_diffusers,
        unchanged=r"caption_projection\..*|proj_out|transformer_blocks\.(?!.*norm).*",
    ),
    "ltx2": Family(
        "LTX2VideoTransformer3DModel",
        {
            **LTX, "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2, "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 8,
        },
        converters.convert_ltx2_transformer_to_diffusers,
        unchanged=r"(audio_)?(caption_projection\..*|proj_out)|transformer_blocks\.(?!.*norm).*",
    ),
    "sd15": Family(
        "UNet2DConditionModel",
        {
            **UNET, "block_out_channels": (4, 8, 8, 12), "down_block_types": (DOWN_ATTENTION, DOWN_ATTENTION, DOWN_ATTENTION, DOWN),
            "up_block_types": (UP, UP_ATTENTION, UP_ATTENTION, UP_ATTENTION),
        },
        converters.convert_ldm_unet_checkpoint, prefix="model.diffusion_model.",
    ),
    "sdxl": Family(
        "UNet2DConditionModel",
        {
            **UNET, "block_out_channels": (4, 8, 12), "down_block_types": (DOWN, DOWN_ATTENTION, DOWN_ATTENTION),
            "up_block_types": (UP_ATTENTION, UP_ATTENTION, UP), "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 24,
        },
        converters.convert_ldm_unet_checkpoint, prefix="model.diffusion_model.",
    ),
}  # fmt: skip


def tiny(family: Family) -> nn.Module:
    """The real class, on the meta device."""
    with torch.device("meta"):
        return getattr(diffusers, family.cls)(**family.config)


def weighted(model: nn.Module, left_out: str = r"$^") -> dict[str, nn.Module]:
    """The modules that have a weight of their own."""
    return {n: m for n, m in model.named_modules() if isinstance(getattr(m, "weight", None), Tensor) and not re.match(left_out, n)}


def row_numbers(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """For every parameter of these modules numbers for its rows, none of them twice. [rows] each."""
    numbers, first = {}, 0
    for name, module in modules.items():
        for parameter, value in module.named_parameters(recurse=False):
            numbers[f"{name}.{parameter}"] = torch.arange(first, first + len(value))
            first += len(value)
    return numbers


def authors_rules(family: Family) -> tuple[NamingRule, ...]:
    """The rules of a family without the names that XLabs gave to FLUX."""
    return tuple(rule for rule in read_folder(FOLDER)[family.cls] if "_lora" not in rule.native)


def authors_names(table: NameTable, rules: tuple[NamingRule, ...]) -> list[str]:
    """The names that no rule takes further: those of the model's authors."""
    targets = [(target, rule.native) for rule in rules for target in rule.targets]
    return [n for n in table.spellings if not any((v := captures(t, n)) and fill(native, v) in table.spellings for t, native in targets)]


def authors_checkpoint(table: NameTable, rules: tuple[NamingRule, ...], numbers: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the authors' file would hold if the table is right: the row numbers, put together by its places."""
    checkpoint = {}
    for name in authors_names(table, rules):
        for parameter in ("weight", "bias"):
            places = table.find(name)
            parts = [numbers.get(f"{place.module}.{parameter}") for place in places]
            if parts[0] is None:
                continue
            parts = [part.roll(len(part) // 2) if place.swap_halves else part for part, place in zip(parts, places, strict=True)]
            # norms of these authors call their weight scale
            spelled = "scale" if re.search(r"(query_norm|key_norm|distilled_guidance_layer\.norms\.\d+)$", name) else parameter
            checkpoint[f"{name}.{spelled}"] = torch.cat(parts)
    return checkpoint


@pytest.mark.parametrize("key", FAMILIES)
def test_names_are_those_of_diffusers_own_converter(key):
    family = FAMILIES[key]
    model = tiny(family)
    rules = authors_rules(family)
    modules = weighted(model, family.left_out)
    numbers = row_numbers(modules)
    table = NameTable(modules, rules)
    assert {n for n in authors_names(table, rules) if n in modules} == {n for n in modules if re.fullmatch(family.unchanged, n)}
    checkpoint = authors_checkpoint(table, rules, numbers)
    checkpoint |= dict.fromkeys(family.besides, torch.zeros(1))
    arguments = {"config": dict(model.config)} if family.prefix else {}
    converted = family.convert({family.prefix + name: value for name, value in checkpoint.items()}, **arguments)
    assert set(numbers) <= set(converted), f"the converter finds no {sorted(set(numbers) - set(converted))[:5]}"
    wrong = [name for name, rows in numbers.items() if not torch.equal(converted[name], rows)]
    assert not wrong, f"other rows in {wrong[:5]}"
    # nothing else came out, but for names that the converter passed through unread
    assert set(converted) - set(numbers) <= {"pos_embed.pos_embed"} | set(checkpoint)


@pytest.mark.parametrize("key", FAMILIES)
def test_every_dialect_covers_every_row_of_every_module_once(key):
    family = FAMILIES[key]
    model = tiny(family)
    rules = rules_for(family.cls)
    table = NameTable.of(model)
    modules = weighted(model)
    of_authors = authors_names(NameTable(modules, authors_rules(family)), authors_rules(family))
    for dialect in (list(modules), of_authors):
        for spelled in (str, flatten):
            covered = set()
            for name in dialect:
                places = table.find(spelled(name))
                assert places == table.find(name)
                first = 0
                for place in places:
                    rows = modules[place.module].weight.shape[0]
                    assert place.start is None and place.total is None
                    assert place.take == (None if len(places) == 1 else slice(first, first + rows))
                    first += rows
                    covered.add(place.module)
                assert rows_in_file(places) == (None if len(places) == 1 else first)
            assert covered == set(modules)
    assert len(rules) > 6 and all(len(meanings) == 1 for meanings in table.flat.values())


def test_names_of_xlabs_are_those_of_diffusers_own_converter():
    family = FAMILIES["flux"]
    model = tiny(family)
    table = NameTable.of(model)
    names = [f"double_blocks.1.{part}{side}" for part in ("qkv_lora", "proj_lora") for side in (1, 2)]
    names += ["single_blocks.1.qkv_lora", "single_blocks.1.proj_lora"]
    file, expected = {}, {}
    for i, name in enumerate(names):
        assert not any(place.swap_halves for place in table.find(name))
        down, rows = torch.full((1, 2), i), rows_in_file(table.find(name)) or HIDDEN["attention_head_dim"] * HIDDEN["num_attention_heads"]
        up = torch.arange(rows)[:, None] + i * 10**5
        block, _, part = name.rpartition(".")
        file |= {f"{block}.processor.{part}.down.weight": down, f"{block}.processor.{part}.up.weight": up}
        for place in table.find(name):
            expected[f"transformer.{place.module}.lora_A.weight"] = down
            expected[f"transformer.{place.module}.lora_B.weight"] = up[place.take or slice(None)]
    converted = lora_converters._convert_xlabs_flux_lora_to_diffusers(file)
    assert set(converted) == set(expected) and all(torch.equal(converted[key], expected[key]) for key in expected)


def test_names_of_ltx2_with_prompt_modulation_are_those_of_diffusers_own_lora_converter():
    family = FAMILIES["ltx2"]
    model = tiny(replace(family, config={**family.config, "cross_attn_mod": True, "audio_cross_attn_mod": True}))
    table = NameTable(weighted(model), authors_rules(family))
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    names = [n for n in authors_names(table, authors_rules(family)) if table.find(n)[0].module in linears]
    assert len(names) == len(linears) and "prompt_adaln_single.linear" in names and "audio_prompt_adaln_single.linear" in names
    file = {f"diffusion_model.{n}.lora_A.weight": n for n in names}
    converted = lora_converters._convert_non_diffusers_ltx2_lora_to_diffusers(file)
    assert converted == {f"transformer.{table.find(n)[0].module}.lora_A.weight": n for n in names}
    assert not any(place.swap_halves for n in names for place in table.find(n))


@pytest.mark.parametrize(
    "key, names",
    [
        ("flux2", {
            "double_blocks.1.img_attn.qkv": [f"transformer_blocks.1.attn.to_{x}" for x in "qkv"],
            "double_blocks.1.txt_attn.qkv": [f"transformer_blocks.1.attn.add_{x}_proj" for x in "qkv"],
        }),
        ("hunyuan_video", {
            f"txt_in.individual_token_refiner.blocks.1.{there}": [f"context_embedder.token_refiner.refiner_blocks.1.{x}" for x in here]
            for there, here in {
                "self_attn_qkv": ["attn.to_q", "attn.to_k", "attn.to_v"], "self_attn_proj": ["attn.to_out.0"], "mlp.fc1": ["ff.net.0.proj"],
                "mlp.fc2": ["ff.net.2"], "adaLN_modulation.1": ["norm_out.linear"], "norm2": ["norm2"],
            }.items()
        }),
    ],
)  # fmt: skip
def test_names_that_the_converter_reads_loosely(key, names):
    table = NameTable.of(tiny(FAMILIES[key]))
    assert {name: [place.module for place in table.find(name)] for name in names} == names


def test_no_rule_is_idle():
    models = [tiny(family) for family in FAMILIES.values()] + list(text_encoders().values())
    ltx2 = FAMILIES["ltx2"]
    models.append(tiny(replace(ltx2, config={**ltx2.config, "cross_attn_mod": True})))
    used = {
        rule
        for model in models
        for names in [NameTable.of(model).spellings]
        for rule in rules_for(type(model).__name__)
        if any(captures(rule.targets[0], name) for name in names)
    }
    assert not {rule for rules in read_folder(FOLDER).values() for rule in rules} - used


def text_encoders() -> dict[str, nn.Module]:
    """A small one of each class, on the meta device."""
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 9,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    sees = {"depth": 1, "hidden_size": 8, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 8}
    llm = transformers.Qwen3Config(**sizes, num_key_value_heads=1, head_dim=4)
    vlm = transformers.Qwen2_5_VLConfig(text_config={**sizes, "num_key_value_heads": 1}, vision_config=sees)
    clip = transformers.CLIPTextConfig(**sizes, projection_dim=8)
    with torch.device("meta"):
        return {
            "CLIPTextModel": transformers.CLIPTextModel(clip),
            "CLIPTextModelWithProjection": transformers.CLIPTextModelWithProjection(clip),
            "T5EncoderModel": transformers.T5EncoderModel(transformers.T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)),
            "Qwen3Model": transformers.Qwen3Model(llm),
            "Qwen3ForCausalLM": transformers.Qwen3ForCausalLM(llm),
            "Qwen2_5_VLForConditionalGeneration": transformers.Qwen2_5_VLForConditionalGeneration(vlm),
        }


@pytest.mark.parametrize(
    "cls, names",
    [
        ("CLIPTextModel", ["encoder.layers.1.self_attn.q_proj", "text_model.encoder.layers.1.self_attn.q_proj",
                           "text_model.encoder.layers.1.self_attn.to_q", "encoder.layers.1.self_attn.to_q"]),
        ("CLIPTextModelWithProjection", ["encoder.layers.1.self_attn.out_proj", "text_model.encoder.layers.1.self_attn.out_proj",
                                         "text_model.encoder.layers.1.self_attn.to_out", "encoder.layers.1.self_attn.to_out"]),
        ("CLIPTextModel", ["encoder.layers.0.self_attn.k_proj", "text_model.encoder.layers.0.self_attn.to_k"]),
        ("CLIPTextModel", ["encoder.layers.0.self_attn.v_proj", "text_model.encoder.layers.0.self_attn.to_v"]),
        ("CLIPTextModelWithProjection", ["text_projection"]),
        ("T5EncoderModel", ["encoder.block.1.layer.0.SelfAttention.q"]),
        ("Qwen3Model", ["layers.1.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("Qwen3ForCausalLM", ["layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj"]),
        ("Qwen2_5_VLForConditionalGeneration", ["layers.1.mlp.up_proj", "model.layers.1.mlp.up_proj", "language_model.layers.1.mlp.up_proj",
                                                "language_model.model.layers.1.mlp.up_proj", "model.language_model.layers.1.mlp.up_proj"]),
        ("Qwen2_5_VLForConditionalGeneration", ["visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"]),
    ],
)  # fmt: skip
def test_text_encoders_whatever_their_outer_levels(cls, names):
    model = text_encoders()[cls]
    table = NameTable.of(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    own = [name for name in names if name in linears]
    assert len(own) == 1
    assert {place for name in names for spelled in (str, flatten) for place in table.find(spelled(name))} == {Place(own[0])}
    assert all(table.find(flatten(n)) == table.find(n) for n in linears)


@pytest.mark.parametrize("key", ["sd15", "sdxl"])
def test_names_inside_resnets_of_ldm(key):
    model = tiny(FAMILIES[key])
    table, own = NameTable.of(model), dict(model.named_modules())
    inner = {
        "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj", "out_layers.0": "norm2", "out_layers.3": "conv2",
        "skip_connection": "conv_shortcut",
    }  # fmt: skip
    blocks = {
        "input_blocks.4.0": "down_blocks.1.resnets.0",
        "middle_block.0": "mid_block.resnets.0",
        "output_blocks.8.0": "up_blocks.2.resnets.2",
    }
    for native, block in blocks.items():
        for there, here in inner.items():
            wanted = (Place(f"{block}.{here}"),) if f"{block}.{here}" in own else None
            assert table.find(f"{native}.{there}") == table.find(flatten(f"{native}.{there}")) == wanted
            assert (wanted is None) == (native == "middle_block.0" and here == "conv_shortcut")


@pytest.mark.parametrize("key, names", [("sd15", ["2.1", "5.2", "8.2"]), ("sdxl", ["2.2", "5.2"])])
def test_upsamplers_of_ldm_stand_after_the_attention_if_there_is_one(key, names):
    table = NameTable.of(tiny(FAMILIES[key]))
    assert [table.find(f"output_blocks.{n}.conv") for n in names] == [
        (Place(f"up_blocks.{i}.upsamplers.0.conv"),) for i in range(len(names))
    ]


def test_every_linear_of_clip_has_kohyas_name():
    for cls in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        model = text_encoders()[cls]
        table = NameTable.of(model)
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "text_projection"]
        assert len(linears) == 12
        for name in linears:
            kohya = flatten(f"text_model.{name.removeprefix('text_model.')}")
            assert [p.module for p in table.find(kohya)] == [name]


GOOD = "classes: [Model]\nnames: {a.*: b.*}\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("a: [", "x.yaml is no readable YAML"),
        ("- a", "a file of naming rules is a mapping with classes and names, nothing else"),
        (GOOD + "more: 1", "a mapping with classes and names, nothing else"),
        ("classes: Model\nnames: {a: b}", "classes is 'Model'; it takes a list of class names"),
        ("classes: []\nnames: {a: b}", "classes is \\[\\]; it takes a list"),
        ("classes: [1]\nnames: {a: b}", "classes is \\[1\\]; it takes a list"),
        ("classes: [Model]\nnames: [a]", "names is \\['a'\\]; it takes a mapping"),
        ("classes: [Model]\nnames: {a: b, a: c}", "no readable YAML: the key 'a' is given twice"),
        ("classes: [Model]\nnames: {a: 3}", "rule 'a' points to 3; it takes a module name or a list of them"),
        ("classes: [Model]\nnames: {3: a}", "rule 3 points to 'a'; it takes a module name"),
        ("classes: [Model]\nnames: {a: []}", "rule 'a' points to \\[\\]; it takes a module name"),
        ("classes: [Model]\nnames: {a: b..c}", "rule 'a' points to 'b..c'; it takes a module name"),
        ("classes: [Model]\nnames: {a: {from: b}}", "rule 'a' has the fields from; it takes to, and may have swap_halves"),
        ("classes: [Model]\nnames: {a: {to: b, swap: true}}", "rule 'a' has the fields to, swap; it takes to"),
        ("classes: [Model]\nnames: {a: {to: b, swap_halves: first}}", "swap_halves 'first'; choose true, false or last"),
        ("classes: [Model]\nnames: {a: {to: b, swap_halves: 1}}", "swap_halves 1; choose true, false or last"),
        ("classes: [Model]\nnames: {a: {to: [b, c], swap_halves: true}}", "swaps the halves of several modules"),
        ("classes: [Model]\nnames: {a: {to: b, swap_halves: last}}", "swaps halves in the last block but has no [*] for its number"),
        ("classes: [Model]\nnames: {a.*: b}", "both sides need the same number of [*], and the same [*][*] [(]one at most[)]"),
        ("classes: [Model]\nnames: {a.*: [b.*, b]}", "both sides need the same number"),
        ("classes: [Model]\nnames: {a.**: b.*}", "both sides need the same number"),
        ("classes: [Model]\nnames: {'**.a.**': '**.b.**'}", "both sides need the same number"),
        ("classes: [Model]\nnames: {a.q*: b.q*}", "both sides need the same number"),
    ],
)  # fmt: skip
def test_a_malformed_file_of_rules_is_refused(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_rules(tmp_path / "x.yaml")


def test_rules_of_a_class(tmp_path):
    (tmp_path / "x.yaml").write_text("classes: [One, Two]\nnames: {a.*: b.*, c: [d, e], f: {to: g, swap_halves: true}}")
    (tmp_path / "y.yaml").write_text("classes: ['*']\nnames: {h: i}")
    own = (NamingRule("a.*", ("b.*",)), NamingRule("c", ("d", "e")), NamingRule("f", ("g",), True))
    assert rules_for("Two", tmp_path) == (*own, NamingRule("h", ("i",)))
    assert rules_for("Three", tmp_path) == (NamingRule("h", ("i",)),)


def test_a_class_belongs_to_one_file(tmp_path):
    for name in ("x", "y"):
        (tmp_path / f"{name}.yaml").write_text(GOOD)
    with pytest.raises(ConfigError, match=r"y\.yaml: class Model has rules in another file as well; name it in one file only"):
        rules_for("Model", tmp_path)


def test_shipped_classes_exist():
    known = set(read_folder(FOLDER)) - {"*"}
    assert all(hasattr(diffusers, name) or hasattr(transformers, name) for name in known)


@pytest.mark.parametrize(
    "pattern, name, found",
    [
        ("a.*.b", "a.12.b", (("12",), "")),
        ("a.*.b", "a.x.b", None),
        ("a.*.b", "a.1.b.c", None),
        ("a.**", "a.b.c", ((), "b.c")),
        ("a.**", "a", None),
        ("**.b.*", "x.y.b.3", (("3",), "x.y")),
        ("*.a.*", "1.a.2", (("1", "2"), "")),
        ("a.b", "a_b", None),
        ("a+", "aa", None),
        ("a.2-1.**", "a.2-1.b", ((), "b")),
    ],
)
def test_patterns(pattern, name, found):
    assert captures(pattern, name) == found
    if found:
        assert fill(pattern, found) == name
