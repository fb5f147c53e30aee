"""Small LoRA files in every layout and of every adapter type, and what each does by plain formulas.

Nothing of int8run is imported: names and numbers are written down a second time. The models are tiny ones of
diffusers' and transformers' own classes. `python -m lora.lora_files FOLDER`, in `tests/`, writes all files
into a folder and lists them.
"""

import sys
from collections.abc import Mapping
from pathlib import Path

from lora.layouts import flux_pairs, flux_types, sdxl_pairs, sdxl_types
from lora.layouts.mistakes import MISTAKES
from lora.layouts.sample import LAYOUTS, Sample
from lora.layouts.tiny_models import make_tiny_models
from safetensors.torch import save_file
from torch import nn

LAYOUT_MODULES = (flux_pairs, flux_types, sdxl_pairs, sdxl_types)  # importing them fills LAYOUTS


def make_sample(name: str, models: Mapping[str, Mapping[str, nn.Module]]) -> Sample:
    """One file, not yet written."""
    base, fill = LAYOUTS[name]
    sample = Sample(name, base, models[base])
    fill(sample)
    return sample


def write_sample(sample: Sample, folder: Path) -> Sample:
    """The sample with its file in a folder."""
    sample.path = folder / f"{sample.name}.safetensors"
    save_file(sample.tensors, sample.path, sample.metadata)
    return sample


def main(folder: Path) -> None:
    """Write every file, good and bad, and list them."""
    folder.mkdir(parents=True, exist_ok=True)
    models = make_tiny_models()
    for name in LAYOUTS:
        sample = write_sample(make_sample(name, models), folder)
        num_modules = sum(map(len, sample.expected.values()))
        line = f"{sample.path.name}: {sample.base}, {len(sample.tensors)} tensors, {num_modules} modules"
        print(line)  # noqa: T201
    for name, mistake in MISTAKES.items():
        sample = make_sample(mistake.layout, models)
        mistake.spoil(sample.tensors)
        sample.name = f"bad_{name.replace(' ', '_')}"
        print(f"{write_sample(sample, folder).path.name}: {mistake.when}: {mistake.words}")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
