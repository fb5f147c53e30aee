"""The INT8 text encoders that people download most, each made tiny: real key names, markers and dtypes.

The list is in `tests/data/official_files.yaml`. Numbers are random; layers are rotated and rounded by a
formula of the tests' own.
"""

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support.rotation import GROUP, rotate_groups
from support.run_job import make_spec
from text_encoders.files import File, write_codes
from text_encoders.tiny_encoders import TINY, Tiny
from torch import Tensor, nn

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.tasks.inspect_checkpoint import describe_checkpoint
from int8run.tasks.quantize_text_encoder import quantize_text_encoder
from int8run.text_encoders.load import build_text_encoder, load_text_encoder
from int8run.text_encoders.registry import get_encoder

pytestmark = pytest.mark.usefixtures("one_thread")
LIST = Path(__file__).parents[1] / "data" / "official_files.yaml"
FILES = yaml.safe_load(LIST.read_text(encoding="utf-8"))
ENTRIES = FILES["text_encoders"]
W4A8_ENTRIES = FILES["w4a8_text_encoders"]
# the one of which every run of the tests looks at the header
QUICK = "qwen3.5_9b_qwen_image_2.1_pe_i2i.int8_convrot"
MARKER = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": GROUP}


# what a file does not say of its tower for images, as the published encoders have it
TOWER = {"patch_size": 16, "hidden_size": 32, "num_heads": 16}


def make_tiny(entry: Mapping[str, Any]) -> Tiny:
    """The tiny encoder of a line of the list."""
    tiny = TINY[entry["encoder"]]
    if "vision_config" not in tiny.config:
        return tiny
    tower = {**tiny.config["vision_config"], **TOWER, **entry.get("tower", {})}
    tiny = replace(tiny, config={**tiny.config, "vision_config": tower})
    if not entry.get("tied", False):
        return tiny
    return replace(tiny, config={**tiny.config, "tie_word_embeddings": True}, lacks=r"^lm_head")


