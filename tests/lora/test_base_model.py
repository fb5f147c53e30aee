"""Base models detected from headers: every layout, parts of models, adapter types, tags, and the errors."""

import re
from pathlib import Path

import diffusers
import pytest
import torch
import yaml
from support.parameter_ids import name_parameter
from torch import nn

from int8run.checkpoints.header import read_header
from int8run.errors import LoraError
from int8run.lora.base_model import (
    LoraBase,
    check_lora_base,
    detect_lora_base,
    load_table,
    read_tag,
    resolve_size,
)
from int8run.lora.find import SHIPPED_LORAS
from int8run.models.key_mapping import load_mappings
from int8run.models.original_names import to_original

RANK = 4
STYLE = Path("loras/style.safetensors")
SD3 = dict(
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    caption_projection_dim=1536,
    pos_embed_max_size=192,
)
SD35 = SD3 | dict(dual_attention_layers=tuple(range(13)))
SD35_LARGE = SD3 | dict(num_layers=38, num_attention_heads=38, caption_projection_dim=2432)
UNET = dict(block_out_channels=(320, 640, 1280, 1280))
SDXL = dict(
    block_out_channels=(320, 640, 1280),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    attention_head_dim=(5, 10, 20),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
)
KLEIN_4B = dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680)
KLEIN_9B = dict(num_layers=8, num_single_layers=24, num_attention_heads=32, joint_attention_dim=12288)
ANIMA = dict(num_attention_heads=16, num_layers=28)
SANA_600M = dict(
    num_layers=28,
    num_attention_heads=36,
    num_cross_attention_heads=16,
    cross_attention_head_dim=72,
    cross_attention_dim=1152,
)
HIDREAM = dict(
    patch_size=2,
    in_channels=16,
    axes_dims_rope=(64, 32, 32),
    caption_channels=[4096, 4096],
    llama_layers=[*range(32), *[31] * 16],
)
ERNIE_IMAGE = dict(
    hidden_size=4096, num_attention_heads=32, num_layers=36, ffn_hidden_size=12288, text_in_dim=3072
)
# base -> class in diffusers and what differs from its own defaults; the sizes are those of the released
# checkpoints
MODELS = {
    "flux": ("FluxTransformer2DModel", dict(guidance_embeds=True)),
    "chroma": ("ChromaTransformer2DModel", {}),
    "flux2_klein_4b": ("Flux2Transformer2DModel", KLEIN_4B),
    "flux2_klein_9b": ("Flux2Transformer2DModel", KLEIN_9B),
    "flux2_dev": ("Flux2Transformer2DModel", {}),
    "qwen_image": ("QwenImageTransformer2DModel", {}),
    "qwen_image_21": ("QwenImage21Transformer2DModel", {}),
    "hunyuan_video": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuan_image": ("HunyuanImageTransformer2DModel", {}),
    "sd15": ("UNet2DConditionModel", UNET | dict(cross_attention_dim=768)),
    "sd2": ("UNet2DConditionModel", UNET | dict(cross_attention_dim=1024)),
    "sdxl": ("UNet2DConditionModel", SDXL),
    "sd3": ("SD3Transformer2DModel", SD3),
    "sd35_medium": ("SD3Transformer2DModel", SD35),
    "sd35_large": ("SD3Transformer2DModel", SD35_LARGE),
    "z_image": ("ZImageTransformer2DModel", {}),
    "lumina2": ("Lumina2Transformer2DModel", dict(cap_feat_dim=2304)),
    "wan_14b": ("WanTransformer3DModel", {}),
    "wan_5b": (
        "WanTransformer3DModel",
        dict(num_attention_heads=24, ffn_dim=14336, num_layers=30, in_channels=48, out_channels=48),
    ),
    "wan_1_3b": ("WanTransformer3DModel", dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)),
    "anima": ("CosmosTransformer3DModel", ANIMA),
    "ltx": ("LTXVideoTransformer3DModel", {}),
    "ltx_13b": (
        "LTXVideoTransformer3DModel",
        dict(num_layers=48, attention_head_dim=128, cross_attention_dim=4096),
    ),
    "ltx2": ("LTX2VideoTransformer3DModel", {}),
    "pixart": ("PixArtTransformer2DModel", dict(caption_channels=4096, sample_size=128)),
    "sana": ("SanaTransformer2DModel", {}),
    "sana_600m": ("SanaTransformer2DModel", SANA_600M),
    "sana_4_8b": ("SanaTransformer2DModel", dict(num_layers=60, qk_norm="rms_norm_across_heads")),
    "hidream": ("HiDreamImageTransformer2DModel", HIDREAM),
    "ernie_image": ("ErnieImageTransformer2DModel", ERNIE_IMAGE),
    "krea2": ("Krea2Transformer2DModel", {}),
    "prx": ("PRXTransformer2DModel", {}),
}
LTX25 = dict(
    gated_attn=True,
    audio_gated_attn=True,
    cross_attn_mod=True,
    audio_cross_attn_mod=True,
    use_prompt_embeddings=False,
    use_prompt_adaln_single=False,
)
KANDINSKY5_IMAGE = dict(model_dim=2560, ff_dim=10240, num_visual_blocks=50)
KANDINSKY5_PRO = dict(model_dim=4096, ff_dim=16384, time_dim=1024, num_text_blocks=4, num_visual_blocks=60)
COGVIEW4 = dict(num_layers=28, num_attention_heads=32, attention_head_dim=128)
JOYIMAGE = dict(hidden_size=4096, num_attention_heads=32, num_layers=40)
# those that only slow tests try
LONG_TAIL = {
    "flux3_klein": ("Flux3Transformer2DModel", {}),
    "longcat_image": ("LongCatImageTransformer2DModel", dict(num_layers=10, num_single_layers=20)),
    "ovis_image": ("OvisImageTransformer2DModel", {}),
    "hunyuan_video15": ("HunyuanVideo15Transformer3DModel", {}),
    "cogview4": ("CogView4Transformer2DModel", COGVIEW4),
    "glm_image": ("GlmImageTransformer2DModel", dict(num_attention_heads=32, attention_head_dim=128)),
    "ideogram4": ("Ideogram4Transformer2DModel", {}),
    "fibo2": ("BriaFibo2Transformer2DModel", {}),
    "joyimage": (
        "JoyImageEditTransformer3DModel",
        dict(hidden_size=4096, num_attention_heads=32, num_layers=40),
    ),
    "kandinsky5_lite": ("Kandinsky5Transformer3DModel", dict(model_dim=1792, ff_dim=7168)),
    "kandinsky5_image": ("Kandinsky5Transformer3DModel", KANDINSKY5_IMAGE),
    "kandinsky5_pro": ("Kandinsky5Transformer3DModel", KANDINSKY5_PRO),
    "kandinsky6": ("Kandinsky6Transformer3DModel", {}),
    "fibo": ("BriaFiboTransformer2DModel", dict(num_layers=8)),
    "sana_video": ("SanaVideoTransformer3DModel", {}),
    "minimax_h3": ("MiniMaxH3Transformer3DModel", {}),
    "ltx25": ("LTX2VideoTransformer3DModel", LTX25),
}
MODELS |= LONG_TAIL
UNETS = {"sd15", "sd2", "sdxl"}


