"""Loading: each way in which a folder can be wrong is a FileError with the folder's name and the reason."""

import importlib.metadata
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from torch import nn

import int8run
from int8run.backends.autotune_cache import describe_environment
from int8run.errors import BackendError, ConfigError, FileError
from int8run.models import loader
from int8run.models.family import ModelSource
from int8run.models.loader import (
    check_component_libraries,
    list_block_prefixes,
    load_parts,
    load_pipeline,
    pick_device,
    read_library_versions,
)
from int8run.models.sampling import Sampling

CPU = torch.device("cpu")
INDEX = {
    "_class_name": "FluxPipeline",
    "_diffusers_version": "0.36.0",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
}


def load_on_cpu(location, **denoisers):
    return load_pipeline(location, denoisers, torch.float32, CPU)


@pytest.fixture
def write_index(tmp_path):
    def write(index):
        (tmp_path / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
        return tmp_path

    return write


BROKEN = {
    "no json": "{",
    "a list": "[]",
    "no class": {"transformer": INDEX["transformer"]},
    "unknown class": INDEX | {"_class_name": "NoSuchPipeline"},
    "component without a folder": INDEX,
    "unknown component class": INDEX | {"transformer": ["diffusers", "NoSuchModel"]},
    "unknown component library": INDEX | {"transformer": ["nosuchlibrary", "X"]},
    "a library that is there, and would run": INDEX | {"transformer": ["antigravity", "X"]},
}


@pytest.mark.parametrize("index", BROKEN.values(), ids=BROKEN)
def test_broken_folder_is_a_one_line_error(write_index, index):
    place = write_index(index)
    with pytest.raises(
        FileError,
        match=rf"^model '{place}' could not be loaded: .+; set model\.location to a folder that has it$",
    ):
        load_on_cpu(place)


@pytest.mark.parametrize("setting", [[1, 2], [0.5, "x"], ["diffusers"], {"a": 1}], ids=str)
def test_a_list_among_the_settings_of_a_pipeline_is_no_component(write_index, setting):
    """Krea 2 has such a list."""
    place = write_index({"_class_name": "FluxPipeline", "text_encoder_select_layers": setting})
    check_component_libraries(place)


def test_code_inside_a_model_is_not_run(write_index):
    place = write_index(INDEX | {"_class_name": ["pipeline", "Mine"]})
    (place / "pipeline.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('pwned').touch()\nclass Mine: pass\n"
    )

    with pytest.raises(FileError, match=r"could not be loaded: .*(trust_remote_code|custom code)"):
        load_on_cpu(place)
    assert not (place / "pwned").exists()


def test_pickled_weights_are_not_read(write_index):
    place = write_index(INDEX)
    (place / "transformer").mkdir()
    (place / "transformer" / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 0})
    )
    torch.save({"x": torch.zeros(1)}, place / "transformer" / "diffusion_pytorch_model.bin")

    with pytest.raises(FileError, match=r"could not be loaded: .*safetensors"):
        load_on_cpu(place)


def test_given_denoisers_are_used_as_they_are(tmp_path):
    save_random_pipeline(tmp_path)
    for file in (tmp_path / "transformer").glob("*.safetensors"):
        file.unlink()  # nobody reads them
    mine = random_pipeline().transformer.to("meta")

    pipe = load_on_cpu(tmp_path, transformer=mine)

    assert pipe.transformer is mine
    assert all(p.is_meta for p in mine.parameters())
    assert not any(p.is_meta for p in pipe.vae.parameters())
    assert pipe.device.type == "cpu"
    with pytest.raises(FileError, match=rf"^model '{tmp_path}' could not be loaded: "):
        load_on_cpu(tmp_path)


def test_every_module_is_loaded_in_the_given_dtype(tmp_path):
    save_random_pipeline(tmp_path)
    pipe = load_pipeline(tmp_path, {}, torch.bfloat16, CPU)

    for module in (pipe.transformer, pipe.vae, pipe.text_encoder):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("there", "kind"), [("cuda xpu mps", "cuda"), ("xpu", "xpu"), ("mps", "cpu"), ("", "cpu")]
)
def test_device_auto_is_a_gpu_that_has_int8_products(monkeypatch, there, kind):
    monkeypatch.setattr(loader, "has_device", lambda asked: asked in there.split())
    assert pick_device("auto").type == kind


@pytest.mark.parametrize("asked", ["banana", "cuda:x", ""])
def test_unknown_device_is_an_error(asked):
    choices = "auto, cpu, cuda, cuda:N, xpu, xpu:N, mps"
    with pytest.raises(ConfigError, match=rf"device is '{asked}'; choose from {choices}$"):
        pick_device(asked)


