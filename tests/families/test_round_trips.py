"""Every family's tiny pipeline: streamed, quantized, saved in both namings, read, quantized to a file."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families.instances import OTHERS
from families.trips import (
    FAMILIES,
    FILE,
    INSTANCES,
    SAVED,
    Case,
    assert_same,
    contents,
    float_weights,
    int8_layers,
    made,
    made_lora,
    native_state,
    quantize_alone,
    rounded,
    stored,
    write,
    write_shards,
)
from torch import nn

from int8run.errors import ConfigError
from int8run.layers.plan import Int8Settings
from int8run.lora.config import Adapter
from int8run.metrics.quality import compute_relative_error
from int8run.pipeline.checkpoint_weights import FileWeights
from int8run.pipeline.load import load_model
from int8run.report.console import Progress

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=INSTANCES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield made(request.param, tmp_path_factory.mktemp(request.param), patch)


def test_nothing_of_a_denoiser_is_read_before_it_is_needed(case: Case) -> None:
    spec = replace(case.spec, model=case.source())
    skeleton = load_model(spec, Progress(False), whole=False).denoiser

    assert {name for name, value in skeleton.named_parameters() if not value.is_meta} == set()


def test_a_folder_is_streamed_and_drawn(case: Case) -> None:
    trip, floats = case.saved("folder"), float_weights(case)

    assert trip.built.family.name == case.instance.family
    assert list(trip.built.denoisers) == ["int8"]

    linears = {
        name
        for part in case.denoisers.values()
        for name, m in part.named_modules()
        if isinstance(m, nn.Linear)
    }
    wanted = {name for name in linears if FAMILIES[case.instance.family].find_skip_reason(name) is None}

    layers = int8_layers(trip.built)

    assert wanted
    assert len(layers) == len(wanted) * len(case.denoisers)

    for name in layers:
        q, scale = rounded(floats[f"{name}.weight"])
        assert torch.equal(trip.held[f"{name}.q"], q)
        assert torch.equal(trip.held[f"{name}.scale"], scale)
        floats.pop(f"{name}.weight")

    assert_same({name: trip.held[name] for name in floats}, floats)
    assert len(trip.drawn) == 2
    assert trip.drawn.isfinite().all()
    assert trip.drawn[-1].std() > 0.01


@pytest.mark.parametrize("kind", SAVED)
def test_what_was_saved_comes_back_as_the_model(case: Case, kind: str) -> None:
    trip = case.saved(kind)
    again = case.build(trip.location)

    assert again.family.name == case.instance.family
    assert_same(contents(again), trip.held)
    assert torch.equal(case.latents(again), trip.drawn)


@pytest.mark.parametrize("kind", SAVED)
def test_what_was_saved_comes_back_as_layers_of_the_model(case: Case, kind: str) -> None:
    trip, single = case.saved(kind), len(case.denoisers) == 1
    where = str(trip.location) if single else {name: str(path) for name, path in trip.location.items()}

    again = case.build(int8=replace(case.spec.int8, checkpoint=where))

    assert_same(contents(again), trip.held)
    assert torch.equal(case.latents(again), trip.drawn)


def test_layers_are_rotated_where_their_width_allows(case: Case) -> None:
    layers = int8_layers(case.saved("rotated file").built)

    assert {layer.transform.method for layer in layers.values() if layer.in_features % 4 == 0} == {"convrot"}
    assert {layer.transform.method for layer in layers.values() if layer.in_features % 4} <= {"none"}
    assert not torch.equal(case.saved("rotated file").drawn, case.saved("file").drawn)


# float files of the authors


def write_native(case: Case, kind: str) -> Any:
    """The float weights under their authors' names; the location of them."""
    places = {}
    for name, part in case.denoisers.items():
        folder = case.home / f"{kind} {name}"
        match kind:
            case "bare":
                places[name] = write(native_state(part, ""), folder / "x.safetensors")
            case "prefixed":
                places[name] = write(native_state(part, "model.diffusion_model."), folder / "x.safetensors")
            case "index":
                places[name] = write_shards(native_state(part), folder)
            case "shards":
                places[name] = write_shards(native_state(part), folder).parent
    return places if len(places) > 1 else next(iter(places.values()))


# every family's own spelling is one of the first two
@pytest.mark.parametrize("kind", ["bare", "prefixed", "index", "shards"])
def test_a_float_file_of_the_authors_is_the_model(case: Case, kind: str) -> None:
    spec = replace(case.spec, model=case.source(write_native(case, kind)), int8=Int8Settings(enable=False))
    loaded = load_model(spec, Progress(False))

    assert loaded.family.name == case.instance.family
    assert_same(loaded.denoiser.state_dict(), float_weights(case))


# from file to file


def test_task_quantize_writes_what_a_run_writes(case: Case) -> None:
    single, in_folder = len(case.denoisers) == 1, case.saved("folder").location
    for component, part in case.denoisers.items():
        named = None if single else component
        folder, file = case.home / f"quantized {component}", case.home / f"quantized {component}.safetensors"
        about = case.quantize(case.folder, folder, named)
        assert (about["family"], about["denoiser"]) == (case.instance.family, type(part).__name__)
        assert_same(stored(folder / FILE), stored((in_folder if single else in_folder[component]) / FILE))
        case.quantize(case.folder, file, named)
        in_file = case.saved("file").location
        assert_same(stored(file), stored(in_file if single else in_file[component]))
        # a file says what it is by its names alone
        source = write(native_state(part), case.home / f"float {component}.safetensors")
        about = case.quantize(source, case.home / "again.safetensors")
        assert (about["family"], about["denoiser"]) == (case.instance.family, type(part).__name__)
        assert_same(stored(case.home / "again.safetensors"), stored(file))


