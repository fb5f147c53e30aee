"""Loading without the float model: what is filled in is what diffusers would have loaded, and the planned
weights are never there.
"""

import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models import attention_dispatch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from support.helpers import CPU
from support.run_job import make_spec
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from torch import Tensor, nn

from int8run.errors import BackendError, ConfigError, FileError
from int8run.generate.prompts import build_samples
from int8run.layers.int8_linear import Int8Linear
from int8run.models.family import AutoFamily, load_families
from int8run.models.source import ResolvedDenoiser, resolve_model
from int8run.pipeline import load as module
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.checkpoint_weights import DenoiserWeights, FileWeights
from int8run.pipeline.load import load_model
from int8run.pipeline.loaded_model import LoadedModel, SkeletonLinear, computes_values, replace_missing_layers
from int8run.pipeline.model_files import hash_model_files
from int8run.pipeline.step_settings import select_load_settings
from int8run.quant.weight import quantize_weight
from int8run.report.console import Progress
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import ASSETS_FOLDER

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET = Progress(enabled=False)
PROBE = build_samples(["a"], 1, 0)
SMALL = [
    "sampler.height=16",
    "sampler.width=16",
    "sampler.steps=1",
    "backend=reference",
    "metrics.baseline=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_pipeline(tmp_path_factory.mktemp("model"))


def words(folder: Path | str, *more: str) -> list[str]:
    return [f"model.location={folder}", *SMALL, *more]


def loaded(folder: Path | str, *more: str, whole: bool = False) -> LoadedModel:
    return load_model(
        select_load_settings(make_spec(words(folder, *more)), needs_float_denoiser=whole), QUIET
    )


def built(folder: Path | str, *more: str) -> BuiltModel:
    return build_model(make_spec(words(folder, *more)), PROBE, [], QUIET)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those that no file holds included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def assert_same(one: nn.Module, two: nn.Module) -> None:
    ours, theirs = tensors_of(one), tensors_of(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), name


# -- the same as a resident model ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_filled_skeleton_is_what_diffusers_loads(folder: Path, dtype: str) -> None:
    found = loaded(folder, f"model.dtype={dtype}")
    assert all(p.is_meta for p in found.denoiser.parameters()) and found.checkpoint is not None
    found.fill_weights()
    whole = loaded(folder, f"model.dtype={dtype}", whole=True)
    assert whole.checkpoint is None
    assert_same(found.denoiser, whole.denoiser)
    assert not any(p.requires_grad for p in found.denoiser.parameters()) and not found.denoiser.training
    assert found.float_bytes == whole.float_bytes


@pytest.mark.parametrize("outlier", ["none", "convrot"])
@pytest.mark.parametrize("location", ["random", "shipped:tiny"])
def test_a_streamed_build_is_a_resident_one_bit_for_bit(folder: Path, location: str, outlier: str) -> None:
    place = folder if location == "random" else location
    streamed = built(place, f"outlier={outlier}")
    resident = built(place, f"outlier={outlier}", "metrics.baseline=run")
    assert set(streamed.denoisers) == {"int8"} and set(resident.denoisers) == {"int8", "float"}
    assert_same(streamed.denoisers["int8"], resident.denoisers["int8"])
    assert (
        streamed.float_bytes == resident.float_bytes
        and streamed.num_params == resident.num_params
        and streamed.macs == resident.macs
    )
    assert [(p.name, p.skip_reason, p.outlier) for p in streamed.plans] == [
        (p.name, p.skip_reason, p.outlier) for p in resident.plans
    ]


def test_a_single_file_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    save_file(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"), file)
    single = words(file, f"++model.base={folder}")
    streamed = build_model(make_spec(single), PROBE, [], QUIET)
    assert_same(streamed.denoisers["int8"], built(folder).denoisers["int8"])
    whole = load_model(select_load_settings(make_spec(single), needs_float_denoiser=True), QUIET)
    assert whole.checkpoint is not None
    assert_same(whole.denoiser, loaded(folder, whole=True).denoiser)


def quantize_component(folder: Path, component: str, name: str, scaled: bool = True) -> dict[str, Tensor]:
    """Rewrite the matrices of a component as fp8, with a scale for each or cast.

    Returns:
        What the numbers stand for, by key.
    """
    file = folder / component / name
    tensors, real = load_file(file), {}
    for key, weight in list(tensors.items()):
        if not key.endswith(".weight") or weight.dim() != 2:
            continue
        scale = weight.abs().max() / 448 if scaled else torch.tensor(1.0)
        tensors[key] = (weight / scale).to(torch.float8_e4m3fn)
        if scaled:
            tensors[f"{key}_scale"] = scale
        real[key] = tensors[key].float() * scale
    save_file(tensors, file, {"format": "pt"})
    return real


DENOISER_FILE = ("transformer", "diffusion_pytorch_model.safetensors")


@pytest.mark.parametrize("scaled", [True, False])
def test_quantized_weights_in_a_pipelines_folder_are_read_with_their_scales(
    scaled: bool, tmp_path: Path
) -> None:
    """diffusers would take the numbers without their scales."""
    folder = save_random_pipeline(tmp_path)
    real = quantize_component(folder, *DENOISER_FILE, scaled=scaled)

    found = loaded(folder, whole=True)

    state = found.denoiser.state_dict()
    assert real and all(torch.equal(state[key], weight) for key, weight in real.items())
    assert found.num_dequantized_layers > 0


def test_the_config_beside_a_quantized_file_on_the_hub_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SDNQ says in it alone that nothing is rotated."""
    tensors = load_file(folder.joinpath(*DENOISER_FILE))
    key = next(key for key, tensor in tensors.items() if key.endswith(".weight") and tensor.dim() == 2)
    quantized = quantize_weight(tensors[key].float())
    tensors |= {key: quantized.qdata, f"{key.removesuffix('weight')}scale": quantized.scale}
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()

    def download(repository: str, name: str, revision: str | None = None) -> str:
        assert repository == "org/model"
        if name == "m.safetensors":
            save_file(tensors, snapshot / name)
        elif name == "quantization_config.json":
            (snapshot / name).write_text('{"quant_method": "sdnq", "use_hadamard": false}')
        else:
            raise EntryNotFoundError(f"404: {name}")
        return str(snapshot / name)

    monkeypatch.setattr("int8run.models.model_folders.check_repository", lambda *words: None)
    monkeypatch.setattr("int8run.models.model_folders.hf_hub_download", download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    location = [*words(folder)[1:], "model.location=org/model/m.safetensors", f"++model.base={folder}"]
    found = load_model(select_load_settings(make_spec(location), needs_float_denoiser=True), QUIET)

    assert torch.equal(found.denoiser.state_dict()[key], quantized.dequantize())


def test_a_float_pipeline_has_no_dequantized_layers(folder: Path) -> None:
    assert loaded(folder, whole=True).num_dequantized_layers == 0
    assert loaded(folder).num_dequantized_layers == 0


def test_a_layout_that_a_float_pipeline_does_not_have_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model.quant_format=nvfp4, and .* has no such layer"):
        loaded(folder, "model.quant_format=nvfp4", whole=True)


def test_quantized_components_that_libraries_would_misread_are_refused(tmp_path: Path) -> None:
    folder = save_random_pipeline(tmp_path)
    quantize_component(folder, "text_encoder", "model.safetensors")

    message = r"text_encoder holds \d+ quantized weights \(float8_e4m3fn scaled, tensor\), which .* without"
    with pytest.raises(FileError, match=message):
        loaded(folder, whole=True)
    # clip= reads them
    place = folder / "text_encoder"
    found = loaded(folder, "clip=auto", f"+clip.path={{text_encoder: {place}}}")
    assert set(found.encoders) == {"text_encoder"}


def test_casts_in_other_components_are_floats(tmp_path: Path) -> None:
    folder = save_random_pipeline(tmp_path)
    quantize_component(folder, "text_encoder", "model.safetensors", scaled=False)
    loaded(folder, whole=True)


WAN = {
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_modules_that_diffusers_keeps_in_float32_are_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    diffusers.WanTransformer3DModel(**WAN).save_pretrained(tmp_path)
    expected = diffusers.WanTransformer3DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    made = ResolvedDenoiser("transformer", "WanTransformer3DModel", WAN, tmp_path).build_skeleton(dtype)
    pipe = SimpleNamespace(components={})
    stand_in: Any = SimpleNamespace(denoiser=made, pipe=pipe, checkpoint=None, offload_device=CPU)
    files = DenoiserWeights({"": FileWeights(tmp_path, made)})
    stand_in.checkpoint = files
    LoadedModel.fill_weights(stand_in)
    assert len({p.dtype for p in expected.parameters()}) == (1 if dtype == torch.float32 else 2), (
        "else this tests nothing"
    )
    assert_same(made, expected)


# -- what is in memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("outlier", ["none", "hadanorm"])
def test_no_float_weight_stays_while_others_are_read(
    folder: Path, outlier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = {p.name for p in loaded(folder).plan_layers() if p.skip_reason is None}
    read, most = FileWeights.read_tensor, []
    seen: list[weakref.ref[Tensor]] = []

    def watched(self: FileWeights, name: str) -> Tensor:
        tensor = read(self, name)
        if name.removesuffix(".weight") in planned and name.endswith(".weight"):
            seen.append(weakref.ref(tensor))
            most.append(sum(ref() is not None for ref in seen))
        return tensor

    monkeypatch.setattr(FileWeights, "read_tensor", watched)
    streamed = built(folder, f"outlier={outlier}")
    # one that is being quantized, and the one before
    assert len(most) == len(planned) == 34 and max(most) <= 2, "float weights pile up"
    int8 = streamed.denoisers["int8"]
    assert all(isinstance(int8.get_submodule(name), Int8Linear) for name in planned)
    assert not any(t.is_meta for t in tensors_of(int8).values())


def test_planned_weights_stay_empty_and_biases_are_read(folder: Path) -> None:
    found = loaded(folder)
    planned = [p.name for p in found.plan_layers() if p.skip_reason is None]
    found.fill_weights(except_for=planned)
    empty = {n for n, p in found.denoiser.named_parameters() if p.is_meta}
    assert empty == {f"{name}.weight" for name in planned} and len(planned) == 34
    weight = found.read_weight(planned[0])
    assert not weight.is_meta and found.denoiser.get_submodule(planned[0]).weight.is_meta, (
        "read, and not kept"
    )
    assert torch.equal(weight, random_pipeline().transformer.get_submodule(planned[0]).weight)
    assert found.read_weight("proj_out") is not None and not found.denoiser.proj_out.weight.is_meta


def test_without_weights_a_model_shows_its_shapes() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5, device="meta"))
    blank = replace_missing_layers(model)
    assert (
        isinstance(blank[1], SkeletonLinear)
        and blank[0].weight is model[0].weight
        and model[1].weight.is_meta
    )
    x = torch.randn(2, 7, 3, dtype=torch.float32)
    assert torch.equal(blank(x), torch.zeros(2, 7, 5))
    half = SkeletonLinear(4, 5, torch.bfloat16)
    assert half(torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
    full = nn.Sequential(nn.Linear(3, 4))
    assert computes_values(full) and not computes_values(blank)
    assert not computes_values(replace_missing_layers(nn.Sequential(nn.Conv2d(1, 2, 3, device="meta"))))
    assert replace_missing_layers(full) is full


# -- hashes --------------------------------------------------------------------------------------------------


def test_every_file_that_decides_an_image_is_hashed(tmp_path: Path) -> None:
    folder = save_random_pipeline(tmp_path / "model")
    (folder / "readme.md").write_text("x")
    source = resolve_model(make_spec(words(folder)).model)
    store = DiskCache(str(tmp_path / "cache"))
    before = dict(hash_model_files(source, store))
    assert {
        "model_index.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    } <= set(before)
    assert any(name.startswith("tokenizer") for name in before) and "readme.md" not in before
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    after = dict(hash_model_files(source, store))
    assert {n for n in before if before[n] != after[n]} == {"scheduler/scheduler_config.json"}


def test_a_single_files_hash_counts(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.safetensors"
    store, hashes = DiskCache(str(tmp_path / "cache")), []
    for value in (0.0, 1.0):
        save_file({"a": torch.full((1,), value)}, file)
        source = resolve_model(make_spec(words(file, f"++model.base={folder}")).model)
        hashes.append(hash_model_files(source, store))
    assert "transformer: m.safetensors" in dict(hashes[0]) and hashes[0] != hashes[1]


def test_files_of_a_component_in_another_folder_count(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "b/config.json"
    config.parent.mkdir()
    source = replace(resolve_model(make_spec(words(folder)).model), elsewhere={"vae": config.parent})
    store, hashes = DiskCache(str(tmp_path / "cache")), []

    for text in ("{}", "{} "):
        config.write_text(text)
        hashes.append(dict(hash_model_files(source, store)))

    assert {name for name in hashes[0] if hashes[0][name] != hashes[1][name]} == {"vae: config.json"}


# -- offloading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["model", "group"])
def test_offloading_without_a_gpu_is_refused_before_anything_is_loaded(
    folder: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "resolve_model", lambda *_: pytest.fail("looked for the model"))
    message = (
        rf"^offload={mode} moves parts of the model between memory and "
        rf"a GPU; on cpu there is nothing to move; set offload=none$"
    )
    with pytest.raises(BackendError, match=message):
        loaded(folder, f"offload={mode}", "device=cpu")


def test_every_change_of_the_denoiser_is_told_to_the_offloading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from int8run.pipeline import build as build_module

    seen: list[tuple[str, bool]] = []

    def note(pipe: Any, mode: str, device: torch.device) -> None:
        seen.append((mode, any(isinstance(m, Int8Linear) for m in pipe.transformer.modules())))

    monkeypatch.setattr(build_module, "set_offload", note)
    built(folder)
    assert seen == [("none", False), ("none", True)]


# -- settings ------------------------------------------------------------------------------------------------


def test_an_unknown_attention_backend_is_refused_for_a_skeleton_too(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^attention=nope cannot be used here: .*diffusers has .*native"):
        loaded(folder, "attention=nope")


def test_an_attention_whose_library_is_missing_is_refused_before_anything_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_dispatch, "_CAN_USE_FLASH_ATTN", False)
    monkeypatch.setattr(module, "resolve_model", lambda source: pytest.fail("looked for the model"))

    with pytest.raises(ConfigError, match=r"^attention=flash cannot be used here: .*install `flash-attn"):
        loaded(folder, "attention=flash")


def test_a_model_of_another_family_is_refused_before_it_is_read(folder: Path) -> None:
    message = (
        r"^model.location=.* holds a FluxTransformer2DModel \(flux\), and the steps, guidance and size of "
        r"this model are made for sdxl; choose model=flux or .*, or set model.family=null to use it anyway"
    )
    with pytest.raises(ConfigError, match=message):
        loaded(folder, "model.family=sdxl")


def test_the_tiny_models_own_folder_is_refused_with_its_own_option() -> None:
    model = make_spec(["model=sdxl", f"model.location={ASSETS_FOLDER / 'tiny'}"]).model

    with pytest.raises(ConfigError, match=r"made for sdxl; choose model=tiny, or set model\.family=null"):
        module.check_model_family(model, "FluxTransformer2DModel")


def test_a_model_of_the_right_family_or_of_any_is_read(folder: Path) -> None:
    assert loaded(folder, "model.family=flux").family.name == "flux"
    assert loaded(folder, "model.family=null").family.name == "flux"


def test_another_family_of_the_same_class_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    families = load_families()
    model = make_spec(["model.family=sdxl"]).model

    module.warn_of_other_family(model, AutoFamily(), families["sd15"])
    assert "The denoiser is of the family sd15, and the steps, guidance and size are those of" in caplog.text

    caplog.clear()
    module.warn_of_other_family(model, AutoFamily(), families["sdxl"])
    module.warn_of_other_family(model, families["sd15"], families["sd15"])
    assert not caplog.messages
