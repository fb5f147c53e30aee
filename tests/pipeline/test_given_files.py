"""Files for another model are refused by their headers, before the pipeline is loaded."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.run_job import make_spec

from int8run.errors import FileError, LoraError
from int8run.generate.prompts import build_samples
from int8run.lora.header_info import read_lora_headers
from int8run.pipeline import load
from int8run.pipeline.build import build_model
from int8run.report.console import Progress
from int8run.utils.paths import ASSETS_FOLDER

LORA = ASSETS_FOLDER / "lora" / "ink.safetensors"


@pytest.fixture(autouse=True)
def no_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the pipeline is loaded."""
    monkeypatch.setattr(load, "load_pipeline", lambda *arguments: pytest.fail("the pipeline was loaded"))


def build(*overrides: str) -> None:
    spec = make_spec(["backend=reference", *overrides])
    headers = read_lora_headers(spec.lora, spec.model.lora_base, None)
    build_model(spec, build_samples(["a"], 1, 0), headers, Progress(enabled=False))


def test_a_lora_as_int8_checkpoint_is_refused_with_what_it_is() -> None:
    with pytest.raises(
        FileError, match=r"^int8\.checkpoint=.*ink.* is no checkpoint of a Flux.* It is a LoRA: "
    ):
        build(f"int8.checkpoint={LORA}")


def test_floats_as_int8_checkpoint_are_refused() -> None:
    weights = ASSETS_FOLDER / "tiny" / "transformer"

    with pytest.raises(
        FileError, match=r"holds no INT8 layer that can be used as it is; set model\.location"
    ):
        build(f"int8.checkpoint={weights}")


def test_a_lora_for_another_architecture_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(
        {
            "lora_unet_down_0_q.lora_down.weight": torch.ones(2, 8),
            "lora_unet_down_0_q.lora_up.weight": torch.ones(8, 2),
        },
        file,
    )

    with pytest.raises(
        LoraError, match=r"^other\.safetensors: none of its 1 modules and keys is in the model"
    ):
        build("lora=file", f"lora.adapters.0.path={file}")


def test_a_lora_for_the_model_goes_on_to_the_pipeline() -> None:
    with pytest.raises(pytest.fail.Exception, match="the pipeline was loaded"):
        build("lora=file", f"lora.adapters.0.path={LORA}")
