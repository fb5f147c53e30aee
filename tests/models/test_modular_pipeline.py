"""Modular pipelines: images like those of the others, guidance for the guider, no code from folders."""

import inspect
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AnimaModularPipeline,
    Flux3ModularPipeline,
    FluxModularPipeline,
    FluxPipeline,
    LTX2VideoDiffusionDecoderModel,
    LTX25ModularPipeline,
    MiniMaxH3ModularPipeline,
    ModularPipeline,
    Wan22ModularPipeline,
    WanAnimate2ModularPipeline,
)
from diffusers.modular_pipelines.minimax_h3 import MiniMaxH3ImageReference, MiniMaxH3VideoReference
from families.instances_b import INSTANCES
from families.instances_modular import QUICK
from PIL import Image
from support.tiny_pipeline import random_pipeline, save_random_pipeline

import int8run.models.modular_pipeline as module
import int8run.models.modular_source as modular_source
from int8run.errors import ConfigError, FileError
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.call_parameters import get_call_default
from int8run.generate.generate import generate
from int8run.generate.negative_prompts import read_guidance
from int8run.generate.prompts import Sample
from int8run.models.family import ModelSource
from int8run.models.modular_blocks import build_blocks
from int8run.models.modular_loader import find_library, load_modular_pipeline
from int8run.models.modular_pipeline import ModularFace, find_guiders, make_pipeline
from int8run.models.pipeline_index import read_pipeline_index
from int8run.models.sampling import Sampling
from int8run.models.source import resolve_model

pytestmark = pytest.mark.usefixtures("one_thread")
FLUX_SAMPLING = Sampling(steps=3, height=16, width=16, guidance=2.0, extra={"max_sequence_length": 8})
SAMPLES = [Sample("a b", 1, "a"), Sample("b", 2, "b")]


def make_plain() -> FluxPipeline:
    """The tiny FluxPipeline as it is loaded: its text encoders do not drop out."""
    pipe = random_pipeline()
    for part in (pipe.text_encoder, pipe.text_encoder_2, pipe.vae, pipe.transformer):
        part.eval()
    return pipe


def make_flux() -> ModularFace:
    """The components of the tiny FluxPipeline."""
    blocks = build_blocks(FluxModularPipeline)
    names = {spec.name for spec in blocks.expected_components}
    components = {name: part for name, part in make_plain().components.items() if name in names}
    return make_pipeline(FluxModularPipeline, blocks, components, {})


def generate_images(pipe: Any, sampling: Sampling = FLUX_SAMPLING) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return generate(pipe, "transformer", {"": pipe.transformer}, SAMPLES, sampling)[""]


def test_a_modular_pipeline_makes_the_images_of_the_other() -> None:
    plain, modular = generate_images(make_plain()), generate_images(make_flux())

    assert all(map(torch.equal, plain.trajectories, modular.trajectories))
    assert [image.tobytes() for image in plain.images] == [image.tobytes() for image in modular.images]
    assert [len(steps) for steps in modular.step_seconds] == [3, 3]


def test_latents_alone_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = make_flux()
    monkeypatch.setattr(pipe.vae, "decode", lambda *_, **__: pytest.fail("decoded"))
    sampling = Sampling(
        steps=2, height=16, width=16, extra={"output_type": "latent", "max_sequence_length": 8}
    )

    made = generate_images(pipe, sampling)

    assert made.frames == [] and [len(steps) for steps in made.trajectories] == [2, 2]


def test_equal_prompts_are_encoded_once() -> None:
    pipe = make_flux()
    encoded: list[Any] = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: encoded.append(1))
    generate_images(pipe)
    generate_images(pipe)

    assert len(encoded) == len(SAMPLES)


