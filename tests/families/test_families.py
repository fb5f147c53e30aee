"""Every family on a tiny instance of its real pipeline: recognised, its facts true, quantized and sampled."""

import fnmatch
import functools
import inspect
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import ClassVar

import diffusers
import pytest
import torch
import yaml
from families.instance_sets import INSTANCES, LONG_TAIL, NAMED_AS, NAMES
from families.instances import OTHERS
from support.helpers import CONF, NEVER_FLOAT
from support.parameter_ids import name_parameter
from torch import nn

from int8run.backends.base import Limits
from int8run.backends.reference import Reference
from int8run.generate.generate import generate
from int8run.generate.prompts import Sample
from int8run.layers.assemble import assemble_int8_model
from int8run.layers.fusion import group_by_shared_input
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import plan_layers
from int8run.models.denoiser_classes import OWN_DENOISERS
from int8run.models.family import AutoFamily, ModelFamily, load_families
from int8run.models.modular_pipeline import get_call_class
from int8run.ptq.quantize import build_int8_layers, quantize_layers
from int8run.quant.rounding import AbsMax

FAMILIES = load_families()
COMPONENTS = "transformer", "unet"
# families whose denoiser is of another family's class, or of one that is none: their pipelines tell
NO_CLASS = {"anima"}


@functools.cache
def build_instance(name):
    """The pipeline, the name of its denoiser, and the denoiser in float."""
    pipe = INSTANCES[name].build()
    component = next(c for c in COMPONENTS if isinstance(pipe.components.get(c), nn.Module))
    return pipe, component, getattr(pipe, component).eval().requires_grad_(False)


@functools.cache
def get_denoiser(name):
    """The denoiser of an instance; one of the long tail is on the meta device."""
    if name not in LONG_TAIL:
        return build_instance(name)[2]
    with torch.device("meta"):
        return INSTANCES[name].denoiser()


def list_linears(model):
    return {name: m.in_features for name, m in model.named_modules() if isinstance(m, nn.Linear)}


@functools.cache
def list_denoisers(family):
    """Every denoiser that stands for a family here."""
    parts = [get_denoiser(name) for name, instance in INSTANCES.items() if instance.family == family]
    return [*parts, *(make() for make in OTHERS.get(family, ()))]


@dataclass(frozen=True)
class Counting(Reference):
    """Counts how often an input is quantized, and takes a GELU into that."""

    limits: ClassVar[Limits] = Limits(fuses_gelu=True)
    counted: Counter = field(default_factory=Counter, compare=False)

    def quantize(self, x, **steps):
        self.counted["inputs"] += 1
        return super().quantize(x, **steps)


def quantize_model(model, family, backend):
    """All layers that the family leaves to INT8, as a run makes them."""
    chosen = [plan for plan in plan_layers(model, family.find_skip_reason) if plan.skip_reason is None]
    layers = quantize_layers(model, chosen, methods={}, rounding=AbsMax(), statistics={})
    made = build_int8_layers(
        model, layers, backend=backend, settings=NEVER_FLOAT, rows={plan.name: 8 for plan in chosen}
    )
    return assemble_int8_model(model, made, family)


def generate_latents(name, denoisers):
    pipe, component, _ = build_instance(name)
    return generate(
        pipe, component, denoisers, [Sample(INSTANCES[name].prompt, 7, "0")], INSTANCES[name].sampling
    )


def test_every_family_has_an_instance():
    assert {instance.family for instance in INSTANCES.values()} == set(FAMILIES)
    assert {cls for family in FAMILIES.values() for cls in family.denoisers} == {
        type(model).__name__ for family in set(FAMILIES) - NO_CLASS for model in list_denoisers(family)
    }


@pytest.mark.parametrize("name", INSTANCES)
def test_denoiser_fits_its_family_and_no_other(name, caplog):
    model = get_denoiser(name)
    linears = list_linears(model)

    pipeline = getattr(INSTANCES[name].pipeline, "__name__", None)
    found = AutoFamily().resolve_family(type(model).__name__, [], linears, pipeline)

    assert found.name == INSTANCES[name].family
    assert not [
        record for record in caplog.records if record.name.startswith("int8run")
    ]  # diffusers may say something of its own

    fitting = [
        f.name
        for f in FAMILIES.values()
        if f.has_member(type(model).__name__, pipeline) and f.find_input_mismatch(linears) is None
    ]

    assert fitting == [INSTANCES[name].family]


