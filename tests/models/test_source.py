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
from int8run.models import source as module
from int8run.models.family import ModelSource
from int8run.models.resolve_weights import ASSETS_FOLDER
from int8run.models.sampling import Sampling
from int8run.models.source import ResolvedDenoiser, ResolvedModel, resolve_model

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


def model(location: Any, **more: Any) -> ModelSource:
    return ModelSource(str(location) if isinstance(location, Path) else location, "x", Sampling(), **more)


@pytest.fixture
def pipeline(tmp_path: Path) -> Callable[..., Path]:
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
            else [n for n in module.DENOISER_COMPONENTS if isinstance(index, dict) and n in index]
        )
        for component in there:
            (folder / component).mkdir()
            (folder / component / "config.json").write_text(
                config if isinstance(config, str) else json.dumps(config)
            )
        return folder

    return write


def weights(path: Path) -> Path:
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

    monkeypatch.setattr(DiffusionPipeline, "download", lambda name, **more: answer("folder", (name, more)))
    monkeypatch.setattr(module, "hf_hub_download", lambda *words, **more: answer("file", (words, more)))
    return asked


# -- what is found ------------------------------------------------------------------------------------------------------


def test_a_diffusers_folder_has_all(pipeline: Callable[..., Path]) -> None:
    folder = pipeline()
    assert resolve_model(model(folder)) == ResolvedModel(
        folder,
        (ResolvedDenoiser("transformer", "FluxTransformer2DModel", FLUX, folder / "transformer"),),
        False,
    )


def test_two_experts_come_in_the_order_of_their_use(pipeline: Callable[..., Path]) -> None:
    found = resolve_model(model(pipeline(TWO)))
    assert [d.component for d in found.denoisers] == [
        "transformer",
        "transformer_2",
    ] and not found.has_single_files
    left_out = pipeline(TWO | {"transformer_2": [None, None]}, "wan21", components=("transformer",))
    assert [d.component for d in resolve_model(model(left_out)).denoisers] == ["transformer"]


def test_the_shipped_model_is_found() -> None:
    found = resolve_model(model("shipped:tiny"))
    assert found.folder == ASSETS_FOLDER / "tiny" and len(found.denoisers) == 1


