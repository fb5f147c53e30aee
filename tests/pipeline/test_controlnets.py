"""ControlNets in INT8: their own layers by data, the denoiser's by its family, and what keeps one float."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    UNet2DConditionModel,
    ZImageControlNetModel,
    ZImageTransformer2DModel,
)
from diffusers.models.controlnets.multicontrolnet import MultiControlNetModel
from support.helpers import CPU, on_int8, randn, to_int8
from support.tiny_unet_pipeline import build_unet
from torch import nn

from int8run.backends.reference import Reference
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.layers.int8_conv import Int8Layer
from int8run.layers.plan import Int8Settings
from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.lora import LoRA
from int8run.models.family import UNKNOWN_FAMILY, ModelFamily, load_families
from int8run.models.loader import place_components
from int8run.models.sampling import Sampling
from int8run.outlier.convrot import ConvRot
from int8run.outlier.none import NoOutlier
from int8run.outlier.smoothquant import SmoothQuant
from int8run.pipeline.checkpoint_weights import DenoiserWeights
from int8run.pipeline.controlnets import list_float_controlnets, quantize_controlnets
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantization_settings import QuantizationSettings
from int8run.pipeline.shared_layers import Int8Denoiser
from int8run.quant.rounding import AbsMax
from int8run.quant.weight import sqnr_db
from int8run.report.console import Progress
from int8run.tasks.controlnet_metrics import measure_controlnets

QUIET = Progress(enabled=False)


def randomize(module: nn.Module) -> nn.Module:
    """Zero projections would hide what a ControlNet computes."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module.eval().requires_grad_(requires_grad=False)


def build_unet_controlnet() -> nn.Module:
    return randomize(ControlNetModel.from_unet(build_unet(), conditioning_embedding_out_channels=(8, 8)))


def build_sdxl_controlnet() -> nn.Module:
    unet = UNet2DConditionModel(
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=32,
        norm_num_groups=4,
        layers_per_block=1,
    )
    return randomize(ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8)))