def list_model_classes():
    """Every model class of diffusers that is usable here."""
    return [
        n
        for n in dir(diffusers)
        if inspect.isclass(cls := getattr(diffusers, n)) and issubclass(cls, diffusers.ModelMixin)
    ]


def test_every_other_diffusers_class_is_unknown():
    exported = list_model_classes()
    known = {cls for family in FAMILIES.values() for cls in family.denoisers}

    assert known <= {*exported, *OWN_DENOISERS}
    assert len(exported) > 150

    found = {cls: AutoFamily().resolve_family(cls, [], {"a": 1}).name for cls in set(exported) - known}

    assert set(found.values()) == {"unknown"}, found


def test_shared_class_with_other_input_widths_is_unknown():
    shared = Counter(cls for family in FAMILIES.values() for cls in family.denoisers)
    for family in FAMILIES.values():
        for cls in family.denoisers:
            if shared[cls] > 1:
                assert family.inputs, f"{family.name} shares {cls} and names no inputs"
                assert AutoFamily().resolve_family(cls, [], {"a": 1}).name == "unknown"


def test_cosmos_is_not_detected_as_anima():
    cosmos = list_denoisers("anima")[0]
    assert AutoFamily().resolve_family(type(cosmos).__name__, [], list_linears(cosmos)).name == "unknown"


@pytest.mark.parametrize("family", FAMILIES)
def test_every_ignore_rule_matches_and_has_a_reason(family):
    # a file does not say which weight is a Linear's: rules for convolutions and tables count as well
    parameters = [item for model in list_denoisers(family) for item in model.named_parameters()]
    names = [
        name.removesuffix(".weight") for name, p in parameters if p.dim() >= 2 and name.endswith(".weight")
    ]

    for rule in FAMILIES[family].ignore:
        alone = ModelFamily("alone", ignore=[rule])
        assert any(alone.find_skip_reason(name) for name in names), (
            f"{family}: {rule.pattern} matches no layer"
        )
        assert rule.reason
        others = ModelFamily("others", ignore=[r for r in FAMILIES[family].ignore if r is not rule])
        assert any(alone.find_skip_reason(name) and not others.find_skip_reason(name) for name in names), (
            f"{family}: {rule.pattern} is said twice"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_only_layers_of_the_repeated_blocks_become_int8(family):
    for model in list_denoisers(family):
        blocks = [f"{name}." for name in FAMILIES[family].blocks]
        int8 = [name for name in list_linears(model) if FAMILIES[family].find_skip_reason(name) is None]
        assert int8
        assert [name for name in int8 if not name.startswith(tuple(blocks))] == []


# the layers that become INT8, all of them and no others
DOUBLE = (
    r"transformer_blocks\.\d+\."
    r"(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|{ff}{net}|{context}{net})"
)
FLUX_DOUBLE = DOUBLE.format(ff="ff", context="ff_context", net=r"\.net\.(0\.proj|2)")
FLUX_SINGLE = r"single_transformer_blocks\.\d+\.(attn\.to_[qkv]|proj_mlp|proj_out)"
INT8_LAYERS = {
    "flux": f"{FLUX_DOUBLE}|{FLUX_SINGLE}",
    "chroma": f"{FLUX_DOUBLE}|{FLUX_SINGLE}",
    "flux2": DOUBLE.format(ff="ff", context="ff_context", net=r"\.linear_(in|out)")
    + r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
    "z_image": r"(layers\.[12]|noise_refiner\.\d+)\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])",
    "qwen_image": DOUBLE.format(ff="img_mlp", context="txt_mlp", net=r"\.net\.(0\.proj|2)")
    + r"|transformer_blocks\.\d+\.((img|txt)_mod\.1|img_mlp\.(proj|gate_layer|out))",
    "ernie_image": r"layers\.\d+\.(self_attention\.(to_[qkv]|to_out\.0)|mlp\.(gate_proj|up_proj|linear_fc2))",
    "krea2": r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_gate|to_out\.0)|ff\.(gate|up|down))",
    "anima": r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))",
}