@pytest.mark.parametrize("asked", ["meta", "vulkan"])
def test_unsupported_device_is_an_error(asked):
    message = rf"^device={asked}: this version runs on cpu and cuda and xpu and mps$"
    with pytest.raises(BackendError, match=message):
        pick_device(asked)


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "xpu:0", "mps"])
def test_missing_gpu_is_an_error(monkeypatch, asked):
    for kind in (torch.cuda, torch.xpu, torch.backends.mps):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    with pytest.raises(
        BackendError, match=rf"device={asked} asks for a GPU, but torch .* sees none; device=cpu works here"
    ):
        pick_device(asked)


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_gpu_index_out_of_range_is_an_error(monkeypatch, kind):
    monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: True)
    monkeypatch.setattr(getattr(torch, kind), "device_count", lambda: 2)

    assert pick_device(f"{kind}:1") == torch.device(f"{kind}:1")
    with pytest.raises(BackendError, match=rf"device={kind}:2.* torch sees 2, .*launcher .* may hide others"):
        pick_device(f"{kind}:2")


def test_block_prefixes_come_from_lists_with_more_than_one_module():
    model = nn.Module()
    model.first, model.head = nn.ModuleList(nn.Linear(1, 1) for _ in range(2)), nn.Linear(1, 1)
    model.alone, model.last = (
        nn.ModuleList([nn.Linear(1, 1)]),
        nn.ModuleList(nn.Linear(1, 1) for _ in range(2)),
    )

    assert list_block_prefixes(model) == ["first.0.", "first.1.", "last.0.", "last.1."]


def test_library_versions_are_the_installed_ones():
    versions = read_library_versions()

    assert {"int8run", "torch", "diffusers", "transformers", "numpy"} <= set(versions)
    # the build tag, +cpu or +cu130, is not always part of the installed version
    assert versions["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_a_working_tree_without_installed_metadata_knows_its_version(monkeypatch):
    find_version = importlib.metadata.version

    def without_int8run(name):
        if name == "int8run":
            raise importlib.metadata.PackageNotFoundError(name)
        return find_version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_int8run)

    assert read_library_versions()["int8run"] == int8run.__version__
    assert f"int8run {int8run.__version__}" in describe_environment(torch.device("cpu"), None)


def test_missing_component_is_loaded_from_model_parts(tmp_path):
    pipe = random_pipeline()
    pipe.text_encoder_2.save_pretrained(tmp_path / "t5")
    elsewhere = {"text_encoder_2": ["T5EncoderModel", str(tmp_path / "t5")]}
    folder = tmp_path / "pipe"
    pipe.save_pretrained(folder)

    assert load_parts(folder, elsewhere, torch.float32) == {}, "the folder has its own"

    shutil.rmtree(folder / "text_encoder_2")

    with pytest.raises(FileError, match="could not be loaded"):
        load_pipeline(folder, {}, torch.float32, CPU)

    parts = load_parts(folder, elsewhere, torch.float32)
    made = load_pipeline(folder, {}, torch.float32, CPU, parts)

    assert made.text_encoder_2 is parts["text_encoder_2"]
    for name, tensor in pipe.text_encoder_2.state_dict().items():
        assert torch.equal(made.text_encoder_2.state_dict()[name], tensor), name


def test_part_that_cannot_be_loaded_is_an_error_with_the_setting(tmp_path):
    folder = save_random_pipeline(tmp_path / "pipe")
    shutil.rmtree(folder / "tokenizer")
    words = (
        rf"^tokenizer could not be loaded from {tmp_path}/no: .*; set "
        rf"'model\.parts\.tokenizer=\[CLIPTokenizer, FOLDER\]' to one that"
    )

    with pytest.raises(FileError, match=words):
        load_parts(folder, {"tokenizer": ["CLIPTokenizer", f"{tmp_path}/no"]}, torch.float32)
    with pytest.raises(
        ConfigError, match=r"model\.parts\.tokenizer is of class NoSuch, which neither transformers .* has"
    ):
        load_parts(folder, {"tokenizer": ["NoSuch", "x/y"]}, torch.float32)
    with pytest.raises(
        ConfigError, match=r"model\.parts\.tokenizer is of class RagRetriever; allowed are models"
    ):
        load_parts(folder, {"tokenizer": ["RagRetriever", "x/y"]}, torch.float32)
    with pytest.raises(
        ConfigError,
        match=r"model\.parts\.a is 'x'; it takes \[class of transformers or diffusers, hub id or folder\]",
    ):
        ModelSource("x", "x", Sampling(), parts={"a": "x"})


@pytest.mark.parametrize("kind", ["cuda", "hip", "xpu"])
def test_what_was_measured_with_another_driver_is_not_read(kind, monkeypatch):
    driver = ["1.0"]
    monkeypatch.setattr(torch.version, "hip", "7.0" if kind == "hip" else None)
    monkeypatch.setattr(torch.version, "xpu", "20250301", raising=False)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver[0], raising=False)
    monkeypatch.setattr(
        torch.xpu, "get_device_properties", lambda device: SimpleNamespace(driver_version=driver[0])
    )
    device = torch.device("xpu" if kind == "xpu" else "cuda")

    before = describe_environment(device, None)
    driver[0] = "2.0"

    runtime = {"cuda": f"CUDA {torch.version.cuda}", "hip": "HIP 7.0", "xpu": "SYCL 20250301"}[kind]
    assert before.endswith(f"{runtime}, driver 1.0")
    assert describe_environment(device, None) != before