def mark_base(base):
    """A base as a parameter."""
    return pytest.param(base, id=base, marks=pytest.mark.slow if base in LONG_TAIL else ())


BASES = list(map(mark_base, MODELS))
# LoRAs of the others have diffusers' names
NAMED_BY_AUTHORS = [mark_base(base) for base in MODELS if base not in UNETS]
# a LoRA on all layers of the first could be one of the others as well: SD3.5 medium has all layers of SD3
# medium and more of them, Sana 4.8B those of Sana 1.6B, LTX-2 those of LTX-2.5; Sana-Video differs from Sana
# in convolutions
POSSIBLE = {
    "sd3": ("sd3", "sd35_medium"),
    "sana": ("sana", "sana_video", "sana_4_8b"),
    "sana_video": ("sana", "sana_video", "sana_4_8b"),
    "ltx25": ("ltx2", "ltx25"),
}


def list_possible(base):
    """The bases that a LoRA on all layers of a base could be for, the likeliest first."""
    return POSSIBLE.get(base, (base,))


@pytest.fixture(scope="module")
def layers():
    """Shapes of the matrices of a base's denoiser, by name; the models have no memory behind them."""
    made: dict[str, dict[str, list[int]]] = {}

    def layers(base):
        if base not in made:
            name, settings = MODELS[base]
            with torch.device("meta"):
                model = getattr(diffusers, name)(**settings)
            made[base] = {
                n: list(m.weight.shape) for n, m in model.named_modules() if isinstance(m, nn.Linear)
            }
        return made[base]

    return layers