@pytest.mark.parametrize("family", INT8_LAYERS)
def test_expected_layers_become_int8(family):
    names = {name for model in list_denoisers(family) for name in list_linears(model)}
    int8 = {name for name in names if FAMILIES[family].find_skip_reason(name) is None}

    assert int8 == {name for name in names if re.fullmatch(INT8_LAYERS[family], name)}


@pytest.mark.parametrize("family", FAMILIES)
def test_block_lists_exist_in_the_model(family):
    for name in FAMILIES[family].blocks:
        found = [m for model in list_denoisers(family) for n, m in model.named_modules() if n == name]
        assert found and all(isinstance(m, nn.ModuleList) for m in found), f"{family}: no list {name}"


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_named_beside_the_rules_exist(family):
    facts = FAMILIES[family]

    assert facts.hardware
    assert facts.lora_prefixes
    assert facts.fingerprints
    for model in list_denoisers(family):
        if facts.denoisers:
            assert facts.find_input_mismatch(list_linears(model)) is None


def list_relative_names(family):
    """Every name that a fact gives, relative to a block."""
    facts = FAMILIES[family]
    return {name for group in facts.same_input for name in group} | {g.into for g in facts.deferred_gelu}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_in_same_input_and_deferred_gelu_is_an_int8_layer(family):
    int8 = [
        name
        for model in list_denoisers(family)
        for name in list_linears(model)
        if FAMILIES[family].find_skip_reason(name) is None
    ]
    assert {
        n for n in list_relative_names(family) if not any(name.endswith(f".{n}") for name in int8)
    } == set()


def count_quantizations(calls, layer, *_):
    calls[layer] += 1


@functools.cache
def quantize_with_and_without_facts(name):
    """(denoiser, generation, quantized inputs) with what the family says about its blocks, and without."""
    family = FAMILIES[INSTANCES[name].family]
    found = []
    for facts in (family, replace(family, same_input=(), deferred_gelu=())):
        backend = Counting()
        int8 = quantize_model(build_instance(name)[2], facts, backend)
        calls = Counter()
        for layer, module in int8.named_modules():
            if isinstance(module, Int8Linear):
                module.register_forward_hook(functools.partial(count_quantizations, calls, layer))
        found.append((int8, generate_latents(name, {"int8": int8})["int8"], backend.counted["inputs"], calls))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_shared_inputs_and_deferred_gelus_change_no_bit(name):
    (_, fast, *_), (_, plain, *_) = quantize_with_and_without_facts(name)
    assert torch.equal(fast.trajectories[0], plain.trajectories[0])


@pytest.mark.parametrize("name", NAMES)
def test_layers_with_the_same_input_share_one_quantization(name):
    (int8, _, shared, calls), (_, _, alone, _) = quantize_with_and_without_facts(name)
    groups = group_by_shared_input(calls, FAMILIES[INSTANCES[name].family].same_input)

    assert alone == calls.total()
    assert set(calls) == {n for n, m in int8.named_modules() if isinstance(m, Int8Linear)}
    # a group whose layers read different tensors, or the same one at other times, would be quantized more
    # often
    assert shared == sum(max(calls[layer] for layer in group) for group in groups)


# what is multiplied with another layer's output before the next layer reads it
GATES = (".mlp_act",)


def list_tanh_gelus(model, family):
    """Modules in the repeated blocks that compute a GELU (tanh) before an INT8 layer."""
    blocks = tuple(f"{block}." for block in family.blocks)
    found = [
        n
        for n, m in model.named_modules()
        if getattr(m, "approximate", None) == "tanh" and n.startswith(blocks)
    ]
    before_a_layer = [n for n in found if not n.endswith(GATES)]
    return [n for n in before_a_layer if not family.find_skip_reason(f"{n}.proj")]


