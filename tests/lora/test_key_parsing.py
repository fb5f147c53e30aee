"""Names of tensors in LoRA files: component, module name and part, for every way of writing them."""

import pytest

from int8run.lora.key_parsing import PART_BY_SUFFIX, ParsedKey, parse_key, remove_adapter_name
from int8run.lora.unread_types import load_signatures


@pytest.mark.parametrize(
    ("key", "component", "name", "part"),
    [
        ("transformer.a.b.lora_A.weight", "denoiser", "a.b", "down"),
        ("transformer.a.b.lora_B.default.weight", "denoiser", "a.b", "up"),
        ("transformer.a.b.lora_A.default_0.weight", "denoiser", "a.b", "down"),
        ("transformer.a.b.lora_B.bias", "denoiser", "a.b", "up_bias"),
        ("transformer.a.b.lora_B.default.bias", "denoiser", "a.b", "up_bias"),
        ("transformer.a.b.lora_A.default_0.default.weight", "denoiser", "a.b", "down"),
        ("transformer.a.b.lora_B.my_style.weight", "denoiser", "a.b", "up"),
        ("transformer.a.b.lora_B.my_style.bias", "denoiser", "a.b", "up_bias"),
        ("transformer.a.b.lora_A.default", "denoiser", "a.b", "down"),
        ("transformer.a.b.hada_w1_a.default", "denoiser", "a.b", "hada_w1_a"),
        ("transformer.a.b.lora_magnitude_vector.my_style", "denoiser", "a.b", "magnitude"),
        ("transformer.a.b.magnitude", "denoiser", "a.b", "magnitude"),
        ("lora_unet_a_b.lora_up.bias", "denoiser", "a_b", "up_bias"),
        ("transformer.a.b.lora_magnitude_vector", "denoiser", "a.b", "magnitude"),
        ("transformer.a.b.lora_magnitude_vector.weight", "denoiser", "a.b", "magnitude"),
        ("transformer.a.b.lora_magnitude_vector.default.weight", "denoiser", "a.b", "magnitude"),
        ("a.b.lora_A", "denoiser", "a.b", "down"),
        ("a.b.lora_B", "denoiser", "a.b", "up"),
        ("unet.a.lora.down.weight", "denoiser", "a", "down"),
        ("unet.a.lora.up.weight", "denoiser", "a", "up"),
        ("unet.mid.attn1.processor.to_q_lora.down.weight", "denoiser", "mid.attn1.to_q", "down"),
        ("unet.mid.attn1.processor.to_out_lora.up.weight", "denoiser", "mid.attn1.to_out", "up"),
        ("unet.mid.attn1.to_k_lora.up.weight", "denoiser", "mid.attn1.to_k", "up"),
        ("unet.mid.attn1.processor.add_k_proj_lora.up.weight", "denoiser", "mid.attn1.add_k_proj", "up"),
        ("double_blocks.0.processor.qkv_lora1.down.weight", "denoiser", "double_blocks.0.qkv_lora1", "down"),
        ("double_blocks.0.processor.proj_lora2.up.weight", "denoiser", "double_blocks.0.proj_lora2", "up"),
        (
            "diffusion_model.single_blocks.7.processor.qkv_lora.up.weight",
            "denoiser",
            "single_blocks.7.qkv_lora",
            "up",
        ),
        ("single_blocks.7.processor.proj_lora.down.weight", "denoiser", "single_blocks.7.proj_lora", "down"),
        (
            "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
            "denoiser",
            "double_blocks_0_img_attn_qkv",
            "down",
        ),
        ("lora_unet__blocks_0_ffn_0.lora_up.weight", "denoiser", "blocks_0_ffn_0", "up"),
        (
            "lora_transformer_transformer_blocks_0_ff_net_2.alpha",
            "denoiser",
            "transformer_blocks_0_ff_net_2",
            "alpha",
        ),
        (
            "lycoris_transformer_blocks_0_ff_net_2.lokr_w1",
            "denoiser",
            "transformer_blocks_0_ff_net_2",
            "lokr_w1",
        ),
        ("lora_prior_unet_a_b.lora_mid.weight", "denoiser", "a_b", "mid"),
        ("diffusion_model.lora_unet_a_b.lora_mid.weight", "denoiser", "a_b", "mid"),
        ("base_model.model.diffusion_model.a.diff", "denoiser", "a", "diff"),
        ("base_model.model.model.a.diff_b", "denoiser", "a", "diff_b"),
        ("transformer.base_model.model.a.w_norm", "denoiser", "a", "w_norm"),
        ("unet.base_model.model.a.b_norm", "denoiser", "a", "b_norm"),
        ("model.diffusion_model.a.dora_scale", "denoiser", "a", "dora_scale"),
        ("model.a.alpha", "denoiser", "model.a", "alpha"),
        ("_orig_mod.a.alpha", "denoiser", "a", "alpha"),
        ("module.a.alpha", "denoiser", "a", "alpha"),
        ("transformer._orig_mod.a.alpha", "denoiser", "a", "alpha"),
        ("pipe.dit.a.alpha", "denoiser", "a", "alpha"),
        ("model.transformer.a.alpha", "denoiser", "a", "alpha"),
        ("model.text_encoder.model.a.alpha", "text_encoder", "model.a", "alpha"),
        ("a._checkpoint_wrapped_module.b._fsdp_wrapped_module.alpha", "denoiser", "a.b", "alpha"),
        ("lora_unet__orig_mod_a__checkpoint_wrapped_module_b.alpha", "denoiser", "a_b", "alpha"),
        ("lora_unet_a_b__orig_mod.alpha", "denoiser", "a_b", "alpha"),
        ("text_encoder._orig_mod.a.alpha", "text_encoder", "a", "alpha"),
        ("lora_unet_a_b_.alpha", "denoiser", "a_b", "alpha"),
        ("transformer.a.b..alpha", "denoiser", "a.b", "alpha"),
        ("lora_transformer__a_b.alpha", "denoiser", "a_b", "alpha"),
        ("blocks.0.transformer.proj.alpha", "denoiser", "blocks.0.transformer.proj", "alpha"),
        ("transformer_blocks.0.proj.alpha", "denoiser", "transformer_blocks.0.proj", "alpha"),
        ("a.on_input", "denoiser", "a", "on_input"),
        ("diffusion_model.blocks.0.diff_m", "denoiser", "blocks.0.modulation", "diff"),
        ("diffusion_model.head.modulation.diff", "denoiser", "head.modulation", "diff"),
        ("diffusion_model.a.weight.diff", "denoiser", "a", "diff"),
        ("diffusion_model.a.bias.diff", "denoiser", "a", "diff_b"),
        ("a.norm.query_norm.scale.diff", "denoiser", "a.norm.query_norm", "diff"),
        ("a.norm.key_norm.scale", "denoiser", "a.norm.key_norm", "new_norm"),
        ("transformer.a.norm_added_q.weight", "denoiser", "a.norm_added_q", "new_norm"),
        ("a.weight", "denoiser", "a", "weight"),
        ("a.lora_down.scale_weight", "denoiser", "a", "down_scale"),
        ("a.lora_up.scale_weight", "denoiser", "a", "up_scale"),
        ("a.hada_t1", "denoiser", "a", "hada_t1"),
        ("a.lokr_w2_b", "denoiser", "a", "lokr_w2_b"),
        (
            "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha",
            "text_encoder",
            "text_model_encoder_layers_0_mlp_fc1",
            "alpha",
        ),
        ("lora_te1_a.alpha", "text_encoder", "a", "alpha"),
        ("lora_te2_a.alpha", "text_encoder_2", "a", "alpha"),
        ("lora_te3_encoder_block_0.alpha", "text_encoder_3", "encoder_block_0", "alpha"),
        ("lora_prior_te_a.alpha", "text_encoder", "a", "alpha"),
        ("text_encoder.text_model.a.lora_linear_layer.up.weight", "text_encoder", "text_model.a", "up"),
        ("text_encoder.text_model.a.lora_linear_layer.down.weight", "text_encoder", "text_model.a", "down"),
        ("text_encoder.self_attn.to_q_lora.down.weight", "text_encoder", "self_attn.to_q", "down"),
        ("text_encoder_2.a.lora_A.weight", "text_encoder_2", "a", "down"),
        ("text_encoder_3.a.lora_A.weight", "text_encoder_3", "a", "down"),
        (
            "text_encoder.base_model.model.model.layers.0.q.lora_A.weight",
            "text_encoder",
            "model.layers.0.q",
            "down",
        ),
        ("base_model.model.text_encoder.a.lora_A.weight", "text_encoder", "a", "down"),
        (
            "text_encoders.clip_l.transformer.text_model.a.lora_up.weight",
            "text_encoder",
            "text_model.a",
            "up",
        ),
        (
            "text_encoders.clip_g.transformer.text_model.a.lora_up.weight",
            "text_encoder_2",
            "text_model.a",
            "up",
        ),
        (
            "text_encoders.t5xxl.transformer.encoder.block.0.lora_up.weight",
            "text_encoder_3",
            "encoder.block.0",
            "up",
        ),
        (
            "text_encoders.qwen25_7b.transformer.model.layers.0.lora_up.weight",
            "text_encoder",
            "model.layers.0",
            "up",
        ),
        ("text_encoders.transformer.model.layers.0.lora_up.weight", "text_encoder", "model.layers.0", "up"),
        ("lycoris_x.oft_blocks", "denoiser", "x", "oft_blocks"),
        ("lora_unet_x.rescale", "denoiser", "x", "rescale"),
        ("oft_unet_x.oft_blocks", "denoiser", "x", "kohya_oft_blocks_0"),
        ("transformer.oft_unet_x.oft_blocks", "denoiser", "x", "kohya_oft_blocks_0"),
        ("oft_unet_x.oft_blocks.2", "denoiser", "x", "kohya_oft_blocks_2"),
        ("base_model.model.x.oft_R.weight", "denoiser", "x", "oft_R"),
        ("base_model.model.x.oft_R.my_style.weight", "denoiser", "x", "oft_R"),
        ("base_model.model.x.boft_R", "denoiser", "x", "boft_R"),
        ("base_model.model.x.boft_s.default", "denoiser", "x", "boft_s"),
    ],
)
def test_key_is_parsed_into_component_name_and_part(key, component, name, part):
    assert parse_key(key) == ParsedKey(component, name, part)


