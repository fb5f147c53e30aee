"""LoRA keys are parsed here: a key -> component, module name, part of the adapter.

This is the place where a new spelling of LoRA keys is added: a suffix to `PART_BY_SUFFIX`, a prefix to
`FLAT_PREFIXES` or `DENOISER_PREFIXES`. `int8run.lora.load` and `task=inspect` call `parse_key`.

The suffix is read first, then the prefix; what is left is the module's name as the file has it. Names that a
trainer wrote with underscores for dots (`lora_unet_...`, `lora_te_...`, `lycoris_...`) stay so: which
underscores were dots, only a list of real modules can tell (`int8run.lora.module_names`).
"""

import re
from typing import NamedTuple

DENOISER = "denoiser"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
TEXT_ENCODER_3 = "text_encoder_3"

# PEFT puts the adapter's name into the key, unless a file was saved without it
PEFT_ADAPTER_NAMES = ("", ".default", ".default_0")
LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
OTHER_LYCORIS_PARTS = ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "on_input")

# suffix -> part of an adapter; the first that ends a key counts
PART_BY_SUFFIX = {
    # a low-rank pair: PEFT, diffusers
    **{f".lora_A{adapter}.weight": "down" for adapter in PEFT_ADAPTER_NAMES},
    **{f".lora_B{adapter}.weight": "up" for adapter in PEFT_ADAPTER_NAMES},
    **{f".lora_B{adapter}.bias": "up_bias" for adapter in PEFT_ADAPTER_NAMES},
    **{f".lora_magnitude_vector{adapter}.weight": "magnitude" for adapter in PEFT_ADAPTER_NAMES},
    **{f".lora_magnitude_vector{adapter}": "magnitude" for adapter in PEFT_ADAPTER_NAMES},
    # kohya, ComfyUI, OneTrainer, LyCORIS
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    # scales of an int8 file
    ".lora_down.scale_weight": "down_scale",
    ".lora_up.scale_weight": "up_scale",
    ".lora_A.scale_weight": "down_scale",
    ".lora_B.scale_weight": "up_scale",
    # diffusers before PEFT: attention processors, other layers, text encoders
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    # Mochi
    ".lora_A": "down",
    ".lora_B": "up",
    **{f".{part}": part for part in (*LOHA_PARTS, *LOKR_PARTS, *OTHER_LYCORIS_PARTS)},
}

# suffix -> an adapter type that is not applied, together with everything else of its module
UNSUPPORTED_SUFFIXES = {
    **{f".{part}.weight": "GLoRA" for part in ("a1", "a2", "b1", "b2", "bm")},
    ".oft_blocks": "OFT or BOFT",
    ".rescale": "OFT or BOFT",
    ".oft_R.weight": "OFT or BOFT",
    ".oft_r": "OFT or BOFT",
    ".bias_indices": "sparse bias",
    ".bias_values": "sparse bias",
    ".bias_size": "sparse bias",
    ".set_weight": "whole replacement (set_weight)",
    ".reshape_weight": "whole replacement (reshape_weight)",
    ".lora_embedding_A": "LoRA of an embedding",
    ".lora_embedding_B": "LoRA of an embedding",
    ".ia3_l": "IA3 as PEFT stores it",
    ".vera_lambda_b": "VeRA",
    ".vera_lambda_d": "VeRA",
    ".lokr_t1": "LoKr with lokr_t1",
    ".scalar": "LyCORIS change with its scalar left outside",
}
# beginnings of the keys of textual inversions, which some files bring along
EMBEDDING_PREFIXES = ("bundle_emb.", "emb_params", "string_to_param", "string_to_token")

# attention processors of xlabs have q, k and v in one pair; their names stay, because no model has such
# modules
XLABS_KEY = re.compile(r"(.+)\.processor\.((?:qkv|proj)_lora[12]?)\.(down|up)\.weight")

