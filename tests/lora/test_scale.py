"""alpha / rank from every place where a writer puts it, with PEFT's own numbers as the judge."""

import json
import logging
import math
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.compare import assert_close
from support.helpers import randn
from torch import nn

from int8run.errors import LoraError
from int8run.lora.find import find_lora
from int8run.lora.load import read_lora
from int8run.lora.metadata import describe_header
from int8run.lora.peft_config import list_setting_warnings
from int8run.lora.stack import LoraStack
from int8run.tasks.inspect_file import inspect_file

RANK, IN, OUT = 8, 12, 10
PAIR = {"lora_A.weight": randn(RANK, IN), "lora_B.weight": randn(OUT, RANK, seed=1)}
LOKR = {"lokr_w1": randn(2, 3), "lokr_w2": randn(5, 4, seed=1)}
CONFIG = {"peft_type": "LORA", "r": RANK}


@pytest.fixture
def write(tmp_path):
    """Writes a LoRA of one module `x`, with a header and PEFT's file beside it."""

    def write(metadata=None, config=None, parts=PAIR, prefix="base_model.model.", alpha=None, name=None):
        tensors = {f"{prefix}x.{part}": tensor.clone() for part, tensor in parts.items()}
        if alpha is not None:
            tensors[f"{prefix}x.alpha"] = torch.tensor(alpha)
        path = tmp_path / (name or "adapter_model.safetensors")
        save_file(tensors, path, metadata)
        if config is not None:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        return path

    return write


def get_scale(path):
    """The scale of the one module of a file."""
    (change,) = read_lora(path).all_changes
    return change.weight_delta.scale


def test_a_plain_alpha_of_a_header_is_for_every_component(write):
    for prefix in ("text_encoder.", "text_encoder_2.", "transformer.", "lora_te1_"):
        parts = {"lora_down.weight": PAIR["lora_A.weight"], "lora_up.weight": PAIR["lora_B.weight"]}
        path = write({"lora_alpha": "16"}, parts=parts, prefix=prefix, name="style.safetensors")
        assert get_scale(path) == 2.0, prefix


def test_an_alpha_with_a_component_is_for_that_one(write):
    metadata = {"text_encoder_2_lora_alpha": "16"}
    assert get_scale(write(metadata, prefix="text_encoder_2.", name="a.safetensors")) == 2.0
    assert get_scale(write(metadata, prefix="text_encoder.", name="a.safetensors")) == 1.0


# -- PEFT is the judge ---------------------------------------------------------------------------------------


def save_with_peft(folder, config, initialize=None):
    """A folder as PEFT saves it, and the weights that PEFT merges, by module."""
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = nn.ModuleList(
            nn.ModuleDict({"to_q": nn.Linear(IN, OUT), "to_k": nn.Linear(IN, OUT)}) for _ in range(2)
        )
        base = nn.ModuleDict({"blocks": blocks})
        original = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        model = peft.get_peft_model(base, config)
        if initialize is not None:
            initialize(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn(parameter.shape) * 0.1
    model.save_pretrained(folder)
    merged = model.merge_and_unload().state_dict()
    return original, merged


def assert_same_as_peft(folder, original, merged):
    """Every weight of the model changes as PEFT changes it."""
    changes = read_lora(find_lora(str(folder), None)).changes["denoiser"]
    assert sorted(changes) == sorted(f"blocks.{i}.{name}" for i in range(2) for name in ("to_q", "to_k"))
    for name, change in changes.items():
        before, after = original[f"{name}.weight"], merged[f"{name}.weight"]
        assert_close(name, change.weight_delta.compute_delta(before), after - before, 1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"lora_alpha": 6},
        {"lora_alpha": 2.5, "use_rslora": True},
        {"alpha_pattern": {"0.to_q": 1, "to_k": 2}, "rank_pattern": {"to_q": 2}},
        {"lora_alpha": 3, "alpha_pattern": {r"blocks\.\d\.to_q": 5, "^blocks.1.to_k": 1}},
        {"lora_alpha": 3, "rank_pattern": {"^to_q": 2, ".*k": 3}, "use_rslora": True},
        {"lora_alpha": 6, "use_dora": True},
        {"init_lora_weights": "gaussian", "lora_alpha": 1},
        {"init_lora_weights": "orthogonal", "lora_alpha": 1},
        {"init_lora_weights": "eva", "lora_alpha": 1},
    ],
    ids=json.dumps,
)
@pytest.mark.parametrize("place", ["beside", "in the header"])
def test_lora_changes_weights_as_peft_does(tmp_path, settings, place):
    peft = pytest.importorskip("peft")

    saved = save_with_peft(tmp_path, peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], **settings))
    if place == "in the header":
        move_settings_into_header(tmp_path)

    assert_same_as_peft(tmp_path, *saved)


