"""Every family's tiny pipeline: streamed, quantized, saved in both namings, read, quantized to a file."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.cases import (
    FAMILIES,
    FILE,
    SAVE_KINDS,
    Case,
    Lora,
    Tensors,
    assert_same_tensors,
    collect_contents,
    collect_float_weights,
    find_int8_layers,
    make_case,
    make_lora,
    make_original_state,
    quantize_alone,
    read_file,
    round_rows,
    write_file,
    write_shards,
)
from families.instance_sets import NAMES, ORIGINAL_NAMED_AS
from families.instances import OTHERS
from torch import nn

from int8run.errors import ConfigError
from int8run.layers.plan import Int8Settings
from int8run.lora.config import Adapter
from int8run.metrics.quality import compute_relative_error
from int8run.models.denoiser_components import COMPONENTS_WITHOUT_LORAS
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.checkpoint_weights import FileWeights
from int8run.pipeline.load import load_model
from int8run.pipeline.step_settings import select_load_settings
from int8run.report.console import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
# one way to save is enough to see a change of a family; 20 families three times take minutes
QUICK_AND_SLOW_KINDS = [
    kind if kind == "file" else pytest.param(kind, marks=pytest.mark.slow) for kind in SAVE_KINDS
]


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield make_case(request.param, tmp_path_factory.mktemp(request.param), patch)


def test_denoiser_weights_are_not_read_before_they_are_needed(case: Case) -> None:
    spec = replace(case.spec, model=case.make_source())
    skeleton = load_model(
        select_load_settings(spec, needs_float_denoiser=False), Progress(enabled=False)
    ).denoiser

    assert {name for name, value in skeleton.named_parameters() if not value.is_meta} == set()


def test_folder_is_streamed_to_int8_layers_that_generate(case: Case) -> None:
    saved, floats = case.get_saved("folder"), collect_float_weights(case)

    assert saved.built.family.name == case.instance.family
    assert list(saved.built.denoisers) == ["int8"]

    linears = {
        name
        for part in case.denoisers.values()
        for name, m in part.named_modules()
        if isinstance(m, nn.Linear)
    }
    wanted = {name for name in linears if FAMILIES[case.instance.family].find_skip_reason(name) is None}

    layers = find_int8_layers(saved.built)

    assert wanted
    assert len(layers) == len(wanted) * len(case.denoisers)

    for name in layers:
        q, scale = round_rows(floats[f"{name}.weight"])
        assert torch.equal(saved.contents[f"{name}.q"], q)
        assert torch.equal(saved.contents[f"{name}.scale"], scale)
        floats.pop(f"{name}.weight")

    assert_same_tensors({name: saved.contents[name] for name in floats}, floats)
    assert len(saved.latents) == 2
    assert saved.latents.isfinite().all()
    assert saved.latents[-1].std() > 0.01


@pytest.mark.parametrize("kind", QUICK_AND_SLOW_KINDS)
def test_saved_denoiser_is_loaded_as_the_model(case: Case, kind: str) -> None:
    saved = case.get_saved(kind)
    again = case.build(saved.location)

    assert again.family.name == case.instance.family
    assert_same_tensors(collect_contents(again), saved.contents)
    assert torch.equal(case.generate_latents(again), saved.latents)


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAVE_KINDS)
def test_saved_denoiser_is_loaded_as_int8_checkpoint(case: Case, kind: str) -> None:
    saved, single = case.get_saved(kind), len(case.denoisers) == 1
    where = str(saved.location) if single else {name: str(path) for name, path in saved.location.items()}

    again = case.build(int8=replace(case.spec.int8, checkpoint=where))

    assert_same_tensors(collect_contents(again), saved.contents)
    assert torch.equal(case.generate_latents(again), saved.latents)


@pytest.mark.slow
def test_layers_are_rotated_where_their_width_allows(case: Case) -> None:
    layers = find_int8_layers(case.get_saved("rotated file").built)

    assert {layer.transform.method for layer in layers.values() if layer.in_features % 4 == 0} == {"convrot"}
    assert {layer.transform.method for layer in layers.values() if layer.in_features % 4} <= {"none"}
    assert not torch.equal(case.get_saved("rotated file").latents, case.get_saved("file").latents)


# float files of the authors


def write_original_files(case: Case, kind: str) -> Any:
    """The float weights under their authors' names; the location of them."""
    places = {}
    for name, part in case.denoisers.items():
        folder = case.home / f"{kind} {name}"
        match kind:
            case "bare":
                places[name] = write_file(make_original_state(part, ""), folder / "x.safetensors")
            case "prefixed":
                places[name] = write_file(
                    make_original_state(part, "model.diffusion_model."), folder / "x.safetensors"
                )
            case "index":
                places[name] = write_shards(make_original_state(part), folder)
            case "shards":
                places[name] = write_shards(make_original_state(part), folder).parent
    return places if len(places) > 1 else next(iter(places.values()))


