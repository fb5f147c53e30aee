"""GGUF files through the tasks: a denoiser and text encoders out of them run, are quantized and shown."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from families.instances import seeded, z_image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli_process import Command
from support.gguf_files import write_gguf
from support.run_job import run_job
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from text_encoders.test_gguf import ARCH, convert, round_layers
from torch import Tensor

from int8run.models.original_names import to_original
from int8run.pipeline import process_cache
from int8run.tasks.run import RunResult
from int8run.utils.paths import ASSETS_FOLDER

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ASSETS_FOLDER / "tiny" / "transformer"
SMALL = (
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=1",
    "prompts.prompts=[a]",
    "backend=reference",
)
QUIET = ("tracker=none", "progress=false")


def name_as_authors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A FLUX denoiser's tensors under the names of ComfyUI-GGUF's files."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    named = {}
    for key, parts in to_original(shapes, "FluxTransformer2DModel").items():
        extracted = [part.extract(tensors[part.key]).float() for part in parts]
        named[key] = torch.cat(extracted) if len(extracted) > 1 else extracted[0]
    return named


def write_denoiser(folder: Path, tensors: dict[str, Tensor], kind: str) -> Path:
    """`x.gguf`, and beside it `x.safetensors` with the numbers that it stands for."""
    arrays = {key: tensor.contiguous().numpy() for key, tensor in name_as_authors(tensors).items()}
    meant = write_gguf(folder / "x.gguf", arrays, kind, metadata={"general.license": "apache-2.0"})
    save_file({key: torch.from_numpy(found.copy()) for key, found in meant.items()}, folder / "x.safetensors")
    return folder / "x.gguf"


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped denoiser in Q8_0."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(TINY.glob("*.safetensors")):
        tensors |= load_file(file)
    return write_denoiser(tmp_path_factory.mktemp("tiny"), tensors, "Q8_0")


def run_model(out: Path, *words: str) -> RunResult:
    process_cache.clear()
    result = run_job([*SMALL, *QUIET, "metrics.layers=false", *words], out)
    process_cache.clear()
    return result


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_a_denoiser_runs_on_the_numbers_that_the_file_stands_for(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = save_random_pipeline(tmp_path / "base")
    file = write_denoiser(tmp_path, random_pipeline().transformer.state_dict(), kind)
    words = (f"model.base={base}", "model_type=flux", "outlier=none")

    with caplog.at_level(logging.INFO):
        found = run_model(tmp_path / "gguf", f"model.location={file}", *words)
    wanted = run_model(tmp_path / "float", f"model.location={file.with_suffix('.safetensors')}", *words)

    for one, other in (
        (found.baseline.trajectories, wanted.baseline.trajectories),
        (found.candidate.trajectories, wanted.candidate.trajectories),
    ):
        assert all(map(torch.equal, one, other))
    assert found.metrics["quality/float_layers_from_same_file"] > 10
    assert "quality/float_layers_from_same_file" not in wanted.metrics
    assert f"× {kind}" in caplog.text and "dequantized, and quantized again" in caplog.text
    assert "The float model has the quantized numbers of" in caplog.text


def test_t5_runs_on_the_numbers_that_the_file_stands_for(tmp_path: Path) -> None:
    base = save_random_pipeline(tmp_path / "base", text=64)
    t5 = random_pipeline(text=64).text_encoder_2.eval()
    tensors = convert(t5, ARCH.T5ENCODER)
    write_gguf(
        tmp_path / "t5.gguf",
        tensors,
        lambda key, tensor: "Q8_0" if tensor.ndim == 2 and "blk" in key and "rel_b" not in key else "F32",
        architecture="t5encoder",
    )
    round_layers(t5, "Q8_0").save_pretrained(tmp_path / "rounded")
    words = (f"model.location={base}", "int8.enable=false", "clip=auto")

    found = run_model(tmp_path / "gguf", *words, f"clip.path={{text_encoder_2: {tmp_path}/t5.gguf}}")
    wanted = run_model(tmp_path / "float", *words, f"clip.path={{text_encoder_2: {tmp_path}/rounded}}")

    assert all(map(torch.equal, found.candidate.trajectories, wanted.candidate.trajectories))


def test_qwen3_runs_on_the_numbers_that_the_file_stands_for(tmp_path: Path) -> None:
    pipe = seeded(z_image)()
    pipe.save_pretrained(tmp_path / "base")
    qwen = pipe.text_encoder.eval()
    write_gguf(
        tmp_path / "qwen3.gguf",
        convert(qwen, ARCH.QWEN3),
        lambda key, tensor: "Q8_0" if tensor.ndim == 2 and "blk" in key else "F32",
        architecture="qwen3",
    )
    round_layers(qwen, "Q8_0").save_pretrained(tmp_path / "rounded")
    words = (f"model.location={tmp_path}/base", "int8.enable=false", "clip=auto", "sampler.steps=2")

    found = run_model(tmp_path / "gguf", *words, f"clip.path={tmp_path}/qwen3.gguf")
    wanted = run_model(tmp_path / "float", *words, f"clip.path={tmp_path}/rounded")
    own = run_model(
        tmp_path / "own", f"model.location={tmp_path}/base", "int8.enable=false", "sampler.steps=2"
    )

    assert all(map(torch.equal, found.candidate.trajectories, wanted.candidate.trajectories))
    assert not all(map(torch.equal, found.candidate.trajectories, own.candidate.trajectories))


# -- task=quantize -----------------------------------------------------------------------------------


def quantize(command: Command, source: Path, save: str, *words: str) -> str:
    done = command(
        "task=quantize", f"model.location={source}", f"save={save}", "outlier=convrot", *QUIET, *words
    )
    assert done.code == 0, done.err
    return done.out + done.err


def test_a_denoiser_is_quantized_from_the_numbers_that_the_file_stands_for(
    command: Command, tiny_file: Path
) -> None:
    text = quantize(command, tiny_file, "gguf.safetensors")
    quantize(command, tiny_file.with_suffix(".safetensors"), "float.safetensors")

    found = load_file(command.folder / "gguf.safetensors")
    wanted = load_file(command.folder / "float.safetensors")
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        is_kept_weight = tensor.dtype == torch.float32 and found[key].dtype == torch.bfloat16
        assert torch.equal(found[key], tensor.bfloat16() if is_kept_weight else tensor), key
    assert sum(tensor.dtype == torch.bfloat16 for tensor in found.values()) == 14
    assert "30 tensors Q8_0 in GGUF's blocks, dequantized and rounded once more" in text
    assert "14 weights are quantized in the source and kept float: written in BF16" in text
    with safe_open(command.folder / "gguf.safetensors", "pt") as file:
        metadata = file.metadata()
    note = json.loads(metadata["int8run"])
    assert note["source"]["gguf_types"] == {"F32": 42, "Q8_0": 30}
    assert not any(key.startswith("general.") for key in metadata)


def test_every_digit_is_kept_where_that_is_asked_for(command: Command, tiny_file: Path) -> None:
    quantize(command, tiny_file, "gguf.safetensors", "model.dtype=float32")
    quantize(command, tiny_file.with_suffix(".safetensors"), "float.safetensors")

    found = load_file(command.folder / "gguf.safetensors")
    for key, tensor in load_file(command.folder / "float.safetensors").items():
        assert torch.equal(found[key], tensor), key


def test_card_and_license_name_the_file(command: Command, tiny_file: Path) -> None:
    quantize(command, tiny_file, "x.safetensors")
    card = (command.folder / "x.card.md").read_text()
    assert "| weights of the base | x.gguf (42 × F32, 30 × Q8\\_0): what GGUF's rounding lost" in card
    assert "apache-2.0 (header of x.gguf)" in card


def test_a_file_that_was_made_from_gguf_is_audited_beside_it(command: Command, tiny_file: Path) -> None:
    quantize(command, tiny_file, "x.safetensors", "model.dtype=float32")
    done = command("task=audit", "task.path=x.safetensors", f"task.base={tiny_file}", *QUIET)
    assert done.code == 0 and "grade A: Reproduced" in done.out


def test_a_gguf_file_itself_is_not_graded(command: Command, tiny_file: Path) -> None:
    done = command("task=audit", f"task.path={tiny_file}", *QUIET)
    assert done.code == 3
    assert "is a GGUF file, which task=audit does not grade; task.base= takes it" in done.message


def test_a_text_encoder_is_quantized_from_gguf(command: Command, tmp_path: Path) -> None:
    t5 = random_pipeline(text=64).text_encoder_2
    tensors = convert(t5, ARCH.T5ENCODER)
    meant = write_gguf(
        tmp_path / "t5.gguf",
        tensors,
        lambda key, tensor: "Q8_0" if tensor.ndim == 2 and "blk" in key and "rel_b" not in key else "F32",
        architecture="t5encoder",
    )

    done = command(
        "task=quantize",
        "task.component=text_encoder",
        "clip=int8_rowwise",
        f"model.location={tmp_path}/t5.gguf",
        "save=x.safetensors",
        "outlier=convrot",
        *QUIET,
    )

    assert done.code == 0, done.err
    assert "tensors Q8_0 in GGUF's blocks, dequantized and rounded once more" in done.out + done.err
    assert "task.component=text_encoder ignores outlier" in done.out + done.err
    found = load_file(command.folder / "x.safetensors")
    name = "encoder.block.0.layer.0.SelfAttention.q"
    weight = found[f"{name}.weight"].float() * found[f"{name}.weight_scale"].reshape(-1, 1)
    wanted = torch.from_numpy(meant["enc.blk.0.attn_q.weight"].copy())
    assert (weight - wanted).abs().max() <= wanted.abs().max() / 200
    assert np.array_equal(found["shared.weight"].numpy(), meant["token_embd.weight"])


# -- task=inspect ------------------------------------------------------------------------------------


def test_inspect_shows_what_a_file_holds(command: Command, tiny_file: Path) -> None:
    done = command("task=inspect", f"task.path={tiny_file}", *QUIET)
    assert done.code == 0, done.err
    for words in (
        "GGUF file, whose numbers are read as floats",
        "42 × F32, 30 × Q8_0",
        "flux (FluxTransformer2DModel)",
        "30 × Q8_0",
        "header: general.license",
    ):
        assert words in done.out


def test_inspect_shows_how_a_text_encoder_is_used(command: Command, tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "t5.gguf",
        convert(random_pipeline().text_encoder_2, ARCH.T5ENCODER),
        architecture="t5encoder",
    )
    done = command("task=inspect", f"task.path={tmp_path}/t5.gguf", *QUIET)
    assert done.code == 0 and "t5_old (T5EncoderModel)" in done.out
    assert f"clip=auto clip.path={tmp_path}/t5.gguf" in done.out


def test_inspect_names_a_type_that_is_not_read(command: Command, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    write_gguf(path, {"a.weight": np.ones((4, 256), np.float32)}, "Q8_0")
    # the type of the only tensor, behind its name and its two sizes
    data = path.read_bytes()
    at = data.index(b"a.weight") + len("a.weight") + 4 + 16
    path.write_bytes(data[:at] + (10).to_bytes(4, "little") + data[at + 4 :])
    done = command("task=inspect", f"task.path={path}", *QUIET)
    assert done.code == 3 and "a.weight is Q2_K" in done.message