def test_a_single_file_takes_the_rest_from_its_base(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    folder, file = pipeline(), weights(tmp_path / "m.safetensors")
    found = resolve_model(model(file, base=str(folder)))
    assert found == ResolvedModel(
        folder, (ResolvedDenoiser("transformer", "FluxTransformer2DModel", FLUX, file),), True
    )


def test_a_folder_of_weights_without_a_pipeline_is_a_denoiser(
    pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    folder = weights(tmp_path / "mine" / "diffusion_pytorch_model.safetensors").parent
    found = resolve_model(model(folder, base=str(pipeline())))
    assert found.has_single_files and found.denoisers[0].weights == folder


def test_a_file_for_each_expert(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    low, high = weights(tmp_path / "low.safetensors"), weights(tmp_path / "high.safetensors")
    found = resolve_model(
        model({"transformer_2": str(low), "transformer": str(high)}, base=str(pipeline(TWO)))
    )
    assert [(d.component, d.weights) for d in found.denoisers] == [
        ("transformer", high),
        ("transformer_2", low),
    ]


def test_a_path_may_begin_with_the_home_folder(
    pipeline: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    weights(tmp_path / "m.safetensors")
    pipeline()
    assert (
        resolve_model(model("~/m.safetensors", base="~/pipe")).denoisers[0].weights
        == tmp_path / "m.safetensors"
    )


# -- the hub ------------------------------------------------------------------------------------------------------------


def test_a_hub_id_is_fetched_without_pickles(pipeline: Callable[..., Path], hub: dict[str, Any]) -> None:
    hub["folder"] = folder = pipeline()
    found = resolve_model(model("org/name", revision="v2"))
    assert (
        found.folder == folder
        and hub["pipelines"] == [("org/name", {"revision": "v2", "use_safetensors": True})]
        and not hub["files"]
    )


def test_of_a_base_on_the_hub_the_denoisers_weights_are_not_fetched(
    pipeline: Callable[..., Path], hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["folder"] = folder = pipeline()
    found = resolve_model(model(weights(tmp_path / "m.safetensors"), base="org/name", revision="of the file"))
    assert found.folder == folder and found.has_single_files
    nothing = dict.fromkeys(module.DENOISER_COMPONENTS)
    assert hub["pipelines"] == [("org/name", {"revision": None, "use_safetensors": True, **nothing})]
    assert hub["files"] == [(("org/name", "config.json"), {"subfolder": "transformer", "revision": None})]


def test_a_file_on_the_hub_is_fetched(
    pipeline: Callable[..., Path], hub: dict[str, Any], tmp_path: Path
) -> None:
    hub["file"] = file = weights(tmp_path / "fetched.safetensors")
    found = resolve_model(model("org/name/split/m.safetensors", base=str(pipeline()), revision="v2"))
    assert found.denoisers[0].weights == file and hub["files"] == [
        (("org/name", "split/m.safetensors"), {"revision": "v2"})
    ]


FAILURES = [
    OSError("org/name is not a local folder\nand not on the hub"),
    ValueError("offline"),
    KeyError("_class_name"),
    TypeError("t"),
]


@pytest.mark.parametrize("error", FAILURES, ids=lambda e: type(e).__name__)
def test_a_model_that_the_hub_does_not_give_is_one_line(error: Exception, hub: dict[str, Any]) -> None:
    hub["folder"] = error
    with pytest.raises(
        FileError,
        match=r"^model\.location=org/name is not on this machine and could not be downloaded \(\w+: .+\); set model\.location to a",
    ) as raised:
        resolve_model(model("org/name"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("error", FAILURES[:2], ids=lambda e: type(e).__name__)
def test_a_file_that_the_hub_does_not_give_is_one_line(
    error: Exception, pipeline: Callable[..., Path], hub: dict[str, Any]
) -> None:
    hub["file"] = error
    with pytest.raises(
        FileError,
        match=r"^model\.location=org/name/m\.safetensors is not on this machine and could not be downloaded",
    ):
        resolve_model(model("org/name/m.safetensors", base=str(pipeline())))


# -- refusals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.ckpt", "m.pt", "m.pth", "m.bin", "M.PT", "org/name/m.bin"])
def test_pickled_files_are_refused(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError,
        match=rf"^model\.location={name} is a pickled file, which can run code .*convert it to \.safetensors",
    ):
        resolve_model(model(name, base="org/base"))
    assert not hub["pipelines"] and not hub["files"]


def test_other_formats_are_refused_with_who_reads_them() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^model\.location=m\.gguf is a GGUF file; ComfyUI-GGUF and diffusers' GGUFQuantizationConfig",
    ):
        resolve_model(model("m.gguf"))
    with pytest.raises(ConfigError, match=r"^model\.location=b\.gguf is a GGUF file"):
        resolve_model(model({"transformer": "a.safetensors", "transformer_2": "b.gguf"}))


@pytest.mark.parametrize(
    "location", ["m.safetensors", {"transformer": "m.safetensors"}], ids=["file", "mapping"]
)
def test_a_single_file_needs_a_base(location: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"holds a denoiser alone; set model\.base=<hub id or diffusers folder> that the text encoders",
    ):
        resolve_model(model(location))


def test_files_for_two_denoisers_are_all_named(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    base, file = str(pipeline(TWO)), str(weights(tmp_path / "m.safetensors"))
    message = r"has 2 denoisers \(transformer, transformer_2\); set 'model\.location=\{transformer: <file>, transformer_2: <file>\}'$"
    for location in (file, {"transformer_2": file}):
        with pytest.raises(ConfigError, match=message):
            resolve_model(model(location, base=base))


def test_a_file_for_a_denoiser_that_is_not_there(pipeline: Callable[..., Path], tmp_path: Path) -> None:
    message = r"^model\.location names transfomer; did you mean 'transformer'\? .*pipe has transformer$"
    with pytest.raises(ConfigError, match=message):
        resolve_model(model({"transfomer": str(weights(tmp_path / "m.safetensors"))}, base=str(pipeline())))


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
def test_a_file_that_is_not_there(place: str, pipeline: Callable[..., Path], hub: dict[str, Any]) -> None:
    with pytest.raises(
        FileError,
        match=r"^/.*safetensors: no such file; on the hub a file is org/repository/name\.safetensors$",
    ):
        resolve_model(model(place, base=str(pipeline())))
    assert not hub["files"]


@pytest.mark.parametrize("place", ["./absent", "/absent", "~/absent", "shipped:absent"])
def test_a_folder_that_is_not_there(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        FileError, match=r"^/.*absent is not a diffusers folder: it has no model_index\.json$"
    ):
        resolve_model(model(place))


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
def test_a_broken_index_is_one_line(index: object, reason: str, pipeline: Callable[..., Path]) -> None:
    folder = pipeline(index)
    with pytest.raises(
        FileError,
        match=rf"^model '{folder}' could not be loaded: .*{reason}.*; set model\.location to a folder that has it$",
    ):
        resolve_model(model(folder))


@pytest.mark.parametrize(
    "entry", [["diffusers"], [], ["diffusers", "FluxTransformer2DModel", "more"]], ids=str
)
def test_a_component_of_another_form_is_one_line(entry: list[str], pipeline: Callable[..., Path]) -> None:
    with pytest.raises((FileError, ConfigError)):
        resolve_model(model(pipeline(ONE | {"transformer": entry})))


@pytest.mark.parametrize(
    ("config", "reason"), [("{", r"config\.json "), ("[]", r"config\.json is not a JSON object")]
)
def test_a_broken_config_is_one_line(config: str, reason: str, pipeline: Callable[..., Path]) -> None:
    with pytest.raises(FileError, match=rf"could not be loaded: .*{reason}"):
        resolve_model(model(pipeline(config=config)))


def test_a_config_that_is_not_there(pipeline: Callable[..., Path]) -> None:
    with pytest.raises(FileError, match=r"could not be loaded: .*config\.json cannot be read: No such file"):
        resolve_model(model(pipeline(components=())))


def test_a_pipeline_without_a_denoiser(pipeline: Callable[..., Path]) -> None:
    folder = pipeline(
        {
            "_class_name": "X",
            "vae": ["diffusers", "AutoencoderKL"],
            "prior": ["diffusers", "PriorTransformer"],
        }
    )
    with pytest.raises(
        ConfigError,
        match=rf"^X in {folder} has no denoiser: its components are prior, vae; .* transformer or transformer_2 or unet$",
    ):
        resolve_model(model(folder))


# -- the skeleton -------------------------------------------------------------------------------------------------------


def denoiser(config: dict[str, Any], kind: type = FluxTransformer2DModel) -> ResolvedDenoiser:
    return ResolvedDenoiser("transformer", kind.__name__, config, Path())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skeleton_has_shapes_and_no_values(dtype: torch.dtype) -> None:
    made = denoiser(FLUX).build_skeleton(dtype)
    real = FluxTransformer2DModel.from_config(FLUX)
    assert {n: tuple(p.shape) for n, p in made.named_parameters()} == {
        n: tuple(p.shape) for n, p in real.named_parameters()
    }
    assert (
        all(p.is_meta and p.dtype == dtype and not p.requires_grad for p in made.parameters())
        and not made.training
    )


def test_buffers_that_no_file_holds_are_there() -> None:
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
        denoiser(config, WanTransformer3DModel).build_skeleton(torch.bfloat16),
        WanTransformer3DModel.from_config(config),
    )
    buffers = dict(made.named_buffers())
    assert buffers and all(
        torch.equal(buffers[n], b) and buffers[n].dtype == b.dtype for n, b in real.named_buffers()
    )


@pytest.mark.parametrize("config", [{"num_layers": "x"}, {"attention_head_dim": None}], ids=str)
def test_a_config_that_the_class_does_not_take(config: dict[str, Any]) -> None:
    with pytest.raises(
        FileError,
        match=r"^the config of transformer does not fit FluxTransformer2DModel: .+; take the one of its checkpoint$",
    ):
        denoiser(FLUX | config).build_skeleton(torch.float32)
