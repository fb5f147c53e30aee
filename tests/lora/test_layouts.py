"""Every layout and adapter type, read and matched: each module gets the change that `lora_files.py` computes.

`lora_files.py` computes it by plain formulas of its own.
"""

import re

import pytest
import torch
from lora import lora_files
from lora.layouts.mistakes import MISTAKES
from lora.layouts.sample import LAYOUTS
from lora.layouts.tiny_models import make_tiny_models
from support.compare import assert_close

from int8run.errors import LoraError
from int8run.lora.load import read_lora
from int8run.lora.match import MatchRequest, match_loras


@pytest.fixture(scope="module")
def models():
    return make_tiny_models()


def read_deltas(sample, models):
    """Component -> module -> changes of weight and bias, of a file as int8run reads it."""
    components = models[sample.base]
    matched = match_loras(components, [MatchRequest(read_lora(sample.path))], strict=True)
    deltas = {}
    for component, modules in matched.by_component.items():
        for name, entries in modules.items():
            weight = components[component].get_submodule(name).weight
            weights, biases = [], []
            for _, change in entries:
                if change.weight_delta is not None:
                    weights.append(change.weight_delta.compute_delta(weight))
                if change.bias_delta is not None:
                    biases.append(change.bias_delta)
            deltas[component, name] = (sum(weights) if weights else None), (sum(biases) if biases else None)
    return deltas


def list_expected(sample):
    """Component and module -> its changes by the formulas."""
    expected = {}
    for component, modules in sample.expected.items():
        for module, change in modules.items():
            expected[component, module] = change
    return expected


@pytest.mark.parametrize("name", LAYOUTS)
def test_file_changes_each_module_by_its_formula(name, models, tmp_path):
    sample = lora_files.write_sample(lora_files.make_sample(name, models), tmp_path)

    deltas = read_deltas(sample, models)

    expected = list_expected(sample)
    assert deltas.keys() == expected.keys()
    for module, (weight, bias) in deltas.items():
        assert_same_change(f"{module} weight", weight, expected[module].weight)
        assert_same_change(f"{module} bias", bias, expected[module].bias)


def assert_same_change(name, actual, expected):
    assert (actual is None) == (expected is None), name
    if expected is not None:
        assert_close(name, actual, expected, 2e-6)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_in_a_file_is_reported(mistake, models, tmp_path):
    sample = lora_files.make_sample(mistake.layout, models)
    mistake.spoil(sample.tensors)
    lora_files.write_sample(sample, tmp_path)

    before = copy_weights(models[sample.base])

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
    assert_same_weights(models[sample.base], before)


def copy_weights(components):
    return {name: {key: t.clone() for key, t in m.state_dict().items()} for name, m in components.items()}


def assert_same_weights(components, before):
    for name, model in components.items():
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name][key]), f"{name}: {key}"


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
    adapter_types = set()
    for name in LAYOUTS:
        sample = lora_files.write_sample(lora_files.make_sample(name, models), tmp_path)
        adapter_types |= read_lora(sample.path).adapter_types.keys()

    assert adapter_types == {"LoRA", "LoCon", "LoHa", "LoKr", "diff", "norm", "IA3", "DoRA", "bias"}
    assert {base for base, _ in LAYOUTS.values()} == {"flux", "sdxl"}