def test_its_call_takes_what_its_blocks_read_and_its_guiders_are_set_to() -> None:
    pipe = QUICK["anima"].build()
    known = inspect.signature(type(pipe).__call__).parameters

    assert type(pipe).__name__ == "AnimaModularPipeline"
    assert {"prompt", "image", "strength", "guidance_scale", "guidance_rescale", "guidance_start"} <= set(
        known
    )
    assert "enabled" not in known and "guider" not in known
    assert get_call_default(pipe, "guidance_scale") == 4.0
    assert read_guidance(pipe, Sampling()).scale == 4.0


def test_each_of_two_guiders_has_settings_of_its_own() -> None:
    blocks = build_blocks(Wan22ModularPipeline)
    guiders = {
        spec.name: spec.create() for spec in blocks.expected_components if spec.name.startswith("guider")
    }
    known = module.build_signature(blocks, guiders).parameters

    assert known["guidance_scale"].default == 5.0 and known["guidance_scale_2"].default == 3.0
    assert module.list_guider_arguments("audio_guider", guiders["guider"])["guidance_scale"] == (
        "audio_guidance_scale"
    )


@pytest.mark.parametrize(("guidance", "passes"), [(1.0, 1), (4.0, 2)])
def test_guidance_reaches_the_guider_and_does_not_remain(guidance: float, passes: int) -> None:
    instance, calls = QUICK["anima"], []
    pipe = instance.build()
    pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    sampling = Sampling(steps=2, height=32, width=32, guidance=guidance, extra={"max_sequence_length": 16})
    generate(pipe, "transformer", {"": pipe.transformer}, SAMPLES[:1], sampling)

    assert len(calls) == 2 * passes and pipe.guider.guidance_scale == guidance

    unset = Sampling(steps=1, height=32, width=32, extra={"max_sequence_length": 16})
    generate(pipe, "transformer", {"": pipe.transformer}, SAMPLES[:1], unset)

    assert pipe.guider.guidance_scale == 4.0


def test_a_component_that_a_call_needs_and_the_folder_lacks_is_an_error() -> None:
    pipe = make_flux()
    pipe.text_encoder_2 = None

    with pytest.raises(ConfigError, match=r"^FluxModularPipeline needs text_encoder_2 for these inputs"):
        generate_images(pipe)


def test_a_setting_that_cannot_be_passed_on_is_an_error() -> None:
    pipe = QUICK["minimax_h3"].build()
    with pytest.raises(ConfigError, match=r"^MiniMaxH3ModularPipeline takes no guidance_scale; .*sampler"):
        pipe(prompt=["a"], guidance_scale=3.0)


def test_a_workflow_is_run_alone_and_an_unknown_one_is_an_error() -> None:
    blocks = build_blocks(AnimaModularPipeline, "img2img")

    assert next(p for p in blocks.inputs if p.name == "image").required
    with pytest.raises(
        ConfigError, match=r"^model\.workflow=x is not one of FluxModularPipeline; choose from "
    ):
        build_blocks(FluxModularPipeline, "x")


def test_offloading_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, offloaded, grouped = make_flux(), [], []
    device = torch.device("cpu")
    manager = SimpleNamespace(
        add=lambda name, part: offloaded.append(name),
        enable_auto_cpu_offload=lambda device: offloaded.append(device),
    )
    monkeypatch.setattr(module, "ComponentsManager", lambda: manager)
    monkeypatch.setattr(module, "apply_group_offloading", lambda module, **given: grouped.append(given))
    for part in (pipe.transformer, pipe.vae):
        monkeypatch.setattr(part, "enable_group_offload", lambda **given: grouped.append(given))
    pipe.enable_model_cpu_offload(device)
    pipe.enable_group_offload(onload_device=device)

    assert offloaded == ["text_encoder", "text_encoder_2", "vae", "transformer", device]
    assert grouped == [{"onload_device": device}] * 4