@pytest.mark.parametrize("name", NAMES)
def test_every_tanh_gelu_before_an_int8_layer_is_deferred(name):
    family, (float_model, int8) = (
        FAMILIES[INSTANCES[name].family],
        (build_instance(name)[2], quantize_with_and_without_facts(name)[0][0]),
    )
    moved = [n for n, m in int8.named_modules() if isinstance(m, Int8Linear) and m.gelu_from is not None]

    assert list_tanh_gelus(int8, family) == []
    assert len(moved) == len(list_tanh_gelus(float_model, family))


@pytest.mark.parametrize("name", NAMES)
def test_int8_latents_are_close_to_float(name):
    plain = generate_latents(name, {"float": build_instance(name)[2]})["float"]
    int8 = quantize_with_and_without_facts(name)[0][1]
    (reference,), (latents,) = plain.trajectories, int8.trajectories

    assert reference.shape == latents.shape
    assert len(latents) == 2
    assert torch.isfinite(latents).all()
    assert latents[-1].std() > 0.01

    error = (latents[-1] - reference[-1]).norm() / reference[-1].norm()

    assert 0 < error < 0.03  # 0.0001 to 0.012 here


def find_fingerprint(keys):
    """(family, class) of every fingerprint that the names of a file fit."""

    def matches(pattern):
        return bool(fnmatch.filter(keys, pattern))

    return {
        (family.name, f.denoiser)
        for family in FAMILIES.values()
        for f in family.fingerprints
        if all(map(matches, f.all)) and not any(map(matches, f.none))
    }


@pytest.mark.parametrize("name", INSTANCES)
def test_file_with_diffusers_names_is_detected(name):
    model = get_denoiser(name)
    class_name = NAMED_AS.get(name, type(model).__name__)

    family = INSTANCES[name].family
    found = find_fingerprint(list(model.state_dict()))

    # the names alone do not tell a family without a class of its own from others
    assert found == (set() if family in NO_CLASS else {(family, class_name)})


# names of the authors' own files that others do not have, as ComfyUI and diffusers look for them
KEY_NORM = "double_blocks.0.img_attn.norm.key_norm.scale"
MINIMAX_H3 = [
    "video_patch_proj.weight",
    "audio_patch_proj.weight",
    "token_refiner.blocks.0.attn.qkv_proj.weight",
]
AUTHORS = {
    "flux": [KEY_NORM, "img_in.weight", "vector_in.in_layer.weight", "guidance_in.in_layer.bias"],
    "flux2": [
        KEY_NORM,
        "img_in.weight",
        "double_stream_modulation_img.lin.weight",
        "single_stream_modulation.lin.weight",
    ],
    "chroma": [KEY_NORM, "img_in.weight", "distilled_guidance_layer.in_proj.weight"],
    "z_image": [
        "cap_embedder.1.weight",
        "layers.0.adaLN_modulation.0.weight",
        "layers.0.attention.qkv.weight",
    ],
    "krea2": ["txtfusion.projector.weight", "blocks.0.attn.wq.weight"],
    "minimax_h3": [*MINIMAX_H3, "time_embedder.proj_in.weight"],
    "minimax_h3_pruned": [*MINIMAX_H3, "adaln_t_table"],
    "anima": [
        "blocks.0.mlp.layer1.weight",
        "blocks.0.self_attn.q_proj.weight",
        "llm_adapter.out_proj.weight",
    ],
}
FOREIGN = {
    "cosmos": ["blocks.0.mlp.layer1.weight", "blocks.0.self_attn.q_proj.weight", "x_embedder.proj.1.weight"],
    "hunyuan_video": [
        "txt_in.individual_token_refiner.blocks.0.norm1.weight",
        "double_blocks.0.img_attn_qkv.weight",
        "img_in.proj.weight",
    ],
    "auraflow": ["double_layers.0.attn.w1q.weight", "cond_seq_linear.weight", "t_embedder.mlp.0.weight"],
}


@pytest.mark.parametrize(("family", "keys"), AUTHORS.items(), ids=name_parameter)
def test_file_with_original_names_is_detected(family, keys):
    assert [name for name, _ in find_fingerprint(keys)] == [family]


