"""LoRA keys are parsed here: a key -> component, module name, part of the adapter.

This is the place where a new spelling of LoRA keys is added: a suffix to `PART_BY_SUFFIX`, a prefix to
`FLAT_PREFIXES` or `DENOISER_PREFIXES`; what is not applied is listed in `unread_types.yaml`.
`int8run.lora.key_groups` and `task=inspect` call `parse_key`.

The suffix is read first, then the prefix; what is left is the module's name as the file has it. Names that a
trainer wrote with underscores for dots (`lora_unet_...`, `lora_te_...`, `lycoris_...`) stay so: which
underscores were dots, only a list of real modules can tell (`int8run.lora.module_names`).
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from int8run.lora.unread_types import find_unread_type, find_unread_weight

DENOISER = "denoiser"
TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
TEXT_ENCODER_3 = "text_encoder_3"

LOHA_PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
OTHER_LYCORIS_PARTS = ("alpha", "dora_scale", "diff", "diff_b", "w_norm", "b_norm", "on_input")
# of OFT and BOFT: by LyCORIS, by PEFT, and by kohya, which cuts a fused matrix into up to four parts
OFT_SUFFIXES = {".oft_blocks": "oft_blocks", ".rescale": "rescale"}
PEFT_OFT_PART = "oft_R"
PEFT_OFT_SUFFIXES = {".oft_R.weight": PEFT_OFT_PART, ".boft_R": "boft_R", ".boft_s": "boft_s"}
KOHYA_OFT_PARTS = tuple(f"kohya_oft_blocks_{i}" for i in range(4))
KOHYA_OFT_PREFIX = "oft_"

# PEFT's norms of a DoRA: one tensor, in its own module or not
MAGNITUDE_VECTOR = "lora_magnitude_vector"
# the trained value of a norm, which takes the place of the model's own
NEW_NORM = "new_norm"

# suffix -> part of an adapter; the first that ends a key counts
PART_BY_SUFFIX = {
    # a low-rank pair: PEFT, diffusers
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    f".{MAGNITUDE_VECTOR}.weight": "magnitude",
    f".{MAGNITUDE_VECTOR}": "magnitude",
    # kohya, ComfyUI, OneTrainer, LyCORIS
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    # AI-Toolkit: DoRA by rows, and a bias of the pair
    ".magnitude": "magnitude",
    ".lora_up.bias": "up_bias",
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
    f".{NEW_NORM}": NEW_NORM,
    **OFT_SUFFIXES,
    **PEFT_OFT_SUFFIXES,
    **{f".oft_blocks.{i}": part for i, part in enumerate(KOHYA_OFT_PARTS)},
}
# pieces of a key after which PEFT puts the adapter's name, unless a file was saved without it
NAMED_PARTS = {
    "lora_A",
    "lora_B",
    MAGNITUDE_VECTOR,
    "lora_down",
    "lora_up",
    "lora_mid",
    *LOHA_PARTS,
    *LOKR_PARTS,
    *PEFT_OFT_SUFFIXES.values(),
}
# what may stand behind the adapter's name
TENSOR_NAMES = ("weight", "bias", "scale_weight", "weight_scale")
# an adapter inside another one has two names (`default_0.default`)
MAX_ADAPTER_PIECES = 2
UNKNOWN_SUFFIX = "unknown suffix"
# end of a key -> the same in the spelling of `PART_BY_SUFFIX`
OTHER_SPELLINGS = {
    # Wan's modulation is a parameter of its block, and not of a module
    ".diff_m": ".modulation.diff",
    # ComfyUI's names of parameters that are not the weight of a module
    ".weight.diff": ".diff",
    ".bias.diff": ".diff_b",
    ".query_norm.scale.diff": ".query_norm.diff",
    ".key_norm.scale.diff": ".key_norm.diff",
    # control LoRAs of BFL hold the norms of q and k whole
    ".query_norm.scale": f".query_norm.{NEW_NORM}",
    ".key_norm.scale": f".key_norm.{NEW_NORM}",
    ".norm_q.weight": f".norm_q.{NEW_NORM}",
    ".norm_k.weight": f".norm_k.{NEW_NORM}",
    ".norm_added_q.weight": f".norm_added_q.{NEW_NORM}",
    ".norm_added_k.weight": f".norm_added_k.{NEW_NORM}",
}

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
    "oft_unet_": DENOISER,
    "oft_te1_": TEXT_ENCODER,
    "oft_te2_": TEXT_ENCODER_2,
    "oft_te_": TEXT_ENCODER,
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
    "module.",
    "pipe.",
    "pipeline.",
    "dit.",
)
# a wrapper only around one of the prefixes above or a component: some denoisers have a `model` of their own
OUTER_WRAPPER = "model."
# levels that torch.compile, activation checkpoints and FSDP put between a module and its name
TORCH_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_fpw_module",
    "_forward_module",
)
# a component as diffusers' pipelines call it, and ComfyUI's text encoders
COMPONENT_NAMES = tuple(
    f"{name}." for name in (TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3, "text_encoders")
)
# the modules of a language model may begin with `model.` themselves, so less is taken off
TEXT_ENCODER_PREFIXES = ("base_model.model.", "module.")


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
    xlabs = XLABS_KEY.fullmatch(key)
    if xlabs:
        block, processor, half = xlabs.groups()
        return ParsedKey(*split_component(f"{block}.{processor}"), half)

    plain_key = normalize_key(key)
    found = find_unread_type(plain_key)
    if found is not None:
        unread, name = found
        return ParsedKey(*split_component(name), None, unread.reason)

    suffix = find_suffix(plain_key)
    if suffix:
        part, name = PART_BY_SUFFIX[suffix], plain_key.removesuffix(suffix)
        if part == "oft_blocks" and remove_wrappers(name).startswith(KOHYA_OFT_PREFIX):
            part = KOHYA_OFT_PARTS[0]  # bounded otherwise than LyCORIS's
        return ParsedKey(*split_component(name), part)

    unread_weight = find_unread_weight(key)
    if unread_weight is not None:
        return ParsedKey(*split_component(key), None, unread_weight.reason)
    if key.endswith(".weight"):  # of an IA3, when its module also has `on_input`
        return ParsedKey(*split_component(key.removesuffix(".weight")), "weight")
    return ParsedKey(*split_component(key), None, UNKNOWN_SUFFIX)


def normalize_key(key: str) -> str:
    """A key without an adapter's name, its end in the spelling of `PART_BY_SUFFIX`."""
    plain_key, _ = remove_adapter_name(key)
    if not plain_key.endswith(tuple(OTHER_SPELLINGS)):
        return plain_key
    ending = next(ending for ending in OTHER_SPELLINGS if plain_key.endswith(ending))
    return plain_key.removesuffix(ending) + OTHER_SPELLINGS[ending]