def make_entries(**shapes):
    return {key: {"shape": shape} for key, shape in shapes.items()}


def make_peft_header(modules, prefix="transformer."):
    """A header as diffusers writes it."""
    down = {f"{prefix}{n}.lora_A.weight": {"shape": [RANK, s[1]]} for n, s in modules.items()}
    return down | {f"{prefix}{n}.lora_B.weight": {"shape": [s[0], RANK]} for n, s in modules.items()}


def make_kohya_header(modules, prefix="lora_unet_"):
    """A header as kohya's scripts write it."""
    flat = {prefix + n.replace(".", "_"): s for n, s in modules.items()}
    down = {f"{n}.lora_down.weight": {"shape": [RANK, s[1]]} for n, s in flat.items()}
    return (
        down
        | {f"{n}.lora_up.weight": {"shape": [s[0], RANK]} for n, s in flat.items()}
        | {f"{n}.alpha": {"shape": []} for n in flat}
    )


def rename_to_original(modules, base):
    """The matrices under the names of the model's authors; those that are fused there have all rows."""
    shapes = {f"{name}.weight": tuple(shape) for name, shape in modules.items()}
    kind = MODELS[base][0]
    keys = {
        key.removeprefix(load_mappings(kind).prefix): parts
        for key, parts in to_original(shapes, kind).items()
    }
    return {
        key.removesuffix(".weight"): (
            sum(p.count_rows(shapes[p.key][0]) for p in parts),
            shapes[parts[0].key][1],
        )
        for key, parts in keys.items()
    }


# -- every base ----------------------------------------------------------------------------------------------


def test_every_base_is_tested():
    assert set(MODELS) | {"tiny"} == set(load_table()["bases"])


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("layout", [make_peft_header, make_kohya_header])
def test_base_is_detected_from_a_lora_on_all_layers(layers, base, layout):
    found = detect_lora_base(layout(layers(base)), {})

    assert found.possible_names == list_possible(base)
    assert found.evidence == "shapes" and found.tag is None


@pytest.mark.parametrize("base", NAMED_BY_AUTHORS)
@pytest.mark.parametrize("layout", [make_peft_header, make_kohya_header])
def test_base_is_detected_under_the_authors_names(layers, base, layout):
    found = detect_lora_base(layout(rename_to_original(layers(base), base)), {})

    assert (found.possible_names, found.evidence) == (list_possible(base), "shapes")


@pytest.mark.parametrize("base", BASES)
def test_index_of_a_sequential_may_be_missing(layers, base):
    found = detect_lora_base(
        make_peft_header({name.replace("to_out.0", "to_out"): shape for name, shape in layers(base).items()}),
        {},
    )

    assert (found.possible_names, found.evidence) == (list_possible(base), "shapes")


@pytest.mark.parametrize("base", BASES)
def test_lora_on_all_layers_is_rejected_by_every_other_base(layers, base):
    found = detect_lora_base(make_peft_header(layers(base)), {})

    for other in set(load_table()["bases"]) - set(list_possible(base)):
        if any(other in load_table()["partly_fits"].get(name, {}) for name in found.possible_names):
            assert check_lora_base(STYLE, found, other).startswith("style.safetensors was made for ")
        else:
            with pytest.raises(LoraError, match=r"^style\.safetensors was made for "):
                check_lora_base(STYLE, found, other)


@pytest.mark.parametrize("base", BASES)
def test_lora_on_attention_only_is_never_detected_as_another_base(layers, base):
    modules = {n: s for n, s in layers(base).items() if "attn" in n or "attention" in n}
    for part in (modules, dict(list(modules.items())[:4]), dict(list(modules.items())[-4:])):
        found = detect_lora_base(make_peft_header(part), {})
        assert base in (found.name, *found.alternatives)
        assert check_lora_base(Path("x"), found, base) is None


@pytest.mark.parametrize("base", BASES)
def test_each_single_layer_fits_its_base(layers, base):
    for name, shape in layers(base).items():
        found = detect_lora_base(make_peft_header({name: shape}), {})
        assert found is None or base in (found.name, *found.alternatives), name


CONVOLUTIONS = {
    "transformer_blocks.19.ff.conv_inverted": (11200, 2240),
    "transformer_blocks.0.ff.conv_depth": (11200, 1),
}
NATIVE_CONVOLUTIONS = {
    "blocks.19.mlp.inverted_conv.conv": (11200, 2240),
    "blocks.0.mlp.depth_conv.conv": (11200, 1),
}


