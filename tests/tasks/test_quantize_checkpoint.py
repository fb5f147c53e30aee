"""`task=quantize`: from the command line to the files, what they are called, and what is refused."""

import csv
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from families.denoisers import ovis_image
from hydra import compose, initialize_config_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.cli_process import command_in
from support.helpers import randn
from support.original_families import FAMILIES
from support.original_families import tiny as tiny_instance
from torch import nn

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.job import Job
from int8run.errors import ConfigError, FileError
from int8run.export.stream_plan import QuantizationRecipe, plan_targets
from int8run.models.family import load_families
from int8run.models.original_names import to_original
from int8run.models.resolve_weights import ResolvedWeights
from int8run.models.state_dict_adapter import find_prefix
from int8run.models.tensor_part import join_shapes
from int8run.outlier.none import NoOutlier
from int8run.pipeline.checkpoint_weights import FileWeights
from int8run.quant.rounding import AbsMax
from int8run.quant.weight import quantize_weight
from int8run.tasks.denoiser_checkpoint import find_repeated_blocks, has_original_names, recognize_checkpoint
from int8run.tasks.quantize_checkpoint import quantize_file
from int8run.tasks.quantize_checkpoint_plan import plan_names
from int8run.tasks.quantize_common import count_skip_reasons, hash_checkpoint
from int8run.utils.paths import ASSETS_FOLDER

TINY = ASSETS_FOLDER / "tiny" / "transformer"
NO_TRACKER = "tracker=none"
OVIS_IMAGE = "OvisImageTransformer2DModel"


def run(folder, *overrides, component=None):
    """The task without a command line; its output folder is `folder/out`."""
    with initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", ["task=quantize", "model=tiny", NO_TRACKER, "progress=false", *overrides])
    out = folder / "out"
    out.mkdir(exist_ok=True)
    job = Job(get_plain_config(config), choices={}, overrides=list(overrides), output_dir=out)
    return quantize_file(create_run_spec(config), job, component)


@pytest.fixture(scope="module")
def tiny():
    """The tiny model's tensors."""
    tensors = {}
    for file in sorted(TINY.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    with command_in(tmp_path / "here", monkeypatch, capsys) as run:
        yield run


def dequantized(tensors, layer):
    assert json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise",
        "per_row": True,
    }
    return tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scale"]


def assert_terminal_names_what_was_made(words):
    size_and_speed = (
        r"SQNR, mean / min 4\d\.\d / 4\d\.\d dB size 30\.2 MB "
        r"→ 19\.\d MB, 0\.65× · time [\d.]+ s, [\d.]+ MB/s read"
    )

    assert re.search(r"read .*tiny/transformer · files 3 · size 30\.2 MB · family flux", words)
    assert re.search(r"write .*x\.safetensors · INT8 layers 16 · outlier none · rounding absmax", words)
    assert "INT8 16 layers · float 14 (" in words
    assert "7 × modulation output of a norm" in words
    assert re.search(size_and_speed, words)
    assert re.search(r"peak memory \d+\.\d MB", words)


def assert_file_has_the_models_weights(found, tiny):
    """In the authors' names: layers that they have together are joined, halves change places."""
    block = "single_transformer_blocks.0."
    names = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    weight = torch.cat([tiny[f"{block}{name}.weight"].float() for name in names])
    bias = torch.cat([tiny[f"{block}{name}.bias"] for name in names])
    steps = found["single_blocks.0.linear1.weight_scale"]
    shift, scale = tiny["norm_out.linear.weight"].chunk(2)
    query_norm = tiny["transformer_blocks.0.attn.norm_q.weight"]

    assert ((dequantized(found, "single_blocks.0.linear1") - weight).abs() <= 0.5001 * steps).all()
    assert torch.equal(found["single_blocks.0.linear1.bias"], bias)
    assert torch.equal(found["final_layer.adaLN_modulation.1.weight"], torch.cat([scale, shift]))
    assert torch.equal(found["double_blocks.0.img_attn.norm.query_norm.scale"], query_norm)
    assert torch.equal(found["img_in.weight"], tiny["x_embedder.weight"])
    assert found["img_in.weight"].dtype == torch.float16