@pytest.mark.parametrize(
    ("key", "name", "reason"),  # no reason: it is applied
    [
        ("transformer.x.a1.weight", "x", "unsupported adapter type: GLoRA"),
        ("lora_unet_x.b2.weight", "x", "unsupported adapter type: GLoRA"),
        ("base_model.model.x.oft_r", "x", "unsupported adapter type: OFT of PEFT before 0.14"),
        ("base_model.model.x.oft_embedding_R.weight", "x", "unsupported adapter type: OFT of an embedding"),
        ("diffusion_model.x.set_weight", "x", "unsupported adapter type: whole replacement (set_weight)"),
        (
            "diffusion_model.x.reshape_weight",
            "x",
            "unsupported adapter type: whole replacement (reshape_weight)",
        ),
        ("lora_unet_x.bias_indices", "x", "unsupported adapter type: sparse bias"),
        ("text.x.lora_embedding_A", "text.x", "unsupported adapter type: LoRA of an embedding"),
        ("transformer.x.lora_A.something", "x.lora_A.something", "unknown suffix"),
        ("transformer.x.lora_A.default.something", "x.lora_A.default.something", "unknown suffix"),
        ("transformer.x.lora_A.a.b.c.weight", "x.lora_A.a.b.c", None),  # a plain weight
        ("x.lambda_layer", "x", "unsupported adapter type: T-LoRA"),
        ("x.lora_E.default", "x", "unsupported adapter type: AdaLoRA"),
        ("x.norm.ln_tuning_layers.weight", "x.norm", "unsupported adapter type: LN tuning"),
        (
            "x.lora_A.default.weight_scale",
            "x",
            "unsupported adapter type: int8 or fp8 LoRA with weight_scale",
        ),
        ("x.lora_down", "x", "unsupported adapter type: LoRA in nunchaku's own layout"),
        ("x.attn.to_q.lora_down", "x", "unsupported adapter type: PDD of MiniMax-H3"),
        (
            "diffusion_model.final_layer.video_out.set_weight",
            "final_layer",
            "unsupported adapter type: PDD of MiniMax-H3",
        ),
        ("final_layer.audio_out.set_bias", "final_layer", "unsupported adapter type: PDD of MiniMax-H3"),
        ("image_proj.norm.weight", "image_proj.norm.weight", "IP-Adapter, not a LoRA"),
        (
            "controlnet_blocks.0.weight",
            "controlnet_blocks.0.weight",
            "ControlNet, not a LoRA",
        ),
        ("controlnet_blocks.0.lora_A.weight", "controlnet_blocks.0", None),
        ("clip_g", "clip_g", "textual inversion, not a LoRA"),
        ("transformer.x.bias", "x.bias", "unknown suffix"),
        ("iteration", "iteration", "unknown suffix"),
        ("", "", "unknown suffix"),
        (
            "bundle_emb.word.string_to_param.*",
            "bundle_emb.word.string_to_param.*",
            "textual inversion, not a LoRA",
        ),
        ("emb_params", "emb_params", "textual inversion, not a LoRA"),
    ],
)
def test_unsupported_key_has_a_reason(key, name, reason):
    if reason is None:
        parsed = parse_key(key)
        assert parsed.part is not None and parsed.name == name and not parsed.reason
    else:
        assert parse_key(key) == ParsedKey("denoiser", name, None, reason)