@pytest.mark.parametrize("base", ["pixart", "sana", "hidream", "ernie_image", "krea2"])
def test_each_layer_of_a_block_is_enough(layers, base):
    convolutions = CONVOLUTIONS | NATIVE_CONVOLUTIONS if base == "sana" else {}
    for name, shape in (layers(base) | rename_to_original(layers(base), base) | convolutions).items():
        if re.search(r"(blocks|layers|caption_projection)\.\d+\.|^p_embedder", name):
            found = detect_lora_base(make_peft_header({name: shape}), {})
            assert found is not None and base in (found.name, *found.alternatives), name


def test_shipped_loras_are_for_the_tiny_model():
    for path in SHIPPED_LORAS.glob("*.safetensors"):
        found = detect_lora_base(*read_header(path))
        assert (
            found == LoraBase("tiny", "shapes", "hidden 384") and check_lora_base(path, found, "tiny") is None
        )


NATIVE = {
    "flux": {
        "double_blocks.18.img_attn.qkv": (9216, 3072),
        "double_blocks.0.img_mod.lin": (18432, 3072),
        "single_blocks.37.linear1": (21504, 3072),
    },
    "chroma": {"double_blocks.0.img_attn.qkv": (9216, 3072), "distilled_guidance_layer.in_proj": (5120, 64)},
    "flux2_klein_4b": {
        "double_blocks.0.img_attn.qkv": (9216, 3072),
        "single_blocks.0.linear1": (27648, 3072),
    },
    "flux2_klein_9b": {"double_blocks.0.img_mlp.0": (24576, 4096)},
    "flux2_dev": {"single_blocks.47.linear2": (6144, 24576)},
    "tiny": {"single_blocks.3.linear1": (2688, 384)},
    "hunyuan_video": {
        "double_blocks.0.img_attn_qkv": (9216, 3072),
        "double_blocks.0.img_mlp.fc1": (12288, 3072),
    },
    "sd3": {"joint_blocks.23.x_block.attn.qkv": (4608, 1536)},
    "sd35_medium": {"joint_blocks.0.x_block.attn2.qkv": (4608, 1536)},
    "sd35_large": {"joint_blocks.37.context_block.mlp.fc1": (9728, 2432)},
    "sd15": {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768)},
    "sdxl": {"input_blocks.4.1.transformer_blocks.1.attn1.to_q": (640, 640)},
    "z_image": {"layers.29.attention.qkv": (11520, 3840), "layers.0.attention.out": (3840, 3840)},
    "lumina2": {"layers.0.attention.qkv": (3840, 2304), "layers.0.feed_forward.w1": (9216, 2304)},
    "wan_14b": {"blocks.39.self_attn.q": (5120, 5120), "blocks.0.cross_attn.k_img": (5120, 5120)},
    "wan_5b": {"blocks.0.ffn.0": (14336, 3072)},
    "wan_1_3b": {"blocks.0.self_attn.o": (1536, 1536)},
    "anima": {"blocks.0.self_attn.q_proj": (2048, 2048), "blocks.0.cross_attn.k_proj": (2048, 1024)},
    "qwen_image": {"transformer_blocks.0.img_mlp.net.0.proj": (12288, 3072)},
    "ltx2": {"transformer_blocks.0.audio_attn1.to_q": (2048, 2048)},
    "pixart": {"blocks.27.cross_attn.kv_linear": (2304, 1152), "blocks.0.mlp.fc1": (4608, 1152)},
    "sana": {"blocks.19.attn.qkv": (6720, 2240), "blocks.0.mlp.inverted_conv.conv": (11200, 2240)},
    "sana_600m": {"blocks.0.attn.proj": (1152, 1152), "blocks.0.mlp.point_conv.conv": (1152, 2880)},
    "sana_4_8b": {"blocks.20.cross_attn.q_linear": (2240, 2240)},
    "hidream": {"double_stream_blocks.0.block.ff_i.experts.3.w1": (6912, 2560)},
    "ernie_image": {
        "layers.35.self_attention.to_out": (4096, 4096),
        "layers.0.mlp.linear_fc2": (4096, 12288),
    },
    "krea2": {"blocks.0.attn.wq": (6144, 6144), "txtfusion.refiner_blocks.1.attn.wk": (2560, 2560)},
}


