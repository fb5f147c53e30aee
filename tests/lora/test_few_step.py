"""Few-step presets: what the table says, which files give one away, and what contradicts one."""

import inspect
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
from support.parameter_ids import name_parameter

from int8run.errors import ConfigError
from int8run.lora.base_model import load_table as base_table
from int8run.lora.few_step import (
    FewStepPreset,
    detect_preset,
    get_preset,
    is_for_training_only,
    list_presets,
    load_table,
    parse_steps_in_name,
    warn_about_distilled_model,
)
from int8run.lora.few_step_differences import list_differences
from int8run.models.sampling import Sampling

ROWS = [(name, base) for name, entry in load_table()["presets"].items() for base in entry["bases"]]
# one pipeline of diffusers for each base, where `extra` must be understood
PIPELINES = {
    "sd15": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "flux2_dev": "Flux2Pipeline",
    "qwen_image": "QwenImagePipeline",
    "qwen_image_21": "QwenImage21Pipeline",
    "ltx2": "LTX2Pipeline",
}
MADE_UP = dict(name="fast", base="tiny", steps=4, scheduler="LCMScheduler", source="community")


# -- the table -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "base"), ROWS)
def test_every_row_runs_in_diffusers(name, base):
    row = get_preset(name, base)
    scheduler = getattr(diffusers, row.scheduler)

    known = inspect.signature(scheduler.__init__).parameters

    assert set(row.scheduler_settings) <= set(known)

    scheduler(**row.scheduler_settings)

    if row.extra:
        assert set(row.extra) <= set(
            inspect.signature(getattr(diffusers, PIPELINES[base]).__call__).parameters
        )
    assert row.sampling == Sampling(
        row.steps,
        row.guidance,
        scheduler=row.scheduler,
        scheduler_settings=row.scheduler_settings,
        extra=row.extra,
    )


@pytest.mark.parametrize(("name", "base"), ROWS)
def test_every_number_of_steps_of_a_row_is_accepted(name, base):
    low, high = get_preset(name, base).steps_range

    for steps in range(low, high + 1):
        assert get_preset(name, base, steps).steps == steps


def test_every_base_is_in_the_base_table():
    assert {base for _, base in ROWS} - set(base_table()["bases"]) == {
        "flux_depth"
    }  # FLUX.1 with a depth image at its input


def test_table_has_only_known_fields():
    fields = set(inspect.signature(FewStepPreset).parameters) - {"name", "base"}
    for name, base in ROWS:
        row = load_table()["presets"][name]["bases"][base]
        assert set(row) <= fields | {"by_steps"} and all(
            set(changed) <= fields for changed in row.get("by_steps", {}).values()
        )


def test_presets_match_their_model_cards():
    lcm = get_preset("lcm", "sdxl")

    assert (lcm.steps, lcm.guidance, lcm.scheduler, lcm.strength, lcm.companions) == (
        4,
        1.0,
        "LCMScheduler",
        1.0,
        0.45,
    )

    hyper = get_preset("hyper_flux", "flux")

    assert (hyper.strength, hyper.guidance, hyper.scheduler) == (
        0.125,
        3.5,
        "FlowMatchEulerDiscreteScheduler",
    )
    assert get_preset("dmd2", "sdxl").extra == {"timesteps": [999, 749, 499, 249]}
    assert get_preset("lightning", "sdxl").scheduler_settings == {"timestep_spacing": "trailing"}
    assert (
        get_preset("lcm", "tiny").steps == 4
        and get_preset("lcm", "tiny").strength == 0.5
        and get_preset("lcm", "tiny", 1).strength == 1.0
    )


def test_steps_of_the_file_replace_those_of_the_preset():
    hyper = get_preset("hyper_sd_cfg", "sd3", 16)

    assert (hyper.steps, hyper.steps_range, hyper.guidance, hyper.guidance_range) == (
        16,
        (16, 16),
        7.0,
        (7.0, 7.0),
    )
    assert get_preset("hyper_sd_cfg", "sd3").guidance == 5.0
    assert get_preset("lightning", "sdxl", 8).steps_range == (8, 8)
    assert get_preset("lightning", "sdxl", 30) == get_preset("lightning", "sdxl"), (
        "its name means something else"
    )
    assert get_preset("pcm_normalcfg", "sdxl", 4).guidance_range == [2.5, 3.5]


