"""Runs with INT8 convolutions and an INT8 VAE, on a random StableDiffusionPipeline."""

import csv
import shutil

import pytest
import torch
from hydra import compose, initialize_config_module
from safetensors.torch import load_file, save_file
from support.run_job import run_job
from support.tiny_unet_pipeline import build_unet, random_unet_pipeline, save_unet_pipeline

from int8run.backends import float_comparison
from int8run.config.compose import create_run_spec, get_plain_config
from int8run.config.job import Job
from int8run.errors import ConfigError, FileError
from int8run.pipeline import process_cache
from int8run.tasks.inspect_file import inspect_file
from int8run.tasks.quantize_checkpoint import quantize_file

FILE = "diffusion_pytorch_model.safetensors"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(save_unet_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def small(model):
    process_cache.clear()
    return [
        f"model.location={model}",
        "model.dtype=float32",
        "sampler.height=16",
        "sampler.width=16",
        "sampler.steps=2",
        "prompts.prompts=[a]",
        "tracker=none",
        "backend=reference",
        "int8.small_batch_fallback=never",
    ]


def read_rows(path):
    with path.open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def quantize(overrides, folder):
    """The task without a command line."""
    with initialize_config_module("int8run.conf", version_base="1.3"):
        config = compose("config", ["tracker=none", "progress=false", *overrides])
    job = Job(get_plain_config(config), choices={}, overrides=list(overrides), output_dir=folder)
    return quantize_file(create_run_spec(config), job, None)


def test_convolutions_are_int8_and_have_rows(small, tmp_path):
    result = run_job([*small, "int8.convolutions=int8"], tmp_path)

    rows = read_rows(tmp_path / "layers.csv")
    conv = rows["down_blocks.0.resnets.0.conv1"]
    assert (conv["kind"], conv["shape"], conv["quantized"]) == ("conv", "3x3 stride 1", "true")
    assert float(conv["output_sqnr_db"]) > 30 and float(conv["macs_share"]) > 0
    assert rows["conv_in"]["why_not"] == "first convolution"
    assert rows["mid_block.attentions.0.proj_in"]["shape"] == "1x1 stride 1"
    assert result.metrics["quality/psnr_db"] > 30
    # of the multiply-adds of this UNet, first and last convolution and embeddings are what is left
    assert result.metrics["quant/macs_int8_share"] > 0.8


@pytest.mark.slow
def test_without_being_asked_for_nothing_is_new(small, tmp_path):
    result = run_job(small, tmp_path)

    rows = read_rows(tmp_path / "layers.csv")
    assert "conv" not in {row["kind"] for row in rows.values()}
    assert not (tmp_path / "vae.csv").exists()
    assert not [name for name in result.metrics if name.startswith("vae/")]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "convrot"])
def test_a_saved_model_comes_back_bit_for_bit(small, tmp_path, method):
    convolutions = ["int8.convolutions=int8", f"outlier={method}"]
    made = run_job([*small, *convolutions, f"save={tmp_path / 'folder'}"], tmp_path / "a")
    path = tmp_path / "folder" / FILE
    process_cache.clear()

    read = run_job([*small, f"outlier={method}", f"int8.checkpoint={path}"], tmp_path / "b")

    rows = read_rows(tmp_path / "a" / "layers.csv")
    for name, row in read_rows(tmp_path / "b" / "layers.csv").items():
        assert row["outlier"] == rows[name]["outlier"]
    assert all(map(torch.equal, made.candidate.trajectories, read.candidate.trajectories))
    assert read.metrics["quant/layers_int8"] == made.metrics["quant/layers_int8"]


@pytest.mark.slow
def test_a_file_in_the_authors_names_comes_back_bit_for_bit(small, tmp_path):
    made = run_job([*small, "int8.convolutions=int8", f"save={tmp_path / 'x.safetensors'}"], tmp_path / "a")
    kernels = [
        t for t in load_file(tmp_path / "x.safetensors").values() if t.dtype == torch.int8 and t.dim() == 4
    ]
    process_cache.clear()

    read = run_job([*small, f"int8.checkpoint={tmp_path / 'x.safetensors'}"], tmp_path / "b")

    assert kernels
    assert all(map(torch.equal, made.candidate.trajectories, read.candidate.trajectories))


@pytest.mark.slow
def test_convolutions_are_rotated_and_their_rows_name_the_method(small, tmp_path):
    result = run_job([*small, "int8.convolutions=int8", "outlier=convrot"], tmp_path)

    rows = read_rows(tmp_path / "layers.csv")
    conv = rows["down_blocks.0.resnets.0.conv1"]
    assert (conv["outlier"], conv["outlier_why_not"]) == ("convrot group_size=16", "")
    assert float(conv["output_sqnr_db"]) > 30
    assert result.metrics["quality/psnr_db"] > 30