@pytest.mark.parametrize("base", NATIVE)
@pytest.mark.parametrize(
    "prefix", ["", "diffusion_model.", "model.diffusion_model.", "base_model.model.diffusion_model."]
)
def test_base_is_detected_from_authors_names_with_any_prefix(base, prefix):
    found = detect_lora_base(make_peft_header(NATIVE[base], prefix), {})

    assert found.name == base and found.evidence == "shapes"
    assert (
        detect_lora_base(make_kohya_header(NATIVE[base]), {})
        == detect_lora_base(make_kohya_header(NATIVE[base], "lycoris_"), {})
        == found
    )


def test_xlabs_layout_is_flux():
    shapes = {
        "double_blocks.0.processor.qkv_lora1.down.weight": [16, 3072],
        "double_blocks.0.processor.qkv_lora1.up.weight": [9216, 16],
    }

    assert detect_lora_base(make_entries(**shapes), {}).name == "flux"
    assert (
        detect_lora_base(
            make_entries(**{key: [s if s != 3072 else 3584 for s in shape] for key, shape in shapes.items()}),
            {},
        )
        is None
    )


def test_bases_of_equal_shapes_are_alternatives(layers):
    def attention(base, last="attn"):
        return {
            name: shape
            for name, shape in layers(base).items()
            if last in name and name.startswith("transformer_blocks.0.")
        }

    def found(modules, **metadata):
        base = detect_lora_base(make_peft_header(modules), metadata)
        return (base.name, *base.alternatives)

    # alike but for the feed-forward and the width of the text
    assert found(attention("pixart")) == found(attention("sana_600m")) == ("pixart", "sana_600m")
    assert found(attention("pixart"), ss_base_model_version="sana") == ("sana_600m", "pixart")
    with pytest.raises(
        LoraError, match=r"made for PixArt or Sana 0\.6B \(hidden 1152\), the model is LTX-Video 2B"
    ):
        check_lora_base(STYLE, detect_lora_base(make_peft_header(attention("pixart")), {}), "ltx")
    # one in the first 20 blocks
    assert found(attention("sana")) == found(attention("sana_4_8b")) == ("sana", "sana_4_8b", "sana_video")
    # queries of the same width; keys and values are narrower in Krea 2
    assert found(attention("krea2", "to_q")) == ("flux2_dev", "krea2")
    assert found(attention("krea2")) == ("krea2",) and found(attention("flux2_dev")) == ("flux2_dev",)
    # one name in two architectures; the size is not PixArt's
    assert found({"adaln_single.linear": (12288, 2048)}) == ("ltx", "ltx_13b", "ltx2", "ltx25")


# -- kinds of changes ----------------------------------------------------------------------------------------

NAME = "lora_unet_double_blocks_18_img_mod_lin"  # 18432 x 3072, in FLUX.1 only


@pytest.mark.parametrize(
    "parts",
    [
        dict(hada_w1_a=[18432, 4], hada_w1_b=[4, 3072], hada_w2_a=[18432, 4], hada_w2_b=[4, 3072]),
        dict(lokr_w1=[8, 8], lokr_w2=[2304, 384]),
        dict(lokr_w1_a=[8, 4], lokr_w1_b=[4, 8], lokr_w2_a=[2304, 16], lokr_w2_b=[16, 384]),
        dict(diff=[18432, 3072]),
        {"weight": [18432, 3072]},  # a checkpoint
        {"oft_blocks": [36, 512, 512]},
        {"oft_blocks": [2, 36, 512, 512]},
        {"boft_R": [1, 8, 384, 384], "boft_s": [18432, 1]},
        {"oft_R.weight": [64, 276]},  # no size, but the names are there
        {"lora_down.weight": [4, 3072]},
        {"alpha": []},
    ],
    ids=" ".join,
)
def test_size_is_read_from_every_adapter_type(parts):
    header = make_entries(**{f"{NAME}.{part}": shape for part, shape in parts.items()})

    assert detect_lora_base(header, {}).name == "flux"

    wrong = {
        key: {"shape": [n * 3 if n > 300 else n for n in entry["shape"]]} for key, entry in header.items()
    }

    if any(n > 300 for entry in header.values() for n in entry["shape"]):
        assert detect_lora_base(wrong, {}) is None


@pytest.mark.parametrize(
    "parts",
    [
        dict(hada_w1_a=[4, 18432], hada_w1_b=[4, 3072], hada_t1=[4, 4]),
        dict(lokr_w1=[8, 8], lokr_w2_a=[4, 16], lokr_t2=[4, 4]),
    ],
    ids=name_parameter,
)
def test_size_is_unknown_with_a_core_tensor(parts):
    assert (
        detect_lora_base(
            make_entries(
                **{f"{NAME}.{part}": shape for part, shape in parts.items()} | {f"{NAME}.lokr_w2_b": [4, 8]}
            ),
            {},
        ).name
        == "flux"
    )


