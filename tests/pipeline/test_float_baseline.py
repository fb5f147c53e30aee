"""The key of the float model's images in the cache."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import IMAGE, SampleInputs, read_input_file
from int8run.lora.config import Adapter, LoraSettings
from int8run.lora.header_info import LoraHeader, read_lora_headers
from int8run.models.family import ModelSource
from int8run.models.sampling import Sampling
from int8run.pipeline.float_baseline import BaselineOrigin, build_baseline_key
from int8run.utils.disk_cache import DiskCache


def write_pair(path: Path) -> None:
    """A LoRA of one module, as PEFT writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pair = {f"base_model.model.x.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
    save_file(pair, path)


def make_key(folder: Path | None = None, samples: Sequence[Sample] = ()) -> str:
    """The key of a run with the LoRA in a folder."""
    headers: Sequence[LoraHeader] = ()
    if folder is not None:
        headers = read_lora_headers(LoraSettings([Adapter("style", str(folder))]), "tiny")
    model = ModelSource("shipped:tiny", "tiny", Sampling())
    origin = BaselineOrigin(model=model, headers=headers, samples=samples, settings_key="", device="cpu")
    return build_baseline_key(origin, DiskCache(None, 0))


def test_files_beside_a_lora_count(tmp_path: Path) -> None:
    folder = tmp_path / "style"
    write_pair(folder / "adapter_model.safetensors")
    keys = [make_key(folder)]

    for alpha in (1, 2):
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": alpha, "init_lora_weights": "pissa"}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        keys.append(make_key(folder))
    write_pair(folder / "initial" / "adapter_model.safetensors")
    keys.append(make_key(folder))
    (folder / "initial" / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 1}))
    keys.append(make_key(folder))

    assert len(set(keys)) == 5
    assert make_key(folder) == keys[-1]

    write_pair(folder / "other" / "adapter_model.safetensors")
    assert make_key(folder) == keys[-1]


def test_images_that_were_made_when_color_profiles_were_ignored_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    path.write_bytes(b"an image")
    file = read_input_file(path)
    keys = []
    for colors in (file.colors, "as in the file"):
        inputs = SampleInputs({IMAGE: (replace(file, colors=colors),)})
        keys.append(make_key(samples=[Sample("a cat", 0, "0", inputs=inputs)]))

    assert keys[0] != keys[1]
