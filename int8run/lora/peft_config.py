"""Which PEFT settings (`LoraConfig`, `LoHaConfig`, `LoKrConfig`) a LoRA can have here, besides its scale.

Most settings of a training do not matter for what the tensors mean. Some do: they make another change of the
same names. Those are listed here, and refused or told by name, since the tensors alone would load.
Fields as in PEFT 0.21.
"""

from collections.abc import Collection, Mapping

from int8run.errors import LoraError
from int8run.lora.untrusted_text import as_list, sanitize_text
from int8run.lora.written_settings import (
    INITIALIZATION_KEY,
    MAX_TEXT_CHARS,
    OFT_SETTINGS,
    RELATIVE_INITIALIZATIONS,
    Place,
    Settings,
)

# types whose tensors are read; what any other type means is not known
READ_TYPES = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
# setting -> what the tensors are because of it
REFUSED_SETTINGS = {
    "use_qalora": "acts on sums of groups of inputs (QA-LoRA)",
    "layer_replication": "was trained on a model whose layers are repeated",
    "alora_invocation_tokens": "acts only on tokens after an invocation (aLoRA)",
    "kasa_config": "is relative to a truncated base (KaSA)",
    "arrow_config": "chooses between several adapters (Arrow)",
    "monteclora_config": "samples its factors (MonteCLoRA)",
    "use_bdlora": "has block-diagonal factors (BD-LoRA)",
    "target_parameters": "changes parameters that belong to no layer",
    "megatron_config": "is split over several devices (Megatron)",
    "trainable_token_indices": "trains tokens of an embedding as well",
}
# settings of a training, and those that are read elsewhere
KNOWN_SETTINGS = {
    *("task_type", "peft_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"),
    *("r", "rank", "alpha", "lora_alpha", "network_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("dropout", "lora_dropout", "boft_dropout", "rank_dropout", "rank_dropout_scale", "module_dropout"),
    *("use_effective_conv2d", "decompose_both", "decompose_factor", "fan_in_fan_out", "bias", "lora_bias"),
    *("use_dora", "modules_to_save", "init_lora_weights", "init_weights", "init_ia3_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "qalora_group_size"),
    *("megatron_core", "runtime_config", "ensure_weight_tying", "_custom_modules", "peft_config", "format"),
    *("oft_block_size", "boft_block_size", "boft_block_num", "boft_n_butterfly_factor", *OFT_SETTINGS),
}
# `init_lora_weights` after which the adapter is the whole change: the base was not touched
PLAIN_INITIALIZATIONS = ("true", "false", "gaussian", "eva", "orthogonal", "mica", "lycoris", "none")
# setting that is true -> the part that each module then has, as the key parser calls it
PARTS_BY_SETTING = {"use_dora": ("magnitude", "dora_scale"), "lora_bias": ("up_bias",)}


def check_settings(place: Place, component: str) -> list[str]:
    """Check that the tensors of a component are what their names say.

    Returns:
        Warnings about settings that are not applied.

    Raises:
        LoraError: for a setting that makes another change of the tensors than is computed here.
    """
    settings = place.get_settings(component)
    peft_type = str(settings.get("peft_type", "LORA")).rpartition(".")[2].upper()
    if peft_type not in READ_TYPES:
        raise LoraError(
            f"{place.name} says peft_type {sanitize_text(peft_type, MAX_TEXT_CHARS)}, which is not read; "
            f"read are {', '.join(READ_TYPES)}. Merge it into the model with PEFT, or take another file"
        )
    for setting, consequence in REFUSED_SETTINGS.items():
        if settings.get(setting):
            raise LoraError(
                f"{place.name} has {setting}, so that the adapter {consequence}; that is not computed here. "
                "Merge it into the model with PEFT, or take another file"
            )
    return list_setting_warnings(place.name, settings)


def list_setting_warnings(place: str, settings: Settings) -> list[str]:
    """What of the settings is seen and not applied."""
    warnings = []
    if settings.get("fan_in_fan_out"):
        warnings.append(f"{place} has fan_in_fan_out, which is ignored, as PEFT ignores it for Linear layers")
    whole_modules = [str(name) for name in as_list(settings.get("modules_to_save"))]
    if whole_modules:
        warnings.append(
            f"{place} has modules_to_save: {sanitize_text(', '.join(whole_modules), MAX_TEXT_CHARS)} were "
            "trained whole beside the adapter; whole weights are not applied"
        )
    bias = settings.get("bias")
    if bias not in (None, "", "none"):
        warnings.append(
            f"{place} has bias {str(bias)[:MAX_TEXT_CHARS]!r}: biases of the model were trained "
            "beside the adapter; they are not applied"
        )
    known = KNOWN_SETTINGS | REFUSED_SETTINGS.keys()
    unknown = [key for key, value in settings.items() if value and key not in known]
    if unknown:
        names = ", ".join(sanitize_text(key, MAX_TEXT_CHARS) for key in unknown[:5])
        warnings.append(f"{place} has settings that are not known and are ignored: {names}")
    return warnings


def check_parts(settings: Mapping[str, object], place: str, parts: Collection[str]) -> None:
    """Check that a low-rank pair has the further parts that the settings promise, and no others.

    Raises:
        LoraError: when one is missing, so that the rest would be another change, or there in spite of them.
    """
    if "down" not in parts:
        return
    for setting, promised in PARTS_BY_SETTING.items():
        found = [part for part in promised if part in parts]
        value = settings.get(setting)
        if value and not found:
            raise LoraError(f"has no {promised[0]}, and {place} has {setting}; the file is incomplete")
        if value is False and found:
            raise LoraError(
                f"has a {found[0]}, and {place} says {setting} false; which one is meant cannot be told: ask "
                "its author"
            )


def find_relative_initialization(place: Place, component: str) -> str | None:
    """The name of an initialization that changed the base weights; None: they are those of the model.

    Raises:
        LoraError: for an initialization that is not known.
    """
    settings = place.get_settings(component)
    value = settings.get(INITIALIZATION_KEY, settings.get("init_weights"))
    name = str(value).lower()
    for prefix, title in RELATIVE_INITIALIZATIONS.items():
        if name.startswith(prefix):
            return f"{sanitize_text(value, MAX_TEXT_CHARS)} ({title})"
    if name not in PLAIN_INITIALIZATIONS:
        known = (*PLAIN_INITIALIZATIONS, *RELATIVE_INITIALIZATIONS)
        raise LoraError(
            f"{place.name} says init_lora_weights {str(value)[:MAX_TEXT_CHARS]!r}, and whether that changed "
            f"the base weights is not known; known are {', '.join(known)}"
        )
    return None