@pytest.mark.parametrize(
    "shape", [[], [4], ["x", "y"], [[4], [4]], [None, None], [4, True], [4, 10**30]], ids=str
)
def test_malformed_shapes_are_ignored(shape):
    for part in ("lora_down.weight", "hada_w1_a", "lokr_w1", "diff", "weight"):
        detect_lora_base(make_entries(**{f"{NAME}.{part}": shape}), {})


def test_unknown_modules_give_no_base():
    assert detect_lora_base({}, {}) is None
    assert detect_lora_base(make_peft_header({"some.layer": (8, 8)}), {}) is None
    assert (
        detect_lora_base(
            make_peft_header({"text_model.encoder.layers.0.self_attn.q_proj": (768, 768)}, "text_encoder."),
            {},
        )
        is None
    )
    assert detect_lora_base(make_peft_header(NATIVE["flux"], "text_encoder."), {}) is None, (
        "only the denoiser counts"
    )
    assert detect_lora_base(make_peft_header({"transformer_blocks.0.attn.to_q": (64, 64)}), {}) is None, (
        "a base of another size"
    )


def test_layers_of_two_bases_give_no_base():
    assert (
        detect_lora_base(
            make_peft_header(
                {"transformer_blocks.0.attn.to_q": (3072, 3072), "transformer_blocks.1.attn.to_q": (384, 384)}
            ),
            {},
        )
        is None
    )


def test_unknown_layers_are_ignored():
    modules = {"double_blocks.0.img_mod.lin": (18432, 3072), "something.new": (5, 5), "img_in": (3072, 128)}

    assert detect_lora_base(make_peft_header(modules), {}).name == "flux"


@pytest.mark.parametrize(
    ("blocks", "base"), [(1, "flux"), (5, "flux2_klein_4b"), (6, "ovis_image"), (7, "flux"), (19, "flux")]
)
def test_base_whose_last_block_is_in_the_file_is_likeliest(blocks, base):
    found = detect_lora_base(
        make_peft_header({f"double_blocks.{n}.img_attn.qkv": (9216, 3072) for n in range(blocks)}), {}
    )

    assert found.name == base and {"flux", "chroma", "hunyuan_video"} <= {found.name, *found.alternatives}


def test_base_with_fewer_blocks_is_excluded():
    assert (
        detect_lora_base(make_peft_header({"double_blocks.18.img_attn.qkv": (9216, 3072)}), {}).name == "flux"
    )
    assert (
        detect_lora_base(make_peft_header({"double_blocks.19.img_attn.qkv": (9216, 3072)}), {}).name
        == "hunyuan_video"
    )
    assert detect_lora_base(make_peft_header({"double_blocks.20.img_attn.qkv": (9216, 3072)}), {}) is None

    falling = {f"double_blocks.{n}.img_attn.qkv": (9216, 3072) for n in (19, 0)}

    assert detect_lora_base(make_peft_header(falling), {}).name == "hunyuan_video"


def test_one_deep_layer_makes_it_sdxl():
    name = "down_blocks.1.attentions.0.transformer_blocks.{}.attn1.to_q"

    assert detect_lora_base(make_peft_header({name.format(n): (640, 640) for n in range(2)}), {}) == LoraBase(
        "sdxl", "shapes", "text width 2048"
    )