@pytest.mark.parametrize("suffix", PART_BY_SUFFIX)
def test_every_suffix_is_recognized(suffix):
    # a suffix that ends with an earlier one would never be
    name = "x" if suffix.startswith(".") else "x_y"

    assert parse_key(f"transformer.{name}{suffix}") == ParsedKey("denoiser", name, PART_BY_SUFFIX[suffix])


@pytest.mark.parametrize(
    ("key", "plain", "adapter"),
    [
        ("x.lora_A.weight", "x.lora_A.weight", ""),
        ("x.lora_A.my_style.weight", "x.lora_A.weight", "my_style"),
        ("x.lora_A.default_0.default.weight", "x.lora_A.weight", "default_0.default"),
        ("x.lora_B.a.bias", "x.lora_B.bias", "a"),
        ("x.lora_A.base_layer.weight", "x.lora_A.base_layer.weight", ""),
        ("x.lora_A.a.b.c.weight", "x.lora_A.a.b.c.weight", ""),
        ("x.lokr_w1.default", "x.lokr_w1", "default"),
        ("x.lokr_w1.scale", "x.lokr_w1.scale", ""),
        ("x.alpha", "x.alpha", ""),
        ("", "", ""),
    ],
)
def test_name_of_the_adapter_is_taken_out(key, plain, adapter):
    assert remove_adapter_name(key) == (plain, adapter)


