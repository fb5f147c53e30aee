"""alpha / rank of the modules of a file, from `.alpha` tensors or the PEFT settings in its header."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from int8run.errors import LoraError
from int8run.lora.key_parsing import DENOISER, TEXT_ENCODER, TEXT_ENCODER_2, TEXT_ENCODER_3

METADATA_KEY = "lora_adapter_metadata"
# prefix of a setting -> component that it is for
COMPONENT_PREFIXES = {
    "transformer": DENOISER,
    "unet": DENOISER,
    TEXT_ENCODER: TEXT_ENCODER,
    TEXT_ENCODER_2: TEXT_ENCODER_2,
    TEXT_ENCODER_3: TEXT_ENCODER_3,
}


class PeftHeader:
    """The PEFT settings (`LoraConfig`) in the header of a file, by component.

    diffusers writes them as one JSON text under `lora_adapter_metadata`, with names such as
    `transformer.lora_alpha`.

    Args:
        metadata: the header's metadata; anything that is not such settings is ignored.
    """

    def __init__(self, metadata: Mapping[str, str]):
        self.by_component: dict[str | None, dict[str, Any]] = {}  # None: settings for all components
        for key, value in parse_settings(metadata).items():
            prefix, _, setting = key.partition(".")
            if prefix in COMPONENT_PREFIXES and setting:
                self.by_component.setdefault(COMPONENT_PREFIXES[prefix], {})[setting] = value
            else:
                self.by_component.setdefault(None, {})[key] = value

    def get_scale(self, component: str, name: str, alpha: Tensor | None, rank: int) -> float:
        """alpha / rank, or alpha / sqrt(rank) for rsLoRA (arXiv 2312.03732); 1 without any alpha.

        Args:
            component: `denoiser`, `text_encoder`, ...
            name: the module, for `alpha_pattern`.
            alpha: the module's `.alpha` tensor, which wins over the header; 0 means rank, as in kohya's
                files.
            rank: of the module's adapter.

        Raises:
            LoraError: for an alpha that is not a number, or a pattern that is not a regular expression.
        """
        if alpha is not None:
            if alpha.numel() != 1:
                raise LoraError(
                    f"has an alpha of shape {list(alpha.shape)}; it is one number, the file is broken"
                )
            return (alpha.item() or rank) / rank

        settings = self.by_component.get(None, {}) | self.by_component.get(component, {})
        header_alpha = get_header_alpha(settings, name)
        if header_alpha is None:
            return 1.0
        is_number = isinstance(header_alpha, int | float) and not isinstance(header_alpha, bool)
        if not is_number or not math.isfinite(header_alpha):
            raise LoraError(
                f"cannot be scaled: the file's lora_alpha is {header_alpha!r}, which is not a number"
            )
        return header_alpha / math.sqrt(rank) if settings.get("use_rslora") else header_alpha / rank


def parse_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings as they stand in the header; empty when there are none that can be read."""
    try:
        settings = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (json.JSONDecodeError, RecursionError):
        return {}
    return settings if isinstance(settings, dict) else {}


def get_header_alpha(settings: Mapping[str, Any], name: str) -> Any:
    """The alpha of a module: that of the first `alpha_pattern` that fits its name, else `lora_alpha`.

    Raises:
        LoraError: when a pattern is not a regular expression.
    """
    patterns = settings.get("alpha_pattern")
    for pattern, alpha in patterns.items() if isinstance(patterns, dict) else ():
        try:
            is_match = re.match(rf"(.*\.)?({pattern})$", name) is not None
        except re.error as error:
            raise LoraError(
                f"cannot be scaled: the file's alpha_pattern is not a regular expression: {error}"
            ) from error
        if is_match:
            return alpha
    return settings.get("lora_alpha")
