"""int8run as a library: quantize a loaded model, put LoRAs on it, leave the rest of the program alone."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import CpuOffload, add_hook_to_module
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir, version
from hydra.core.global_hydra import GlobalHydra
from peft import LoraConfig
from support.compare import assert_close
from support.helpers import TinyModel, randn
from support.run_job import make_spec, save_lora
from support.tiers import slow_except
from support.tiny_pipeline import random_pipeline, save_random_pipeline
from torch import Tensor, nn

import int8run
from int8run import LoraStack, api, quantize_
from int8run.backends import float_comparison
from int8run.backends.base import LayerTimes
from int8run.backends.layer_timer import LayerTimer
from int8run.errors import BackendError, ConfigError
from int8run.generate.capture import capture_step
from int8run.generate.prompts import build_samples
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import ATTENTION
from int8run.lora.stack import LoraStack as TheStack
from int8run.models.sampling import Sampling
from int8run.pipeline.build import build_model
from int8run.pipeline.built_model import BuiltModel
from int8run.ptq.quantize import build_int8_layers, quantize_layers
from int8run.report.console import Progress

KEEP_ALL = "model_type.ignore=[{pattern: '*', reason: asked}]"
NEVER = "int8.small_batch_fallback=never"
PROBE = build_samples(["a"], 1, 0)
SMALL = Sampling(steps=2, height=16, width=16)


@pytest.fixture(scope="module")
def location(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"model.location={save_random_pipeline(tmp_path_factory.mktemp('model'))}"


def build_by_command(location: str, *words: str) -> BuiltModel:
    """What `int8run` makes of a model with these words."""
    size = ["sampler.height=16", "sampler.width=16", "sampler.steps=2", "backend=reference"]
    return build_model(make_spec([location, *size, *words]), PROBE, [], Progress(enabled=False))


def predict(model: nn.Module, call: dict[str, object]) -> Tensor:
    with torch.no_grad():
        return model(**call)[0]


def list_int8_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Int8Linear)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, []),
        ({"outlier": "convrot", "rounding": "mse"}, ["outlier=convrot", "rounding=mse"]),
        (
            {"model_type": "none", "overrides": ["outlier.group_size=16", NEVER], "outlier": "convrot"},
            ["model_type=none", "outlier=convrot", "outlier.group_size=16", NEVER],
        ),
    ],
    ids=["defaults", "outlier and rounding", "overrides"],
)
def test_a_model_is_quantized_as_by_the_command(location: str, options: dict, words: list[str]) -> None:
    built = build_by_command(location, *words)
    (call,) = capture_step(built.pipe, built.component, built.denoisers["float"], PROBE, SMALL)
    model = random_pipeline().transformer
    plans = quantize_(model, backend="reference", **options, rows=64)
    assert (
        list_int8_layers(model) == list_int8_layers(built.denoisers["int8"])
        and len(list_int8_layers(model)) >= 34
    )
    # the command traces a step, in which it sees the attentions, too
    built_layers = [p for p in built.plans if p.kind != ATTENTION]
    assert [(p.name, p.skip_reason, p.outlier, p.rounding) for p in plans] == [
        (p.name, p.skip_reason, p.outlier, p.rounding) for p in built_layers
    ]
    assert torch.equal(predict(model, call), predict(built.denoisers["int8"], call))
    assert_close("float", predict(model, call), predict(random_pipeline().transformer, call), 0.05)


def test_the_callers_object_is_changed_and_gives_its_float_weights_up() -> None:
    model = random_pipeline().transformer
    block = model.transformer_blocks
    quantize_(model, backend="reference", overrides=[NEVER])
    assert (
        isinstance(model.get_submodule("transformer_blocks.0.attn.to_q"), Int8Linear)
        and model.transformer_blocks is not block
    )
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linears) == 14 and not any(m.weight.dtype == torch.int8 for m in linears)


def test_layers_that_are_faster_in_float_stay_float(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def measure(
        timer: LayerTimer, backends: dict[str, Any], shape: tuple[int, int, int], groups: Any = None
    ) -> LayerTimes:
        float_seconds = 0.5 if shape[1] == shape[2] else 4.0
        seconds = {name: float_seconds if name == "float" else 1.0 for name in backends}
        return LayerTimes(seconds, {}, is_steady=True)

    caplog.set_level("INFO")
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    monkeypatch.setattr(LayerTimer, "measure", measure)
    pipe = random_pipeline()
    weight = pipe.transformer.transformer_blocks[0].attn.to_q.weight
    table = f"backend.table={tmp_path / 'choices.json'}"
    plans = quantize_(pipe.transformer, overrides=[table])

    by_choice = [plan for plan in plans if plan.is_float_by_choice]
    assert by_choice and all(plan.in_features == plan.out_features for plan in by_choice)
    assert pipe.transformer.transformer_blocks[0].attn.to_q.weight is weight
    int8 = list_int8_layers(pipe.transformer)
    assert len(int8) == sum(plan.skip_reason is None for plan in plans) > 0
    assert f"{len(int8)} of {len(plans)} layers are INT8" in caplog.messages
    assert f"{len(by_choice)} of {len(by_choice) + len(int8)} layers stay float" in caplog.text

    kept = quantize_(random_pipeline().transformer, backend="float")
    assert all(plan.skip_reason for plan in kept) and "backend=float" in {plan.skip_reason for plan in kept}


def test_a_lora_goes_onto_a_quantized_model_and_off_again(tmp_path: Path) -> None:
    pipe = random_pipeline()
    (call,) = capture_step(pipe, "transformer", pipe.transformer, PROBE, SMALL)
    file = save_lora(tmp_path / "style.safetensors", pipe.transformer)
    model = random_pipeline().transformer
    quantize_(model, outlier="convrot", backend="reference")
    plain = predict(model, call)
    stack = LoraStack(model).add(file, 0.8)
    reference = LoraStack(random_pipeline().transformer).add(file, 0.8)
    strong = predict(reference.denoiser, call)
    assert (strong - plain).norm() > 0.05 * plain.norm()
    assert_close("with a LoRA", predict(model, call), strong, 0.05)
    stack.set_strength("style", 0.4)
    reference.set_strength("style", 0.4)
    assert_close("weaker", predict(model, call), predict(reference.denoiser, call), 0.05)
    stack.set_strength("style", 0)
    assert torch.equal(predict(model, call), plain)


def test_a_pipeline_can_be_given(tmp_path: Path) -> None:
    pipe, plain = random_pipeline(), random_pipeline()
    (call,) = capture_step(pipe, "transformer", pipe.transformer, PROBE, SMALL)
    file = save_lora(tmp_path / "style.safetensors", pipe.transformer)

    plans = quantize_(pipe, backend="reference")

    assert plans == quantize_(plain.transformer, backend="reference")
    assert torch.equal(predict(pipe.transformer, call), predict(plain.transformer, call))
    stack = LoraStack(pipe).add(file, 0.8)
    assert list(stack.parts) == ["denoiser", "text_encoder", "text_encoder_2"]
    LoraStack(plain.transformer).add(file, 0.8)
    assert torch.equal(predict(pipe.transformer, call), predict(plain.transformer, call))


@pytest.mark.parametrize("how", slow_except(["wrapped"], ["wrapped", "in place"]))
def test_a_compiled_model_can_be_given(tmp_path: Path, how: str) -> None:
    torch._dynamo.reset()
    model, plain = TinyModel(), TinyModel()
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
    file = save_lora(tmp_path / "style.safetensors", model, only="proj", prefix="")
    x = randn(9, 7)

    def assert_alike() -> None:
        assert torch.equal(compiled(x), plain(x))

    assert_alike()
    stack, reference = LoraStack(compiled).add(file, 0.8), LoraStack(plain).add(file, 0.8)
    assert_alike()
    stack.clear()
    reference.clear()
    for target in (compiled, plain):
        quantize_(target, backend="reference", model_type="none", overrides=[NEVER])
    assert len(list_int8_layers(model)) == 6
    assert_alike()
    stack, reference = LoraStack(compiled).add(file, 0.8), LoraStack(plain).add(file, 0.8)
    with_lora = plain(x)
    assert_alike()
    stack.set_strength("style", 0.3)
    reference.set_strength("style", 0.3)
    assert_alike()
    assert not torch.equal(plain(x), with_lora)


def test_both_denoisers_of_a_pipeline_are_quantized() -> None:
    class Dual(DiffusionPipeline):
        def __init__(self, transformer: nn.Module, transformer_2: nn.Module):
            super().__init__()
            self.register_modules(transformer=transformer, transformer_2=transformer_2)

    parts = random_pipeline().transformer, random_pipeline(seed=1).transformer
    alone = [random_pipeline(seed=seed).transformer for seed in (0, 1)]
    plans = quantize_(Dual(*parts), backend="reference", model_type="flux")

    for model, expected in zip(parts, alone, strict=True):
        quantize_(expected, backend="reference", model_type="flux")
        names = list_int8_layers(model)
        assert names == list_int8_layers(expected) and len(names) == 34
        assert torch.equal(model.get_submodule(names[0]).packed, expected.get_submodule(names[0]).packed)
    assert sum(plan.skip_reason is None for plan in plans) == 68


def test_blocks_that_were_compiled_are_named(caplog: pytest.LogCaptureFixture) -> None:
    model = random_pipeline().transformer
    model.compile_repeated_blocks(backend="eager")
    quantize_(model, backend="reference")
    assert [line for line in caplog.messages if "compiled" in line] == [
        "the compiled blocks of FluxTransformer2DModel are replaced by INT8 blocks that are not compiled; "
        "call compile_repeated_blocks() after quantize_"
    ]


def test_a_model_with_loras_is_not_quantized(tmp_path: Path) -> None:
    pipe = random_pipeline()
    model = pipe.transformer
    file = save_lora(tmp_path / "style.safetensors", model)
    stack = LoraStack(model).add(file)
    on_text = (
        r"^FluxTransformer2DModel has LoRAs on it \('style'\); call clear\(\) of their LoraStack first, "
    )

    for given in (model, pipe, copy.deepcopy(model)):
        with pytest.raises(ConfigError, match=on_text):
            quantize_(given, backend="reference")
    with pytest.raises(ConfigError, match=on_text):
        del stack
        quantize_(model, backend="reference")

    LoraStack(model).clear()
    quantize_(model, backend="reference")
    assert len(list_int8_layers(model)) == 34


# -- where a model will run ----------------------------------------------------------------------------------


@pytest.fixture
def packed_for(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """The meta device as a GPU: where each weight is when it is quantized, and what the backend packs for."""
    seen: list[torch.device] = []
    monkeypatch.setattr(api, "pick_device", torch.device)
    monkeypatch.setattr(api, "check_backend", lambda backend, device, plans: seen.append(device))

    def quantize_here(model, plans, *, read, **settings):
        seen.extend(read(plan.name).device for plan in plans)
        return quantize_layers(model, plans, **settings)

    def build_here(model, layers, *, device, **settings):
        seen.append(device)
        return build_int8_layers(model, layers, device=torch.device("cpu"), **settings)

    monkeypatch.setattr(api, "quantize_layers", quantize_here)
    monkeypatch.setattr(api, "build_int8_layers", build_here)
    return seen


def list_devices(model: nn.Module) -> set[str]:
    return {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}


def test_a_model_in_memory_is_quantized_for_the_gpu_and_ends_up_there(packed_for: list) -> None:
    model = random_pipeline().transformer

    quantize_(model, backend="reference", device="meta")

    assert len(packed_for) == 36 and set(packed_for) == {torch.device("meta")}
    assert list_devices(model) == {"meta"} and len(list_int8_layers(model)) == 34


def test_an_offloaded_model_is_quantized_for_where_it_computes_and_waits_in_memory(packed_for: list) -> None:
    model = random_pipeline().transformer
    add_hook_to_module(model, CpuOffload(execution_device="meta"))

    quantize_(model, backend="reference")

    assert len(packed_for) == 36 and set(packed_for) == {torch.device("meta")}
    assert list_devices(model) == {"cpu"} and len(list_int8_layers(model)) == 34


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("cuda:0", BackendError, r"^device=cuda:0 asks for a GPU, but torch .* sees none"),
        ("gpu", ConfigError, r"^device is 'gpu'; choose from auto, cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(device: str, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        quantize_(random_pipeline().transformer, backend="reference", device=device)


def test_other_programs_changes_are_named() -> None:
    model = random_pipeline().transformer
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ConfigError, match=r"^FluxTransformer2DModel has adapters of PEFT in it .*; take"):
        quantize_(model, backend="reference")
    with pytest.raises(ConfigError, match=r"^FluxTransformer2DModel has weights that are not in memory"):
        quantize_(random_pipeline().transformer.to("meta"), backend="reference")
    grouped = random_pipeline().transformer
    grouped.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(
        ConfigError, match=r"^FluxTransformer2DModel has group offloading on; call quantize_ be"
    ):
        quantize_(grouped, backend="reference")
    for dtype in (torch.float8_e4m3fn, torch.int8):
        packed = random_pipeline().transformer
        layer = packed.get_submodule("transformer_blocks.0.attn.to_q")
        layer.weight = nn.Parameter(layer.weight.to(dtype), requires_grad=False)
        with pytest.raises(
            ConfigError, match=rf"^FluxTransformer2DModel has weights of {str(dtype)[6:]}, so"
        ):
            quantize_(packed, backend="reference")
    with pytest.raises(ConfigError, match=r"^quantize_ takes a denoiser, .*, or its pipeline, not a str$"):
        quantize_("flux", backend="reference")


CALIBRATED = {"outlier": ["smoothquant", "auto"], "rounding": ["gptq"]}


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group, options in CALIBRATED.items() for option in options]
)
def test_what_needs_a_calibration_is_refused_with_the_command_to_use(group: str, option: str) -> None:
    model = random_pipeline().transformer
    with pytest.raises(ConfigError) as error:
        quantize_(model, backend="reference", **{group: option})
    assert str(error.value) == (
        f"{group}={option} is fitted to activations, which quantize_ does not see; use the command "
        f"`int8run {group}={option} save=FILE`, or another option"
    )
    assert list_int8_layers(model) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"outlier": "konvrot"}, ConfigError, r"konvrot.*convrot"),
        ({"overrides": ["int8.maxrows=1"]}, ConfigError, r"int8\.maxrows"),
        ({"overrides": ["nonsense"]}, ConfigError, "nonsense"),
        ({"rows": 0}, ConfigError, r"^rows is 0; allowed is a whole number from 1 to "),
        *(
            (
                {"overrides": words.split()},
                ConfigError,
                r"^quantize_ takes no save, int8\.checkpoint, .*, quality_db, lora or clip;",
            )
            for words in (
                "save=a.safetensors",
                "int8.checkpoint=a.safetensors",
                "int8.enable=false",
                "int8.attention=int8",
                "int8.vae=int8",
                "lora=stack_a",
                "model_type.mixed_precision=auto quality_db=40",
                "clip=nvfp4",
            )
        ),
        ({"backend": "triton"}, BackendError, "backend 'triton' cannot run here"),
        (
            {"overrides": ["int8.max_rows=-1"]},
            ConfigError,
            r"int8\.max_rows is -1; allowed is a whole number from 0 to 4096",
        ),
        (
            {"overrides": [KEEP_ALL], "model_type": "flux"},
            ConfigError,
            r"FluxTransformer2DModel: no layer became INT8 \(48 × asked\); choose another",
        ),
    ],
    ids=[
        "option",
        "key",
        "form",
        "rows",
        "save",
        "checkpoint",
        "float",
        "attention",
        "vae",
        "lora",
        "budget",
        "clip",
        "backend",
        "range",
        "nothing left",
    ],
)
def test_what_cannot_be_leaves_the_model_as_it_was(
    options: dict, error: type[Exception], message: str
) -> None:
    model = random_pipeline().transformer
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error, match=message):
        quantize_(model, **{"backend": "reference", **options})
    after = model.state_dict()
    assert (
        list_int8_layers(model) == []
        and before.keys() == after.keys()
        and all(torch.equal(t, after[n]) for n, t in before.items())
    )


def test_a_hydra_application_of_the_callers_own_goes_on(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        mine = GlobalHydra.instance().hydra
        quantize_(random_pipeline().transformer, backend="reference")
        with pytest.raises(ConfigError):
            quantize_(random_pipeline().transformer, rounding="gptq")
        assert (
            GlobalHydra.instance().hydra is mine
            and compose("mine") == {"a": 1}
            and version.getbase() == version.Version("1.2")
        )
    assert not GlobalHydra.instance().is_initialized()
    quantize_(random_pipeline().transformer, backend="reference")
    assert not GlobalHydra.instance().is_initialized(), "none is left behind where there was none"


def test_old_names_of_settings_work(caplog: pytest.LogCaptureFixture) -> None:
    options = {"model_type": "flux", "overrides": ["model_type.float_layers=[{pattern: '*.to_q', why: so}]"]}

    plans = quantize_(random_pipeline().transformer, backend="reference", **options)

    kept = [plan.name for plan in plans if plan.skip_reason == "so"]
    assert kept and all(name.endswith(".to_q") for name in kept)
    assert "model_type.float_layers is now model_type.ignore; the old name works until 0.3" in caplog.messages


NAMES = ["LoraStack", "__version__", "build_text_encoder", "load_text_encoder", "quantize_"]


def test_the_package_has_five_names() -> None:
    assert LoraStack is TheStack and int8run.LoraStack is TheStack
    assert sorted(int8run.__all__) == NAMES
    with pytest.raises(AttributeError, match=r"^module 'int8run' has no attribute 'quantise_'$"):
        int8run.quantise_  # noqa: B018


def test_dir_lists_the_public_names_and_all_of_them_are_there() -> None:
    assert dir(int8run) == NAMES
    assert all(getattr(int8run, name) is not None for name in dir(int8run))
