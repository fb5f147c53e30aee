"""`task=quantize task.component=text_encoder`: every format is read back as a run would have it, and what is
refused.
"""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors import safe_open
from safetensors.torch import load_file
from support.cli_process import command_in
from support.clip_files import answer, changed, file_of
from support.compare import assert_close
from support.helpers import CPU
from support.tiers import slow_except
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from text_encoders import oracle
from text_encoders.files import File, make_encoder_file
from text_encoders.probes import probe_weights, strip_root
from torch import nn

from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.writer import StreamWriter
from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.job import Job
from int8run.errors import ConfigError, FileError
from int8run.lora.match import Matches
from int8run.models.sampling import Sampling
from int8run.pipeline.text_encoders import build_encoders, open_encoders
from int8run.quant.formats import FORMATS
from int8run.report.console import Progress
from int8run.tasks import quantize_text_encoder as module
from int8run.text_encoders.base import TextEncoders
from int8run.text_encoders.load import build_text_encoder, load_text_encoder

pytestmark = pytest.mark.usefixtures("one_thread")

WO_FLOAT = {"int8_tensorwise", "int8_rowwise", "int8_blockwise", "int8_block3d"}  # where T5's `wo` suffers
WRITTEN = [name for name, form in FORMATS.items() if not form.is_read_only]
Quantize = Callable[..., dict[str, float]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"), text=256)


@pytest.fixture(scope="module")
def floats() -> dict[str, nn.Module]:
    pipe = random_pipeline(text=256)
    return {name: getattr(pipe, name).eval() for name in ("text_encoder", "text_encoder_2")}


@pytest.fixture
def quantize(tmp_path: Path) -> Quantize:
    """The task without a command line; its output folder is `out`."""

    def run(
        location: Path, clip: str, save: Path | None, *words: str, component: str = "text_encoder"
    ) -> dict[str, float]:
        saved = [f"save={save}"] if save is not None else []
        overrides = [
            "task=quantize",
            f"model.location={location}",
            f"clip={clip}",
            "tracker=none",
            "progress=false",
            *saved,
            *words,
        ]
        with initialize_config_module("int8run.conf", version_base="1.3"):
            config = compose("config", overrides)
        (tmp_path / "out").mkdir(exist_ok=True)
        job = Job(get_plain_config(config), choices={}, overrides=overrides, output_dir=tmp_path / "out")
        return module.quantize_text_encoder(create_run_spec(config), job, component)

    return run


def on_the_fly(model: Path, component: str, word: str) -> nn.Module:
    """The encoder of a run with `clip=<word>`."""
    clip = TextEncoders(format=word, kernel_backend="dequantize", components=[component])
    opened = open_encoders(clip, model, {}, torch.float32)
    return build_encoders(
        opened, clip, CPU, Sampling(1, 16, 16), Matches({}, []), Progress(enabled=False)
    ).modules[component]


# a scale for each row, with rotation, for blocks of int8, of a float8, and packed four-bit numbers
DAILY_FORMATS = ("int8_rowwise", "int8_convrot", "int8_blockwise", "float8_e4m3fn", "nvfp4")


@pytest.mark.parametrize("word", slow_except(DAILY_FORMATS, WRITTEN))
def test_a_file_is_read_back_as_the_run_has_it(
    word: str, model: Path, quantize: Quantize, tmp_path: Path
) -> None:
    for number, component in enumerate(("text_encoder", "text_encoder_2")):
        # to a file and to a folder in turn
        path = (
            tmp_path / f"{component}.safetensors"
            if (WRITTEN.index(word) + number) % 2
            else tmp_path / component
        )
        metrics = quantize(model, word, path, component=component)
        state, metadata = load_text_encoder(path, word, "dequantize")
        count = 6 - (number == 1 and word in WO_FLOAT)

        assert metadata["formats"] == {word: count}
        assert metadata["quant_format"]["found"] == word
        assert metrics["clip/layers_quantized"] == count and metrics["clip/layers_float"] == 8 - count, (
            "two tables, and what else"
        )

        config = json.loads((model / component / "config.json").read_text())
        found = build_text_encoder(state, metadata, config["architectures"][0], config, torch.float32)
        expected = on_the_fly(model, component, word)
        read = probe_weights(found)

        for name, weight in probe_weights(expected).items():
            assert np.array_equal(read[name], weight), name
        assert torch.equal(answer(found), answer(expected))


@pytest.mark.parametrize("word", ["int8_convrot", "nvfp4", "float8_e4m3fn_blockwise"])
def test_another_reader_reads_the_same(
    word: str, model: Path, quantize: Quantize, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    quantize(model, word, tmp_path / "x.safetensors")
    real = {
        strip_root(name): reading.weight for name, reading in oracle.read(tmp_path / "x.safetensors").items()
    }
    found = probe_weights(on_the_fly(model, "text_encoder", word))

    for name, weight in found.items():
        assert np.allclose(weight, real[name], rtol=1e-4, atol=2e-5 * abs(weight).max()), name


def test_what_is_written_beside(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    quantize(model, "nvfp4", tmp_path / "folder", component="text_encoder_2")

    names = ["card.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == names

    own = json.loads((model / "text_encoder_2" / "config.json").read_text())

    assert json.loads((tmp_path / "folder" / "config.json").read_text()) == own

    with safe_open(tmp_path / "folder" / "model.safetensors", "pt") as file:
        header = file.metadata()
    note = json.loads(header["int8run"])

    assert header["format"] == "pt"
    assert (note["encoder"], note["format"]) == ("t5_old", "nvfp4")
    assert len(note["source"]["sha256"]) == 64
    assert set(note["kept_float"]) == {
        "shared",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    }

    rows = list(csv.DictReader((tmp_path / "out" / "layers.csv").read_text().splitlines()))

    assert {
        row["name"]: row["rounding"] for row in rows if row["quantized"] == "true"
    }.keys() == load_text_encoder(tmp_path / "folder")[1]["layers"].keys()

    saved = json.loads((tmp_path / "out" / "metrics.json").read_text())

    assert (saved["format"], saved["encoder"], saved["save"]) == (
        "nvfp4",
        "t5_old",
        str(tmp_path / "folder" / "model.safetensors"),
    )

    sizes = saved["metrics"]["build/read_bytes"], saved["metrics"]["build/written_bytes"]

    assert sizes[1] == (tmp_path / "folder" / "model.safetensors").stat().st_size < 0.5 * sizes[0]
    assert saved["metrics"]["clip/weight_sqnr_db_mean"] > 15


def test_a_single_file_has_comfyuis_names(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    quantize(model, "int8_rowwise", tmp_path / "x.safetensors")
    held = load_file(tmp_path / "x.safetensors")
    own = load_file(model / "text_encoder" / "model.safetensors")
    layer = "text_model.encoder.layers.0.mlp.fc1"

    assert {f"{layer}.{part}" for part in ("weight", "weight_scale", "comfy_quant", "bias")} <= held.keys()
    assert json.loads(bytes(held[f"{layer}.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise",
        "per_row": True,
    }

    floats = {
        key: tensor
        for key, tensor in held.items()
        if tensor.is_floating_point() and not key.endswith("scale")
    }
    for key, tensor in floats.items():
        source = own.get(key, own.get(key.removeprefix("text_model.")))
        assert source is not None and torch.equal(tensor, source) and tensor.dtype == source.dtype, key

    assert len(floats) + 6 == len(own)


def test_the_command_writes_a_file_that_a_run_takes(
    model: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    small = [f"model.location={model}", "tracker=none", "progress=false", "cache.limit_gb=0"]
    with command_in(tmp_path / "here", monkeypatch, capsys) as command:
        done = command(
            "task=quantize",
            "task.component=text_encoder_2",
            "clip=int8_blockwise",
            "save=t5.safetensors",
            *small,
        )

        assert done.code == 0, done.err

        words = " ".join(done.out.split())

        assert "encoder t5_old" in words
        assert "layers 5 · format int8_blockwise" in words
        assert "int8_blockwise 5 layers · float 3 (" in words

        size = [
            "sampler.height=16",
            "sampler.width=16",
            "sampler.steps=1",
            "prompts.prompts=[a]",
            "metrics.baseline=none",
            "int8.enable=false",
        ]
        done = command("clip=auto", "clip.path=t5.safetensors", *small, *size)

        assert done.code == 0, done.err

        words = " ".join(done.out.split())

        assert (
            "clip.path has the weights of text_encoder_2; text_encoder stays as it is" in words
            and "text_encoder_2 int8_blockwise 5, float 4" in words
        ), words


# -- sources -------------------------------------------------------------------------------------------------


def test_tokenizers_in_a_file_are_kept(quantize: Quantize, tmp_path: Path) -> None:
    file = make_encoder_file("t5")
    file.text("spiece_model", b"\x00\x01words\xff")
    file.metadata["author"] = "x"
    source = file.write(tmp_path / "t5.safetensors")
    quantize(source, "nvfp4", tmp_path / "x.safetensors")

    assert bytes(load_file(tmp_path / "x.safetensors")["spiece_model"].tolist()) == b"\x00\x01words\xff"

    with safe_open(tmp_path / "x.safetensors", "pt") as held:
        assert held.metadata()["author"] == "x"


def test_the_same_format_is_copied(
    quantize: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for word in ("int8_rowwise", "nvfp4", "float8_e4m3fn", "mxfp8", "float8_e4m3fn_cast"):
        file = make_encoder_file("t5", word, quantized=["shared.weight"])
        source = file.write(tmp_path / "source.safetensors")
        metrics = quantize(source, word, tmp_path / f"{word}.safetensors")
        held, made = load_file(source), load_file(tmp_path / f"{word}.safetensors")

        assert held.keys() == made.keys()
        for key in held.keys() - {key for key in held if key.endswith("comfy_quant")}:
            assert torch.equal(
                held[key].flatten().view(torch.uint8), made[key].flatten().view(torch.uint8)
            ), (word, key)
        assert "clip/weight_sqnr_db_mean" not in metrics
        assert metrics["clip/layers_quantized"] == 8

        rows = list(csv.DictReader((tmp_path / "out" / "layers.csv").read_text().splitlines()))

        assert {row["rounding"] for row in rows if row["quantized"] == "true"} == {
            f"{word}, as in the source"
        }

    assert not caplog.records


def test_another_format_is_rounded_once_more(
    quantize: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = make_encoder_file("clip_l", words=["int8_rowwise", "nvfp4"])
    quantize(file.write(tmp_path / "source.safetensors"), "float8_e4m3fn_rowwise", tmp_path / "x.safetensors")
    message = (
        "layers that are quantized already are dequantized and rounded once more: 3 × int8_rowwise, 3 × nvfp4"
    )

    assert f"{tmp_path / 'source.safetensors'}: {message}" in caplog.text

    for name, reading in oracle.read(tmp_path / "x.safetensors").items():
        if name in file.words:
            expected = (
                FORMATS["float8_e4m3fn_rowwise"]
                .quantize(torch.from_numpy(file.real[name]).float())
                .dequantize()
            )
            assert_close(name, torch.from_numpy(reading.weight), expected, 1e-3)
    with safe_open(tmp_path / "x.safetensors", "pt") as held:
        assert "_quantization_metadata" not in held.metadata()


@pytest.mark.parametrize(
    ("word", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)]
)
def test_a_table_that_was_quantized_has_the_dtype_of_what_is_float(
    word: str, dtype: torch.dtype, quantize: Quantize, tmp_path: Path
) -> None:
    file = make_encoder_file("t5", "int8_rowwise", quantized=["shared.weight"], dtype=word)
    quantize(file.write(tmp_path / "source.safetensors"), "nvfp4", tmp_path / "x.safetensors")
    held = load_file(tmp_path / "x.safetensors")

    assert torch.equal(held["shared.weight"], torch.from_numpy(file.real["shared"]).float().to(dtype))
    assert held["encoder.final_layer_norm.weight"].dtype == dtype, "what was float stays what it was"


def test_a_stale_description_is_left_out(quantize: Quantize, tmp_path: Path) -> None:
    file = make_encoder_file("clip_l", "int8_convrot", carrier="both")
    quantize(file.write(tmp_path / "source.safetensors"), "mxfp8", tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as held:
        assert "_quantization_metadata" not in held.metadata()

    assert load_text_encoder(tmp_path / "x.safetensors")[1]["formats"] == {"mxfp8": 6}


def test_one_of_a_checkpoints_encoders_is_written_without_its_prefix(
    quantize: Quantize, tmp_path: Path
) -> None:
    source = (
        make_encoder_file("clip_l", dtype="F32")
        .prefixed("text_encoders.clip_l.transformer.")
        .write(tmp_path / "source.safetensors")
    )
    quantize(source, "int8_rowwise", tmp_path / "x.safetensors")

    assert all(key.startswith("text_model.") for key in load_file(tmp_path / "x.safetensors"))


def test_a_folder_of_an_encoder_alone(
    model: Path, quantize: Quantize, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    quantize(model / "text_encoder", "int8_rowwise", tmp_path / "alone.safetensors")
    quantize(model, "int8_rowwise", tmp_path / "part.safetensors")
    alone, part = (load_file(tmp_path / f"{name}.safetensors") for name in ("alone", "part"))

    assert alone.keys() == part.keys()
    assert all(torch.equal(alone[key], part[key]) for key in alone)

    # and what was written to a folder is a source again
    quantize(model, "int8_rowwise", tmp_path / "folder")
    quantize(tmp_path / "folder", "int8_rowwise", tmp_path / "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")

    assert alone.keys() == again.keys()
    assert all(torch.equal(alone[key], again[key]) for key in alone)


def test_one_tensor_at_a_time(
    model: Path, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No weight is read before the one before it is written."""
    events: list[tuple[str, str]] = []
    read, write = TensorFiles.read, StreamWriter.write

    def reading(self: TensorFiles, key: str, *args: Any, **kwargs: Any) -> Any:
        events.append(("read", key))
        return read(self, key, *args, **kwargs)

    def writing(self: StreamWriter, key: str, *args: Any, **kwargs: Any) -> Any:
        events.append(("write", key))
        return write(self, key, *args, **kwargs)

    monkeypatch.setattr(TensorFiles, "read", reading)
    monkeypatch.setattr(StreamWriter, "write", writing)
    quantize(model, "int8_convrot", tmp_path / "x.safetensors", component="text_encoder_2")
    reads = [i for i, (what, _) in enumerate(events) if what == "read"]

    assert len(reads) == 11, "each tensor once, tied ones as well"
    for i in reads:
        assert events[i + 1][0] == "write"
        assert events[i + 1][1] == events[i][1]


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (
            "keep",
            (
                r"task\.component=text_encoder is written in the format "
                r"of clip=; choose one: int8_tensorwise, .*nvfp4, w4a8, w6a8$"
            ),
        ),
        ("auto", r"is written in the format of clip="),
    ],
)
def test_a_format_is_needed(clip: str, message: str, model: Path, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(model, clip, tmp_path / "x.safetensors")
    with pytest.raises(ConfigError, match="written in the format of clip=") as found:
        quantize(model, "nvfp4_modelopt", tmp_path / "x.safetensors", f"clip.path={model}")
    assert "nvfp4_modelopt" not in str(found.value)
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(
        ConfigError, match=r"task=quantize reads model\.location; set it to the file, and clip\.path=null"
    ):
        quantize(model, "nvfp4", tmp_path / "x.safetensors", f"clip.path={model}")


def test_a_place_is_needed(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task=quantize writes a checkpoint; set save="):
        quantize(model, "nvfp4", None)
    with pytest.raises(
        ConfigError,
        match=(
            r"task\.component=text_encoder_3 is not a text encoder of "
            r".*; did you mean 'text_encoder_2'\? it has text_encoder,"
        ),
    ):
        quantize(model, "nvfp4", tmp_path / "x.safetensors", component="text_encoder_3")

    (tmp_path / "file").write_text("")

    with pytest.raises((ConfigError, FileError), match="file"):
        quantize(model, "nvfp4", tmp_path / "file" / "x.safetensors")


def test_the_source_is_not_overwritten(
    model: Path, quantize: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_encoder_file("clip_l").write(tmp_path / "clip.safetensors")
    before = source.read_bytes()

    with pytest.raises(
        ConfigError, match=r"save=.*clip\.safetensors is the source itself; choose another name"
    ):
        quantize(source, "nvfp4", source)
    assert source.read_bytes() == before

    folder = shutil.copytree(model / "text_encoder", tmp_path / "folder")

    with pytest.raises(ConfigError, match="is the source itself"):
        quantize(folder, "nvfp4", folder)

    other = tmp_path / "other.safetensors"
    other.write_bytes(b"old")
    quantize(source, "nvfp4", other)

    assert f"save={other} replaces an existing file" in caplog.text
    assert len(other.read_bytes()) > 1000


def test_sources_that_are_none(model: Path, quantize: Quantize, tmp_path: Path) -> None:
    save = tmp_path / "x.safetensors"

    with pytest.raises(FileError, match="holds no text encoder that is known: it holds a VAE"):
        quantize(model / "vae", "nvfp4", save)
    with pytest.raises(FileError, match="nowhere"):
        quantize(tmp_path / "nowhere.safetensors", "nvfp4", save)

    only_tables = make_encoder_file("t5", only=["shared", "relative", "layer_norm"])

    with pytest.raises(FileError):
        quantize(only_tables.write(tmp_path / "tables.safetensors"), "nvfp4", save)
    assert not save.exists()


def test_numbers_that_are_none_stop_it(quantize: Quantize, tmp_path: Path) -> None:
    for key in ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"):
        file: File = make_encoder_file("t5")
        file.put(key, "F32", np.full(file.tensors[key].shape, np.nan))

        with pytest.raises((ConfigError, FileError), match="NaN or infinity"):
            quantize(file.write(tmp_path / "t5.safetensors"), "nvfp4", tmp_path / "x.safetensors")
        assert not (tmp_path / "x.safetensors").exists(), "no half of a file is left"


def test_layers_that_cannot_have_the_format(
    quantize: Quantize, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = make_encoder_file("t5", inner=100).write(tmp_path / "t5.safetensors")
    quantize(source, "float8_e4m3fn_blockwise", tmp_path / "x.safetensors")
    _, metadata = load_text_encoder(tmp_path / "x.safetensors", "float8_e4m3fn_blockwise")

    assert metadata["formats"] == {"float8_e4m3fn_blockwise": 4, "float8_e4m3fn_rowwise": 3}
    assert "3 layers cannot be float8_e4m3fn_blockwise: " in caplog.text


def test_biases_and_norms_of_a_checkpoint_stay_what_they_are(
    quantize: Quantize, floats: dict[str, nn.Module], tmp_path: Path
) -> None:
    file = file_of(floats["text_encoder"], [])
    quantize(file.write(tmp_path / "clip.safetensors"), "int8_rowwise", tmp_path / "x.safetensors")
    state, metadata = load_text_encoder(tmp_path / "x.safetensors", kernel_backend="dequantize")
    config = floats["text_encoder"].config.to_dict()
    found = answer(build_text_encoder(state, metadata, "CLIPTextModel", config, torch.float32))
    real = {name: reading.weight for name, reading in oracle.read(tmp_path / "x.safetensors").items()}

    assert_close("clip", found, answer(changed(floats["text_encoder"], real)), 1e-5)