def move_settings_into_header(folder):
    """The same adapter as diffusers writes it."""
    config_path, path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config = {f"transformer.{key}": value for key, value in json.loads(config_path.read_text()).items()}
    config_path.unlink()
    tensors = {
        key.replace("base_model.model.", "transformer."): tensor for key, tensor in load_file(path).items()
    }
    path.unlink()
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(config)}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata)


@pytest.mark.parametrize("kind", ["LoHaConfig", "LoKrConfig"])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2, "alpha": 6},
        {"r": 64, "alpha": 8},  # a LoKr's factors are whole
        {"r": 2, "alpha": 6, "alpha_pattern": {"0.to_q": 1}, "rank_pattern": {"to_k": 1}},
    ],
    ids=json.dumps,
)
def test_lycoris_of_peft_changes_weights_as_peft_does(tmp_path, kind, settings):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(target_modules=["to_q", "to_k"], init_weights=False, **settings)

    assert_same_as_peft(tmp_path, *save_with_peft(tmp_path, config))


@pytest.mark.parametrize(
    "place", ["a folder beside it", "a file beside it", "the same file", "PEFT converts"]
)
@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "lora_alpha": 6},
        {"init_lora_weights": "olora", "lora_alpha": 3, "use_rslora": True},
        {"init_lora_weights": "pissa", "use_dora": True},
    ],
    ids=json.dumps,
)
def test_initial_factors_are_subtracted_as_peft_does(tmp_path, settings, place):
    peft = pytest.importorskip("peft")
    if place == "PEFT converts" and settings.get("use_dora"):
        pytest.skip("PEFT converts no DoRA")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_k"], **settings)
    initial, trained = tmp_path / "pissa_init", tmp_path / "trained"

    def save_initial(model):
        name = config.init_lora_weights
        config.init_lora_weights = True
        model.save_pretrained(initial)
        config.init_lora_weights = name

    original, merged = save_with_peft(trained, config, save_initial)
    weights = load_file(trained / "adapter_model.safetensors")
    initial_weights = load_file(initial / "adapter_model.safetensors")
    if place == "a folder beside it":
        initial.rename(trained / "pissa_init")
    elif place == "a file beside it":
        (initial / "adapter_model.safetensors").rename(trained / "initial.safetensors")
    elif place == "the same file":
        for key, tensor in initial_weights.items():
            if key.endswith(".weight"):
                weights[key.replace(".weight", ".pissa_init.weight")] = tensor
        save_file(weights, trained / "adapter_model.safetensors")
    else:
        convert_with_peft(peft, trained, initial, original)

    assert_same_as_peft(trained, original, merged)


def convert_with_peft(peft, trained, initial, original):
    """The adapter as PEFT converts it to one that is relative to the base."""
    blocks = nn.ModuleList(
        nn.ModuleDict({"to_q": nn.Linear(IN, OUT), "to_k": nn.Linear(IN, OUT)}) for _ in range(2)
    )
    base = nn.ModuleDict({"blocks": blocks})
    base.load_state_dict(original)
    model = peft.PeftModel.from_pretrained(base, trained)
    model.save_pretrained(trained, path_initial_model_for_weight_conversion=str(initial))