def assert_note_names_source_and_recipe(path):
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["int8run"])

    assert (note["family"], note["denoiser"]) == ("flux", "FluxTransformer2DModel")
    assert (note["outlier"], note["rounding"]) == ("none", "absmax")
    assert (note["model"], note["seed"], note["loras"]) == ("shipped:tiny", 0, [])
    assert note["kept_float"]["img_in"] == "input embedder"
    assert len(note["kept_float"]) == 14
    assert len(note["source"]["files"]) == 3
    assert re.fullmatch("[0-9a-f]{64}", note["source"]["sha256"])


def assert_table_has_every_layer(path):
    with path.open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    float_row = rows["img_in"]
    int8_row = rows["single_blocks.0.linear1"]

    assert len(rows) == 30
    assert (float_row["quantized"], float_row["why_not"]) == ("false", "input embedder")
    assert (int8_row["quantized"], int8_row["outlier"], int8_row["rounding"]) == ("true", "none", "absmax")
    assert 40 < float(int8_row["weight_sqnr_db"]) < 50
    assert float(int8_row["saturated_share"]) > 0


def test_from_the_command_line(command, tiny):
    done = command("task=quantize", "model=tiny", "save=x.safetensors", NO_TRACKER)

    assert done.code == 0, done.err

    written = command.folder / "x.safetensors"
    (folder,) = (command.folder / "outputs").glob("*/*")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())

    assert names == ["config.yaml", "int8run.log", "layers.csv", "metrics.json", "status.json"]

    assert_terminal_names_what_was_made(" ".join(done.out.split()))
    assert_file_has_the_models_weights(load_file(written), tiny)
    assert_note_names_source_and_recipe(written)
    assert_table_has_every_layer(folder / "layers.csv")

    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]

    assert metrics["quant/layers_int8"] == 16
    assert metrics["build/written_bytes"] == written.stat().st_size
    assert metrics["build/read_bytes"] == sum(t.numel() * t.element_size() for t in tiny.values())
    assert metrics["memory/peak_bytes"] > 1e8
    assert metrics["build/quantize_s"] > 0