def build_flux_controlnet() -> nn.Module:
    return randomize(
        FluxControlNetModel(
            in_channels=8,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    )


UNET_CALL = {
    "sample": randn(1, 4, 8, 8),
    "timestep": torch.tensor(1),
    "controlnet_cond": randn(1, 3, 16, 16, seed=1),
    "return_dict": False,
}
CALLS = {
    "sd15": {**UNET_CALL, "encoder_hidden_states": randn(1, 8, 768, seed=2)},
    "sdxl": {
        **UNET_CALL,
        "encoder_hidden_states": randn(1, 8, 32, seed=2),
        "added_cond_kwargs": {"text_embeds": randn(1, 8, seed=3), "time_ids": torch.ones(1, 6)},
    },
    "flux": {
        "hidden_states": randn(1, 16, 8),
        "controlnet_cond": randn(1, 16, 8, seed=1),
        "encoder_hidden_states": randn(1, 8, 16, seed=2),
        "pooled_projections": randn(1, 16, seed=3),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
        "return_dict": False,
    },
}
BUILDERS = {"sd15": build_unet_controlnet, "sdxl": build_sdxl_controlnet, "flux": build_flux_controlnet}
# layers that stay float and why, and one that becomes INT8
ROWS = {
    "sd15": (
        {
            "controlnet_mid_block": "projection into a block of the denoiser",
            "controlnet_cond_embedding.conv_in": "embedder of the control image",
            "time_embedding.linear_1": "time embedder",
            "conv_in": "first convolution",
        },
        "mid_block.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "sdxl": (
        {
            "controlnet_down_blocks.0": "projection into a block of the denoiser",
            "add_embedding.linear_1": "embedder of sizes and pooled text",
        },
        "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    ),
    "flux": (
        {
            "controlnet_blocks.0": "projection into a block of the denoiser",
            "controlnet_single_blocks.0": "projection into a block of the denoiser",
            "controlnet_x_embedder": "embedder of the control image",
            "x_embedder": "input embedder",
        },
        "single_transformer_blocks.0.proj_out",
    ),
}


def load(controlnet: nn.Module, family: str | ModelFamily) -> LoadedModel:
    """A loaded model, of which only what belongs to a ControlNet is asked for."""
    if isinstance(family, str):
        family = load_families()[family]
    pipe = SimpleNamespace(components={"controlnet": controlnet, "vae": nn.Linear(2, 2)})
    return LoadedModel(
        pipe=pipe,
        component="denoiser",
        denoiser=nn.Linear(2, 2),
        scheduler=None,
        family=family,
        sampling=Sampling(),
        device=CPU,
        source=None,
        checkpoint=None,
        encoders={},
    )


def make_settings(outlier=None, quality_db=None, **int8) -> QuantizationSettings:
    return QuantizationSettings(
        outlier=outlier or NoOutlier(),
        rounding=AbsMax(),
        backend=Reference(),
        int8=Int8Settings(small_batch_fallback="never", **int8),
        calibration=CalibrationSettings(prompts=("a",), seed=0, num_timesteps=1),
        quality_db=quality_db,
        dtype=torch.float32,
        needs_calibration=False,
        has_fused_layers=False,
    )


def quantize(controlnet, family, call, settings):
    calls = {"controlnet": [] if call is None else [call]}
    loaded = load(controlnet, family)
    denoiser = Int8Denoiser(loaded.denoiser, [])
    (built,) = quantize_controlnets(
        loaded, calls, settings, denoiser=denoiser, keeps_float=True, progress=QUIET
    )
    return built


def flatten(output):
    """All residuals of a ControlNet as one vector."""
    tensors = []
    for item in output:
        tensors += list(item) if isinstance(item, list | tuple) else [item]
    return torch.cat([tensor.flatten() for tensor in tensors if tensor is not None])


@pytest.mark.parametrize("name", BUILDERS)
def test_blocks_become_int8_and_layers_of_its_own_stay_float(name):
    controlnet = BUILDERS[name]()
    before = flatten(controlnet(**CALLS[name]))
    built = quantize(controlnet, name, CALLS[name], make_settings(ConvRot(), convolutions="int8"))

    rows = {plan.name: plan for plan in built.named_plans}
    reasons, int8_layer = ROWS[name]
    for layer, reason in reasons.items():
        assert rows[f"controlnet.{layer}"].skip_reason == reason, layer
    assert rows[f"controlnet.{int8_layer}"].skip_reason is None
    assert isinstance(built.module.get_submodule(int8_layer), Int8Layer)
    assert sum(plan.macs_share for plan in built.plans) == pytest.approx(1, abs=0.01)
    assert sqnr_db(before, flatten(built.module(**CALLS[name]))) > 25
    # the float model keeps its own
    assert torch.equal(before, flatten(controlnet(**CALLS[name])))


def test_convolutions_have_rows_only_where_they_may_be_int8():
    built = quantize(build_unet_controlnet(), "sd15", CALLS["sd15"], make_settings())
    assert {plan.kind for plan in built.plans} == {"linear"}


@pytest.mark.parametrize(
    ("settings", "call", "reason"),
    [
        (make_settings(controlnet="float"), CALLS["flux"], "int8.controlnet=float"),
        (make_settings(), None, "does not call it"),
        (make_settings(quality_db=40.0), CALLS["flux"], "quality_db"),
        (make_settings(SmoothQuant()), CALLS["flux"], "int8.checkpoint"),
    ],
    ids=["asked", "not called", "quality_db", "no calibration"],
)
def test_controlnet_that_stays_float_has_rows_with_the_reason(settings, call, reason):
    controlnet = build_flux_controlnet()
    built = quantize(controlnet, "flux", call, settings)
    assert built.module is controlnet
    assert built.plans and all(reason in plan.skip_reason for plan in built.plans)
    metrics = measure_controlnets([built], nn.Identity(), with_outputs=True)
    assert metrics["controlnet/layers_int8"] == 0 and metrics["memory/controlnet_ratio"] == 1


def test_rules_count_for_each_controlnet_of_a_list():
    controlnet = MultiControlNetModel([build_unet_controlnet(), build_unet_controlnet()]).eval()
    call = {
        **CALLS["sd15"],
        "controlnet_cond": [CALLS["sd15"]["controlnet_cond"]] * 2,
        "conditioning_scale": [1.0, 0.5],
    }
    built = quantize(controlnet, "sd15", call, make_settings())
    reasons = {plan.name: plan.skip_reason for plan in built.plans}
    assert reasons["nets.1.time_embedding.linear_2"] == "time embedder"
    assert reasons["nets.1.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"] is None


def test_of_an_unknown_denoiser_only_middle_blocks_become_int8():
    family = ModelFamily(name=UNKNOWN_FAMILY)
    controlnet = randomize(
        FluxControlNetModel(
            in_channels=8,
            num_layers=3,
            num_single_layers=0,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 6, 6),
        )
    )
    built = quantize(controlnet, family, CALLS["flux"], make_settings())
    int8 = {plan.name.split(".")[1] for plan in built.plans if plan.skip_reason is None}
    assert int8 == {"1"}


def test_metrics_count_layers_and_memory_and_name_the_worst_output():
    built = quantize(build_flux_controlnet(), "flux", CALLS["flux"], make_settings())
    metrics = measure_controlnets([built], nn.Identity(), with_outputs=True)
    num_int8 = sum(plan.skip_reason is None for plan in built.plans)
    assert metrics["controlnet/layers_int8"] == num_int8 > 0
    assert metrics["controlnet/layers_int8"] + metrics["controlnet/layers_float"] == len(built.plans)
    assert metrics["memory/controlnet_ratio"] > 1.2
    assert 25 < metrics["controlnet/output_sqnr_db_min"] < 60


class Blocks(nn.Module):
    """A layer of its own, and one with a token that a ControlNet may take over, as that of Z-Image does."""

    def __init__(self, *, other: "Blocks | None" = None) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.refiner = nn.Linear(2, 2) if other is None else other.refiner
        self.pad_token = nn.Parameter(torch.ones(2)) if other is None else other.pad_token


def test_what_a_controlnet_takes_of_a_skeleton_is_read_into_both():
    with torch.device("meta"):
        skeleton = Blocks()
    controlnet = Blocks(other=skeleton)
    place_components(
        SimpleNamespace(
            components={"controlnet": controlnet, "transformer": skeleton},
            set_progress_bar_config=lambda **options: None,
        ),
        CPU,
        without=["transformer"],
    )
    loaded = load(controlnet, "flux")
    loaded.denoiser = skeleton
    file = {name: randn(*tensor.shape) for name, tensor in skeleton.state_dict().items()}
    weights = DenoiserWeights({})
    weights.read_tensor, weights.locate = file.__getitem__, lambda name: [SimpleNamespace(path="a file")]
    loaded.checkpoint = weights

    loaded.fill_weights(except_for=["own", "refiner"])

    assert skeleton.own.weight.is_meta, "INT8 layers read it when they are made"
    assert torch.equal(controlnet.refiner.weight, file["refiner.weight"])
    assert controlnet.pad_token is skeleton.pad_token
    assert torch.equal(controlnet.pad_token, file["pad_token"])


SIZES_OF_Z_IMAGE = {"dim": 64, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}


@torch.no_grad()
def test_layers_that_the_denoiser_shares_are_its_int8_layers_with_its_loras():
    torch.manual_seed(0)
    denoiser = randomize(
        ZImageTransformer2DModel(
            in_channels=4,
            n_layers=1,
            cap_feat_dim=16,
            axes_dims=[8, 12, 12],
            axes_lens=[256, 32, 32],
            **SIZES_OF_Z_IMAGE,
        )
    )
    controlnet = randomize(
        ZImageControlNetModel(
            control_layers_places=[0],
            control_refiner_layers_places=[0],
            control_in_dim=4,
            **SIZES_OF_Z_IMAGE,
        )
    )
    ZImageControlNetModel.from_transformer(controlnet, denoiser)
    call = {
        "x": [randn(4, 1, 8, 8)],
        "t": torch.tensor([0.5]),
        "cap_feats": [randn(8, 16, seed=1)],
        "control_context": [randn(4, 1, 8, 8, seed=2)],
    }
    before = flatten(controlnet(**call).values())
    other_layers = [name for name, _ in denoiser.named_modules() if not name.startswith("noise_refiner.")]
    int8, plans = to_int8(denoiser, keep_float=tuple(other_layers))
    loaded = replace(load(controlnet, "z_image"), denoiser=denoiser)
    (built,) = quantize_controlnets(
        loaded,
        {"controlnet": [call]},
        make_settings(),
        denoiser=Int8Denoiser(int8, plans),
        keeps_float=True,
        progress=QUIET,
    )

    shared = "noise_refiner.0.feed_forward.w1"
    rows = {plan.name: plan for plan in built.plans}
    assert built.module.get_submodule(shared) is int8.get_submodule(shared)
    assert isinstance(built.module.get_submodule(shared), Int8Layer)
    assert rows[shared].skip_reason is None and rows[shared].macs_share > 0
    # a LoRA of the denoiser changes both ControlNets alike
    int8_before = flatten(built.module(**call).values())
    assert sqnr_db(before, int8_before) > 25
    layer = denoiser.get_submodule(shared)
    change = LoraChange(LoRA(randn(4, layer.in_features, seed=3), randn(layer.out_features, 4, seed=4)))
    on_int8(denoiser, int8, [{shared: change}]).set_strengths([2.0])
    changed = flatten(controlnet(**call).values()) - before
    int8_changed = flatten(built.module(**call).values()) - int8_before
    assert sqnr_db(changed, int8_changed) > 15


def test_size_of_a_controlnet_is_without_what_the_denoiser_holds():
    denoiser = Blocks()
    loaded = replace(load(Blocks(other=denoiser), "flux"), denoiser=denoiser)
    (built,) = list_float_controlnets(loaded)
    own_bytes = (2 * 2 + 2) * 4  # weight and bias of `own`
    assert built.float_bytes == own_bytes
    assert measure_controlnets([built], denoiser, with_outputs=False)["memory/controlnet_bytes"] == own_bytes
    # beside a denoiser that does not hold them, they are memory of the ControlNet
    whole = measure_controlnets([built], nn.Identity(), with_outputs=False)["memory/controlnet_bytes"]
    assert whole == own_bytes * 2 + 2 * 4
