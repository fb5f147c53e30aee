"""Low-rank pairs for Flux, in every layout: with the authors' names and with those of diffusers."""

import json
import math
from collections.abc import Callable

import torch
from lora.layouts.names import CLIP_LAYERS, FLUX, FLUX_MODULES, XLABS
from lora.layouts.pairs import DEFAULT_ADAPTER, DOWN_UP, KOHYA, PairKeys, add_clip_pairs
from lora.layouts.sample import ALPHA, RANK, SCALE, Sample, layout


def make_peft_settings(**settings: object) -> dict[str, str]:
    """Metadata as diffusers writes it."""
    return {"format": "pt", "lora_adapter_metadata": json.dumps(settings)}


def add_flux_pairs(s: Sample, keys: PairKeys, alpha: float | None = None) -> None:
    """Every native matrix of Flux as a low-rank pair; without an alpha its scale is 1."""
    scale = 1.0 if alpha is None else alpha / RANK
    for native in FLUX:
        a, b = s.pair(*s.native_shape(native))
        keys.add(s, native, a, b, alpha)
        s.expect_native(native, scale * b @ a)


@layout("flux")
def kohya(s: Sample) -> None:
    add_flux_pairs(s, KOHYA, alpha=ALPHA)


@layout("flux")
def kohya_without_alpha(s: Sample) -> None:
    add_flux_pairs(s, KOHYA)


@layout("flux")
def kohya_with_text_encoder(s: Sample) -> None:
    add_flux_pairs(s, KOHYA, alpha=ALPHA)
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")


@layout("flux")
def kohya_alphas_and_ranks_differ(s: Sample) -> None:
    for i, native in enumerate(FLUX):
        rank, alpha = 1 + i % 3, float(i % 4)
        a, b = s.pair(*s.native_shape(native), rank)
        KOHYA.add(s, native, a, b, alpha)
        scale = (alpha or rank) / rank  # alpha 0 means the rank
        s.expect_native(native, scale * b @ a)


@layout("flux")
def kohya_split_qkv(s: Sample) -> None:
    """q, k and v trained apart, in one pair of rank 3r: up has a block for each and zeros elsewhere."""
    for native in ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1"):
        targets = FLUX[native]
        pairs = [s.pair(*s.weight(target).shape) for target in targets]
        joined_a = torch.cat([a for a, _ in pairs])  # [3 r, in]
        joined_b = torch.block_diag(*[b for _, b in pairs])  # [out of all, 3 r]
        KOHYA.add(s, native, joined_a, joined_b, ALPHA)
        scale = ALPHA / (RANK * len(targets))
        for target, (a, b) in zip(targets, pairs, strict=True):
            s.expect(target, scale * b @ a)


@layout("flux")
def diffsynth_double_underscore(s: Sample) -> None:
    add_flux_pairs(s, PairKeys("lora_unet__", *DOWN_UP, joined=True), alpha=ALPHA)


@layout("flux")
def bfl_native(s: Sample) -> None:
    add_flux_pairs(s, PairKeys(""))


@layout("flux")
def ai_toolkit(s: Sample) -> None:
    add_flux_pairs(s, PairKeys("diffusion_model."))


@layout("flux")
def comfyui(s: Sample) -> None:
    add_flux_pairs(s, PairKeys("diffusion_model.", *DOWN_UP), alpha=ALPHA)


@layout("flux")
def comfyui_model_prefix_and_text_encoder(s: Sample) -> None:
    add_flux_pairs(s, PairKeys("model.diffusion_model.", *DOWN_UP), alpha=ALPHA)
    for name in CLIP_LAYERS:
        module = f"encoder.layers.0.{name}"
        a, b = s.pair(*s.weight(module, "text_encoder").shape)
        s.add(f"text_encoders.clip_l.transformer.text_model.{module}", lora_down__weight=a, lora_up__weight=b)
        s.expect(module, b @ a, component="text_encoder")


@layout("flux")
def peft_wrapped_native(s: Sample) -> None:
    add_flux_pairs(s, PairKeys("base_model.model.", *DEFAULT_ADAPTER))


@layout("flux")
def xlabs(s: Sample) -> None:
    for name, targets in XLABS.items():
        sizes = [len(s.weight(target)) for target in targets]
        columns = s.weight(targets[0]).shape[1]
        a, b = s.pair(sum(sizes), columns)
        s.add(name, down__weight=a, up__weight=b)
        for target, rows in zip(targets, (b @ a).split(sizes), strict=True):
            s.expect(target, rows)


def use_scale_of_1(module: str) -> float:
    """The scale of a pair of which nothing else is said."""
    return 1.0


