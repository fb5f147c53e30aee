"""Files beside a LoRA that are part of it: PEFT's settings, and initial factors that are subtracted."""

from collections.abc import Mapping
from pathlib import Path

from int8run.lora.initial_factors import find_initial_adapter
from int8run.lora.peft_config import find_relative_initialization
from int8run.lora.written_settings import ADAPTER_CONFIG, COMPONENT_PREFIXES, read_settings


def list_side_files(path: Path, metadata: Mapping[str, str]) -> list[Path]:
    """The files beside a LoRA that decide, with it, what it does.

    Args:
        path: of the LoRA.
        metadata: of its header.

    Raises:
        LoraError: when one of them cannot be read.
    """
    written = read_settings(path, metadata)
    files = [path.with_name(ADAPTER_CONFIG)] if written.has_adapter_config else []
    components = set(COMPONENT_PREFIXES.values())
    if any(find_relative_initialization(place, name) for place in written.places for name in components):
        initial = find_initial_adapter(path)
        if initial is not None:
            files += [initial, initial.with_name(ADAPTER_CONFIG)]
    return sorted({file for file in files if file.is_file()})