# -- one place -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "scale"),
    [
        ({"alpha": "1"}, 1 / 8),
        ({"lora_alpha": "32", "r": "8"}, 4.0),
        ({"lora_alpha": "32", "lora_rank": "8"}, 4.0),
        ({"network_alpha": "4", "network_dim": "8"}, 0.5),
        ({"network_alpha": "4.0"}, 0.5),
        ({"transformer.lora_alpha": "32", "transformer.r": "8"}, 4.0),
        ({"unet.alpha": "4"}, 0.5),
        ({"transformer_lora_alpha": "4"}, 0.5),
        ({"text_encoder.lora_alpha": "32"}, 1.0),
        ({"lora_alpha": "8", "use_rslora": "true"}, 8 / 8**0.5),
        ({"lora_alpha": "8", "use_rslora": "False"}, 1.0),
        ({"alpha": "0"}, 1.0),  # kohya's word for rank
        ({"alpha": "None"}, 1.0),
        ({"r": "16"}, 1.0),  # a rank alone scales nothing
        ({"lora_config": '{"lora_alpha": 4, "r": 8}'}, 0.5),
        ({"peft_config": '{"default": {"lora_alpha": 4, "r": 8}}'}, 0.5),
        ({"LoRA_Alpha": "4", "Transformer.R": "8"}, 0.5),
        ({"lora_adapter_metadata": '{"transformer": {"lora_alpha": 4}}'}, 0.5),
        ({"lora_adapter_metadata": '{"transformer.peft_type": "LORA", "transformer.r": 8}'}, 1.0),
        ({"lora_adapter_metadata": '{"lora_alpha": 4}', "network_alpha": "4"}, 0.5),
        ({"ss_network_alpha": "4", "ss_network_dim": "8"}, 1.0),  # converters multiply it in
    ],
    ids=str,
)
def test_scale_in_the_header(write, metadata, scale):
    assert get_scale(write(metadata, prefix="transformer.")) == pytest.approx(scale)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"lora_alpha": 32}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / 8**0.5),
        ({"lora_alpha": 8, "alpha_pattern": {"x": 2}}, 0.25),
        ({"lora_alpha": 0}, 0.0),
        ({}, 1.0),  # PEFT's default alpha is 8
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_scale_beside_the_file(write, config, scale, name):
    assert get_scale(write(config=CONFIG | config, name=name)) == pytest.approx(scale)


def test_a_config_without_numbers_has_the_defaults_of_peft(write):
    config = {"lora_alpha": None, "r": None, "use_rslora": True}
    assert get_scale(write(config=config)) == pytest.approx(8 / 8**0.5)


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"config": {"peft_type": "LOKR", "r": 64, "alpha": 8}}, 0.125),
        ({"config": {"peft_type": "LOKR", "alpha": 4}}, 0.5),
        ({"alpha": 4.0}, 1.0),  # LyCORIS scales two whole factors by nothing
        ({"metadata": {"network_alpha": "4"}}, 1.0),
    ],
    ids=str,
)
def test_lokr_with_both_factors_whole(write, options, scale):
    assert get_scale(write(parts=LOKR, **options)) == scale


# -- places that disagree, or are not understood -------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"metadata": {"lora_adapter_metadata": '{"lora_alpha": 8}'}, "alpha": 2.0},
            "x cannot be scaled: alpha / rank is 0.25 by its alpha tensor and 1 by lora_adapter_metadata in "
            "its header; which one is meant cannot be told",
        ),
        (
            {"config": CONFIG | {"lora_alpha": 4}, "metadata": {"network_alpha": "16"}},
            "alpha / rank is 0.5 by adapter_config.json and 2 by its header",
        ),
        ({"metadata": {"alpha": "4", "lora_alpha": "8"}}, "its header has lora_alpha 8 and alpha 4"),
        (
            {"config": {"peft_type": "LORA", "r": 4, "lora_alpha": 8}},
            "adapter_config.json says rank 4, its tensors have rank 8; alpha / rank is 2 or 1",
        ),
        ({"metadata": {"alpha": "16", "rank": "16"}}, "its header says rank 16, its tensors have rank 8"),
        ({"config": CONFIG | {"rank_pattern": {"x": 2}}}, "says rank 2, its tensors have rank 8"),
        ({"config": CONFIG, "alpha": 4.0}, "0.5 by its alpha tensor and 1 by adapter_config.json"),
        (
            {"config": {"peft_type": "LOKR", "r": 64}, "alpha": 8.0, "parts": LOKR},
            "1 by its alpha tensor and 0.125 by adapter_config.json",
        ),
        ({"config": CONFIG | {"lora_alpha": "sixteen"}}, "lora_alpha of adapter_config.json is 'sixteen'"),
        ({"config": CONFIG | {"lora_alpha": True}}, "'True', which is not a number"),
        ({"config": CONFIG | {"lora_alpha": [8]}}, "which is not a number that a LoRA is scaled with"),
        ({"config": CONFIG | {"lora_alpha": float("inf")}}, "'inf', which is not a number"),
        ({"config": CONFIG | {"lora_alpha": 3e38}}, "'3e[+]38', which is not a number"),
        ({"config": CONFIG | {"r": 0}}, "r of adapter_config.json is 0; a rank is 1 or more"),
        ({"config": CONFIG | {"alpha_pattern": {"y": "z"}}}, "'z', which is not a number"),
        (
            {"config": CONFIG | {"alpha_pattern": {"(a+)+": 2}}},
            r"has the expression '\(a\+\)\+'; read are names",
        ),
        ({"config": [8]}, r"adapter_config.json is not a JSON object of at most 4 MB"),
    ],
    ids=str,
)
def test_contradictions_and_broken_settings_are_refused(write, options, words):
    with pytest.raises(LoraError, match=words):
        read_lora(write(**options))