# LoRAs


def inner(case: Case, name: str) -> str:
    """The name of a layer in its own denoiser."""
    return name if len(case.denoisers) == 1 else name.partition(".")[2]


def test_a_lora_is_streamed_beside_the_layers_under_both_spellings(case: Case) -> None:
    plain, lora, floats = (
        case.saved("folder"),
        made_lora(case.denoiser, case.instance.family),
        float_weights(case),
    )
    own = case.build(
        loras=[
            Adapter(
                "a", str(lora.in_diffusers_words(case.home / "a.safetensors", next(iter(case.denoisers))))
            )
        ]
    )
    authors = case.build(loras=[Adapter("a", str(lora.in_authors_words(case.home / "b.safetensors")))])

    held, drawn, layers = contents(own), case.latents(own), int8_layers(own)

    assert_same(contents(authors), held)
    assert torch.equal(drawn, case.latents(authors))
    assert drawn.isfinite().all()
    assert own.loras.layers_by_mode == {"dynamic": len(layers)}
    assert_same(
        {f"{name}.q": held[f"{name}.q"] for name in layers},
        {f"{name}.q": plain.held[f"{name}.q"] for name in layers},
    )
    for name in [name for name in held if inner(case, name).removesuffix(".weight") in lora.up]:
        torch.testing.assert_close(
            held[name], floats[name] + lora.change(inner(case, name).removesuffix(".weight"))
        )

    # what it does is what it does to the float weights
    baked = case.build(loras=[Adapter("a", str(case.home / "a.safetensors"))], mode="bake")
    held = contents(baked)

    for name in layers:
        weight = floats[f"{name}.weight"] + lora.change(inner(case, name))
        error = (held[f"{name}.q"] * held[f"{name}.scale"] - weight).abs()
        assert (error <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()
    assert compute_relative_error(case.latents(baked)[-1], drawn[-1]) < 0.5 * compute_relative_error(
        plain.drawn[-1], drawn[-1]
    )


# two denoisers


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield made("wan22", tmp_path_factory.mktemp("experts"), patch)


@pytest.mark.parametrize("mode", ["dynamic", "bake"])
@pytest.mark.parametrize("expert", ["transformer", "transformer_2"])
def test_a_lora_for_one_of_two_denoisers(experts: Case, expert: str, mode: str) -> None:
    lora, plain = made_lora(experts.denoiser, "wan"), experts.saved("folder")
    path = lora.in_authors_words(experts.home / "lora.safetensors")
    built = experts.build(loras=[Adapter("a", str(path), components=[expert])], mode=mode)
    held, layers = contents(built), {name for name in int8_layers(built) if name.startswith(f"{expert}.")}
    changed = {name for name in held if not torch.equal(held[name], plain.held[name])}
    integers = {f"{name}.q" for name in layers}

    assert changed
    assert all(name.startswith(f"{expert}.") for name in changed)
    assert changed & integers == (integers if mode == "bake" else set())
    assert built.loras.layers_by_mode == ({"dynamic": len(layers)} if mode == "dynamic" else {})

    # the first step is the first one's, the second the other's
    first, second = (torch.equal(a, b) for a, b in zip(experts.latents(built), plain.drawn, strict=True))

    assert (first, second) == ((False, False) if expert == "transformer" else (True, False))


def test_two_denoisers_need_two_files(experts: Case) -> None:
    file = write(native_state(experts.denoiser), experts.home / "one.safetensors")

    with pytest.raises(ConfigError, match=r"2 denoisers.*transformer: <file>, transformer_2: <file>"):
        experts.build(file)
    with pytest.raises(ConfigError, match=r"2 denoisers.*transformer: <file>, transformer_2: <file>"):
        experts.build(int8=replace(experts.spec.int8, checkpoint=str(file)))
    with pytest.raises(ConfigError, match=r"task\.component=transformer or task\.component=transformer_2"):
        experts.quantize(experts.folder, experts.home / "x.safetensors")


# denoisers without a pipeline

# what tells the family's files from others of the same class, and diffusers keeps in another model
BESIDE = {"anima": {"net.llm_adapter.out_proj.weight": torch.ones(32, 32)}}


@pytest.mark.parametrize(
    ("family", "number"), [(family, i) for family, makers in OTHERS.items() for i in range(len(makers))]
)
def test_a_denoiser_without_a_pipeline(family: str, number: int, tmp_path: Path) -> None:
    model = OTHERS[family][number]().eval()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    source = write(native_state(model) | BESIDE.get(family, {}), tmp_path / "float.safetensors")

    weights = FileWeights(source, model)

    assert_same({name: weights.read_tensor(name) for name in state}, state)

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
            q, scale = rounded(value)
            made = again.read_int8_layer(layer).weight
            assert torch.equal(made.qdata, q)
            assert torch.equal(made.scale, scale)
        else:
            assert torch.equal(again.read_tensor(name), value)

    file = stored(tmp_path / "int8.safetensors")

    assert_same({key: file[key] for key in BESIDE.get(family, {})}, BESIDE.get(family, {}))