def test_a_folder_keeps_the_names_of_diffusers(tmp_path, tiny):
    metrics = run(tmp_path, f"save={tmp_path}/made/here")
    made = tmp_path / "made" / "here"

    names = ["card.md", "config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(p.name for p in made.iterdir()) == names
    assert json.loads((made / "config.json").read_text()) == json.loads((TINY / "config.json").read_text())

    found = load_file(made / "diffusion_pytorch_model.safetensors")

    assert {key for key in found if not key.endswith((".weight_scale", ".comfy_quant"))} == set(tiny)

    for key, t in tiny.items():
        if found[key].dtype == torch.int8:
            wanted = quantize_weight(t)
            assert torch.equal(found[key], wanted.qdata)
            assert torch.equal(found[key.replace(".weight", ".weight_scale")], wanted.scale)
        else:
            assert torch.equal(found[key], t)

    assert metrics["quant/layers_int8"] == sum(t.dtype == torch.int8 for t in found.values()) == 32


@pytest.fixture
def native_file(tmp_path, tiny):
    """The tiny model as its authors name it, in a whole checkpoint: with a prefix and other components."""
    run(tmp_path, f"save={tmp_path}/plain.safetensors", "model_type=none")
    names = load_file(tmp_path / "plain.safetensors")
    original = {}
    with TensorFiles.open(TINY) as files:
        for key, parts in to_original(
            {key: info.shape for key, info in files.items()}, "FluxTransformer2DModel"
        ).items():
            original[f"model.diffusion_model.{key}"] = torch.cat(
                [part.extract(tiny[part.key]) for part in parts]
            )
    assert {k.removeprefix("model.diffusion_model.") for k in original} == {
        k for k in names if not k.endswith(("_scale", "_quant"))
    }
    original |= {"vae.decoder.weight": randn(4, 4), "text_encoders.t5.weight": randn(8, 4)}
    path = tmp_path / "native.safetensors"
    save_file(original, path, {"config": "kept", "_quantization_metadata": '{"layers": {}}'})
    return path, original


def test_a_single_file_keeps_its_own_names(tmp_path, native_file):
    path, original = native_file
    metrics = run(tmp_path, f"model.location={path}", f"save={tmp_path}/x.safetensors", "outlier=convrot")
    found = load_file(tmp_path / "x.safetensors")

    assert {key for key in found if not key.endswith((".weight_scale", ".comfy_quant"))} == set(original)
    assert metrics["quant/layers_int8"] == 16

    layer = "model.diffusion_model.single_blocks.0.linear1"

    assert found[f"{layer}.weight"].dtype == torch.int8
    assert f"{layer}.weight_scale" in found
    assert json.loads(bytes(found[f"{layer}.comfy_quant"].tolist()))["convrot_groupsize"] == 64
    for key, t in original.items():
        assert found[key].dtype == torch.int8 or torch.equal(found[key], t)
    assert torch.equal(found["vae.decoder.weight"], original["vae.decoder.weight"])

    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        metadata = file.metadata()

    assert metadata["config"] == "kept"
    assert set(metadata) == {"format", "config", "int8run"}

    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out" / "layers.csv").open())}

    assert (
        rows["model.diffusion_model.final_layer.adaLN_modulation.1"]["why_not"]
        == "modulation output of a norm"
    )
    assert not any(name.startswith(("vae", "text")) for name in rows)


def test_a_file_without_convolutions_that_are_asked_for_is_warned_of(tmp_path, caplog):
    run(tmp_path, "int8.convolutions=int8", f"save={tmp_path / 'new.safetensors'}")

    assert sum("the denoiser has no convolutions that can be INT8" in text for text in caplog.messages) == 1


def test_a_file_is_a_file_whatever_its_name(tmp_path):
    run(tmp_path, f"save={tmp_path}/a/diffusion_pytorch_model.safetensors")

    names = ["diffusion_pytorch_model.card.md", "diffusion_pytorch_model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == names


def test_a_file_of_diffusers_names_gets_its_authors(tmp_path, tiny):
    save_file(tiny, tmp_path / "plain.safetensors")
    run(tmp_path, f"model.location={tmp_path}/plain.safetensors", f"save={tmp_path}/a.safetensors")
    run(tmp_path, f"save={tmp_path}/b.safetensors")
    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")

    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_an_int8_file_is_renamed_without_a_change(tmp_path, tiny, caplog):
    run(tmp_path, f"save={tmp_path}/folder", "outlier=convrot")
    with caplog.at_level("INFO"):
        run(tmp_path, f"model.location={tmp_path}/folder", f"save={tmp_path}/a.safetensors")
    run(tmp_path, f"save={tmp_path}/b.safetensors", "outlier=convrot")
    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")

    assert set(one) == set(two)
    assert all(torch.equal(one[key], two[key]) for key in one)

    messages = [r.getMessage() for r in caplog.records if "copied as they are" in r.getMessage()]

    assert messages == [
        "16 layers are INT8 in the source, copied as they are "
        "(14 × convrot group_size=64, 2 × convrot group_size=256); "
        "outlier= and rounding= do not change them"
    ]


def test_a_layer_with_a_part_that_stays_float_stays_float(tmp_path, tiny):
    rule = "{pattern: '*.proj_mlp', reason: wide}"
    overrides = ["model_type=flux", f"model_type.ignore=[{rule}]"]
    run(tmp_path, f"save={tmp_path}/x.safetensors", *overrides)
    found = load_file(tmp_path / "x.safetensors")
    weight = [
        tiny[f"single_transformer_blocks.3.{name}.weight"]
        for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]

    assert torch.equal(found["single_blocks.3.linear1.weight"], torch.cat(weight))

    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out" / "layers.csv").open())}

    assert (
        rows["single_blocks.3.linear1"]["why_not"]
        == "wide (single_transformer_blocks.3.proj_mlp is a part of it)"
    )
    assert count_skip_reasons([]) == {}
    assert rows["single_blocks.3.linear2"]["quantized"] == "true"


def test_a_file_that_nobody_knows_gets_the_cautious_rule(tmp_path, caplog):
    tensors = {f"layers.{i}.lin.weight": randn(8, 8, seed=i) for i in range(4)} | {"head.weight": randn(4, 8)}
    save_file(tensors, tmp_path / "s.safetensors")
    with caplog.at_level("WARNING"):
        metrics = run(tmp_path, f"model.location={tmp_path}/s.safetensors", f"save={tmp_path}/x.safetensors")

    assert metrics["quant/layers_int8"] == 2
    assert any(
        "model_type=auto does not know what s.safetensors holds" in r.getMessage() for r in caplog.records
    )

    found = load_file(tmp_path / "x.safetensors")

    assert [key for key, t in sorted(found.items()) if t.dtype == torch.int8] == [
        "layers.1.lin.weight",
        "layers.2.lin.weight",
    ]

    metrics = run(
        tmp_path,
        f"model.location={tmp_path}/s.safetensors",
        f"save={tmp_path}/x.safetensors",
        "model_type=none",
    )

    assert metrics["quant/layers_int8"] == 5


def test_a_file_that_is_there_is_replaced_with_a_word(tmp_path, caplog):
    for _ in range(2):
        run(tmp_path, f"save={tmp_path}/x.safetensors")

    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [
        f"save={tmp_path}/x.safetensors replaces an existing file"
    ]


def test_one_of_two_files_that_are_named_one_by_one(tmp_path, tiny):
    save_file(tiny, tmp_path / "high.safetensors")
    missing, there = tmp_path / "missing.safetensors", tmp_path / "high.safetensors"
    location = f"model.location={{transformer: {missing}, transformer_2: {there}}}"
    run(tmp_path, location, f"save={tmp_path}/x.safetensors", component="transformer_2")

    assert (tmp_path / "x.safetensors").exists()

    words = (
        r"^model\.location names 2 denoisers; choose one: "
        r"task\.component=transformer or task\.component=transformer_2$"
    )

    with pytest.raises(ConfigError, match=words):
        run(tmp_path, location, f"save={tmp_path}/x.safetensors")


def test_what_is_no_layer_of_the_denoiser_is_copied(tmp_path):
    tensors = {f"blocks.{i}.mlp.layer1.weight": randn(16, 8, seed=i) for i in range(8)} | {
        "blocks.0.self_attn.q_proj.weight": randn(8, 8)
    }
    tensors |= {"llm_adapter.embed.weight": randn(32, 8), "llm_adapter.blocks.0.mlp.weight": randn(8, 8)}
    save_file({f"net.{key}": t for key, t in tensors.items()}, tmp_path / "s.safetensors")
    metrics = run(
        tmp_path,
        f"model.location={tmp_path}/s.safetensors",
        f"save={tmp_path}/x.safetensors",
        "model_type=anima",
    )
    found = load_file(tmp_path / "x.safetensors")

    assert torch.equal(found["net.llm_adapter.embed.weight"], tensors["llm_adapter.embed.weight"])
    assert metrics["quant/layers_int8"] == 9
    assert metrics["quant/layers_float"] == 2

    rows = {row["name"]: row for row in csv.DictReader((tmp_path / "out" / "layers.csv").open())}
    words = (
        "not a layer of CosmosTransformer3DModel: Anima's text conditioner, another component of the pipeline"
    )

    assert rows["net.llm_adapter.embed"]["why_not"] == words


def test_another_checkpoint_of_the_same_shapes_has_another_hash(tmp_path):
    hashes = []
    for seed in (0, 0, 1):
        tensors = {"a.weight": randn(64, 64), "b": randn(3, seed=seed)}
        save_file(tensors, tmp_path / "s.safetensors")
        with TensorFiles.open(tmp_path / "s.safetensors") as files:
            hashes.append(hash_checkpoint(files))

    assert hashes[0] == hashes[1] != hashes[2]


REFUSED = {
    "save=null": r"^task=quantize writes a checkpoint; set save=<file\.safetensors> or save=<folder>$",
    "outlier=smoothquant": (
        r"^outlier=smoothquant needs calibration images, .*; set "
        r"task=run save=.*x\.safetensors, which generates them$"
    ),
    "outlier=auto": r"^outlier=auto needs calibration images",
    "rounding=gptq": r"^rounding=gptq needs calibration images, .* task=run save=",
    "model_type.mixed_precision=auto quality_db=40": (
        r"^model_type\.mixed_precision=auto needs " r"calibration images, .* task=run save="
    ),
    "lora=stack_a": (
        r"^task=quantize leaves LoRAs out; set lora=none, or "
        r"task=run lora\.mode=bake save=.*x\.safetensors$"
    ),
    "int8.checkpoint=y.safetensors": (
        r"^task=quantize reads model\.location; set " r"it to the file, and int8\.checkpoint=null$"
    ),
    "outlier=quarot outlier.group_size=1024": (
        r"^outlier=quarot can take none of the " r"16 layers \(10 × in_features=384 is"
    ),
}


@pytest.mark.parametrize("settings", REFUSED)
def test_settings_that_cannot_work(tmp_path, settings):
    with pytest.raises(ConfigError, match=REFUSED[settings]):
        run(tmp_path, f"save={tmp_path}/x.safetensors", *settings.split())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_file_is_not_saved_over_or_beside_its_source(tmp_path, native_file):
    path, _ = native_file
    location = f"model.location={path}"

    with pytest.raises(ConfigError, match=r"native\.safetensors is the source itself; choose another name$"):
        run(tmp_path, location, f"save={path}")

    other_names = (
        r"is a folder, and .*native\.safetensors has its "
        r"authors' names, not those of diffusers; save to a"
    )
    with pytest.raises(ConfigError, match=other_names):
        run(tmp_path, location, f"save={tmp_path}/folder")


def test_a_folder_with_another_checkpoint_is_left_alone(tmp_path, tiny):
    alone = tmp_path / "alone"
    alone.mkdir()
    save_file(tiny, alone / "x.safetensors")

    no_config = (
        r"is a folder, and there is no config\.json beside "
        r".*alone to go with it; save to a \.safetensors file$"
    )
    with pytest.raises(ConfigError, match=no_config):
        run(tmp_path, f"model.location={alone}", f"save={tmp_path}/folder")

    taken = r"save=.*alone holds x\.safetensors, another checkpoint; choose another folder$"
    with pytest.raises(ConfigError, match=taken):
        run(tmp_path, f"save={alone}")


def test_a_folder_is_not_saved_over_its_source(tmp_path):
    run(tmp_path, f"save={tmp_path}/folder")

    with pytest.raises(ConfigError, match=r"folder holds the source itself; choose another folder$"):
        run(tmp_path, f"model.location={tmp_path}/folder", f"save={tmp_path}/folder")


def test_places_that_cannot_be_written_to(tmp_path):
    (tmp_path / "taken" / "config.json").mkdir(parents=True)

    with pytest.raises(FileError, match=r"taken/config\.json cannot be written: Is a directory"):
        run(tmp_path, f"save={tmp_path}/taken")

    (tmp_path / "file").write_text("")

    with pytest.raises(FileError, match=r"file/x\.safetensors cannot be written: "):
        run(tmp_path, f"save={tmp_path}/file/x.safetensors")


def test_nothing_becomes_int8(tmp_path):
    save_file({"a.bias": randn(4)}, tmp_path / "s.safetensors")

    with pytest.raises(
        ConfigError,
        match=r"^no layer becomes INT8 \(it has no weight with two dimensions\); choose another model_type=$",
    ):
        run(tmp_path, f"model.location={tmp_path}/s.safetensors", f"save={tmp_path}/x.safetensors")

    save_file({"img_in.weight": randn(4, 4), "txt_in.weight": randn(4, 4)}, tmp_path / "s.safetensors")
    words = r"^no layer becomes INT8 \(1 × input embedder; 1 × text embedder\); choose another model_type=$"

    with pytest.raises(ConfigError, match=words):
        run(
            tmp_path,
            f"model.location={tmp_path}/s.safetensors",
            f"save={tmp_path}/x.safetensors",
            "model_type=flux",
        )


def test_errors_on_the_command_line_are_one_line(command, tmp_path):
    done = command("task=quantize", "model=tiny", NO_TRACKER)

    assert done.code == 2
    assert done.message.startswith("task=quantize writes a checkpoint; set save=")

    (tmp_path / "broken.safetensors").write_bytes(b"\x05\x00\x00\x00\x00\x00\x00\x00{}")
    done = command(
        "task=quantize", f"model.location={tmp_path}/broken.safetensors", "save=x.safetensors", NO_TRACKER
    )

    assert done.code == 3
    assert "broken.safetensors" in done.message

    done = command("task=quantize", "task.component=unet", "save=x.safetensors", NO_TRACKER)

    assert done.code == 2
    assert "task.component=unet is not a denoiser of shipped:tiny; it has transformer" in done.message


# --- what the names alone decide, beside the real classes of diffusers


def test_repeated_blocks_are_told_by_their_numbers():
    names = [
        "head.lin",
        "blocks.0.a",
        "blocks.0.b",
        "one.0.a",
        "blocks.1.a",
        "single.0.x.3.y",
        "single.1.x.3.y",
    ]

    assert find_repeated_blocks(names) == ["blocks.0.", "blocks.1.", "single.0.", "single.1."]


def test_a_few_names_of_the_other_side_decide_nothing():
    """SANA-Sprint's class has layers of its own whose names are native ones of the other SANAs."""
    few = ["time_embed.timestep_embedder.linear_1.weight", "time_embed.timestep_embedder.linear_2.weight"]
    diffusers = [f"transformer_blocks.{i}.attn1.to_{x}.weight" for i in range(2) for x in "qkv"]

    assert not has_original_names([*few, *diffusers], "SanaTransformer2DModel")
    assert has_original_names(
        ["x_embedder.proj.weight", "blocks.0.attn.qkv.weight"], "SanaTransformer2DModel"
    )
    assert not has_original_names(["transformer_blocks.0.attn.to_q.weight"], "QwenImageTransformer2DModel")
    assert not has_original_names(["anything.weight"], "")


def header_only(path, shapes):
    """A file with these tensors whose numbers take no room."""
    entries, end = {}, 0
    for key, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        entries[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_becomes_int8_are_the_linears_that_the_family_gives(tmp_path, name):
    """From a diffusers folder and from a file of the authors' names: the plan by names agrees with the
    modules of the real class.
    """
    family = FAMILIES[name]
    facts = next((f for f in load_families().values() if family.cls in f.denoisers), None)
    if facts is None:
        pytest.skip(f"no family of {family.cls}")
    model = tiny_instance(family)
    shapes = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    native = to_original(shapes, family.cls)
    linears = {
        f"{n}.weight"
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and facts.find_skip_reason(n) is None
    }
    # a layer of the file is INT8 if all that it holds can be; as a convolution it is none
    wanted = {
        key
        for key, parts in native.items()
        if {p.key for p in parts} <= linears and all(p.shape is None or len(p.shape) == 2 for p in parts)
    }
    header_only(tmp_path / "own.safetensors", shapes)

    assert plan(tmp_path / "own.safetensors", {"_class_name": family.cls}, facts) == (False, wanted)

    header_only(
        tmp_path / "native.safetensors", {key: join_shapes(parts, shapes) for key, parts in native.items()}
    )
    is_identity = all([part.key for part in parts] == [key] for key, parts in native.items())

    assert plan(tmp_path / "native.safetensors", None, replace(facts, denoisers=(family.cls,))) == (
        not is_identity,
        wanted,
    )


def plan(path, config, facts):
    """Whether the names are the authors', and the keys that become INT8."""
    with TensorFiles.open(path) as files:
        prefix = find_prefix(files)
        stored = read_layers(files, prefix)
        known = recognize_checkpoint(
            files,
            stored,
            prefix=prefix,
            source=ResolvedWeights(path, config),
            model_type=replace(facts, inputs={}),
        )
        targets = plan_targets(
            files,
            stored,
            plan_names(files, stored, known, to_folder=False),
            known.find_skip_reason,
            QuantizationRecipe(NoOutlier(), AbsMax()),
        )
    return known.is_original, {target.key for target in targets if target.int8}


def write_fp8_source(path, tiny, dtype):
    """The tiny model with fp8 weights that have a scale each, and everything else in one dtype."""
    tensors = {}
    for key, tensor in tiny.items():
        if tensor.dim() == 2:
            scale = tensor.float().abs().max() / 448
            tensors[key] = (tensor.float() / scale).to(torch.float8_e4m3fn)
            tensors[key + "_scale"] = scale
        else:
            tensors[key] = tensor.to(dtype)
    save_file(tensors, path)
    return tensors


KEPT_DTYPES = {
    "float16 beside it": (torch.float16, [], torch.float16, "F16, as 58 of the 58 float tensors"),
    "bfloat16 beside it": (torch.bfloat16, [], torch.bfloat16, "BF16, as 58 of the 58 float tensors"),
    "float32 beside it": (torch.float32, [], torch.float32, "F32, as 58 of the 58 float tensors"),
    "named": (torch.float16, ["model.dtype=bfloat16"], torch.bfloat16, "BF16, as model.dtype says"),
}


@pytest.mark.parametrize(("beside", "words", "dtype", "reason"), KEPT_DTYPES.values(), ids=KEPT_DTYPES)
def test_fp8_weight_that_stays_float_has_the_dtype_of_its_neighbours(
    beside, words, dtype, reason, tmp_path, tiny, caplog
):
    tensors = write_fp8_source(tmp_path / "fp8.safetensors", tiny, beside)
    with caplog.at_level("INFO"):
        run(
            tmp_path,
            f"model.location={tmp_path / 'fp8.safetensors'}",
            f"save={tmp_path / 'x.safetensors'}",
            *words,
        )

    found = load_file(tmp_path / "x.safetensors")
    stored = tensors["x_embedder.weight"].float() * tensors["x_embedder.weight_scale"]
    assert found["img_in.weight"].dtype == dtype
    assert torch.equal(found["img_in.weight"], stored.to(dtype))
    assert f"14 weights are quantized in the source and kept float: written in {reason}" in caplog.text


def test_a_denoiser_is_quantized_without_what_text_encoders_need(command, monkeypatch):
    """Their libraries take twice the memory of all the rest; a module that is None cannot be imported."""
    monkeypatch.setitem(sys.modules, "int8run.tasks.quantize_text_encoder", None)

    outcome = command("task=quantize", "model=tiny", "save=m.safetensors", NO_TRACKER)

    assert outcome.code == 0, outcome.err
    assert (command.folder / "m.safetensors").is_file()


@pytest.mark.slow
def test_tensors_that_are_one_layer_of_the_model_have_one_transform(tmp_path):
    torch.manual_seed(3)
    model = ovis_image()
    state = {name: value.detach() for name, value in model.state_dict().items()}
    parts_by_key = to_original({name: tuple(value.shape) for name, value in state.items()}, OVIS_IMAGE)
    tensors = {
        key: torch.cat([part.extract(state[part.key]) for part in parts]).contiguous()
        for key, parts in parts_by_key.items()
    }
    tensors["double_blocks.0.img_mlp.up_proj.weight"][:, 0] = 9.0
    save_file(tensors, tmp_path / "x.safetensors")

    where = [f"model.location={tmp_path / 'x.safetensors'}", f"save={tmp_path / 'y.safetensors'}"]
    run(tmp_path, *where, "model.family=null", "outlier=hadanorm", "outlier.group_size=16")

    saved = load_file(tmp_path / "y.safetensors")
    up, gate = (saved[f"double_blocks.0.img_mlp.{name}_proj.pre_quant_scale"] for name in ("up", "gate"))
    assert torch.equal(up, gate)
    assert up[0] != up[1]
    read = FileWeights(tmp_path / "y.safetensors", model)
    layer = read.read_int8_layer("transformer_blocks.0.ff.net.0.proj")
    assert layer.weight.qdata.shape == (512, 64)