def test_an_alpha_tensor_may_say_the_same_as_the_header(write):
    # a trainer's rank need not be that of every module
    assert get_scale(write({"network_alpha": "16", "network_dim": "32"}, alpha=4.0, prefix="")) == 0.5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"metadata": {"lora_adapter_metadata": "{not json"}}, "is not a JSON object and is ignored"),
        (
            {"metadata": {"lora_alpha": "sixteen"}},
            "lora_alpha in its header is 'sixteen', which is not understood",
        ),
        ({"metadata": {"my.alpha": "4"}}, "my.alpha in its header is '4', which is not understood"),
        ({"metadata": {"lora_scale": "4"}}, "lora_scale in its header is '4', which is not understood"),
        (
            {"metadata": {"job": '{"network": {"linear_alpha": 4}}'}},
            "job in its header has an alpha, which is not",
        ),
        (
            {"metadata": {"ss_network_alpha": "4", "ss_network_dim": "8"}},
            "trained with alpha 4 .ss_network_alpha. and rank 8, and no tensor says so: alpha / rank",
        ),
        ({"metadata": {"alphas": '{"x": 4}'}}, "alphas in its header is .*, which is not understood"),
        ({"metadata": {"note": "initialize=pissa"}}, "note in its header names pissa; if the LoRA was"),
        ({"metadata": {"ss_network_args": '{"init": "olora"}'}}, "ss_network_args in its header names olora"),
        ({"metadata": {"note": "started from CorDA"}}, "note in its header names corda; if the LoRA was"),
        ({"metadata": {"init": "pissa_niter_16"}}, "init in its header names pissa; if the LoRA was"),
        ({}, "its names are PEFT's, which writes alpha into adapter_config.json, and there is none"),
        ({"config": CONFIG}, "adapter_config.json has no alpha; PEFT's default of 8 is used"),
        (
            {"config": CONFIG | {"alpha_pattern": {"y": 2}}},
            "alpha_pattern of adapter_config.json has 1 entry without a module in the file .first: 'y'",
        ),
        ({"config": CONFIG | {"fan_in_fan_out": True}}, "has fan_in_fan_out, which is ignored, as PEFT"),
        ({"config": CONFIG | {"modules_to_save": ["y"]}}, "has modules_to_save: y were trained whole"),
        ({"config": CONFIG | {"bias": "all"}}, "has bias 'all': biases of the model were trained"),
        (
            {"config": CONFIG | {"new_setting": 1}},
            "has settings that are not known and are ignored: new_setting",
        ),
    ],
    ids=str,
)
def test_what_is_not_understood_is_told(write, caplog, options, words):
    with caplog.at_level(logging.WARNING):
        read_lora(write(**options))

    assert any(re.search(words, record.getMessage()) for record in caplog.records)


@pytest.mark.parametrize(
    "options",
    [
        {
            "metadata": {
                "format": "pt",
                "modelspec.title": "x",
                "ss_network_alpha": "8",
                "ss_network_dim": "8",
            }
        },
        {"alpha": 4.0, "metadata": {"ss_network_alpha": "1", "ss_network_dim": "8"}},
        {"metadata": {"guidance_scale": "4", "alpha": "None"}},
    ],
    ids=str,
)
def test_usual_files_bring_no_warning(write, caplog, options):
    read_lora(write(**options, prefix="transformer."))

    assert caplog.records == []


@pytest.mark.parametrize("kind", ["Lora", "LoHa", "LoKr", "OFT", "BOFT", "IA3"])
def test_every_setting_of_peft_is_known(kind):
    peft = pytest.importorskip("peft")
    settings = dict.fromkeys(getattr(peft, f"{kind}Config")().to_dict(), "set")

    warnings = list_setting_warnings("adapter_config.json", settings)

    assert not any("not known" in line for line in warnings)


def test_settings_beside_several_loras_are_of_the_one_with_their_name(write, caplog):
    named = write(config=CONFIG | {"lora_alpha": 4})
    other = write(name="other.safetensors", prefix="transformer.")

    assert get_scale(named) == 0.5 and get_scale(other) == 1.0
    assert any(
        "adapter_config.json beside it is ignored, as the folder has 1 other" in r.message
        for r in caplog.records
    )


