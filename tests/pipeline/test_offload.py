"""Offloading with the CPU as the device that parts come to: the numbers are those without it, whatever
calibrates, and weights wait in memory between their turns. Streams and pinned memory are imitated.
"""

import itertools
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import group_offloading
from safetensors.torch import save_file
from support.helpers import CPU, randn
from support.run_job import make_spec
from support.small_model import SAMPLES, SMALL, build_small_model, generate_latents, generate_sample
from support.tiny_unet_pipeline import save_unet_pipeline
from torch import Tensor, nn

from int8run.config.run_modes import GROUP_STREAM, OFFLOAD_MODES
from int8run.errors import BackendError, ConfigError
from int8run.generate.generate import Differences, generate
from int8run.layers.assemble import copy_sharing_tensors
from int8run.layers.int8_linear import Int8Linear
from int8run.pipeline import load as load_module
from int8run.pipeline import offload as module
from int8run.pipeline.offload import check_offload, set_offload
from int8run.tasks.vae_metrics import measure_vae

pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = {
    "plain": [],
    "smoothquant": ["outlier=smoothquant"],
    "auto": ["outlier=auto"],
    "gptq": ["rounding=gptq"],
    "mixed precision": ["model_type.mixed_precision=auto", "quality_db=45"],
    "quantized encoders": ["clip=int8_rowwise"],
    "attention": ["int8.attention=int8"],
    "attention in the search": ["model_type.mixed_precision=auto", "quality_db=45", "int8.attention=int8"],
}
# of a UNet, and of its VAE
PARTS = {
    "convolutions": ["int8.convolutions=int8"],
    "rotated convolutions": ["int8.convolutions=int8", "outlier=auto", "outlier.max_cost=null"],
    "vae": ["int8.vae=int8"],
    "all parts": ["int8.convolutions=int8", "int8.vae=int8", "int8.attention=int8"],
}
OFFLOADED = [mode for mode in OFFLOAD_MODES if mode != "none"]
TARGET = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lora") / "a.safetensors"
    factors = {"lora_A": randn(4, 32), "lora_B": randn(32, 4, seed=1)}
    save_file({f"transformer.{TARGET}.{name}.weight": x for name, x in factors.items()}, path)
    return path


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts come to the CPU; with streams each transfer is a copy, as it is to a GPU."""
    monkeypatch.setattr(load_module, "check_offload", lambda mode, device: None)
    monkeypatch.setattr(module, "apply_group_offloading", apply_with_imitated_streams)
    monkeypatch.setattr(torch.Tensor, "pin_memory", Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    monkeypatch.setattr(group_offloading, "TorchDeviceBackend", lambda device: ImitatedDevice())

    def transfer(group: Any, tensor: Tensor, source: Tensor, default_stream: object) -> None:
        tensor.data = source.clone()

    monkeypatch.setattr(group_offloading.ModuleGroup, "_transfer_tensor_to_device", transfer)


class ImitatedStream:
    def synchronize(self) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


class ImitatedDevice:
    def current_stream(self) -> ImitatedStream:
        return ImitatedStream()

    def stream(self, stream: ImitatedStream) -> ImitatedStream:
        return stream


def apply_with_imitated_streams(model: nn.Module, *, use_stream: bool, **settings: Any) -> None:
    config = group_offloading.GroupOffloadingConfig(
        **settings | {"offload_type": group_offloading.GroupOffloadingType(settings["offload_type"])},
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=False,
        stream=ImitatedStream() if use_stream else None,
        block_modules=getattr(model, "_group_offload_block_modules", None),
    )
    group_offloading._apply_group_offloading(model, config)


# -- the numbers are those without offloading ----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("cpu_as_gpu")
def test_offloading_changes_no_number(folder: Path, method: str) -> None:
    expected = generate_latents(build_small_model(folder, *METHODS[method]))
    for mode in OFFLOADED:
        made = generate_latents(build_small_model(folder, *METHODS[method], f"offload={mode}"))
        assert torch.equal(made, expected), mode


@pytest.fixture(scope="module")
def unet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_unet_pipeline(tmp_path_factory.mktemp("unet"))


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.usefixtures("cpu_as_gpu")
def test_offloading_changes_no_image_whatever_part_is_int8(unet_folder: Path, part: str) -> None:
    words = ["model.dtype=float32", *PARTS[part]]
    plain = generate_sample(build_small_model(unet_folder, *words))
    for mode in OFFLOADED:
        built = build_small_model(unet_folder, *words, f"offload={mode}")
        made = generate_sample(built)
        assert torch.equal(made.trajectories[0], plain.trajectories[0]), mode
        assert made.images[0].tobytes() == plain.images[0].tobytes(), mode
        # a second time, when everything waits where the first left it
        assert generate_sample(built).images[0].tobytes() == plain.images[0].tobytes(), mode
        if built.vae is not None:
            with built.vae.recording():
                generate_sample(built)
            assert measure_vae(built.vae, built.device)["vae/psnr_db"] > 25, mode


@pytest.mark.slow
@pytest.mark.parametrize("lora_mode", ["dynamic", "stochastic"])
@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_strength_that_changes_under_offloading_is_used(folder: Path, lora: Path, lora_mode: str) -> None:
    words = [f"lora.adapters=[{{path: '{lora}', strength: 0.5}}]", f"lora.mode={lora_mode}"]
    made: dict[str, list[Tensor]] = {}
    for mode in ("none", *OFFLOADED):
        built = build_small_model(folder, *words, f"offload={mode}")
        made[mode] = [generate_latents(built)]
        built.set_strengths([2.0], [0.0])
        made[mode].append(generate_latents(built))

    before, after = made["none"]
    assert not torch.equal(before, after)
    for mode in OFFLOADED:
        assert torch.equal(made[mode][0], before), mode
        assert torch.equal(made[mode][1], after), mode


@pytest.mark.slow
@pytest.mark.usefixtures("cpu_as_gpu")
def test_a_lora_comes_to_a_model_that_the_search_for_float_layers_has_offloaded(
    folder: Path, lora: Path
) -> None:
    words = [f"lora.adapters=[{{path: '{lora}', strength: 0.5}}]", "lora.mode=dynamic"]
    words += METHODS["mixed precision"]
    expected = generate_latents(build_small_model(folder, *words))

    for mode in OFFLOADED:
        assert torch.equal(
            generate_latents(build_small_model(folder, *words, f"offload={mode}")), expected
        ), mode


@pytest.mark.slow
@pytest.mark.parametrize("compiled", ["blocks", "full"])
@pytest.mark.usefixtures("cpu_as_gpu")
def test_an_offloaded_model_compiles_although_hooks_part_its_graph(
    folder: Path, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    expected = generate_latents(build_small_model(folder))
    for mode in OFFLOADED:
        made = generate_latents(build_small_model(folder, f"offload={mode}", f"compile={compiled}"))
        torch._dynamo.reset()
        assert torch.equal(made, expected), mode


@pytest.mark.parametrize("mode", ["model", "group"])
@pytest.mark.usefixtures("cpu_as_gpu")
def test_denoisers_that_share_the_steps_come_and_go(folder: Path, mode: str) -> None:
    words = ["sampler.steps=4", "int8.steps=[[0,int8],[0.25,float],[0.5,int8],[0.75,float]]"]
    expected = generate_latents_in_turns(folder, *words)

    assert torch.equal(generate_latents_in_turns(folder, *words, f"offload={mode}"), expected)


def generate_latents_in_turns(folder: Path, *words: str) -> Tensor:
    """The last latents of two images, one after the other, as a run generates them."""
    spec = make_spec([f"model.location={folder}", *SMALL, *words])
    built = build_small_model(folder, *words)
    made = generate(
        built.pipe,
        built.component,
        {"int8": built.denoisers["int8"]},
        [*SAMPLES, *SAMPLES],
        spec.sampling,
        differences=Differences(step_denoisers=built.list_step_denoisers(spec.int8.steps, spec.offload)),
    )["int8"]
    assert made.step_denoisers == [["int8", "float", "int8", "float"]] * 2
    return torch.stack([trajectory[-1] for trajectory in made.trajectories])


# -- where the weights are -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("cpu_as_gpu")
def test_with_streams_int8_weights_wait_in_pinned_memory_between_their_turns(folder: Path) -> None:
    built = build_small_model(folder, f"offload={GROUP_STREAM}")
    denoiser = built.denoisers["int8"]
    pinned = {}
    for block in denoiser.modules():
        hook = module.find_group_hook(block)
        if hook is not None and hook.group.stream is not None:
            pinned |= hook.group.cpu_param_dict
    layers = [m for m in denoiser.modules() if isinstance(m, Int8Linear) and m.packed in pinned]

    for _ in range(2):  # the second step copies ahead
        generate_latents(built)
        assert len(layers) > 10
        for layer in layers:
            assert layer.packed.data_ptr() == pinned[layer.packed].data_ptr()


def test_only_what_waits_in_memory_is_there_before_the_first_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(load_module, "check_offload", lambda mode, device: None)
    monkeypatch.setattr(module, "apply_group_offloading", lambda model, **settings: None)
    monkeypatch.setattr(Int8Linear, "to", lambda layer, home: seen.append(home))
    built = build_small_model(folder, "offload=group")
    assert len(seen) == sum(isinstance(m, Int8Linear) for m in built.denoisers["int8"].modules())
    assert set(seen) == {CPU}


@pytest.mark.usefixtures("cpu_as_gpu")
def test_with_streams_a_layer_may_be_given_tensors_later() -> None:
    model: Any = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    module.offload_blocks(model, GROUP_STREAM, CPU)
    block = model.blocks[1]
    group = module.find_group_hook(block).group
    block.register_buffer("late", torch.ones(4))
    block.bias = nn.Parameter(torch.full((4,), 3.0))
    x = randn(2, 4)

    y = block(x)

    assert torch.equal(y, nn.functional.linear(x, block.weight, torch.full((4,), 3.0)))
    assert block.late.data_ptr() == group.cpu_param_dict[block.late].data_ptr()
    group.onload_()  # as the group before it does
    assert block.late.data_ptr() != group.cpu_param_dict[block.late].data_ptr()


# -- hooks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def hooked(cpu_as_gpu: None) -> nn.Module:
    model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])})
    module.offload_blocks(model, "group", CPU)
    return model


def test_a_copy_has_none_of_the_hooks_and_the_original_keeps_its_own(hooked: Any) -> None:
    copied: Any = copy_sharing_tensors(hooked)

    block, original = copied.blocks[0], hooked.blocks[0]
    assert not module.has_group_offloading(copied) and "forward" not in vars(block)
    assert module.has_group_offloading(hooked) and "forward" in vars(original)
    assert block.weight is original.weight
    x = randn(2, 4)
    assert torch.equal(block(x), original(x))


def test_what_is_offloaded_already_is_left_alone(hooked: Any) -> None:
    before = module.find_group_hook(hooked.blocks[0])
    set_offload(SimpleNamespace(components={"transformer": hooked, "tokenizer": object()}), "group", CPU)
    assert module.find_group_hook(hooked.blocks[0]) is before is not None


def test_offloading_is_diffusers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cuda = nn.Linear(2, 2), torch.device("cuda:1")
    calls: list[tuple[object, ...]] = []
    pipe: Any = SimpleNamespace(
        components={"transformer": model},
        enable_model_cpu_offload=lambda device: calls.append(("model", device)),
    )

    def note(given: nn.Module, **settings: Any) -> None:
        places = (settings["onload_device"], settings["offload_device"])
        calls.append((given, *places, settings["num_blocks_per_group"], settings["use_stream"]))

    monkeypatch.setattr(module, "apply_group_offloading", note)
    for mode in OFFLOAD_MODES:
        set_offload(pipe, mode, cuda)
    group = (model, cuda, CPU, 1)
    assert calls == [("model", cuda), (*group, False), (*group, True)]


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "device"), itertools.product(OFFLOADED, ["cpu", "mps"]))
def test_a_device_without_memory_of_its_own_has_nothing_to_move(mode: str, device: str) -> None:
    message = rf"^offload={mode} moves parts .*; on {device} there is nothing to move; set offload=none$"
    with pytest.raises(BackendError, match=message):
        check_offload(mode, torch.device(device))
    check_offload("none", torch.device(device))
    check_offload(mode, torch.device("cuda:1"))
    check_offload(mode, torch.device("xpu"))


def test_blocks_that_diffusers_does_not_move_are_named() -> None:
    model = nn.Linear(2, 2)
    model._supports_group_offloading = False  # type: ignore[assignment]
    message = "^offload=group: diffusers does not move the blocks of a Linear; set offload=model$"
    with pytest.raises(ConfigError, match=message):
        module.offload_blocks(model, "group", CPU)
