"""The INT8 files that people download most, each made tiny: real key names, markers and dtypes.

The list is `tests/data/official_files.yaml`. Numbers are random; layers are rotated and rounded here, by a
formula of the tests' own.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families.cases import (
    FAMILIES,
    Case,
    Tensors,
    find_int8_layers,
    make_case,
    make_original_state,
    map_original_linears,
    quantize_alone,
    read_file,
    round_rows,
    write_file,
)
from families.instance_sets import INSTANCES, ORIGINAL_NAMED_AS
from support.rotation import GROUP, rotate_groups
from torch import Tensor

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.reader import TensorFiles
from int8run.tasks.inspect_checkpoint import describe_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")
LIST = Path(__file__).parents[1] / "data" / "official_files.yaml"
DENOISERS = yaml.safe_load(LIST.read_text(encoding="utf-8"))["denoisers"]
MARKER = "comfy_quant"
# the one of which every run of the tests looks at the header
QUICK = "krea2_turbo_int8_convrot"


def mark_entry(entry: dict[str, Any]) -> Any:
    """An entry as a parameter: slow, but for one."""
    marks = () if entry["file"] == QUICK else pytest.mark.slow
    return pytest.param(entry, id=entry["file"], marks=marks)


@pytest.fixture(scope="module", params=map(mark_entry, DENOISERS))
def entry(request: pytest.FixtureRequest) -> dict[str, Any]:
    """One line of the list."""
    return request.param


@pytest.fixture(scope="module")
def case(entry: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """The pipeline that the file belongs to."""
    with pytest.MonkeyPatch.context() as patch:
        yield make_case(entry["instance"], tmp_path_factory.mktemp("official"), patch)


@pytest.fixture(scope="module")
def layers(case: Case) -> dict[str, list[str]]:
    """The INT8 layers of the file by the authors' names, each with the Linears that it is made of."""
    family = FAMILIES[case.instance.family]
    found = {}
    for original, parts in map_original_linears(case.denoiser).items():
        names = [part.key for part in parts]
        is_float = any(family.find_skip_reason(name) is not None for name in names)
        width = case.denoiser.get_submodule(names[0]).in_features
        if not is_float and width % GROUP == 0:
            found[original] = names
    return found


@pytest.fixture(scope="module")
def official(entry: Mapping[str, Any], case: Case, layers: Mapping[str, list[str]]) -> Path:
    """The published file, tiny."""
    tensors = make_original_state(case.denoiser, "")
    for name in layers:
        weight = tensors.pop(f"{name}.weight")
        codes, scale = round_rows(rotate_groups(weight))
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.{MARKER}"] = encode_marker(entry)
    prefix = entry.get("prefix", "")
    named = {prefix + key: value.contiguous() for key, value in tensors.items()}
    return write_file(named, case.home / f"{entry['file']}.safetensors")


def encode_marker(entry: Mapping[str, Any]) -> Tensor:
    """The JSON beside a layer, as bytes."""
    text = entry["marker"].replace("{group}", str(GROUP))
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def test_inspect_names_the_family_and_what_is_int8(
    case: Case, official: Path, layers: Mapping[str, list[str]]
) -> None:
    with TensorFiles.open(official) as files:
        rows = list(describe_checkpoint(files, DeclaredFormat("auto", None)))

    facts = dict(rows)
    named = ORIGINAL_NAMED_AS.get(case.name, type(case.denoiser).__name__)
    assert facts["family"] == f"{case.instance.family} ({named})"
    (described,) = [text for label, text in rows if label == "layers" and "int8" in text]
    count, _, kind = described.partition(" × ")
    assert int(count) == len(layers) > 4
    assert re.search(r"int8.*row.*convrot.*16", kind)


@pytest.mark.slow
def test_the_file_is_loaded_as_it_is(case: Case, official: Path, layers: Mapping[str, list[str]]) -> None:
    built = case.build(official)

    linears = {name for names in layers.values() for name in names}
    found = find_int8_layers(built)
    assert linears <= found.keys()
    for name in linears:
        codes, scale = round_rows(rotate_groups(case.denoiser.get_submodule(name).weight.detach()))
        weight = found[name].read_quantized_weight()
        assert torch.equal(weight.qdata, codes), name
        assert torch.equal(weight.scale, scale), name
    assert case.generate_latents(built).isfinite().all()


@pytest.mark.slow
def test_quantizing_the_float_spelling_gives_the_same_keys(case: Case, official: Path) -> None:
    floats = write_file(make_original_state(case.denoiser), case.home / "float.safetensors")
    save = case.home / "ours.safetensors"

    case.quantize(floats, save)

    assert without_prefix(read_file(save)) == without_prefix(read_file(official))


def without_prefix(tensors: Tensors) -> set[str]:
    """The keys that stay when what stands before all of them is taken away."""
    return {re.sub(r"^(model\.diffusion_model|net)\.", "", key) for key in tensors}


@pytest.mark.slow
def test_a_model_that_diffusers_has_no_class_for_is_quantized_by_the_family_that_is_named(
    tmp_path: Path,
) -> None:
    # SCAIL-2 is Wan 2.1 from images that reads poses and masks besides, each by an embedder of its own
    model = INSTANCES["wan_i2v"].denoiser
    assert model is not None
    floats = make_original_state(model(), "")
    for name, channels in (("pose", 20), ("mask", 28)):
        floats[f"patch_embedding_{name}.weight"] = torch.ones(64, channels, 1, 2, 2)
        floats[f"patch_embedding_{name}.bias"] = torch.ones(64)
    source = write_file(floats, tmp_path / "wan2.1_14B_SCAIL_2.safetensors")
    save = tmp_path / "int8.safetensors"

    about = quantize_alone(source, save, tmp_path, "model_type=wan")

    made = read_file(save)
    assert about["family"] == "wan"
    layers = {key.removesuffix(".weight") for key in made if made[key].dtype == torch.int8}
    assert len(layers) == 24
    assert all(name.startswith("blocks.") for name in layers)
    assert made["patch_embedding_pose.weight"].equal(floats["patch_embedding_pose.weight"])
    assert {re.sub(rf"\.(weight_scale|{MARKER})$", ".weight", key) for key in made} == set(floats)