# -- errors --------------------------------------------------------------------------------------------------


def test_unknown_preset_is_rejected():
    with pytest.raises(
        ConfigError, match=r"few_step is 'lcn'; did you mean 'lcm'\? choose from .*hyper_flux.*turbo_alpha"
    ):
        get_preset("lcn", "sdxl")


def test_base_without_the_preset_is_rejected():
    with pytest.raises(
        ConfigError,
        match=r"'dmd2' is not made for 'flux'; it is for sdxl\. Presets for 'flux': hyper_flux, turbo_alpha",
    ):
        get_preset("dmd2", "flux")
    with pytest.raises(ConfigError, match=r"it is for sdxl\. Presets for 'mine': none"):
        get_preset("dmd2", "mine")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (dict(steps=0), "steps of few-step preset 'fast' for 'tiny' is 0; allowed is a whole number from 1"),
        (dict(strength=30), "strength of few-step preset 'fast' for 'tiny' is 30; allowed"),
        (dict(source="hearsay"), "source of .* is 'hearsay'; choose from community, measured, model card"),
        (
            dict(steps_range=(5, 8)),
            r"has steps_range \[5, 8\] and steps 4; a range is \[lowest, highest\] around it",
        ),
        (dict(guidance=3.0, guidance_range=(0, 2)), r"has guidance_range \[0, 2\] and guidance 3.0"),
        (dict(guidance_range=(0, 2)), "has a guidance_range and no guidance; give both or none"),
        (dict(scheduler="euler"), "has scheduler 'euler'; give a class of diffusers, such as LCMScheduler"),
        (dict(companions=-1), "companions of .* is -1; allowed"),
        (dict(extra={"sigmas": [1.0, 0.5]}), "has 2 sigmas for 4 steps; give one for each"),
        (dict(extra={"timesteps": [999]}), "has 1 timesteps for 4 steps"),
    ],
)
def test_malformed_row_is_rejected(wrong, words):
    with pytest.raises(ConfigError, match=words):
        FewStepPreset(**MADE_UP | wrong)


def test_ranges_default_to_the_recommended_value():
    row = FewStepPreset(**MADE_UP, guidance=1.5)

    assert row.steps_range == (4, 4) and row.guidance_range == (1.5, 1.5)
    assert FewStepPreset(**MADE_UP).guidance_range is None


# -- recognizing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("lcm-lora-sdv1-5.safetensors", "lcm"),
        ("models--latent-consistency--lcm-lora-sdxl/snapshots/0a1/pytorch_lora_weights.safetensors", "lcm"),
        ("AnimateLCM_sd15_t2v_lora.safetensors", "animatelcm"),
        ("models--h1t--TCD-SDXL-LoRA/snapshots/0a1/pytorch_lora_weights.safetensors", "tcd"),
        ("Hyper-SD15-4steps-lora.safetensors", "hyper_sd"),
        ("Hyper-SDXL-1step-lora.safetensors", "hyper_sd_unified"),
        ("Hyper-SDXL-8steps-CFG-lora.safetensors", "hyper_sd_cfg"),
        ("Hyper-SD3-16steps-CFG-lora.safetensors", "hyper_sd_cfg"),
        ("Hyper-FLUX.1-dev-8steps-lora.safetensors", "hyper_flux"),
        ("FLUX.1-Turbo-Alpha.safetensors", "turbo_alpha"),
        (
            "models--alimama-creative--FLUX.1-Turbo-Alpha/snapshots/0a1/diffusion_pytorch_model.safetensors",
            "turbo_alpha",
        ),
        ("models--fal--FLUX.2-dev-Turbo/snapshots/0a1/flux.2-turbo-lora.safetensors", "flux2_turbo"),
        ("sdxl_lightning_4step_lora.safetensors", "lightning"),
        ("dmd2_sdxl_4step_lora_fp16.safetensors", "dmd2"),
        ("pcm_sd15_smallcfg_4step_converted.safetensors", "pcm"),
        ("pcm_sdxl_normalcfg_8step_converted.safetensors", "pcm_normalcfg"),
        ("pcm_sdxl_lcmlike_lora_converted.safetensors", "lcm"),
        ("Qwen-Image-Lightning-8steps-V1.0.safetensors", "qwen_lightning"),
        ("Qwen-Image-Edit-2509-Lightning-4steps-V1.0-bf16.safetensors", "qwen_lightning"),
        ("Wan21_T2V_14B_lightx2v_cfg_step_distill_lora_rank32.safetensors", "lightx2v"),
        ("Wan2.2-Lightning_I2V-A14B-4steps-lora_HIGH_fp16.safetensors", "lightx2v"),
        ("models--lightx2v--Wan2.2-Lightning/snapshots/0a1/high_noise_model.safetensors", "lightx2v"),
        ("lora_sd3.5m_turbo_8steps.safetensors", "sd35_turbo"),
        ("TensorArt_TurboX_sd3.5L_8steps.safetensors", "turbox"),
        ("Z-Image-Distill-lora.safetensors", "z_image_distill"),
        ("ltx-2-19b-distilled-lora-384.safetensors", "ltx2_distilled"),
    ],
)
def test_preset_is_detected_from_the_file_name(file, name):
    assert detect_preset(Path("/loras") / file, {}) == name