# prefix -> component, of names with underscores for dots; nothing else is taken off behind them
FLAT_PREFIXES = {
    "lora_unet__": DENOISER,
    "lora_unet_": DENOISER,
    "lora_transformer_": DENOISER,
    "lora_prior_unet_": DENOISER,
    "lycoris_": DENOISER,
    "lora_prior_te_": TEXT_ENCODER,
    "lora_te1_": TEXT_ENCODER,
    "lora_te2_": TEXT_ENCODER_2,
    "lora_te3_": TEXT_ENCODER_3,  # T5; a pipeline with two text encoders has it as its second
    "lora_te_": TEXT_ENCODER,
}
# ComfyUI's names of text encoders, after `text_encoders.`; any other one is the only text encoder of its
# model
COMFY_TEXT_ENCODERS = {"clip_l": TEXT_ENCODER, "clip_g": TEXT_ENCODER_2, "t5xxl": TEXT_ENCODER_3}
# wrappers around names with dots, nested in any way
DENOISER_PREFIXES = (
    "base_model.model.model.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
)
# the modules of a language model may begin with `model.` themselves, so less is taken off
TEXT_ENCODER_PREFIXES = ("base_model.model.",)


class ParsedKey(NamedTuple):
    """The key of a tensor, taken apart.

    Args:
        component: `denoiser`, `text_encoder`, `text_encoder_2` or `text_encoder_3`.
        name: the module's name as the file has it, without prefixes.
        part: which tensor of an adapter it is, a value of `PART_BY_SUFFIX` or `weight`; None: it is not
            applied.
        reason: why it is not applied, where `part` is None.
    """

    component: str
    name: str
    part: str | None
    reason: str = ""


def parse_key(key: str) -> ParsedKey:
    """`transformer.a.b.lora_A.weight` -> ParsedKey("denoiser", "a.b", "down")."""
    if key.startswith(EMBEDDING_PREFIXES):
        return ParsedKey(DENOISER, key, None, "textual inversion, not a LoRA")

    xlabs = XLABS_KEY.fullmatch(key)
    if xlabs:
        block, processor, half = xlabs.groups()
        return ParsedKey(*split_component(f"{block}.{processor}"), half)

    for suffix, adapter_type in UNSUPPORTED_SUFFIXES.items():
        if key.endswith(suffix):
            module = split_component(key.removesuffix(suffix))
            return ParsedKey(*module, None, f"unsupported adapter type: {adapter_type}")

    for suffix, part in PART_BY_SUFFIX.items():
        if key.endswith(suffix):
            return ParsedKey(*split_component(key.removesuffix(suffix)), part)

    if key.endswith(".weight"):  # of an IA3, when its module also has `on_input`
        return ParsedKey(*split_component(key.removesuffix(".weight")), "weight")
    return ParsedKey(*split_component(key), None, "unknown suffix")


def split_component(name: str) -> tuple[str, str]:
    """The component of a module, and its name without prefixes and without `.processor`."""
    unwrapped = strip_prefixes(name, DENOISER_PREFIXES)  # a wrapper may hold a name with underscores
    component, inner = match_component(unwrapped)
    return component or DENOISER, inner.replace(".processor.", ".").removesuffix(".processor")


def match_component(name: str) -> tuple[str | None, str]:
    """The component that the beginning of a name stands for, and the rest of it; None: it stands for none."""
    for prefix, component in FLAT_PREFIXES.items():
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)

    first, _, rest = name.partition(".")
    if first == "text_encoders" and rest:
        encoder, _, inner = rest.partition(".")
        return COMFY_TEXT_ENCODERS.get(encoder, TEXT_ENCODER), strip_prefixes(inner, ("transformer.",))
    if first in (TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3) and rest:
        return first, strip_prefixes(rest, TEXT_ENCODER_PREFIXES)
    return None, name


def strip_prefixes(name: str, prefixes: tuple[str, ...]) -> str:
    """A name without any of the prefixes, which may nest."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return strip_prefixes(name.removeprefix(prefix), prefixes)
    return name