@pytest.mark.parametrize(
    ("cls", "arguments", "needs"),
    [
        (AnimaModularPipeline, {"image": "image"}, ()),
        (Flux3ModularPipeline, {"image": "image", "reference_images": "image"}, ()),
        (
            MiniMaxH3ModularPipeline,
            {"image": "image", "last_image": "last_image", "reference_images": "references"},
            (),
        ),
        (WanAnimate2ModularPipeline, {"image": "image", "video": "driving_video"}, ("image", "video")),
        (
            LTX25ModularPipeline,
            {
                "image": "conditions",
                "reference_video": "reference_conditions",
                "last_image": "conditions",
                "video": "conditions",
            },
            (),
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_inputs_of_a_sample_have_a_place_in_a_modular_call(
    cls: type[ModularPipeline], arguments: dict[str, str], needs: tuple[str, ...]
) -> None:
    call = read_call_inputs(cls)

    assert (dict(call.arguments), call.needs) == (arguments, needs)


def test_images_and_videos_become_the_references_of_minimax_h3() -> None:
    image = Image.new("RGB", (8, 8))
    given = module.make_reference(image)

    assert isinstance(given, MiniMaxH3ImageReference) and given.image is image
    assert isinstance(module.make_reference([image, image]), MiniMaxH3VideoReference)
    assert module.make_reference(given) is given


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [{}, {"image": Image.new("RGB", (32, 32)), "image_crf": 0}], ids=["text", "image"]
)
def test_ltx25_makes_videos_with_sound_which_has_steps_of_its_own(extra: dict[str, Any]) -> None:
    # of LTX-2, but for the decoder, which is not larger than its latents here
    parts = INSTANCES["ltx2"].build().components
    decoder = LTX2VideoDiffusionDecoderModel(
        latent_channels=8,
        patch_size=1,
        decoder_head_dim=8,
        decoder_stage_channels=(16, 8, 8, 8, 8),
        decoder_stage_depths=(1,) * 5,
        decoder_stage_kernels=((1, 3, 3),) * 4,
        decoder_upsample_strides=((1, 1, 1),) * 4,
        decoder_upsample_channel_reductions=(2, 1, 1, 1),
        decoder_stage5_kernel=(3, 3, 3),
        decoder_t_emb_dim=8,
    )
    blocks = build_blocks(LTX25ModularPipeline)
    names = {spec.name for spec in blocks.expected_components}
    components = {name: part for name, part in parts.items() if name in names and part is not None}
    components["diffusion_decoder"] = decoder.eval()
    pipe = make_pipeline(LTX25ModularPipeline, blocks, components, {})
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_frames": 9, "max_sequence_length": 12, "spatio_temporal_guidance_blocks": [1], **extra}
    sampling = Sampling(steps=2, guidance=3.0, height=32, width=32, extra=settings)

    made = generate(pipe, "transformer", {"": pipe.transformer}, SAMPLES[:1], sampling)[""]

    assert made.has_sound and len(made.frames) == 1
    assert [len(steps) for steps in made.trajectories] == [2] and made.trajectories[0].isfinite().all()
    assert pipe.guider.guidance_scale == 3.0 and pipe.audio_guider.guidance_scale == 7.0


# -- folders -------------------------------------------------------------------------------------------------


def save_modular(folder: Path) -> Path:
    make_flux().save_pretrained(str(folder), overwrite_modular_index=True)
    return folder


def load(location: Path, **settings: Any) -> ModularFace:
    source = ModelSource(str(location), "none", Sampling(), dtype="float32", **settings)
    return load_modular_pipeline(resolve_model(source), {}, torch.float32)


def edit_index(folder: Path, **entries: Any) -> None:
    file = folder / "modular_model_index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_a_modular_folder_is_loaded_wherever_it_was_moved_to(tmp_path: Path) -> None:
    folder = save_modular(tmp_path / "a")
    moved = shutil.move(folder, tmp_path / "b")

    assert read_pipeline_index(moved)["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    assert torch.equal(
        generate_images(load(moved)).trajectories[0], generate_images(make_plain()).trajectories[0]
    )


def test_a_folder_that_is_not_modular_is_run_by_a_modular_class(tmp_path: Path) -> None:
    pipe = load(save_random_pipeline(tmp_path / "a"), pipeline="FluxModularPipeline")

    assert isinstance(pipe, FluxModularPipeline) and not find_guiders(pipe.components)


def test_components_in_other_folders_are_found_by_the_index(tmp_path: Path) -> None:
    folder, other = save_modular(tmp_path / "a"), tmp_path / "b"
    other.mkdir()
    shutil.move(folder / "transformer", other / "denoiser")
    entry = json.loads((folder / "modular_model_index.json").read_text())["transformer"]
    entry[2] |= {"pretrained_model_name_or_path": str(other), "subfolder": "denoiser"}
    edit_index(folder, transformer=entry)

    assert load(folder).transformer.config.num_layers == 2

    shutil.rmtree(other)
    with pytest.raises(
        FileError, match=r"finds its transformer in .*denoiser, which is not there; put it beside"
    ):
        load(folder)


def test_components_on_the_hub_are_fetched_without_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, asked = save_modular(tmp_path / "a"), []
    shutil.move(folder / "vae", tmp_path / "vae")
    entry = json.loads((folder / "modular_model_index.json").read_text())["vae"]
    entry[2] |= {"pretrained_model_name_or_path": "org/parts", "subfolder": "vae", "revision": "v2"}
    edit_index(folder, vae=entry)
    monkeypatch.setattr(modular_source, "check_repository", lambda *words: None)

    def download(repository: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(modular_source, "snapshot_download", download)
    load(folder)
    ((repository, revision, patterns),) = asked

    assert (repository, revision) == ("org/parts", "v2")
    assert patterns == [f"vae/*{suffix}" for suffix in (".json", ".safetensors", ".txt", ".model", ".jinja")]


def test_blocks_of_a_repositorys_own_are_refused_by_name(tmp_path: Path) -> None:
    folder = save_modular(tmp_path / "a")
    edit_index(folder, _blocks_class_name="MyBlocks")
    with pytest.raises(FileError, match=r"is made for the blocks MyBlocks, which diffusers .* does not have"):
        load(folder)

    (folder / "modular_config.json").write_text('{"auto_map": {"ModularPipelineBlocks": "block.MyBlocks"}}')
    with pytest.raises(FileError, match=r"has blocks of its own \(block\.MyBlocks\), which are code; "):
        load(folder)


def test_a_class_of_another_library_is_not_imported(tmp_path: Path) -> None:
    folder = save_modular(tmp_path / "a")
    entry = json.loads((folder / "modular_model_index.json").read_text())["vae"]
    edit_index(folder, vae=["antigravity", "Fly", entry[2]])
    with pytest.raises(FileError, match=r"the vae is a antigravity\.Fly, which neither diffusers nor transf"):
        load(folder)


def test_classes_of_diffusers_pipelines_are_found_and_nothing_beside_them() -> None:
    assert find_library("ltx2").LTX2TextConnectors.__name__ == "LTX2TextConnectors"
    # a class, a module that is none of its folders, and one that is not loaded
    assert [find_library(name) for name in ("FluxPipeline", "pipeline_utils", "antigravity")] == [None] * 3


def test_pickled_weights_are_not_read(tmp_path: Path) -> None:
    folder = save_modular(tmp_path / "a")
    for file in (folder / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    with pytest.raises(FileError, match=r"could not be loaded: .*safetensors"):
        load(folder)


def test_a_component_that_the_pipeline_has_no_place_for_is_an_error(tmp_path: Path) -> None:
    source = resolve_model(ModelSource(str(save_modular(tmp_path / "a")), "none", Sampling()))
    with pytest.raises(ConfigError, match=r"^FluxModularPipeline takes no controlnet; it is made of "):
        load_modular_pipeline(source, {"controlnet": object()}, torch.float32)