# -- tags ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tag", "base"),
    [
        ("sd_v1", "sd15"),
        ("sd_1.5", "sd15"),
        ("stable-diffusion-v1/lora", "sd15"),
        ("sd_v2_v", "sd2"),
        ("stable-diffusion-v2-768-v", "sd2"),
        ("sdxl_base_v1-0", "sdxl"),
        ("sdxl_", "sdxl"),
        ("sdxl_1.0", "sdxl"),
        ("stable-diffusion-xl-v1-base/lora", "sdxl"),
        ("stable-diffusion-3-medium", "sd3"),
        ("stable-diffusion-3-5-large/lora", "sd35_large"),
        ("flux1", "flux"),
        ("flux-1-dev/lora", "flux"),
        ("flux-1-schnell", "flux"),
        ("Flux.1-dev", "flux"),
        ("chroma/lora", "chroma"),
        ("flux2_klein_4b", "flux2_klein_4b"),
        ("Flux.2-klein-9b/lora", "flux2_klein_9b"),
        ("Flux.2-dev", "flux2_dev"),
        ("flux2", "flux2_dev"),
        ("lumina2", "lumina2"),
        ("lumina-2/lora", "lumina2"),
        ("zimage", "z_image"),
        ("Z-Image", "z_image"),
        ("qwen_image", "qwen_image"),
        ("Qwen-Image-Edit-2511", "qwen_image"),
        ("qwen-image-2.1", "qwen_image_21"),
        ("wan_2.2_14b", "wan_14b"),
        ("hunyuan-video/lora", "hunyuan_video"),
        ("hunyuan-image-2.1", "hunyuan_image"),
        ("anima-preview/lora", "anima"),
        ("ltx2", "ltx2"),
        ("int8run-tiny/lora", "tiny"),
        ("pixart-alpha/lora", "pixart"),
        ("pixart-sigma/lora", "pixart"),
        ("hidream_i1", "hidream"),
        ("hidream-i1/lora", "hidream"),
        ("ernie_image", "ernie_image"),
        ("Ernie/lora", "ernie_image"),
        ("krea2", "krea2"),
        ("Krea-2/lora", "krea2"),
    ],
)
def test_tag_gives_the_base(tag, base):
    assert (
        detect_lora_base({}, {"ss_base_model_version": tag})
        == detect_lora_base({}, {"modelspec.architecture": tag})
        == LoraBase(base, "tag")
    )


def test_tag_of_several_bases_gives_alternatives():
    assert detect_lora_base({}, {"ss_base_model_version": "wan2.1"}) == LoraBase(
        "wan_14b", "tag", "", ("wan_1_3b",)
    )
    assert detect_lora_base({}, {"ss_base_model_version": "stable-diffusion-3"}).alternatives == (
        "sd35_medium",
        "sd35_large",
    )
    assert detect_lora_base({}, {"modelspec.architecture": "sana/lora"}) == LoraBase(
        "sana", "tag", "", ("sana_600m", "sana_4_8b")
    )


@pytest.mark.parametrize(
    "tag", ["", "None", "animatediff", "flux9", "sd_v", "x" * 10_000, "\x1b[31m", "{}", "狐"]
)
def test_unknown_tag_gives_no_base(tag):
    assert (
        read_tag({"ss_base_model_version": tag}) == (None, [])
        and detect_lora_base({}, {"ss_base_model_version": tag}) is None
    )


def test_long_tag_is_cut():
    assert len(read_tag({"ss_base_model_version": "flux1 " + "x" * 1000})[0]) == 100


def test_second_tag_counts_where_the_first_is_unknown():
    assert (
        detect_lora_base(
            {}, {"ss_base_model_version": "custom", "modelspec.architecture": "flux-1-dev/lora"}
        ).name
        == "flux"
    )


def test_tag_chooses_between_bases_of_the_same_shapes():
    header = make_peft_header({"double_blocks.0.img_attn.qkv": (9216, 3072)})

    assert detect_lora_base(header, {}).name == "flux"

    chosen = detect_lora_base(header, {"ss_base_model_version": "chroma"})

    assert chosen.name == "chroma" and "flux" in chosen.alternatives and chosen.tag is None


def test_shapes_win_over_tags():
    header = make_peft_header(NATIVE["flux2_dev"])
    found = detect_lora_base(header, {"ss_base_model_version": "sdxl\x1b_base"})

    assert found == LoraBase("flux2_dev", "shapes", "hidden 6144", (), "sdxl _base")
    assert str(found) == "FLUX.2-dev (hidden 6144, by its shapes, its tag says sdxl _base)"
    assert (
        str(detect_lora_base({}, {"ss_base_model_version": "wan2.1"})) == "Wan 14B or Wan 1.3B (by its tag)"
    )


# -- refusing ------------------------------------------------------------------------------------------------