@pytest.mark.parametrize(("name", "keys"), FOREIGN.items(), ids=name_parameter)
def test_file_of_another_model_is_not_detected(name, keys):
    assert find_fingerprint(keys) == set()


# they have the very names of another family's class; their own class, where a pipeline has one, is unknown
# all the same
SAME_NAMES = {
    "AudioLDM2UNet2DConditionModel": "sd15",
    "BriaTransformer2DModel": "longcat_image",
    "CogView3PlusTransformer2DModel": "cogview4",
    "SanaWMLTX2RefinerTransformer3DModel": "ltx2",
    "SanaWMTransformer3DModel": "sana_video",
}


def detect_names(cls):
    """What a file of a class with its default sizes is taken for; None where it has no such sizes."""
    try:
        with torch.device("meta"):
            model = getattr(diffusers, cls)()
    except (TypeError, ValueError, AssertionError):
        return None
    return {family for family, _ in find_fingerprint(list(model.state_dict()))}


@pytest.mark.parametrize(
    "cls",
    [
        "FluxControlNetModel",
        "HunyuanVideoTransformer3DModel",
        "NucleusMoEImageTransformer2DModel",
        "QwenImageControlNetModel",
    ],
)
def test_similar_model_is_not_detected_as_a_family(cls):
    assert detect_names(cls) == set()


@pytest.mark.slow
def test_file_of_another_class_is_not_detected_as_a_family(monkeypatch):
    for cls in (nn.Linear, nn.modules.conv._ConvNd):
        monkeypatch.setattr(
            cls, "reset_parameters", lambda self: None
        )  # the names count, and there are thousands of layers
    owners = {cls: family.name for family in FAMILIES.values() for cls in family.denoisers}

    for cls in list_model_classes():
        if cls.startswith("MMAudio"):
            continue  # whether diffusers can build it on the meta device depends on what ran before
        assert (detect_names(cls) or set()) <= {SAME_NAMES.get(cls), owners.get(cls)} | (
            {"sd15", "sdxl"} if "UNet2DCondition" in cls else set()
        )


MODELS = {file.stem: yaml.safe_load(file.read_text()) for file in sorted((CONF / "model").glob("*.yaml"))}
# checkpoints that are not named after an instance
CALLED = {"tiny": "flux", "tiny_edit": "flux"}


def make_instance(model):
    """The instance with the pipeline of a checkpoint: by name, the longest that fits."""
    if model in CALLED:
        return CALLED[model]
    return max((name for name in INSTANCES if model.startswith(name)), key=len, default="")


def get_pipeline_class(model, name):
    """The pipeline that runs a checkpoint: the one that its file names, or that of its instance."""
    named = MODELS[model].get("pipeline")
    if named is not None:
        return get_call_class(getattr(diffusers, named))
    return INSTANCES[name].pipeline or type(build_instance(name)[0])


@pytest.mark.parametrize("model", MODELS)
def test_checkpoint_settings_are_known_to_the_pipeline(model):
    name = make_instance(model)

    assert name != "", f"model={model}: name the instance with its pipeline in CALLED"
    if name is not None:
        sampling = MODELS[model]["sampling"]
        known = inspect.signature(get_pipeline_class(model, name).__call__).parameters
        sizes = {size for size in ("height", "width") if sampling.get(size) is not None}
        asked = {"num_inference_steps", *sizes, *sampling.get("extra", {})}
        assert asked | ({"guidance_scale"} if "guidance" in sampling else set()) <= set(known)


@pytest.mark.parametrize("model", MODELS)
def test_single_file_checkpoint_has_a_base(model):
    location, base = MODELS[model]["location"], MODELS[model]["base"]

    # a folder's own place, so that a file can be put in its stead
    assert (base == location) is not location.endswith(".safetensors")
    assert (base is None) == (make_instance(model) is None)


def test_every_family_has_a_checkpoint():
    counted = Counter(INSTANCES[make_instance(model)].family for model in MODELS)

    assert set(counted) == set(FAMILIES)
