"""VAEs in INT8: those of images and of videos, with causal convolutions, beside their float originals."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from support.helpers import randn
from torch import nn

from int8run.backends.reference import Reference
from int8run.errors import ConfigError
from int8run.layers.int8_conv import Int8Conv
from int8run.layers.plan import Int8Settings
from int8run.models.sampling import Sampling
from int8run.pipeline.store_layers import get_vae_folder, save_vae
from int8run.pipeline.vae import count_latent_pixels, decode_latents, quantize_vae
from int8run.pipeline.vae_file import open_vae_file
from int8run.quant.rounding import AbsMax
from int8run.quant.weight import sqnr_db
from int8run.report.console import Progress
from int8run.tasks.vae_metrics import measure_vae

CPU, QUIET = torch.device("cpu"), Progress(enabled=False)
SETTINGS = SimpleNamespace(
    backend=Reference(), rounding=AbsMax(), int8=Int8Settings(small_batch_fallback="never", vae="int8")
)


def build_wan():
    return diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]
    )


def build_qwen():
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True]
    )


def build_ltx():
    return diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False, False, False),
        downsample_type=("conv", "conv"),
        upsample_residual=(False, False),
        upsample_factor=(1, 1),
        timestep_conditioning=False,
        patch_size=1,
        patch_size_t=1,
    )


def build_image():
    return diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )


VAES = {
    "AutoencoderKL": (build_image, (1, 4, 4, 4)),
    "Wan": (build_wan, (1, 4, 2, 4, 4)),
    "Qwen-Image": (build_qwen, (1, 4, 1, 4, 4)),
    "LTX": (build_ltx, (1, 4, 2, 4, 4)),
}


def quantize(vae, file=None):
    loaded = SimpleNamespace(pipe=SimpleNamespace(vae=vae), device=CPU, offload_device=CPU, vae=file)
    return quantize_vae(loaded, SETTINGS, 16, QUIET)


@pytest.mark.parametrize(("build", "shape"), VAES.values(), ids=VAES)
@torch.no_grad()
def test_an_int8_vae_decodes_what_the_float_one_does(build, shape):
    torch.manual_seed(0)
    vae = build().eval()

    made = quantize(vae)

    latents = randn(*shape)
    expected = decode_latents(made.float_vae, latents)
    with made.recording():
        decoded = made.int8_vae.decode(latents, return_dict=False)[0]
    assert sqnr_db(expected, decoded) > 25
    assert torch.equal(made.latents[0], latents)
    # the decoder's own, and not only those around it
    inside = [name for name, module in made.int8_vae.named_modules() if isinstance(module, Int8Conv)]
    assert any(name.startswith("decoder.up_blocks") for name in inside)
    ends = {plan.name.removesuffix(".conv"): plan for plan in made.plans}
    assert ends["decoder.conv_in"].skip_reason == "first convolution of the decoder"
    assert ends["decoder.conv_out"].skip_reason == "last convolution of the decoder"
    assert torch.equal(decode_latents(vae, latents), expected), "the float one is as it was"


@pytest.mark.parametrize(("build", "shape"), [VAES["AutoencoderKL"], VAES["Wan"]], ids=["image", "causal"])
@torch.no_grad()
def test_a_saved_int8_vae_is_read_back_bit_for_bit(build, shape, tmp_path):
    torch.manual_seed(0)
    made = quantize(build().eval())
    kept = {plan.name: plan.skip_reason for plan in made.plans if plan.skip_reason is not None}
    save = tmp_path / "x.safetensors"
    save_vae(str(save), made, {"rounding": "absmax", "kept_float": kept, "layers": {}})

    parts = {"vae": [type(made.float_vae).__name__, get_vae_folder(str(save))]}
    file = open_vae_file(tmp_path, parts, torch.float32, CPU)
    read = quantize(file.module, file)

    assert read.layers.keys() == made.layers.keys() == file.layers.keys()
    for name, layer in made.layers.items():
        assert torch.equal(read.layers[name].read_qdata(), layer.read_qdata()), name
        assert torch.equal(read.layers[name].scale, layer.scale), name
    assert [plan.skip_reason for plan in read.plans] == [plan.skip_reason for plan in made.plans]
    latents = randn(*shape)
    assert torch.equal(decode_latents(read.int8_vae, latents), decode_latents(made.int8_vae, latents))
    # what the pipeline has in float is what the integers stand for
    weight = file.module.get_submodule(name).weight
    assert torch.equal(weight.flatten(1), layer.read_quantized_weight().dequantize())


@torch.no_grad()
def test_what_a_vae_costs_is_measured_in_the_dtype_that_its_pipeline_decodes_in():
    torch.manual_seed(0)
    vae = build_image().eval().half()
    weight = vae.decoder.conv_in.weight.clone()
    made = quantize(vae)
    made.latents.append(randn(1, 4, 4, 4))  # as SDXL hands over, whose VAE overflows in float16
    seen = []
    for model in (made.float_vae, made.int8_vae):
        model.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))

    metrics = measure_vae(made, CPU)

    assert set(seen) == {torch.float32}
    assert metrics["vae/psnr_db"] > 25
    assert metrics["vae/decode_ratio"] > 0
    assert made.float_vae.dtype == made.int8_vae.dtype == torch.float16
    assert torch.equal(vae.decoder.conv_in.weight, weight)


@pytest.mark.parametrize(
    ("pipe", "sampling", "pixels"),
    [
        (SimpleNamespace(vae_scale_factor=16), Sampling(height=64, width=32), 8),
        (SimpleNamespace(), Sampling(height=64, width=32), 32),
        (SimpleNamespace(), Sampling(), 128 * 128),
        (SimpleNamespace(vae_scale_factor=32), Sampling(height=8, width=8), 1),
    ],
    ids=["scale", "no scale", "no size", "tiny"],
)
def test_linears_see_the_pixels_of_the_latents(pipe, sampling, pixels):
    assert count_latent_pixels(pipe, sampling) == pixels


def test_a_vae_that_decoded_nothing_has_neither_quality_nor_time(caplog):
    metrics = measure_vae(quantize(build_image().eval()), CPU)

    assert metrics["vae/memory_ratio"] > 1
    assert not {"vae/psnr_db", "vae/decode_ms"} & set(metrics)
    assert "what int8.vae=int8 costs is not measured" in caplog.messages[-1]


def test_a_pipeline_without_a_vae_is_refused():
    loaded = SimpleNamespace(pipe=SimpleNamespace(), device=CPU, offload_device=CPU, vae=None)

    with pytest.raises(ConfigError, match=r"int8.vae=int8: SimpleNamespace has no VAE to quantize"):
        quantize_vae(loaded, SETTINGS, 16, QUIET)


def test_a_vae_without_a_layer_that_can_be_int8_is_refused():
    with pytest.raises(
        ConfigError, match=r"no layer of Sequential became INT8 \(1 × a transposed convolution\)"
    ):
        quantize(nn.Sequential(nn.ConvTranspose2d(4, 4, 2)))