def round_rotated(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [N, K] and a scale for each row [N, 1] of a weight whose groups of 16 columns are rotated."""
    rotated = rotate_groups(weight)
    scale = rotated.abs().amax(dim=1, keepdim=True) / 127
    return (rotated / scale).round().to(torch.int8), scale


def list_quantized(entry: Mapping[str, Any], model: nn.Module) -> dict[str, str]:
    """Names in the file of the Linears that its publisher quantizes, and their names in the model."""
    encoder = get_encoder(TINY[entry["encoder"]].encoder)
    found = {}
    for name, module in model.named_modules():
        canonical = encoder.get_canonical_name(f"{name}.weight").removesuffix(".weight")
        is_float = any(fnmatch.fnmatchcase(canonical, rule.pattern) for rule in encoder.ignore)
        if isinstance(module, nn.Linear) and not is_float and module.in_features % GROUP == 0:
            found[canonical] = name
    return found


def mark_entry(entry: dict[str, Any]) -> Any:
    """An entry as a parameter: slow, but for one."""
    marks = () if entry["file"] == QUICK else pytest.mark.slow
    return pytest.param(entry, id=entry["file"], marks=marks)


@pytest.fixture(scope="module", params=map(mark_entry, ENTRIES))
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One line of the list."""
    return request.param


@pytest.fixture(scope="module")
def official(entry: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published file, tiny."""
    tiny = make_tiny(entry)
    model = tiny.model()
    tensors = dict(tiny.file(model))
    for name in list_quantized(entry, model):
        codes, scale = round_rotated(tensors.pop(f"{name}.weight"))
        marker = torch.frombuffer(bytearray(json.dumps(MARKER).encode()), dtype=torch.uint8)
        tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.comfy_quant": marker}
    path = tmp_path_factory.mktemp("official") / f"{entry['file']}.safetensors"
    save_file(tensors, path)
    return path


def test_inspect_names_the_encoder_and_what_is_int8(entry: Mapping[str, Any], official: Path) -> None:
    with TensorFiles.open(official) as files:
        rows = list(describe_checkpoint(files, DeclaredFormat("auto", None)))

    facts = dict(rows)
    count = len(list_quantized(entry, make_tiny(entry).model()))
    assert facts["text encoder"].split(" (")[0] == TINY[entry["encoder"]].encoder
    assert any(row.startswith(f"{count} × int8") for label, row in rows if label == "layers"), rows


@pytest.mark.slow
def test_every_layer_is_read_as_it_is(entry: Mapping[str, Any], official: Path) -> None:
    tiny = make_tiny(entry)
    model = tiny.model()
    quantized = list_quantized(entry, model)

    state, metadata = load_text_encoder(official, kernel_backend="reference")
    built = build_text_encoder(state, metadata, tiny.cls, dict(tiny.config), torch.float32)

    assert metadata["formats"] == {"int8_convrot": len(quantized)}
    for name in quantized.values():
        codes, scale = round_rotated(model.get_submodule(name).weight.detach())
        weight = built.get_submodule(name).read_quantized_weight()
        assert torch.equal(weight.qdata, codes), name
        assert torch.equal(weight.scale, scale), name


@pytest.mark.slow
def test_answers_are_those_of_the_float_encoder_but_for_rounding(
    entry: Mapping[str, Any], official: Path
) -> None:
    tiny = make_tiny(entry)
    model = tiny.model()
    built = build_text_encoder(
        *load_text_encoder(official, kernel_backend="reference"), tiny.cls, dict(tiny.config), torch.float32
    )
    tokens = torch.tensor([[1, 5, 9, 30, 2]])

    with torch.no_grad():
        expected = model(input_ids=tokens, output_hidden_states=True).hidden_states[-1]
        found = built(input_ids=tokens, output_hidden_states=True).hidden_states[-1]

    error = (found - expected).norm() / expected.norm()
    assert 0 < error < 0.2


@pytest.mark.slow
def test_quantizing_the_float_spelling_gives_the_same_keys(
    entry: Mapping[str, Any], official: Path, tmp_path: Path
) -> None:
    floats = tmp_path / "float.safetensors"
    tiny = make_tiny(entry)
    save_file(tiny.file(tiny.model()), floats)

    overrides = [
        "task=quantize",
        f"model.location={floats}",
        "clip=int8_convrot",
        f"save={tmp_path / 'ours.safetensors'}",
        "tracker=none",
        "progress=false",
    ]
    quantize_text_encoder(make_spec(overrides), Job({}, {}, overrides, tmp_path), "text_encoder")

    assert set(load_file(tmp_path / "ours.safetensors")) == set(load_file(official))


# those of which every run of the tests reads one
QUICK_W4A8 = "qwen3.5_9b_w4a8_gptq"
TABLE = "embed_tokens"


def write_w4a8(entry: Mapping[str, Any], folder: Path) -> tuple[Path, Tiny, dict[str, Tensor]]:
    """A published file with codes of 4 bits, tiny, its table among them.

    Returns the file, the encoder, and by layer the weights that the codes stand for.
    """
    tiny = make_tiny(entry)
    model = tiny.model()
    tensors = dict(tiny.file(model))
    table = next(key.removesuffix(".weight") for key in tensors if key.endswith(f"{TABLE}.weight"))
    file, real = File(), {}
    for name in [*list_quantized(entry, model), table]:
        weight = tensors.pop(f"{name}.weight").double().numpy()
        found, marker = write_codes(file, name, weight, bits=4)
        file.text(f"{name}.comfy_quant", marker)
        real[name] = torch.from_numpy(found).float()
    codes = file.write(folder / "codes.safetensors")
    path = folder / f"{entry['file']}.safetensors"
    save_file({**tensors, **load_file(codes)}, path)
    return path, tiny, real


def mark_w4a8(entry: dict[str, Any]) -> Any:
    """An entry as a parameter: slow, but for one."""
    marks = () if entry["file"] == QUICK_W4A8 else pytest.mark.slow
    return pytest.param(entry, id=entry["file"], marks=marks)


@pytest.mark.parametrize("entry", map(mark_w4a8, W4A8_ENTRIES))
@pytest.mark.parametrize("kernels", ["reference", "dequantize"])
def test_w4a8_files_are_read_and_run(entry: Mapping[str, Any], kernels: str, tmp_path: Path) -> None:
    path, tiny, real = write_w4a8(entry, tmp_path)
    with TensorFiles.open(path) as files:
        rows = list(describe_checkpoint(files, DeclaredFormat("auto", None)))
    state, metadata = load_text_encoder(path, kernel_backend=kernels)
    built = build_text_encoder(state, metadata, tiny.cls, dict(tiny.config), torch.float32)
    exact = build_from_weights(tiny, real)
    tokens = torch.tensor([[1, 5, 9, 30, 2]])

    with torch.no_grad():
        expected = exact(input_ids=tokens, output_hidden_states=True).hidden_states
        found = built(input_ids=tokens, output_hidden_states=True).hidden_states

    assert metadata["formats"] == {"w4a8": len(real)}
    assert ("layers", f"{len(real)} × asym_w4a8_int8, 4 bits, group 16, convrot {GROUP}") in rows
    assert torch.allclose(found[0], expected[0], rtol=1e-5, atol=1e-6), "rows of the table"
    # inputs are rounded to int8 where the backend does that, weights are not rounded again
    error = (found[-1] - expected[-1]).norm() / expected[-1].norm()
    assert error < (0.15 if kernels == "reference" else 1e-4)


def build_from_weights(tiny: Tiny, weights: Mapping[str, Tensor]) -> nn.Module:
    """The float encoder with other weights. weights: by the name of the layer in the file."""
    model = tiny.model()
    encoder = get_encoder(tiny.encoder)
    for name, module in model.named_modules():
        canonical = encoder.get_canonical_name(f"{name}.weight").removesuffix(".weight")
        if canonical in weights and isinstance(module, nn.Linear | nn.Embedding):
            module.weight.data = weights[canonical].to(module.weight.dtype)
    return model.float()
