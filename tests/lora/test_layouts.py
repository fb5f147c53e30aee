"""Every layout and adapter type, read and matched: each module gets the change that `lora_files.py` computes.

`lora_files.py` computes it by plain formulas of its own.
"""

import re

import pytest
import torch
from lora import lora_files
from lora.lora_files import LAYOUTS, MISTAKES
from support.compare import assert_close

from int8run.errors import LoraError
from int8run.lora.load import read_lora
from int8run.lora.match import MatchRequest, match_loras


@pytest.fixture(scope="module")
def models():
    return lora_files.make_tiny_models()


def read_deltas(sample, models):
    """Component -> module -> changes of weight and bias, of a file as int8run reads it."""
    parts = models[sample.base]
    found = match_loras(parts, [MatchRequest(read_lora(sample.path))], strict=True)
    made = {}
    for component, modules in found.by_component.items():
        for name, entries in modules.items():
            weight = parts[component].get_submodule(name).weight
            cores = [c.weight_delta.compute_delta(weight) for _, c in entries if c.weight_delta is not None]
            biases = [c.bias_delta for _, c in entries if c.bias_delta is not None]
            made[component, name] = (sum(cores) if cores else None), (sum(biases) if biases else None)
    return made


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_changes_each_module_by_its_formula(name, models, tmp_path):
    sample = lora_files.write_sample(lora_files.make_sample(name, models), tmp_path)
    made = read_deltas(sample, models)

    expected = {
        (component, module): e
        for component, modules in sample.expected.items()
        for module, e in modules.items()
    }

    assert made.keys() == expected.keys()
    for place, (weight, bias) in made.items():
        for what, actual, wanted in (
            ("weight", weight, expected[place].weight),
            ("bias", bias, expected[place].bias),
        ):
            assert (actual is None) == (wanted is None), f"{place}: {what}"
            if wanted is not None:
                assert_close(f"{place} {what}", actual, wanted, 2e-6)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_in_a_file_is_reported(mistake, models, tmp_path):
    sample = lora_files.make_sample(mistake.layout, models)
    mistake.spoil(sample.tensors)
    lora_files.write_sample(sample, tmp_path)

    before = {c: {k: v.clone() for k, v in m.state_dict().items()} for c, m in models[sample.base].items()}

    if mistake.when == "note":
        assert any(re.search(mistake.words, note) for note in read_lora(sample.path).notes)
    elif mistake.when == "reading":
        with pytest.raises(LoraError, match=mistake.words) as caught:
            read_lora(sample.path)
        assert str(sample.path) in str(caught.value)
    else:
        file = read_lora(sample.path)
        with pytest.raises(LoraError, match=mistake.words) as caught:
            match_loras(models[sample.base], [MatchRequest(file)], strict=True)
        assert sample.path.name in str(caught.value)
    assert all(
        torch.equal(v, before[c][k])
        for c, m in models[sample.base].items()
        for k, v in m.state_dict().items()
    )


@pytest.mark.parametrize("name", [name for name, (base, _) in LAYOUTS.items() if base == "flux"])
def test_file_is_rejected_by_a_model_of_another_family(name, models, tmp_path):
    sample = lora_files.write_sample(lora_files.make_sample(name, models), tmp_path)
    unet = {"denoiser": models["sdxl"]["denoiser"]}

    with pytest.raises(
        LoraError,
        match=r"none of its \d+ modules is in the model|is for|changes a|no such module",
    ):
        match_loras(unet, [MatchRequest(read_lora(sample.path))], strict=True)


def test_layouts_cover_every_family_and_adapter_type(models, tmp_path):
    kinds = set()
    for name in LAYOUTS:
        kinds |= read_lora(
            lora_files.write_sample(lora_files.make_sample(name, models), tmp_path).path
        ).adapter_types.keys()

    assert (
        kinds == {"LoRA", "LoCon", "LoHa", "LoKr", "diff", "norm", "IA3", "DoRA", "bias"}
        and len(LAYOUTS) >= 20
    )
