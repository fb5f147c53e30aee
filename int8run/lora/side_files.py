"""Files beside a LoRA that are part of it: PEFT's settings, and initial factors that are subtracted."""

from collections.abc import Mapping
from pathlib import Path

from int8run.lora.initial_factors import find_initial_adapter
from int8run.lora.peft_config import find_relative_initialization
from int8run.lora.written_settings import ADAPTER_CONFIG, COMPONENT_PREFIXES, WrittenSettings, read_settings


def list_side_files(path: Path, metadata: Mapping[str, str]) -> list[Path]:
    """The files beside a LoRA that decide, with it, what it does.

    Args:
        path: of the LoRA.
        metadata: of its header.

    Raises:
        LoraError: when one of them cannot be read.
    """
    written = read_settings(path, metadata)
    files: set[Path] = set()
    if written.has_adapter_config:
        files.add(path.with_name(ADAPTER_CONFIG))
    if is_relative(written):
        initial = find_initial_adapter(path)
        if initial is not None:
            files |= {initial, initial.with_name(ADAPTER_CONFIG)}
    return sorted(file for file in files if file.is_file())


def is_relative(written: WrittenSettings) -> bool:
    """Whether a LoRA is relative to a base that its initialization changed.

    Raises:
        LoraError: for an initialization that is not known.
    """
    for place in written.places:
        for component in set(COMPONENT_PREFIXES.values()):
            if find_relative_initialization(place, component):
                return True
    return False