@pytest.mark.parametrize(
    "kind",
    ["bare", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("prefixed", "index", "shards"))],
)
def test_float_file_with_original_names_is_the_model(case: Case, kind: str) -> None:
    spec = replace(
        case.spec, model=case.make_source(write_original_files(case, kind)), int8=Int8Settings(enable=False)
    )
    loaded = load_model(select_load_settings(spec, needs_float_denoiser=True), Progress(enabled=False))

    assert loaded.family.name == case.instance.family
    assert_same_tensors(loaded.denoiser.state_dict(), collect_float_weights(case))


# from file to file


@pytest.mark.slow
def test_quantize_task_writes_what_a_run_saves(case: Case) -> None:
    single, in_folder = len(case.denoisers) == 1, case.get_saved("folder").location
    for component, part in case.denoisers.items():
        named = None if single else component
        folder, file = case.home / f"quantized {component}", case.home / f"quantized {component}.safetensors"
        about = case.quantize(case.folder, folder, named)
        assert (about["family"], about["denoiser"]) == (case.instance.family, type(part).__name__)
        assert_same_tensors(
            read_file(folder / FILE), read_file((in_folder if single else in_folder[component]) / FILE)
        )
        case.quantize(case.folder, file, named)
        in_file = case.get_saved("file").location
        assert_same_tensors(read_file(file), read_file(in_file if single else in_file[component]))
        # a file says what it is by its names alone
        beside = BESIDE.get(case.instance.family, {})
        source = case.home / f"float {component}.safetensors"
        write_file(make_original_state(part) | beside, source)
        about = case.quantize(source, case.home / "again.safetensors")
        named = ORIGINAL_NAMED_AS.get(case.name, type(part).__name__)
        assert (about["family"], about["denoiser"]) == (case.instance.family, named)
        assert_same_tensors(read_file(case.home / "again.safetensors"), read_file(file) | beside)


# LoRAs


def strip_component(case: Case, name: str) -> str:
    """The name of a layer in its own denoiser."""
    return name if len(case.denoisers) == 1 else name.partition(".")[2]


def build_with_lora(case: Case, path: Path, mode: str = "dynamic") -> BuiltModel:
    return case.build(loras=[Adapter("a", str(path))], mode=mode)