def add_flux_diffusers_pairs(
    s: Sample, keys: PairKeys, scale: Callable[[str], float] = use_scale_of_1
) -> None:
    """Every module of Flux as a low-rank pair without an alpha of its own.

    Args:
        s: the file.
        keys: how the layout writes its keys.
        scale: from a module to the scale that something else in the file gives its pair.
    """
    for module in FLUX_MODULES:
        a, b = s.pair(*s.weight(module).shape)
        keys.add(s, module, a, b)
        s.expect(module, scale(module) * b @ a)


@layout("flux")
def peft(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("transformer."))


@layout("flux")
def peft_adapter_name(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("transformer.", *DEFAULT_ADAPTER))


@layout("flux")
def peft_nested_prefixes(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("transformer.base_model.model."))


@layout("flux")
def peft_folder(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("base_model.model.transformer."))


@layout("flux")
def mochi_style(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("", "lora_A", "lora_B"))


@layout("flux")
def alpha_in_the_header(s: Sample) -> None:
    patterns = {"attn.to_q": 5, "transformer_blocks.0.ff.net.2": 1}
    s.metadata = make_peft_settings(
        **{
            "transformer.lora_alpha": ALPHA,
            "transformer.alpha_pattern": patterns,
            "text_encoder.lora_alpha": 99,
        }
    )

    def find_scale(module: str) -> float:
        if module.endswith("attn.to_q"):
            return 5 / RANK
        if module == "transformer_blocks.0.ff.net.2":
            return 1 / RANK
        return SCALE

    add_flux_diffusers_pairs(s, PairKeys("transformer."), find_scale)


@layout("flux")
def rs_lora(s: Sample) -> None:
    s.metadata = make_peft_settings(**{"transformer.lora_alpha": ALPHA, "transformer.use_rslora": True})
    add_flux_diffusers_pairs(s, PairKeys("transformer."), lambda module: ALPHA / math.sqrt(RANK))


@layout("flux")
def rank_pattern(s: Sample) -> None:
    s.metadata = make_peft_settings(
        **{
            "transformer.lora_alpha": ALPHA,
            "transformer.r": RANK,
            "transformer.rank_pattern": {"proj_out": 3},
        }
    )
    for module in FLUX_MODULES:
        rank = 3 if module.endswith("proj_out") else RANK
        a, b = s.pair(*s.weight(module).shape, rank)
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b)
        s.expect(module, ALPHA / rank * b @ a)


@layout("flux")
def peft_with_bias(s: Sample) -> None:
    s.metadata = make_peft_settings(**{"transformer.lora_alpha": ALPHA})
    for module in ("x_embedder", "transformer_blocks.1.attn.to_k"):
        a, b = s.pair(*s.weight(module).shape)
        bias = s.randn(len(b))
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b, lora_B__bias=bias)
        s.expect(module, SCALE * b @ a, SCALE * bias)


@layout("flux")
def onetrainer(s: Sample) -> None:
    keys = PairKeys("lora_transformer_", *DOWN_UP, joined=True)
    for module in FLUX_MODULES:
        a, b = s.pair(*s.weight(module).shape)
        keys.add(s, module, a, b, ALPHA)
        s.expect(module, SCALE * b @ a)
    add_clip_pairs(s, "lora_te1_", "text_encoder", "")


@layout("flux")
def half_precision(s: Sample) -> None:
    add_flux_diffusers_pairs(s, PairKeys("transformer."))
    for i, module in enumerate(FLUX_MODULES):
        dtype = (torch.bfloat16, torch.float16, torch.float8_e4m3fn)[i % 3]
        a, b = (s.tensors[f"transformer.{module}.lora_{half}.weight"].to(dtype) for half in "AB")
        s.add(f"transformer.{module}", lora_A__weight=a, lora_B__weight=b)
        s.expect(module, b.float() @ a.float())


@layout("flux")
def quantized(s: Sample) -> None:
    for i, native in enumerate(("double_blocks.0.img_attn.qkv", "double_blocks.1.txt_mlp.2")):
        out, columns = s.native_shape(native)
        a = s.randint8(RANK, columns)
        b = s.randint8(out, RANK)
        scale_a = torch.tensor(0.01)
        scale_b = torch.tensor([0.02])
        if i == 1:
            scale_b = s.randn(out, 1).abs() / 100  # one of each row
        module = f"diffusion_model.{native}"
        s.add(module, lora_down__weight=a, lora_up__weight=b, alpha=torch.tensor(ALPHA))
        s.add(module, lora_down__scale_weight=scale_a, lora_up__scale_weight=scale_b)
        s.expect_native(native, SCALE * (b.float() * scale_b) @ (a.float() * scale_a))