@pytest.mark.slow
def test_auto_chooses_for_each_convolution_by_its_error(small, tmp_path):
    pipe = random_unet_pipeline()
    generator = torch.Generator().manual_seed(0)
    for module in pipe.unet.modules():
        if isinstance(module, torch.nn.GroupNorm):  # channels that differ are what rotations are for
            module.weight.data *= torch.randn(module.num_channels, generator=generator).mul(2).exp()
    pipe.save_pretrained(tmp_path / "model")
    auto = ["outlier=auto", "outlier.max_cost=null", "calibration.prompts=[b]"]
    words = [*small, f"model.location={tmp_path / 'model'}", "int8.convolutions=int8"]

    result = run_job([*words, *auto], tmp_path)

    rows = [row for row in read_rows(tmp_path / "layers.csv").values() if row["kind"] == "conv"]
    chosen = {row["outlier"].split()[0] for row in rows if row["quantized"] == "true"}
    assert chosen == {"none", "convrot"}
    assert {row["outlier_why_not"] for row in rows} == {""}
    assert result.metrics["quality/psnr_db"] > 30


@pytest.mark.slow
def test_convolutions_have_no_method_that_is_for_linears_and_say_so(small, tmp_path):
    run_job([*small, "int8.convolutions=int8", "outlier=smoothquant"], tmp_path)

    rows = read_rows(tmp_path / "layers.csv").values()
    reasons = {row["outlier_why_not"] for row in rows if row["kind"] == "conv" and row["quantized"] == "true"}
    assert reasons == {"outlier=smoothquant is for Linears alone"}
    assert {row["outlier"] for row in rows if row["kind"] == "conv"} == {"none", ""}