def assert_lora_is_baked(case: Case, lora: Lora, contents: Tensors, layers: Iterable[str]) -> None:
    """Every INT8 layer is the float weight with the change, rounded."""
    floats = collect_float_weights(case)
    for name in layers:
        weight = floats[f"{name}.weight"] + lora.change(strip_component(case, name))
        error = (contents[f"{name}.q"] * contents[f"{name}.scale"] - weight).abs()
        assert (error <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()


@pytest.mark.slow
def test_lora_has_the_same_effect_under_both_namings(case: Case) -> None:
    plain, floats = case.get_saved("folder"), collect_float_weights(case)
    lora = make_lora(case.denoiser, case.instance.family)
    component = next(iter(case.denoisers))
    diffusers_file = lora.save_with_diffusers_names(case.home / "a.safetensors", component)
    original_file = lora.save_with_original_names(case.home / "b.safetensors")

    own, authors = build_with_lora(case, diffusers_file), build_with_lora(case, original_file)
    held, latents = collect_contents(own), case.generate_latents(own)
    without_loras = tuple(f"{name}." for name in COMPONENTS_WITHOUT_LORAS)
    layers = [name for name in find_int8_layers(own) if not name.startswith(without_loras)]

    assert_same_tensors(collect_contents(authors), held)
    # a layer that is several of the authors' has as many changes, which are summed in another order
    is_cut = any(part.rows is not None for parts in lora.original.values() for part in parts)
    bound = 1e-3 if is_cut else 0.0
    assert compute_relative_error(case.generate_latents(authors), latents) <= bound
    assert latents.isfinite().all()
    assert own.loras.layers_by_mode == {"dynamic": len(layers)}
    assert_same_tensors(
        {f"{name}.q": held[f"{name}.q"] for name in layers},
        {f"{name}.q": plain.contents[f"{name}.q"] for name in layers},
    )
    for name in held:
        layer = strip_component(case, name).removesuffix(".weight")
        if layer in lora.up and not name.startswith(without_loras):
            torch.testing.assert_close(held[name], floats[name] + lora.change(layer))

    # what it does is what it does to the float weights
    baked = build_with_lora(case, diffusers_file, mode="bake")

    assert_lora_is_baked(case, lora, collect_contents(baked), layers)
    baked_error = compute_relative_error(case.generate_latents(baked)[-1], latents[-1])
    plain_error = compute_relative_error(plain.latents[-1], latents[-1])
    assert baked_error < 0.5 * plain_error


# two denoisers


@pytest.fixture(scope="module")
def dual_case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield make_case("wan22", tmp_path_factory.mktemp("experts"), patch)


@pytest.mark.parametrize("mode", ["dynamic", "bake"])
@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_lora_for_one_of_two_denoisers_changes_only_that_one(dual_case: Case, expert: str, mode: str) -> None:
    lora, plain = make_lora(dual_case.denoiser, "wan"), dual_case.get_saved("folder")
    path = lora.save_with_original_names(dual_case.home / "lora.safetensors")
    built = dual_case.build(loras=[Adapter("a", str(path), components=[expert])], mode=mode)
    held, layers = (
        collect_contents(built),
        {name for name in find_int8_layers(built) if name.startswith(f"{expert}.")},
    )
    changed = {name for name in held if not torch.equal(held[name], plain.contents[name])}
    integers = {f"{name}.q" for name in layers}

    assert changed
    assert all(name.startswith(f"{expert}.") for name in changed)
    assert changed & integers == (integers if mode == "bake" else set())
    assert built.loras.layers_by_mode == ({"dynamic": len(layers)} if mode == "dynamic" else {})

    # the first step is the first one's, the second the other's
    first, second = (
        torch.equal(a, b) for a, b in zip(dual_case.generate_latents(built), plain.latents, strict=True)
    )

    assert (first, second) == ((False, False) if expert == "transformer" else (True, False))


def test_one_file_for_two_denoisers_is_an_error(dual_case: Case) -> None:
    file = write_file(make_original_state(dual_case.denoiser), dual_case.home / "one.safetensors")

    with pytest.raises(ConfigError, match=r"2 denoisers.*transformer: <file>, transformer_2: <file>"):
        dual_case.build(file)
    with pytest.raises(ConfigError, match=r"2 denoisers.*transformer: <file>, transformer_2: <file>"):
        dual_case.build(int8=replace(dual_case.spec.int8, checkpoint=str(file)))
    with pytest.raises(ConfigError, match=r"task\.component=transformer or task\.component=transformer_2"):
        dual_case.quantize(dual_case.folder, dual_case.home / "x.safetensors")


# denoisers without a pipeline

# what tells the family's files from others of the same class, and diffusers keeps in another model
BESIDE = {"anima": {"net.llm_adapter.out_proj.weight": torch.ones(32, 32)}}


@pytest.mark.parametrize(
    ("family", "number"), [(family, i) for family, makers in OTHERS.items() for i in range(len(makers))]
)
def test_denoiser_without_a_pipeline_is_quantized(family: str, number: int, tmp_path: Path) -> None:
    model = OTHERS[family][number]().eval()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    source = write_file(make_original_state(model) | BESIDE.get(family, {}), tmp_path / "float.safetensors")

    weights = FileWeights(source, model)

    assert_same_tensors({name: weights.read_tensor(name) for name in state}, state)

    about = quantize_alone(source, tmp_path / "int8.safetensors", tmp_path)

    assert (about["family"], about["denoiser"]) == (family, type(model).__name__)

    again = FileWeights(tmp_path / "int8.safetensors", model)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]

    assert (
        set(again.find_int8_layers())
        == {name for name in linears if FAMILIES[family].find_skip_reason(name) is None}
        != set()
    )
    for name, value in state.items():
        layer = name.removesuffix(".weight")
        if layer in again.find_int8_layers():
            q, scale = round_rows(value)
            made = again.read_int8_layer(layer).weight
            assert torch.equal(made.qdata, q)
            assert torch.equal(made.scale, scale)
        else:
            assert torch.equal(again.read_tensor(name), value)

    file = read_file(tmp_path / "int8.safetensors")

    assert_same_tensors({key: file[key] for key in BESIDE.get(family, {})}, BESIDE.get(family, {}))