# -- settings that make another change -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "VERA"}, "says peft_type VERA, which is not read; read are LORA, LOHA, LOKR"),
        ({"use_qalora": True}, "has use_qalora, so that the adapter acts on sums of groups of inputs"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "has layer_replication, so that"),
        ({"kasa_config": {"beta": 1}}, "relative to a truncated base"),
        (
            {"use_dora": True},
            "x has no magnitude, and adapter_config.json has use_dora; the file is incomplete",
        ),
        ({"lora_bias": True}, "x has no up_bias, and adapter_config.json has lora_bias"),
        (
            {"init_lora_weights": "pissa"},
            r"initialized by pissa \(PiSSA, arXiv 2404.02948\), which changed the base",
        ),
        ({"init_lora_weights": "pissa_niter_16"}, r"pissa_niter_16 \(PiSSA"),
        ({"init_lora_weights": "OLoRA"}, r"OLoRA \(OLoRA"),
        ({"init_lora_weights": "corda"}, r"corda \(CorDA"),
        ({"init_lora_weights": "lora_ga"}, r"lora_ga \(LoRA-GA"),
        ({"init_lora_weights": "loftq"}, r"loftq \(LoftQ"),
        (
            {"init_lora_weights": "milora"},
            "init_lora_weights 'milora', and whether that changed the base weights",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("place", ["beside", "in the header"])
def test_another_change_is_refused_by_name(write, config, words, place):
    parts = config.get("parts", PAIR)
    config = {key: value for key, value in config.items() if key != "parts"}
    if place == "beside":
        path = write(config=CONFIG | config, parts=parts)
    else:
        settings = {f"transformer.{key}": value for key, value in (CONFIG | config).items()}
        path = write({"lora_adapter_metadata": json.dumps(settings)}, parts=parts, prefix="transformer.")
        words = words.replace("adapter_config.json", "lora_adapter_metadata in its header")

    with pytest.raises(LoraError, match=words):
        read_lora(path)


@pytest.mark.parametrize("key", ["init_lora_weights", "transformer.init_lora_weights"])
def test_an_initialization_that_stands_plainly_in_the_header_is_refused(write, key):
    with pytest.raises(LoraError, match=r"was initialized by pissa \(PiSSA"):
        read_lora(write({key: "pissa"}))

    assert get_scale(write({key: "gaussian", "lora_alpha": "4"})) == 0.5


def test_initial_factors_beside_it_are_no_other_lora(write, tmp_path):
    pair = {f"base_model.model.x.{part}": 0.5 * tensor for part, tensor in PAIR.items()}
    save_file(pair, tmp_path / "style_init.safetensors")
    path = write(config=CONFIG | {"lora_alpha": 4, "init_lora_weights": "pissa"}, name="style.safetensors")

    (change,) = read_lora(path).all_changes
    down, up = (PAIR[f"lora_{half}.weight"] for half in "AB")
    expected = 0.5 * (up @ down - 0.25 * up @ down)
    torch.testing.assert_close(change.weight_delta.compute_delta(torch.zeros(OUT, IN)), expected)

    plain = write(config=CONFIG | {"lora_alpha": 4}, name="style.safetensors")
    assert get_scale(plain) == 1, "settings that may be those of the other file are ignored"


def test_initial_factors_without_any_settings_have_those_of_the_lora(write, tmp_path):
    pair = {f"base_model.model.x.{part}": 0.5 * tensor for part, tensor in PAIR.items()}
    save_file(pair, tmp_path / "initial.safetensors", {"lora_adapter_metadata": "{}"})
    path = write(config=CONFIG | {"lora_alpha": 4, "init_lora_weights": "pissa"})

    (change,) = read_lora(path).all_changes

    down, up = (PAIR[f"lora_{half}.weight"] for half in "AB")
    expected = 0.5 * (up @ down - 0.25 * up @ down)
    torch.testing.assert_close(change.weight_delta.compute_delta(torch.zeros(OUT, IN)), expected)


def test_initial_factors_of_a_convolution_may_have_more_dimensions(write, tmp_path):
    down, up = torch.randn(2, 3, 3, 3), torch.randn(4, 2, 1, 1)
    name = "base_model.model.x"
    initial = {f"{name}.lora_A.weight": 0.5 * down, f"{name}.lora_B.weight": (0.5 * up)[..., None].clone()}
    save_file(initial, tmp_path / "initial.safetensors")
    config = CONFIG | {"r": 2, "lora_alpha": 2, "init_lora_weights": "pissa"}
    path = write(parts={"lora_A.weight": down, "lora_B.weight": up}, config=config)

    (change,) = read_lora(path).all_changes

    whole = torch.einsum("nr,rkij->nkij", up[..., 0, 0], down)
    found = change.weight_delta.compute_delta(torch.zeros(4, 3, 3, 3))
    torch.testing.assert_close(found, 0.75 * whole)


def test_initial_factors_of_another_lora_are_refused(write, tmp_path):
    path = write(config=CONFIG | {"init_lora_weights": "pissa"})
    save_file({"base_model.model.y.lora_A.weight": PAIR["lora_A.weight"]}, tmp_path / "initial.safetensors")

    with pytest.raises(LoraError, match="y has no lora_B"):
        read_lora(path)

    pair = {f"base_model.model.y.{part}": tensor.clone() for part, tensor in PAIR.items()}
    save_file(pair, tmp_path / "initial.safetensors")
    with pytest.raises(
        LoraError, match="x has no initial factors; the file of the initial adapter is not that"
    ):
        read_lora(path)

    save_file(pair, tmp_path / "second_init.safetensors")
    with pytest.raises(
        LoraError, match=r"several files may hold its initial factors \(initial.safetensors, second"
    ):
        read_lora(path)


# -- inspect -------------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_beside_the_file(write):
    path = write(config=CONFIG | {"lora_alpha": 16})

    assert describe_header(path, {}, [])["rank and alpha"] == "rank 8, alpha 16"

    (path.parent / "adapter_config.json").write_text("{")
    assert "adapter_config.json is not a JSON object" in describe_header(path, {}, [])["rank and alpha"]


def test_hostile_text_is_shown_without_control_characters(write, caplog):
    escape = "\x1b[31m"
    path = write(
        {f"{escape}.alpha": escape, f"{escape}job": f'{{"lora_alpha": {escape}'},
        CONFIG | {"modules_to_save": [escape], escape: 1, "alpha_pattern": {"y": 1}, "bias": escape},
    )

    read_lora(path)

    assert len(caplog.records) >= 5 and "\x1b" not in caplog.text


@pytest.mark.parametrize("seed", range(20))
def test_random_settings_are_read_or_refused(write, seed):
    generator = random.Random(seed)
    keys = ["r", "lora_alpha", "alpha", "alpha_pattern", "rank_pattern", "use_rslora", "peft_type"]
    keys += ["use_dora", "init_lora_weights", "modules_to_save", "bias", "transformer", "x.alpha"]
    values = [None, 0, 1, -3, 8.5, 1e308, 10**400, True, "8", "\0", "pissa", [], [1], {}, {"x": 1}, {"(": {}}]
    for _ in range(20):
        settings = {generator.choice(keys): generator.choice(values) for _ in range(4)}
        plain = {key: str(value) for key, value in settings.items()}
        as_json = {"lora_adapter_metadata": json.dumps(settings)}
        options = generator.choice([{"config": settings}, {"metadata": plain}, {"metadata": as_json}])
        try:
            (change,) = read_lora(write(**options)).all_changes
        except LoraError:
            continue
        assert math.isfinite(change.weight_delta.scale)


def test_a_folder_of_peft_is_inspected(write):
    path = write(config=CONFIG | {"lora_alpha": 16})

    table = inspect_file(str(path.parent)).to_table()

    assert table.title == f"{path.parent.name}/adapter_model.safetensors"
    assert "rank 8, alpha 16" in list(table.columns[1].cells)


def test_a_folder_of_peft_is_put_on_a_model(tmp_path):
    model = nn.ModuleDict({"x": nn.Linear(IN, OUT)})
    (tmp_path / "style").mkdir()
    pair = {f"base_model.model.x.{part}": tensor.clone() for part, tensor in PAIR.items()}
    save_file(pair, tmp_path / "style" / "adapter_model.safetensors")
    (tmp_path / "style" / "adapter_config.json").write_text(json.dumps(CONFIG | {"lora_alpha": 32}))
    before = model["x"].weight.detach().clone()

    stack = LoraStack(model).add(tmp_path / "style", 0.5)

    assert stack.names == ["style"]
    expected = 0.5 * 4 * PAIR["lora_B.weight"] @ PAIR["lora_A.weight"]
    assert_close("x", model["x"].weight.detach() - before, expected, 1e-5)
