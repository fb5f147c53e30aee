"""Low-rank pairs for SDXL's linear layers and convolutions, in every layout."""

import torch
from lora.layouts.names import ATTENTION, CLIP_LAYERS, SDXL_CONV, SDXL_LINEAR
from lora.layouts.pairs import DOWN_UP, KOHYA, PairKeys, add_clip_pairs
from lora.layouts.sample import ALPHA, RANK, Sample, layout


def add_sdxl_pairs(
    s: Sample, keys: PairKeys, alpha: float | None = None, *, diffusers_names: bool = False
) -> None:
    """Low-rank pairs of linear layers and convolutions; without an alpha their scale is 1.

    Args:
        s: the file.
        keys: how the layout writes its keys.
        alpha: of every pair.
        diffusers_names: the keys have the names of diffusers' modules, in place of Stability's.
    """
    scale = 1.0 if alpha is None else alpha / RANK
    for native, module in (SDXL_LINEAR | SDXL_CONV).items():
        w = s.weight(module)  # [out, in] or [out, in, kh, kw]
        kernel_of_1 = [1] * (w.dim() - 2)
        a = s.randn(RANK, *w.shape[1:])
        b = s.randn(len(w), RANK, *kernel_of_1)
        keys.add(s, module if diffusers_names else native, a, b, alpha)
        s.expect(module, scale * torch.einsum("or,r...->o...", b.flatten(1), a))


@layout("sdxl")
def sdxl_kohya(s: Sample) -> None:
    add_sdxl_pairs(s, KOHYA, alpha=ALPHA)
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")
    add_clip_pairs(s, "lora_te2_", "text_encoder_2", "text_model.")


@layout("sdxl")
def sdxl_kohya_diffusers_names(s: Sample) -> None:
    add_sdxl_pairs(s, KOHYA, alpha=ALPHA, diffusers_names=True)


@layout("sdxl")
def sdxl_comfyui(s: Sample) -> None:
    add_sdxl_pairs(s, PairKeys("diffusion_model.", *DOWN_UP), alpha=ALPHA)


@layout("sdxl")
def sdxl_peft(s: Sample) -> None:
    add_sdxl_pairs(s, PairKeys("unet."), diffusers_names=True)
    for component, level in (("text_encoder", ""), ("text_encoder_2", "text_model.")):
        for name in CLIP_LAYERS:
            module = f"{level}encoder.layers.0.{name}"
            a, b = s.pair(*s.weight(module, component).shape)
            s.add(f"{component}.text_model.encoder.layers.0.{name}", lora_A__weight=a, lora_B__weight=b)
            s.expect(module, b @ a, component=component)


@layout("sdxl")
def sdxl_peft_wrapped(s: Sample) -> None:
    add_sdxl_pairs(s, PairKeys("unet.base_model.model."), diffusers_names=True)


@layout("sdxl")
def diffusers_old_processors(s: Sample) -> None:
    """Before PEFT: attention processors, with `_lora` after the name; text encoders have other names."""
    block = "mid_block.attentions.0.transformer_blocks.0.attn1"
    for name in ATTENTION:
        a, b = s.pair(*s.weight(f"{block}.{name}").shape)
        old = f"unet.{block}.processor.{name.removesuffix('.0')}_lora"
        s.add(old, down__weight=a, up__weight=b)
        s.expect(f"{block}.{name}", b @ a)
    for old, name in (("to_q_lora", "q_proj"), ("to_out_lora", "out_proj")):
        module = f"encoder.layers.0.self_attn.{name}"
        a, b = s.pair(*s.weight(module, "text_encoder").shape)
        s.add(f"text_encoder.text_model.encoder.layers.0.self_attn.{old}", down__weight=a, up__weight=b)
        s.expect(module, b @ a, component="text_encoder")
    a, b = s.pair(*s.weight("encoder.layers.0.mlp.fc1", "text_encoder").shape)
    s.add("text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer", down__weight=a, up__weight=b)
    s.expect("encoder.layers.0.mlp.fc1", b @ a, component="text_encoder")


@layout("sdxl")
def diffusers_old_layers(s: Sample) -> None:
    add_sdxl_pairs(s, PairKeys("unet.", "lora.down.weight", "lora.up.weight"), diffusers_names=True)