@pytest.mark.parametrize(
    "file",
    [
        "hyperrealistic_sdxl_v2.safetensors",
        "Hyper-Realistic-FLUX-style.safetensors",
        "hyper_detail_flux-step00001000.safetensors",  # how far the training was
        "turbopants.safetensors",
        "porsche_911_turbo_flux.safetensors",
        "lightning_bolts_sdxl.safetensors",
        "lightning_strike-step00000400.safetensors",
        "lcmorris_portrait.safetensors",
        "wan_moonlight.safetensors",
        "distilled_whisky.safetensors",
        "dmdx.safetensors",
        "tcdragon.safetensors",
        "8steps_to_heaven.safetensors",
        "my_style.safetensors",
    ],
)
def test_similar_names_are_not_detected(file):
    assert detect_preset(Path("/loras/turbo alpha lcm") / file, {}) is None, "nor does a folder count"


def test_preset_is_detected_from_title_and_hint():
    assert detect_preset(Path("x.safetensors"), {"modelspec.title": "LCM for SDXL"}) == "lcm"
    assert detect_preset(Path("x.safetensors"), {"modelspec.usage_hint": "use as TCD, eta 0.3"}) == "tcd"
    assert detect_preset(Path("x.safetensors"), {"ss_output_name": "Hyper-FLUX.1-dev-8steps"}) == "hyper_flux"
    assert detect_preset(Path("hyper.safetensors"), {"modelspec.title": "8 steps to heaven"}) is None, (
        "all words in one text"
    )
    assert detect_preset(Path("x.safetensors"), {"modelspec.title": "x" * 1000 + " lcm"}) is None, (
        "only the start is read"
    )


def test_detection_may_be_limited_to_a_base():
    path = Path("pcm_sd15_lightning_4step.safetensors")

    assert (
        detect_preset(path, {}) == "lightning"
        and detect_preset(path, {}, "sd15") == "pcm"
        and detect_preset(path, {}, "flux") is None
    )


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("Hyper-SDXL-8steps-lora", 8),
        ("sdxl_lightning_4step_lora", 4),
        ("x-16-steps", 16),
        ("fast 2 step", 2),
        ("style-step00001000", None),
        ("style_1000steps", None),
        ("4stepped", None),
        ("a8steps", None),
        ("style", None),
    ],
)
def test_steps_are_parsed_from_the_name(name, steps):
    assert parse_steps_in_name(Path(f"{name}.safetensors")) == steps


def test_training_adapters_are_detected():
    assert is_for_training_only(Path("zimage_turbo_training_adapter_v2.safetensors"), {})
    assert not is_for_training_only(Path("training_day.safetensors"), {})


@pytest.mark.parametrize(
    "model",
    [
        "black-forest-labs/FLUX.1-schnell",
        "Tongyi-MAI/Z-Image-Turbo",
        "stabilityai/sdxl-turbo",
        "black-forest-labs/FLUX.2-klein-4B",
    ],
)
def test_distilled_model_is_a_warning(model):
    assert warn_about_distilled_model("turbo_alpha", model) == (
        f"{model} is made for few steps already; a few-step LoRA (turbo_alpha) on top of it "
        f"overcooks the image"
    )


@pytest.mark.parametrize(
    "model",
    ["black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.2-klein-base-4B", "shipped:tiny", "/turbo/mine"],
)
def test_other_models_are_no_warning(model):
    assert warn_about_distilled_model("turbo_alpha", model) is None