def find_suffix(plain_key: str) -> str:
    """The end of a key that tells its part, one of `PART_BY_SUFFIX`; empty where none does.

    Args:
        plain_key: see `normalize_key`.
    """
    if not plain_key.endswith(tuple(PART_BY_SUFFIX)):
        return ""
    return next(suffix for suffix in PART_BY_SUFFIX if plain_key.endswith(suffix))


def remove_adapter_name(key: str) -> tuple[str, str]:
    """`a.lora_A.my_style.weight` -> `a.lora_A.weight`, and `my_style`; an empty one where the key has none.

    A name without anything behind it counts only if it begins with `default`, or where nothing else can
    stand: else it could be any part of an adapter.
    """
    pieces = key.split(".")
    position = find_named_part(pieces)
    if position is None:
        return key, ""

    # `a.lora_A` | `my_style` | `weight`
    part = pieces[: position + 1]
    adapter_name = pieces[position + 1 :]
    tensor_name: list[str] = []
    if adapter_name and adapter_name[-1] in TENSOR_NAMES:
        tensor_name.append(adapter_name.pop())

    is_default = all(piece.startswith("default") for piece in adapter_name)
    may_end_key = is_default or part[-1] == MAGNITUDE_VECTOR
    if not tensor_name and not may_end_key:
        return key, ""
    if len(adapter_name) > MAX_ADAPTER_PIECES or "base_layer" in adapter_name:
        return key, ""
    return ".".join([*part, *tensor_name]), ".".join(adapter_name)


def find_named_part(pieces: Sequence[str]) -> int | None:
    """Where in a key the part of an adapter stands after which its name may follow; None: nowhere."""
    first = max(len(pieces) - MAX_ADAPTER_PIECES - 2, 0)
    for position in range(first, len(pieces)):
        if pieces[position] in NAMED_PARTS:
            return position
    return None


def split_component(name: str) -> tuple[str, str]:
    """The component of a module, and its name without prefixes, wrappers and `.processor`."""
    component, inner = match_component(remove_wrappers(name))
    return component or DENOISER, inner.replace(".processor.", ".").removesuffix(".processor").strip(".")


def remove_wrappers(name: str) -> str:
    """A name without the wrappers around it; with the prefix of its component, where it has one."""
    return strip_prefixes(remove_torch_wrappers(name), DENOISER_PREFIXES)


def remove_torch_wrappers(name: str) -> str:
    """A name without the levels of `TORCH_WRAPPERS`, with dots or with underscores for dots."""
    for wrapper in TORCH_WRAPPERS:
        if wrapper in name:
            pieces = [piece for piece in name.split(".") if piece != wrapper]
            name = ".".join(pieces).removesuffix(f"_{wrapper}").replace(f"{wrapper}_", "")
    return name


def match_component(name: str) -> tuple[str | None, str]:
    """The component that the beginning of a name stands for, and the rest of it; None: it stands for none."""
    for prefix, component in FLAT_PREFIXES.items():
        if name.startswith(prefix):
            # some trainers write a dot too much at either end
            return component, name.removeprefix(prefix).strip("_")

    first, _, rest = name.partition(".")
    if first == "text_encoders" and rest:
        encoder, _, inner = rest.partition(".")
        return COMFY_TEXT_ENCODERS.get(encoder, TEXT_ENCODER), strip_prefixes(inner, ("transformer.",))
    if first in (TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3) and rest:
        return first, strip_prefixes(rest, TEXT_ENCODER_PREFIXES)
    return None, name


def strip_prefixes(name: str, prefixes: tuple[str, ...]) -> str:
    """A name without any of the prefixes, which may nest, and without `model.` around one of them."""
    while True:
        prefix = find_prefix(name, prefixes)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)


def find_prefix(name: str, prefixes: tuple[str, ...]) -> str | None:
    """The prefix that a name begins with, `model.` around one included; None: it begins with none."""
    for prefix in prefixes:
        if name.startswith(prefix):
            return prefix
    if name.startswith(OUTER_WRAPPER):
        wrapped = name.removeprefix(OUTER_WRAPPER)
        if wrapped.startswith((*prefixes, *FLAT_PREFIXES, *COMPONENT_NAMES)):
            return OUTER_WRAPPER
    return None