def save_locon(path, rank=2):
    """A LoCon on two convolutions of the UNet, in kohya's names."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    unet = build_unet()
    for name in ("down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.proj_in"):
        weight = unet.get_submodule(name).weight
        key = f"lora_unet_{name.replace('.', '_')}"
        down = torch.randn(rank, *weight.shape[1:], generator=generator) * 0.2
        tensors[f"{key}.lora_down.weight"] = down
        tensors[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], rank, 1, 1, generator=generator)
        tensors[f"{key}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "convrot"])
@pytest.mark.parametrize("mode", ["dynamic", "bake", "stochastic", "auto"])
def test_a_locon_reaches_int8_convolutions_by_every_mode(small, tmp_path, mode, method):
    file = save_locon(tmp_path / "locon.safetensors")
    lora = ["lora=file", f"lora.adapters.0.path={file}", "lora.adapters.0.strength=1"]

    convolutions = ["int8.convolutions=int8", f"outlier={method}"]

    result = run_job([*small, *convolutions, *lora, f"lora.mode={mode}"], tmp_path / "out")

    layers = {
        name: result.metrics.get(f"lora/layers_{name}", 0) for name in ("dynamic", "bake", "stochastic")
    }
    if mode == "bake":
        assert sum(layers.values()) == 0, "it is in the weights that are quantized"
    else:
        assert sum(layers.values()) == 2 and layers.get(mode, 2) == 2
    # the float model has the LoCon in its weights: with it left out of INT8, they would be far apart
    assert result.metrics["quality/latent_rel_err"] < 0.05
    rows = read_rows(tmp_path / "out" / "layers.csv")
    named = {name for name, row in rows.items() if row["lora"]}
    assert len(named) == sum(layers.values())
    if mode in ("dynamic", "stochastic"):
        assert {rows[name]["lora"] for name in named} == {mode}


@pytest.mark.slow
def test_the_vae_is_int8_with_a_loss_of_its_own(small, tmp_path):
    result = run_job([*small, "int8.vae=int8"], tmp_path)

    rows = read_rows(tmp_path / "vae.csv")
    assert rows["decoder.conv_in"]["why_not"] == "first convolution of the decoder"
    assert rows["decoder.mid_block.resnets.0.conv1"]["quantized"] == "true"
    assert rows["decoder.mid_block.attentions.0.to_q"]["kind"] == "linear"
    assert 30 < result.metrics["vae/psnr_db"] < 80
    assert result.metrics["vae/decode_ms"] > 0 and result.metrics["vae/layers_float"] == 6
    # the denoisers' latents do not see it
    process_cache.clear()
    without = run_job(small, tmp_path / "without")
    assert all(map(torch.equal, result.candidate.trajectories, without.candidate.trajectories))
    assert all(map(torch.equal, result.baseline.trajectories, without.baseline.trajectories))
    assert [image.tobytes() for image in result.baseline.images] == [
        image.tobytes() for image in without.baseline.images
    ]


@pytest.mark.slow
def test_a_saved_vae_is_that_of_the_run_from_a_part_and_from_a_pipeline(small, model, tmp_path, capsys):
    made = run_job([*small, "int8.vae=int8", f"save={tmp_path / 'x.safetensors'}"], tmp_path / "a")
    vae = tmp_path / "x_vae"
    pipeline = tmp_path / "pipeline"
    shutil.copytree(model, pipeline)
    shutil.rmtree(pipeline / "vae")
    shutil.copytree(vae, pipeline / "vae")

    for place in (f"model.parts.vae=[AutoencoderKL, {vae}]", f"model.location={pipeline}"):
        process_cache.clear()
        read = run_job([*small, place, "int8.vae=int8"], tmp_path / "b")
        images = [image.tobytes() for image in read.candidate.images]
        assert images == [image.tobytes() for image in made.candidate.images], place
        assert read.metrics["vae/layers_int8"] == made.metrics["vae/layers_int8"]
        assert read_rows(tmp_path / "b" / "vae.csv") == read_rows(tmp_path / "a" / "vae.csv")

    rows = dict(inspect_file(str(vae)).rows)
    assert rows["VAE"] == "AutoencoderKL"
    assert rows["tensors"] == "as int8run wrote them, by their hash"
    assert inspect_file(str(vae)).commands == [
        ("to use it", f"int8.vae=int8 'model.parts.vae=[AutoencoderKL, {vae}]'")
    ]


def test_choices_that_do_not_exist_are_refused(small, tmp_path):
    with pytest.raises(ConfigError, match=r"int8.convolutions is 'fast'.*auto, float, int8"):
        run_job([*small, "int8.convolutions=fast"], tmp_path)
    with pytest.raises(ConfigError, match=r"int8.vae is 'auto'.*float, int8"):
        run_job([*small, "int8.vae=auto"], tmp_path)


@pytest.mark.slow
def test_integers_of_a_convolution_that_int8_does_not_have_are_refused(small, tmp_path, monkeypatch):
    path = tmp_path / "folder"
    run_job([*small, "int8.convolutions=int8", f"save={path}"], tmp_path / "a")
    process_cache.clear()
    monkeypatch.setattr(
        "int8run.pipeline.prequantized.find_conv_obstacle",
        lambda module: "a dilated convolution (dilation 2)",
    )

    with pytest.raises(FileError, match="which is a dilated convolution"):
        run_job([*small, f"int8.checkpoint={path}"], tmp_path / "b")


@pytest.mark.slow
def test_auto_leaves_convolutions_float_that_are_faster_so(small, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))  # where what was measured is kept
    # a busy machine may time anything
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    monkeypatch.setattr(
        float_comparison, "time_in_turns", lambda calls, device, rounds: [[1.0] * rounds, [2.0] * rounds]
    )

    run_job([*small, "int8.convolutions=auto"], tmp_path)

    rows = read_rows(tmp_path / "layers.csv").values()
    convolutions = [row for row in rows if row["kind"] == "conv" and row["speedup_vs_float"]]
    assert all(row["quantized"] == "false" for row in convolutions)
    reasons = {row["why_not"] for row in rows if row["kind"] == "conv"}
    assert any("times as fast as reference for [2, 16, 8, 8] here" in reason for reason in reasons)


def test_parts_need_an_int8_model(small, tmp_path):
    for part, described in {"convolutions": "INT8 convolutions", "vae": "an INT8 VAE"}.items():
        message = (
            f"^int8.enable=false and int8.{part}=int8 contradict each other; for {described} alone set "
            "backend=float$"
        )
        with pytest.raises(ConfigError, match=message):
            run_job([*small, f"int8.{part}=int8", "int8.enable=false"], tmp_path)


@pytest.mark.slow
def test_convolutions_and_vae_alone_are_int8_with_float_linears(small, tmp_path):
    parts = ["int8.convolutions=int8", "int8.vae=int8", "backend=float"]

    run_job([*small, *parts], tmp_path)

    for file in ("layers.csv", "vae.csv"):
        rows = read_rows(tmp_path / file).values()
        assert {row["kind"] for row in rows if row["quantized"] == "true"} == {"conv"}
        assert "backend=float" in {row["why_not"] for row in rows if row["kind"] == "linear"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "convrot", "quarot"])
def test_a_checkpoint_is_quantized_from_file_to_file_with_its_convolutions(model, small, tmp_path, method):
    outlier = [f"outlier={method}", *["outlier.group_size=16"] * (method != "none")]
    made = run_job([*small, *outlier, "int8.convolutions=int8", f"save={tmp_path / 'run'}"], tmp_path / "a")
    streamed = tmp_path / "streamed"
    command = [f"model.location={model}/unet", "model_type=sd15", *outlier, "int8.convolutions=int8"]

    quantize(["task=quantize", *command, f"save={streamed}"], tmp_path)

    ours = load_file(tmp_path / "run" / FILE)
    theirs = load_file(streamed / FILE)
    assert ours.keys() == theirs.keys()
    kernels = [name for name, tensor in ours.items() if tensor.dtype == torch.int8 and tensor.dim() == 4]
    assert len(kernels) == sum(
        plan["kind"] == "conv" and plan["quantized"] == "true"
        for plan in read_rows(tmp_path / "a" / "layers.csv").values()
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert made.metrics["quant/layers_int8"] == sum(t.dtype == torch.int8 for t in theirs.values())