# -- advice --------------------------------------------------------------------------------------------------


def test_matching_settings_have_no_differences():
    for name, base in ROWS:
        row = get_preset(name, base)
        assert (
            list_differences(
                row, row.sampling, scheduler=row.scheduler, strength=row.strength, companions={"style": 0.4}
            )
            == []
        )

    assert list_differences(get_preset("lcm", "sdxl"), Sampling()) == [], "what is not known is not judged"


LCM = get_preset("lcm", "sdxl")
GOOD = LCM.sampling


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (dict(steps=28), "sampler.steps is 28; lcm on sdxl is made for 4 (2 to 8)"),
        (dict(steps=1), "sampler.steps is 1; lcm on sdxl is made for 4 (2 to 8)"),
        (dict(guidance=7.5), "sampler.guidance is 7.5; lcm on sdxl is made for 1 (0 to 2)"),
        (
            dict(scheduler="EulerDiscreteScheduler"),
            "the scheduler is EulerDiscreteScheduler; lcm on sdxl is made for LCMScheduler",
        ),
    ],
    ids=name_parameter,
)
def test_contradicting_setting_is_listed(change, line):
    assert list_differences(LCM, replace(GOOD, **change)) == [line]


@pytest.mark.parametrize(
    "change", [dict(steps=2), dict(steps=8), dict(guidance=0.0), dict(guidance=2.0)], ids=str
)
def test_ends_of_a_range_are_accepted(change):
    assert list_differences(LCM, replace(GOOD, **change)) == []


def test_scheduler_in_use_is_compared():
    assert list_differences(LCM, Sampling(), scheduler="DDIMScheduler") == [
        "the scheduler is DDIMScheduler; lcm on sdxl is made for LCMScheduler"
    ]

    hyper = get_preset("hyper_sd", "sdxl")

    assert list_differences(hyper, Sampling(), scheduler="LCMScheduler") == [
        "the scheduler is LCMScheduler; hyper_sd on sdxl is made for DDIMScheduler with "
        "timestep_spacing=trailing"
    ]

    leading = {"timestep_spacing": "leading"}
    line = "the scheduler's timestep_spacing is leading; hyper_sd on sdxl is made for trailing"

    assert list_differences(hyper, Sampling(), scheduler="DDIMScheduler", scheduler_config=leading) == [line]
    assert list_differences(hyper, Sampling(scheduler="DDIMScheduler", scheduler_settings=leading)) == [line]


def test_contradicting_strength_is_listed():
    assert list_differences(LCM, GOOD, strength=0.5) == ["its strength is 0.5; lcm on sdxl is made for 1"]
    assert list_differences(get_preset("hyper_flux", "flux"), Sampling(), strength=1.0) == [
        "its strength is 1; hyper_flux on flux is made for 0.125"
    ]
    assert list_differences(get_preset("hyper_flux", "flux"), Sampling(), strength=0.13) == []


def test_strong_companions_are_listed():
    assert list_differences(LCM, GOOD, companions={"ink": 0.8, "gloss": 0.45, "less": -0.6}) == [
        "LoRA 'ink' has strength 0.8; beside lcm at most 0.45 is advised",
        "LoRA 'less' has strength -0.6; beside lcm at most 0.45 is advised",
    ]
    assert (
        list_differences(
            get_preset("tcd", "sdxl"), get_preset("tcd", "sdxl").sampling, companions={"ink": 1.0}
        )
        == []
    )


def test_extra_arguments_are_compared():
    dmd2 = get_preset("dmd2", "sdxl")

    assert list_differences(dmd2, replace(dmd2.sampling, extra={"timesteps": [1, 2, 3, 4]})) == [
        "sampler.extra.timesteps is [1, 2, 3, 4]; dmd2 on sdxl is made for [999, 749, 499, 249]"
    ]
    assert list_differences(dmd2, replace(dmd2.sampling, extra={})) == [
        "sampler.extra.timesteps is not set; dmd2 on sdxl is made for [999, 749, 499, 249]"
    ]


def test_presets_are_listed():
    assert {
        "lcm",
        "tcd",
        "hyper_sd",
        "hyper_flux",
        "turbo_alpha",
        "lightning",
        "dmd2",
        "pcm",
        "lightx2v",
    } <= set(list_presets())
