"""Finding a denoiser's weights without diffusers: here, or on a hub that is a folder."""

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest

import int8run.models.resolve_weights as resolve_weights_module
from int8run.errors import ConfigError, FileError
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.family import ModelSource
from int8run.models.model_folders import read_source_index
from int8run.models.resolve_weights import download_side_files, resolve_weights
from int8run.models.sampling import Sampling
from int8run.utils.paths import ASSETS_FOLDER

CONFIG = {"_class_name": "FluxTransformer2DModel", "num_layers": 1}


def write_pipeline(folder, *components):
    """A diffusers folder with these denoisers; another component, and one that is left out."""
    index = {
        "_class_name": "SomePipeline",
        "_version": 1,
        "vae": ["diffusers", "AutoencoderKL"],
        "unet": [None, None],
    }
    for name in components:
        index[name] = ["diffusers", "FluxTransformer2DModel"]
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        (folder / name / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    folder.mkdir(exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_shipped_model_is_found_inside_the_package():
    found = resolve_weights("shipped:tiny")

    assert found.path == ASSETS_FOLDER / "tiny" / "transformer"
    assert found.class_name == "FluxTransformer2DModel"


def test_only_denoiser_of_a_pipeline_is_chosen(tmp_path):
    folder = write_pipeline(tmp_path / "p", "transformer")
    for component in (None, "transformer"):
        found = resolve_weights(str(folder), component=component)
        assert (found.path, found.class_name, found.config) == (
            folder / "transformer",
            "FluxTransformer2DModel",
            CONFIG,
        )


def test_pipeline_with_two_denoisers_needs_a_component(tmp_path):
    folder = write_pipeline(tmp_path / "p", "transformer", "transformer_2")
    words = r"p has 2 denoisers; choose one: task\.component=transformer or task\.component=transformer_2$"

    with pytest.raises(ConfigError, match=words):
        resolve_weights(str(folder))
    assert resolve_weights(str(folder), component="transformer_2").path == folder / "transformer_2"
    with pytest.raises(
        ConfigError,
        match=r"^task\.component=transformer_3 is not a denoiser of .*; did you mean 'transformer_\d'\? "
        r"it has ",
    ):
        resolve_weights(str(folder), component="transformer_3")


def test_pipeline_without_a_denoiser_is_an_error(tmp_path):
    folder = write_pipeline(tmp_path / "p")
    words = (
        r"p has no denoiser: its components are unet, vae; .* in diffusers named transformer or "
        rf"{' or '.join(DENOISER_COMPONENTS[1:])}$"
    )

    with pytest.raises(ConfigError, match=words):
        resolve_weights(str(folder))
    with pytest.raises(ConfigError, match=words):
        resolve_weights(str(folder), component="vae")


def test_denoiser_folder_and_file_are_resolved_with_the_config_beside(tmp_path):
    folder = write_pipeline(tmp_path / "p", "transformer") / "transformer"
    file = folder / "diffusion_pytorch_model.safetensors"

    assert resolve_weights(str(folder)).path == folder
    assert resolve_weights(str(folder)).config == CONFIG
    assert resolve_weights(str(file)).path == file
    assert resolve_weights(str(file)).config == CONFIG
    with pytest.raises(
        ConfigError,
        match=r"^task\.component=transformer names a part of a pipeline, and .* is a single denoiser; ",
    ):
        resolve_weights(str(folder), component="transformer")

    (folder / "config.json").write_text('{"model_type": "not a class"}')

    assert resolve_weights(str(file)).config is None
    assert resolve_weights(str(file)).class_name is None

    (folder / "config.json").unlink()

    assert resolve_weights(str(file)).config is None


@pytest.mark.parametrize(
    "text", ["[1]", "{", "\ud800".encode("utf-8", "surrogatepass")], ids=["a list", "cut off", "no text"]
)
def test_malformed_config_is_an_error(tmp_path, text):
    folder = write_pipeline(tmp_path / "p", "transformer")
    (folder / "transformer" / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(FileError, match=r"config\.json (is not a JSON object|cannot be read: )"):
        resolve_weights(str(folder))


@pytest.mark.parametrize("name", ["x.ckpt", "x.pt", "x.pth", "X.BIN"])
def test_unsupported_file_format_is_an_error(name):
    words = "a pickled file, which can run code when opened; convert it to"
    with pytest.raises(ConfigError, match=rf"^model\.location={name} is {words} "):
        resolve_weights(name)


def test_a_file_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    file.write_bytes(bytes(20))

    def refuse(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)

    with pytest.raises(FileError, match=r"weights cannot be read: Permission denied; set model\.location"):
        resolve_weights(str(file))


def test_a_file_that_is_no_checkpoint_is_an_error_whatever_its_name(tmp_path):
    image = tmp_path / "cat.png"
    image.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))

    with pytest.raises(
        ConfigError,
        match=r"cat\.png is neither a \.safetensors nor a \.gguf file; name one, a diffusers folder",
    ):
        resolve_weights(str(image))
    with pytest.raises(ConfigError, match=r"cat\.png is neither a \.safetensors nor a \.gguf file"):
        read_source_index(ModelSource(str(image), "tiny", Sampling(), base="org/repository"))


@pytest.mark.parametrize(
    "location", ["./missing", "/missing/x.safetensors", "~/missing", "shipped:missing", "missing.safetensors"]
)
def test_missing_path_is_an_error(location):
    with pytest.raises(
        FileError,
        match=r"missing(/x\.safetensors|\.safetensors)?: no such file or folder; set model\.location to a",
    ):
        resolve_weights(location)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the repository `org/model`: a pipeline and a file. Records what is asked for."""
    repository, asked = write_pipeline(tmp_path / "hub", "transformer", "transformer_2"), []
    (repository / "split_files").mkdir()
    (repository / "split_files" / "x.safetensors").write_bytes(b"")

    def file(name, path, revision=None):
        asked.append((name, path, revision))
        if name != "org/model" or not (repository / path).exists():
            raise huggingface_hub.errors.LocalEntryNotFoundError(
                f"404: {path} is not there\nlook at the page"
            )
        return str(repository / path)

    def snapshot(name, revision=None, allow_patterns=None, ignore_patterns=None):
        asked.append((name, tuple(allow_patterns), revision))
        return str(repository)

    monkeypatch.setattr(resolve_weights_module, "check_repository", lambda *words: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return repository, asked


def test_configs_beside_a_file_on_the_hub_are_downloaded(hub, monkeypatch, caplog):
    repository, asked = hub
    (repository / "split_files" / "quantization_config.json").write_text("{}")
    offline = huggingface_hub.hf_hub_download

    def online(name, path, revision=None):
        try:
            return offline(name, path, revision)
        except huggingface_hub.errors.LocalEntryNotFoundError as error:
            raise huggingface_hub.errors.EntryNotFoundError(str(error)) from error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", online)
    download_side_files("org/model/split_files/x.safetensors", "main")

    assert asked == [
        ("org/model", "split_files/config.json", "main"),
        ("org/model", "split_files/quantization_config.json", "main"),
        ("org/model", "split_files/hf_quant_config.json", "main"),
    ]
    assert not caplog.records

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    download_side_files("org/model/split_files/y.safetensors", None)
    assert "the hub cannot be reached for the config.json beside it" in caplog.text


@pytest.mark.parametrize("location", ["./x.safetensors", "/x/y/z.safetensors", "org/model", "shipped:tiny"])
def test_nothing_is_downloaded_beside_other_locations(hub, location):
    _, asked = hub
    download_side_files(location, None)
    assert asked == []


def test_only_the_chosen_component_is_downloaded(hub):
    repository, asked = hub
    found = resolve_weights("org/model", "main", "transformer_2")

    assert (found.path, found.config) == (repository / "transformer_2", CONFIG)

    wanted = (
        "transformer_2/config.json",
        "transformer_2/quantization_config.json",
        "transformer_2/hf_quant_config.json",
        "transformer_2/*.safetensors",
        "transformer_2/*.safetensors.index.json",
    )

    assert asked == [("org/model", "model_index.json", "main"), ("org/model", wanted, "main")]
    with pytest.raises(ConfigError, match=r"^org/model has 2 denoisers"):
        resolve_weights("org/model")


def test_single_file_is_downloaded_from_the_hub(hub):
    repository, asked = hub

    assert (
        resolve_weights("org/model/split_files/x.safetensors").path
        == repository / "split_files" / "x.safetensors"
    )
    assert asked == [("org/model", "split_files/x.safetensors", None)]


@pytest.mark.parametrize("location", ["org/other", "org/model/y.safetensors"])
def test_failed_download_is_an_error(hub, location):
    words = (
        rf"^model\.location={location} is not on this machine and could not be downloaded "
        rf"\(LocalEntryNotFoundError: 404: .* is not there look at the page\); set model.location"
    )
    with pytest.raises(FileError, match=words):
        resolve_weights(location)


def test_module_does_not_import_diffusers():
    text = Path(sys.modules["int8run.models.resolve_weights"].__file__).read_text()

    assert "import diffusers" not in text
    assert "from diffusers" not in text
