"""Denoisers in their authors' names as GGUF files: read as a safetensors file of the same numbers is."""

from pathlib import Path

import numpy as np
import pytest
import torch
from families.instance_sets import INSTANCES
from safetensors.torch import save_file
from support.gguf_files import write_gguf
from support.tiers import slow_except

from int8run.checkpoints.reader import TensorFiles
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.original_names import to_original
from int8run.models.state_dict_adapter import find_denoiser_keys
from int8run.pipeline.checkpoint_weights import FileWeights

# those that people have as GGUF; videos have weights of five dimensions
NAMES = (
    "flux",
    "flux2",
    "chroma",
    "qwen_image",
    "z_image",
    "wan",
    "ltx",
    "sd3",
    "hidream",
    "hunyuan_video15",
    "sdxl",
)


def choose_type(key: str, tensor: np.ndarray) -> str:
    """As converters do: small tensors whole, others in blocks or in half precision."""
    if tensor.ndim < 2:
        return "F32"
    return "Q8_0" if tensor.shape[-1] % 32 == 0 else "F16"


@pytest.mark.parametrize("name", slow_except(("flux", "z_image"), NAMES))
def test_a_denoiser_is_read_as_from_a_float_file(name: str, tmp_path: Path) -> None:
    instance = INSTANCES[name]
    pipe = instance.build()
    model = next(part for part in (getattr(pipe, c, None) for c in DENOISER_COMPONENTS) if part is not None)
    state = {key: tensor.float() for key, tensor in model.state_dict().items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    arrays = {}
    for key, parts in to_original(shapes, type(model).__name__).items():
        arrays[key] = torch.cat([part.extract(state[part.key]) for part in parts]).contiguous().numpy()
    meant = write_gguf(tmp_path / "x.gguf", arrays, choose_type)
    save_file(
        {key: torch.from_numpy(array.copy()) for key, array in meant.items()}, tmp_path / "x.safetensors"
    )

    found = FileWeights(tmp_path / "x.gguf", model)
    wanted = FileWeights(tmp_path / "x.safetensors", model)

    assert any(layer.label == "Q8_0" for layer in found.layers.values())
    assert not found.layout.missing and not found.layout.unused
    for key in state:
        assert torch.equal(found.read_tensor(key).float(), wanted.read_tensor(key).float()), key
    with TensorFiles.open(tmp_path / "x.gguf") as files:
        denoiser_shapes = {short: files[key].shape for short, key in find_denoiser_keys(files).items()}
    detected = detect_denoiser(denoiser_shapes, load_families().values())
    assert detected is not None and detected[1] == type(model).__name__