def test_another_base_is_rejected_with_both_sizes():
    words = (
        r"^style\.safetensors was made for FLUX\.2-dev \(hidden 6144\), the model is FLUX\.1 "
        r"\(hidden 3072\); "
        r"choose a LoRA made for FLUX\.1, or the model that this one was made for$"
    )

    with pytest.raises(LoraError, match=words):
        check_lora_base(STYLE, detect_lora_base(make_peft_header(NATIVE["flux2_dev"]), {}), "flux")
    with pytest.raises(
        LoraError,
        match=r"for SDXL \(text width 2048\), the model is the tiny model of int8run \(hidden 384\)",
    ):
        check_lora_base(STYLE, detect_lora_base(make_peft_header(NATIVE["sdxl"]), {}), "tiny")
    with pytest.raises(
        LoraError, match=r"for FLUX\.1 or Chroma .*or Qwen-Image.*\(hidden 3072\), the model is SDXL"
    ):
        check_lora_base(
            STYLE,
            detect_lora_base(make_peft_header({"transformer_blocks.0.attn.to_q": (3072, 3072)}), {}),
            "sdxl",
        )


@pytest.mark.parametrize(
    ("name", "tag"),
    [("sdxl", ""), ("flux2_dev", ""), ("flux", "flux-2-dev"), ("", "flux-2-dev")],
    ids=["refused", "refused by width", "a wrong tag", "a tag alone"],
)
def test_messages_name_the_folder_of_a_file_that_is_called_as_all_are(name, tag):
    header = make_peft_header(NATIVE[name]) if name else {}
    found = detect_lora_base(header, {"modelspec.architecture": tag})
    file = Path("portrait", "adapter_model.safetensors")

    try:
        message = check_lora_base(file, found, "flux")
    except LoraError as error:
        message = str(error)

    assert message.startswith("portrait/adapter_model.safetensors")


def test_base_known_by_names_alone_is_rejected():
    found = detect_lora_base(
        make_entries(**{"lora_unet_txt_in_individual_token_refiner_blocks_0_x.alpha": []}), {}
    )

    bases = r"HunyuanVideo or HunyuanImage 2\.1 or HunyuanVideo 1\.5"
    with pytest.raises(LoraError, match=bases + r" \(by the names in it\), the model is FLUX\.1"):
        check_lora_base(STYLE, found, "flux")


def test_matching_and_unknown_bases_are_accepted():
    flux = detect_lora_base(make_peft_header(NATIVE["flux"]), {})

    assert check_lora_base(STYLE, flux, "flux") is None
    assert check_lora_base(STYLE, flux, "my_model") is None and check_lora_base(STYLE, None, "flux") is None


def test_partly_fitting_base_is_a_warning():
    assert check_lora_base(STYLE, detect_lora_base(make_peft_header(NATIVE["flux"]), {}), "chroma") == (
        "style.safetensors was made for FLUX.1, the model is Chroma: Chroma has no modulation "
        "layers, so that part of the LoRA "
        "is left out, and what it learned may look different"
    )
    assert "Chroma, the model is FLUX.1: FLUX.1 has no distilled" in check_lora_base(
        STYLE, detect_lora_base(make_peft_header(NATIVE["chroma"]), {}), "flux"
    )


def test_tag_alone_only_warns():
    found = detect_lora_base({}, {"ss_base_model_version": "sdxl_base_v1-0"})

    assert (
        check_lora_base(STYLE, found, "flux")
        == "style.safetensors: its header says that it was made for SDXL, the model is FLUX.1"
    )
    assert check_lora_base(STYLE, found, "sdxl") is None


def test_tag_that_contradicts_the_shapes_is_a_warning():
    found = detect_lora_base(make_peft_header(NATIVE["flux"]), {"ss_base_model_version": "sdxl_base_v1-0"})

    assert (
        check_lora_base(STYLE, found, "flux")
        == "style.safetensors: its header says 'sdxl_base_v1-0', its shapes are those of FLUX.1; "
        "the shapes count"
    )


# -- the table -----------------------------------------------------------------------------------------------


def test_table_is_complete():
    for name, base in load_table()["bases"].items():
        wishes = [
            w for row in load_table()["architectures"][base["architecture"]]["modules"].values() for w in row
        ]
        assert all(
            resolve_size(w, base["sizes"]) is not None
            for w in wishes
            if isinstance(w, str) and w[-1] in "hfkq"
        ), name
        assert (
            base["title"]
            and base["tags"]
            and all(tag == tag.lower() and "_" not in tag for tag in base["tags"])
        )

    for name, others in load_table()["partly_fits"].items():
        assert {name, *others} <= set(load_table()["bases"])


def test_models_name_bases_of_the_table():
    models = Path(__file__).parents[2] / "conf" / "model"

    named = {yaml.safe_load(path.read_text())["lora_base"] for path in models.glob("*.yaml")}

    assert named <= set(load_table()["bases"])
