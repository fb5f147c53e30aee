"""Where the parts of a model lie: folders, single files, the hub; what is not read is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, WanTransformer3DModel
from safetensors.torch import save_file

from int8run.errors import ConfigError, FileError
from int8run.models import model_folders as module
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.models.family import ModelSource
from int8run.models.sampling import Sampling
from int8run.models.source import ResolvedDenoiser, ResolvedModel, resolve_model
from int8run.utils.paths import ASSETS_FOLDER

FLUX = {
    "_class_name": "FluxTransformer2DModel",
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "pooled_projection_dim": 16,
    "in_channels": 8,
    "axes_dims_rope": [4, 6, 6],
}
ONE = {
    "_class_name": "FluxPipeline",
    "vae": ["diffusers", "AutoencoderKL"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
}
TWO = {
    "_class_name": "WanPipeline",
    "transformer_2": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
}


def make_source(location: Any, **more: Any) -> ModelSource:
    return ModelSource(str(location) if isinstance(location, Path) else location, "x", Sampling(), **more)


@pytest.fixture
def write_pipeline(tmp_path: Path) -> Callable[..., Path]:
    """Writes a diffusers folder with configs alone."""

    def write(
        index: object = ONE,
        name: str = "pipe",
        config: object = FLUX,
        components: tuple[str, ...] | None = None,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model_index.json").write_text(index if isinstance(index, str) else json.dumps(index))
        there = (
            components
            if components is not None
            else [n for n in DENOISER_COMPONENTS if isinstance(index, dict) and n in index]
        )
        for component in there:
            (folder / component).mkdir()
            (folder / component / "config.json").write_text(
                config if isinstance(config, str) else json.dumps(config)
            )
        return folder

    return write


def write_weights(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(1)}, path)
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    """What is asked of the hub; answers are set by the tests."""
    asked: dict[str, Any] = {"pipelines": [], "files": [], "folder": None, "file": None}

    def answer(kind: str, call: tuple[Any, ...]) -> str:
        asked[f"{kind}s" if kind == "file" else "pipelines"].append(call)
        found = asked[kind]
        if isinstance(found, Exception):
            raise found
        return str(found)

    monkeypatch.setattr(module, "check_repository", lambda *words: None)
    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **more: answer("folder", (name, more)))
    monkeypatch.setattr(module, "hf_hub_download", lambda *words, **more: answer("file", (words, more)))
    monkeypatch.setattr(module, "download_index", lambda name, revision: find_index(asked["folder"]))
    return asked


def find_index(answer: Any) -> Path:
    """The folder that the hub answers with; an error of the hub is that of the download itself."""
    return Path("nowhere") if answer is None or isinstance(answer, Exception) else answer


# what is found


def test_diffusers_folder_holds_every_part(write_pipeline: Callable[..., Path]) -> None:
    folder = write_pipeline()
    assert resolve_model(make_source(folder)) == ResolvedModel(
        folder,
        (ResolvedDenoiser("transformer", "FluxTransformer2DModel", FLUX, folder / "transformer"),),
        has_single_files=False,
        pipeline_class="FluxPipeline",
    )


def test_two_denoisers_are_listed_in_the_order_of_their_use(write_pipeline: Callable[..., Path]) -> None:
    found = resolve_model(make_source(write_pipeline(TWO)))

    assert [d.component for d in found.denoisers] == [
        "transformer",
        "transformer_2",
    ]
    assert not found.has_single_files

    left_out = write_pipeline(TWO | {"transformer_2": [None, None]}, "wan21", components=("transformer",))

    assert [d.component for d in resolve_model(make_source(left_out)).denoisers] == ["transformer"]


def test_shipped_model_is_found() -> None:
    found = resolve_model(make_source("shipped:tiny"))

    assert found.folder == ASSETS_FOLDER / "tiny"
    assert len(found.denoisers) == 1


def test_single_file_takes_the_rest_from_its_base(
    write_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder, file = write_pipeline(), write_weights(tmp_path / "m.safetensors")
    found = resolve_model(make_source(file, base=str(folder)))

    denoiser = ResolvedDenoiser("transformer", "FluxTransformer2DModel", FLUX, file)
    assert found == ResolvedModel(folder, (denoiser,), has_single_files=True, pipeline_class="FluxPipeline")


def test_folder_of_weights_without_an_index_is_a_denoiser(
    write_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder = write_weights(tmp_path / "mine" / "diffusion_pytorch_model.safetensors").parent
    found = resolve_model(make_source(folder, base=str(write_pipeline())))

    assert found.has_single_files
    assert found.denoisers[0].weights == folder


def test_mapping_gives_each_denoiser_its_file(write_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    low, high = write_weights(tmp_path / "low.safetensors"), write_weights(tmp_path / "high.safetensors")
    found = resolve_model(
        make_source({"transformer_2": str(low), "transformer": str(high)}, base=str(write_pipeline(TWO)))
    )

    assert [(d.component, d.weights) for d in found.denoisers] == [
        ("transformer", high),
        ("transformer_2", low),
    ]


def test_path_may_begin_with_the_home_folder(
    write_pipeline: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_weights(tmp_path / "m.safetensors")
    write_pipeline()

    assert (
        resolve_model(make_source("~/m.safetensors", base="~/pipe")).denoisers[0].weights
        == tmp_path / "m.safetensors"
    )


# the hub


def test_hub_id_is_downloaded_without_pickled_files(
    write_pipeline: Callable[..., Path], hub: dict[str, Any]
) -> None:
    hub["folder"] = folder = write_pipeline()
    found = resolve_model(make_source("org/name", revision="v2"))

    assert found.folder == folder
    assert hub["pipelines"] == [("org/name", {"revision": "v2", "use_safetensors": True})]
    assert not hub["files"]


def test_denoiser_weights_of_a_base_are_not_downloaded(
    write_pipeline: Callable[..., Path], hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["folder"] = folder = write_pipeline()
    found = resolve_model(
        make_source(write_weights(tmp_path / "m.safetensors"), base="org/name", revision="of the file")
    )

    assert found.folder == folder
    assert found.has_single_files

    nothing = dict.fromkeys(DENOISER_COMPONENTS)

    assert hub["pipelines"] == [("org/name", {"revision": None, "use_safetensors": True, **nothing})]
    assert hub["files"] == [(("org/name", "config.json"), {"subfolder": "transformer", "revision": None})]


def test_single_file_is_downloaded_from_the_hub(
    write_pipeline: Callable[..., Path], hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["file"] = file = write_weights(tmp_path / "fetched.safetensors")
    found = resolve_model(
        make_source("org/name/split/m.safetensors", base=str(write_pipeline()), revision="v2")
    )

    assert found.denoisers[0].weights == file
    assert hub["files"] == [(("org/name", "split/m.safetensors"), {"revision": "v2"})]


def test_folder_inside_a_repository_is_downloaded_and_its_config_counts(
    write_pipeline: Callable[..., Path], hub: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    full = write_weights(tmp_path / "snapshot" / "full" / "m.safetensors").parent
    (full / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel", "num_layers": 7}))

    def download(repository: str, **more: Any) -> str:
        asked.append((repository, more["revision"], more["allow_patterns"][0]))
        return str(full.parent)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)

    found = resolve_model(make_source("org/name/full", base=str(write_pipeline()), revision="v2"))

    assert found.denoisers[0].weights == full
    assert found.denoisers[0].config["num_layers"] == 7
    assert asked == [("org/name", "v2", "full/config.json")]
    assert not hub["files"]


FAILURES = [
    OSError("org/name is not a local folder\nand not on the hub"),
    ValueError("offline"),
    KeyError("_class_name"),
    TypeError("t"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_failed_pipeline_download_is_a_one_line_error(error: Exception, hub: dict[str, Any]) -> None:
    hub["folder"] = error

    with pytest.raises(
        FileError,
        match=r"^model\.location=org/name is not on this machine and could not be downloaded \(\w+: .+\); "
        r"set model\.location to a",
    ) as raised:
        resolve_model(make_source("org/name"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", FAILURES[:2], ids=lambda e: type(e).__name__)
def test_failed_file_download_is_a_one_line_error(
    error: Exception, write_pipeline: Callable[..., Path], hub: dict[str, Any]
) -> None:
    hub["file"] = error
    with pytest.raises(
        FileError,
        match=r"^model\.location=org/name/m\.safetensors is not on this machine and could not be downloaded",
    ):
        resolve_model(make_source("org/name/m.safetensors", base=str(write_pipeline())))


# refusals


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "M.PT", "org/name/m.bin"])
def test_pickled_file_is_an_error(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^model\.location={name} is a pickled file, which can run code .*convert it to \.safetensors",
    ):
        resolve_model(make_source(name, base="org/base"))
    assert not hub["pipelines"]
    assert not hub["files"]


def test_gguf_file_is_a_denoiser_alone() -> None:
    with pytest.raises(
        ConfigError, match=r"^model\.location=m\.gguf holds a denoiser alone; set model\.base="
    ):
        resolve_model(make_source("m.gguf"))


@pytest.mark.parametrize(
    "location", ["m.safetensors", {"transformer": "m.safetensors"}], ids=["file", "mapping"]
)
def test_single_file_without_a_base_is_an_error(location: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"holds a denoiser alone; set model\.base=<hub id or diffusers folder> that the text encoders",
    ):
        resolve_model(make_source(location))


def test_one_file_for_two_denoisers_is_an_error(write_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    base, file = str(write_pipeline(TWO)), str(write_weights(tmp_path / "m.safetensors"))
    message = (
        r"has 2 denoisers \(transformer, transformer_2\); set 'model\.location=\{transformer: "
        r"<file>, transformer_2: <file>\}'$"
    )

    for location in (file, {"transformer_2": file}):
        with pytest.raises(ConfigError, match=message):
            resolve_model(make_source(location, base=base))


def test_file_for_an_unknown_component_is_an_error(
    write_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    message = r"^model\.location names transfomer; did you mean 'transformer'\? .*pipe has transformer$"
    with pytest.raises(ConfigError, match=message):
        resolve_model(
            make_source(
                {"transfomer": str(write_weights(tmp_path / "m.safetensors"))}, base=str(write_pipeline())
            )
        )


@pytest.mark.parametrize(
    "place",
    [
        "./absent.safetensors",
        "/absent/m.safetensors",
        "~/absent.safetensors",
        "absent.safetensors",
        "a/b.safetensors",
    ],
)
def test_missing_file_is_an_error(
    place: str, write_pipeline: Callable[..., Path], hub: dict[str, Any]
) -> None:
    with pytest.raises(
        FileError,
        match=r"^/.*safetensors: no such file; on the hub a file is org/repository/name\.safetensors$",
    ):
        resolve_model(make_source(place, base=str(write_pipeline())))
    assert not hub["files"]


@pytest.mark.parametrize("place", ["./absent", "/absent", "~/absent", "shipped:absent"])
def test_missing_folder_is_an_error(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileError,
        match=r"^/.*absent is not a diffusers folder: it has no model_index\.json; set model.location to ",
    ):
        resolve_model(make_source(place))


BROKEN = {
    "no json": ("{", r"model_index\.json "),
    "a list": ("[]", r"model_index\.json is not a JSON object"),
    "unknown class": (
        ONE | {"transformer": ["diffusers", "NoSuchModel"]},
        r"the transformer is of a class .*diffusers\.NoSuchModel is not in",
    ),
    "no class": (
        ONE | {"transformer": ["diffusers", "__version__"]},
        "the transformer is of a class that is not here",
    ),
    "another library": (
        ONE | {"transformer": ["mine", "FluxTransformer2DModel"]},
        r"mine\.FluxTransformer2DModel is not in diffusers",
    ),
}


@pytest.mark.parametrize(("index", "reason"), BROKEN.values(), ids=BROKEN)
def test_broken_index_is_a_one_line_error(
    index: object, reason: str, write_pipeline: Callable[..., Path]
) -> None:
    folder = write_pipeline(index)
    with pytest.raises(
        FileError,
        match=rf"^model '{folder}' could not be loaded: .*{reason}.*; set model\.location to a folder "
        rf"that has it$",
    ):
        resolve_model(make_source(folder))


@pytest.mark.parametrize(
    "entry", [["diffusers"], [], ["diffusers", "FluxTransformer2DModel", "more"]], ids=str
)
def test_malformed_component_entry_is_an_error(entry: list[str], write_pipeline: Callable[..., Path]) -> None:
    with pytest.raises((FileError, ConfigError)):
        resolve_model(make_source(write_pipeline(ONE | {"transformer": entry})))


@pytest.mark.parametrize(
    ("config", "reason"), [("{", r"config\.json "), ("[]", r"config\.json is not a JSON object")]
)
def test_broken_config_is_a_one_line_error(
    config: str, reason: str, write_pipeline: Callable[..., Path]
) -> None:
    with pytest.raises(FileError, match=rf"could not be loaded: .*{reason}"):
        resolve_model(make_source(write_pipeline(config=config)))


def test_missing_config_is_an_error(write_pipeline: Callable[..., Path]) -> None:
    with pytest.raises(FileError, match=r"could not be loaded: .*config\.json cannot be read: No such file"):
        resolve_model(make_source(write_pipeline(components=())))


def test_pipeline_without_a_denoiser_is_an_error(write_pipeline: Callable[..., Path]) -> None:
    folder = write_pipeline(
        {
            "_class_name": "X",
            "vae": ["diffusers", "AutoencoderKL"],
            "prior": ["diffusers", "PriorTransformer"],
        }
    )
    with pytest.raises(
        ConfigError,
        match=rf"^X in {folder} has no denoiser: its components are prior, vae; .* transformer or "
        rf"{' or '.join(DENOISER_COMPONENTS[1:])}$",
    ):
        resolve_model(make_source(folder))


# the skeleton


def make_denoiser(config: dict[str, Any], kind: type = FluxTransformer2DModel) -> ResolvedDenoiser:
    return ResolvedDenoiser("transformer", kind.__name__, config, Path())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_skeleton_has_shapes_and_no_values(dtype: torch.dtype) -> None:
    made = make_denoiser(FLUX).build_skeleton(dtype)
    real = FluxTransformer2DModel.from_config(FLUX)

    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {
        n: tuple(p.shape) for n, p in real.named_parameters()
    }
    assert all(p.is_meta and p.dtype == dtype and not p.requires_grad for p in made.parameters())
    assert not made.training


def test_skeleton_has_the_buffers_that_no_file_holds() -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 8,
        "freq_dim": 16,
        "ffn_dim": 16,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    made, real = (
        make_denoiser(config, WanTransformer3DModel).build_skeleton(torch.bfloat16),
        WanTransformer3DModel.from_config(config),
    )

    buffers = dict(made.named_buffers())

    assert buffers
    assert all(torch.equal(buffers[n], b) and buffers[n].dtype == b.dtype for n, b in real.named_buffers())


@pytest.mark.parametrize("config", [{"num_layers": "x"}, {"attention_head_dim": None}], ids=str)
def test_config_that_does_not_fit_the_class_is_an_error(config: dict[str, Any]) -> None:
    with pytest.raises(
        FileError,
        match=r"^the config of transformer does not fit FluxTransformer2DModel: .+; take the one of its "
        r"checkpoint$",
    ):
        make_denoiser(FLUX | config).build_skeleton(torch.float32)