def test_deep_wrappers_are_taken_off_without_recursion():
    assert parse_key("model.transformer." * 3000 + "a.alpha") == ParsedKey("denoiser", "a", "alpha")


def test_every_listed_type_is_recognized_by_each_of_its_signatures():
    signatures = load_signatures()
    keys = {
        **{f"transformer.x.{part}": unread for part, unread in signatures.by_part.items()},
        **{f"transformer.x.{part}.default.weight": unread for part, unread in signatures.by_part.items()},
        **{f"transformer.x{ending}": unread for ending, unread in signatures.by_ending.items()},
        **{f"{prefix}x": unread for prefix, unread in signatures.by_prefix.items()},
        **dict(signatures.by_key),
        **{f"x.{piece}.y.weight": unread for piece, unread in signatures.by_weight.items()},
    }

    assert {key: parse_key(key).reason for key in keys} == {
        key: unread.reason for key, unread in keys.items()
    }
    assert all(parse_key(key).part is None for key in keys)


def test_no_listed_type_hides_a_part_that_is_applied():
    signatures = load_signatures()
    applied = {suffix.strip(".").split(".")[0] for suffix in PART_BY_SUFFIX}

    assert not applied & signatures.by_part.keys()
    assert not [end for end in signatures.by_ending if end in PART_BY_SUFFIX]
