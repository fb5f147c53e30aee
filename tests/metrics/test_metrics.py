"""Numbers that a run reports, against cases whose answer is known."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from int8run.errors import ConfigError
from int8run.generate.generate import Generation
from int8run.layers.plan import ATTENTION, LayerPlan
from int8run.metrics.images import image_to_tensor
from int8run.metrics.key_frames import select_key_frames
from int8run.metrics.layers import (
    compute_int8_shares,
    compute_layer_metrics,
    count_module_bytes,
    measure_layer_outputs,
    note_macs_shares,
)
from int8run.metrics.memory import read_peak_bytes, reset_peak_memory
from int8run.metrics.quality import (
    SampleQuality,
    average_frames,
    average_quality,
    compare_generations,
    compute_relative_error,
    compute_trajectory_error,
)
from int8run.metrics.settings import MetricsSettings
from int8run.metrics.speed import (
    compute_percentile,
    compute_speed,
    limit_first_step,
    list_step_times,
    pair_blocks,
)

SIZE = 32


def make_flat_image(value):
    return Image.new("RGB", (SIZE, SIZE), (value,) * 3)


def make_noise_image(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_generation(*images, latents=None):
    return Generation(
        frames=[[image] for image in images], trajectories=latents or [torch.ones(1, 4)] * len(images)
    )


def make_video_generation(*samples):
    return Generation(
        frames=[list(frames) for frames in samples], trajectories=[torch.ones(1, 4)] * len(samples)
    )


def compare_values(candidate, baseline):
    """The values of each sample."""
    return [row.values for row in compare_generations(candidate, baseline, ["a"] * len(candidate.frames))]


# -- quality -------------------------------------------------------------------------------------------------


def test_identical_images_have_infinite_psnr():
    (row,) = compare_values(make_generation(make_noise_image()), make_generation(make_noise_image()))

    assert row == {"psnr_db": math.inf, "ssim": pytest.approx(1, abs=1e-5), "latent_rel_err": 0}


@pytest.mark.parametrize(("a", "b", "decibel"), [(0, 255, 0.0), (100, 110, 28.13), (0, 1, 48.13)])
def test_the_psnr_of_a_known_difference(a, b, decibel):
    # 20 log10(255 / |a - b|)
    (row,) = compare_values(make_generation(make_flat_image(a)), make_generation(make_flat_image(b)))

    assert (
        row["psnr_db"]
        == pytest.approx(20 * math.log10(255 / abs(a - b)), abs=1e-3)
        == pytest.approx(decibel, abs=5e-3)
    )


def test_the_ssim_of_flat_images():
    # without variance only the luminance term is left: (2 m n + c) / (m^2 + n^2 + c), c = 0.01^2
    (row,) = compare_values(make_generation(make_flat_image(51)), make_generation(make_flat_image(102)))

    assert row["ssim"] == pytest.approx((2 * 0.2 * 0.4 + 1e-4) / (0.2**2 + 0.4**2 + 1e-4), abs=1e-4)


def test_ssim_falls_with_structure_and_not_with_brightness():
    image = make_noise_image()
    brighter = image.point(lambda v: min(255, v + 3))
    (same,), (other,) = (
        compare_values(make_generation(brighter), make_generation(image)),
        compare_values(make_generation(make_noise_image(1)), make_generation(image)),
    )

    assert same["ssim"] > 0.99 and abs(other["ssim"]) < 0.1


def test_qualities_are_in_the_order_of_the_images():
    quality = compare_values(
        make_generation(make_flat_image(0), make_flat_image(0)),
        make_generation(make_flat_image(0), make_flat_image(255)),
    )

    assert [row["psnr_db"] for row in quality] == [math.inf, pytest.approx(0)]


def test_the_latent_error_is_that_of_the_last_step():
    latents = torch.tensor([[1.0, 1.0], [3.0, 4.0]])
    (row,) = compare_values(
        make_generation(make_flat_image(0), latents=[latents + torch.tensor([[9.0, 9.0], [0.0, 0.5]])]),
        make_generation(make_flat_image(0), latents=[latents]),
    )

    assert row["latent_rel_err"] == pytest.approx(0.1)


def test_means_have_their_public_names():
    values = [
        {"psnr_db": 30.0, "ssim": 0.8, "latent_rel_err": 0.1},
        {"psnr_db": 40.0, "ssim": 1.0, "latent_rel_err": 0.3},
    ]

    def mean(*values):
        return average_quality([SampleQuality(v, []) for v in values])

    assert mean(*values) == pytest.approx(
        {"quality/psnr_db": 35, "quality/ssim": 0.9, "quality/latent_rel_err": 0.2}
    )


def test_one_identical_image_does_not_make_all_of_them_equal():
    def mean(*psnrs):
        return average_quality([SampleQuality({"psnr_db": psnr}, []) for psnr in psnrs])["quality/psnr_db"]

    assert mean(math.inf, 30.0, 40.0) == 35
    assert mean(math.inf, math.inf) == math.inf
    assert math.isnan(mean(math.inf, math.nan))


def test_one_identical_frame_does_not_make_a_video_equal():
    float_video = make_video_generation([make_flat_image(100), make_flat_image(100)])
    video = make_video_generation([make_flat_image(100), make_flat_image(110)])

    (row,) = compare_generations(video, float_video, ["a"])

    assert row.frames[0]["psnr_db"] == math.inf
    assert row.values["psnr_db"] == row.frames[1]["psnr_db"] < 40


def test_images_of_any_mode_are_compared_in_rgb():
    assert image_to_tensor(Image.new("L", (4, 2), 255)).shape == (1, 3, 2, 4)
    assert image_to_tensor(Image.new("RGBA", (4, 2), (0, 255, 0, 128)))[0, :, 0, 0].tolist() == [0, 1, 0]


def test_a_missing_image_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        compare_values(
            make_generation(make_flat_image(0), make_flat_image(0)), make_generation(make_flat_image(0))
        )


def test_an_image_is_a_video_of_one_frame():
    (row,) = compare_generations(
        make_generation(make_flat_image(100)), make_generation(make_flat_image(110)), ["a"]
    )

    assert (
        row.frames == [{name: row.values[name] for name in ("psnr_db", "ssim")}]
        and "latent_rel_err" in row.values
    )
    assert (
        make_generation(make_flat_image(0)).is_video,
        make_video_generation([make_flat_image(0)]).is_video,
        make_video_generation([make_flat_image(0)], [make_flat_image(0), make_flat_image(1)]).is_video,
    ) == (False, False, True)


def test_frames_are_compared_one_by_one_and_their_mean_is_the_samples():
    # the differences of each sample, in levels of 255; the first frames differ by the value alone
    differences = [(1, 2, 4), (10, 20, 40)]
    ours = make_video_generation(*([make_flat_image(100 + d) for d in row] for row in differences))
    floats = make_video_generation(*([make_flat_image(100)] * 3 for _ in differences))
    found = compare_generations(ours, floats, ["a", "b"])
    for row, levels in zip(found, differences, strict=True):
        alone = [
            compare_values(make_generation(make_flat_image(100 + d)), make_generation(make_flat_image(100)))[
                0
            ]
            for d in levels
        ]
        assert row.frames == [{name: values[name] for name in ("psnr_db", "ssim")} for values in alone]
        assert row.values["psnr_db"] == pytest.approx(
            np.mean([20 * math.log10(255 / d) for d in levels]), abs=1e-3
        )
        assert row.values["ssim"] == pytest.approx(np.mean([values["ssim"] for values in alone]))
    expected = [np.mean([20 * math.log10(255 / sample[i]) for sample in differences]) for i in range(3)]

    assert average_frames(found, "psnr_db") == pytest.approx(expected, abs=1e-3)
    assert average_quality(found)["quality/psnr_db"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_a_missing_frame_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        compare_generations(
            make_video_generation([make_flat_image(0), make_flat_image(0)]),
            make_video_generation([make_flat_image(0)]),
            ["a"],
        )


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"first": 0}),
        (2, {"first": 0, "last": 1}),
        (3, {"first": 0, "middle": 1, "last": 2}),
        (81, {"first": 0, "middle": 40, "last": 80}),
    ],
    ids=str,
)
def test_key_frames_are_the_first_the_middle_and_the_last(count, expected):
    assert select_key_frames(count) == expected


def test_the_relative_error_of_known_vectors():
    assert compute_relative_error(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])) == pytest.approx(0.1)


def test_trajectory_error_is_the_mean_over_samples_at_each_step():
    base = [torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[1.0], [1.0], [2.0]])]
    ours = [torch.tensor([[1.0], [1.1], [2.4]]), torch.tensor([[1.0], [1.3], [2.0]])]

    assert compute_trajectory_error(
        make_generation(latents=ours), make_generation(latents=base)
    ) == pytest.approx([0, 0.2, 0.1])


def test_a_sample_without_the_first_steps_counts_in_the_last_ones():
    base = [torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[1.0], [2.0]])]
    ours = [torch.tensor([[1.1], [1.1], [2.4]]), torch.tensor([[1.3], [2.0]])]

    assert compute_trajectory_error(
        make_generation(latents=ours), make_generation(latents=base)
    ) == pytest.approx([0.1, 0.2, 0.1])


# -- speed ---------------------------------------------------------------------------------------------------


def make_timed_generation(*batches, image_seconds=(1.0,)):
    return Generation(step_seconds=[list(b) for b in batches], image_seconds=list(image_seconds))


def test_the_first_step_of_a_batch_is_left_out():
    assert list_step_times(make_timed_generation([9.0, 0.1, 0.2], [8.0, 0.3])) == pytest.approx(
        [100, 200, 300]
    )


def test_a_single_step_is_kept():
    assert list_step_times(make_timed_generation([0.5], [0.25])) == pytest.approx([500, 250])


def test_the_speed_of_known_times():
    ours = make_timed_generation([9.0, *(i / 100 for i in range(1, 11))], image_seconds=[0.5, 0.5, 1.0])
    values = compute_speed(ours, make_timed_generation([9.0, 0.1, 0.11, 0.12]))

    assert values == pytest.approx(
        {
            "speed/step_ms_p50": 55,
            "speed/step_ms_p90": 90,
            "speed/images_per_s": 1.5,
            "speed/ratio_vs_float": 110 / 55,
        }
    )


def make_shared_generation(*batches):
    """Each batch is a list of (seconds, denoiser)."""
    return Generation(
        step_seconds=[[seconds for seconds, _ in batch] for batch in batches],
        step_denoisers=[[name for _, name in batch] for batch in batches],
        image_seconds=[1.0],
    )


def test_a_step_of_two_denoisers_takes_the_mean_of_their_medians():
    batch = [(9.0, "float"), (0.4, "float"), (0.1, "int8"), (0.1, "int8"), (0.2, "int8")]
    values = compute_speed(make_shared_generation(batch), make_timed_generation([9.0, 0.5, 0.5]))

    assert values["speed/step_ms_p50"] == pytest.approx((2 * 400 + 3 * 100) / 5)
    assert values["speed/step_ms_p90"] == pytest.approx((2 * 400 + 3 * 200) / 5)
    assert values["speed/ratio_vs_float"] == pytest.approx(500 / 220)


def test_first_steps_alone_are_timed_by_the_float_model_because_they_include_text_encoding():
    batch = [(9.0, "float"), (0.1, "int8"), (0.1, "int8")]

    values = compute_speed(make_shared_generation(batch), make_timed_generation([9.0, 0.4, 0.4]))
    assert values["speed/step_ms_p50"] == pytest.approx((400 + 2 * 100) / 3)
    without_float = compute_speed(make_shared_generation(batch), None)
    assert without_float["speed/step_ms_p50"] == pytest.approx((9000 + 2 * 100) / 3)


def test_stretches_are_those_of_the_denoiser_with_most_steps():
    batch = [(9.0, "float"), (0.8, "float"), (0.1, "int8"), (0.1, "int8"), (0.1, "int8")]
    shared, alone = (
        make_shared_generation(batch, batch),
        make_timed_generation([9, *[0.5] * 4], [9, *[0.5] * 4]),
    )

    assert pair_blocks(shared, alone, 1) == ([100, 100], [500, 500])


def test_with_a_step_cache_the_first_step_counts_as_the_longest_other_one_at_most():
    assert limit_first_step([9.0, 3.0, 1.0]) == [3.0, 3.0, 1.0]
    assert limit_first_step([2.0, 3.0, 1.0]) == [2.0, 3.0, 1.0]
    assert limit_first_step([9.0]) == [9.0]


def test_a_video_counts_once_and_so_does_each_of_its_frames():
    ours = Generation(
        frames=[[make_flat_image(0)] * 5, [make_flat_image(0)] * 5],
        step_seconds=[[1.0]],
        image_seconds=[2.0, 2.0],
    )
    values = compute_speed(ours, None)

    assert values["speed/images_per_s"] == 0.5 and values["speed/frames_per_s"] == 2.5


def test_without_a_baseline_there_is_no_ratio():
    assert set(compute_speed(make_timed_generation([1.0, 2.0]), None)) == {
        "speed/step_ms_p50",
        "speed/step_ms_p90",
        "speed/images_per_s",
    }


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5], 0.9, 5),
        ([4, 1, 3, 2], 0.5, 2),
        (range(1, 11), 0.9, 9),
        (range(1, 12), 0.9, 10),
        (range(1, 31), 0.9, 27),
        ([1, 2], 1.0, 2),
    ],
    ids=["one", "half", "nine of ten", "ten of eleven", "27 of 30", "all"],
)
def test_percentile_is_the_smallest_value_that_the_share_does_not_exceed(values, share, expected):
    assert compute_percentile(list(values), share) == expected


# -- layers and memory ---------------------------------------------------------------------------------------


def make_plan(name, keep_float=None, asked="triton", used="triton", **measured):
    return LayerPlan(
        name, 4, 4, keep_float, "none", backend_asked=asked, backend_used=used, measured=measured
    )


def test_layers_are_counted_and_averaged():
    plans = [
        make_plan("a", weight_sqnr_db=40.0, output_sqnr_db=30.0),
        make_plan("b", weight_sqnr_db=50.0, output_sqnr_db=36.0, used="reference"),
        make_plan("c", keep_float="embedder", asked="", used=""),
        make_plan("d", weight_sqnr_db=1.0),
    ]
    plans[1].backends_left_out = "triton: no C compiler"
    plans[3].float_reason = "slow"
    plans[3].leave_float()

    assert compute_layer_metrics(plans) == pytest.approx(
        {
            "quant/layers_int8": 2,
            "quant/layers_float": 2,
            "quant/fallback_layers": 1,
            "quant/layers_float_by_choice": 1,
            "quant/layers_with_backends_left_out": 1,
            "quant/weight_sqnr_db_mean": 45,
            "quant/weight_sqnr_db_min": 40,
            "quant/output_sqnr_db_mean": 33,
            "quant/output_sqnr_db_min": 30,
        }
    )


def test_a_choice_of_auto_is_not_a_fallback():
    assert compute_layer_metrics([make_plan("a", asked="auto", used="onednn")])["quant/fallback_layers"] == 0


def test_what_was_not_measured_is_not_reported():
    assert set(compute_layer_metrics([make_plan("a", weight_sqnr_db=40.0)])) == {
        "quant/layers_int8",
        "quant/layers_float",
        "quant/fallback_layers",
        "quant/layers_float_by_choice",
        "quant/layers_with_backends_left_out",
        "quant/weight_sqnr_db_mean",
        "quant/weight_sqnr_db_min",
    }


def test_an_unreached_layer_does_not_hide_the_others():
    values = compute_layer_metrics([make_plan("a", output_sqnr_db=30.0), make_plan("b")])

    assert values["quant/output_sqnr_db_mean"] == 30


class Net(nn.Module):
    def __init__(self, error):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.used.weight.copy_(torch.eye(3) * (1 + error))

    def forward(self, x):
        return self.used(x)


def test_outputs_are_compared_on_the_same_input():
    plans = [make_plan("used"), make_plan("unused"), make_plan("kept", keep_float="embedder")]
    measure_layer_outputs(Net(0.0), Net(0.01), [{"x": torch.ones(2, 3)}], plans)

    # 1 % error is 40 dB
    assert plans[0].measured["output_sqnr_db"] == pytest.approx(40, abs=0.01)
    assert plans[1].measured == {} == plans[2].measured, "a layer that does not run is not measured"


def test_the_int8_share_is_that_of_everything_that_was_counted():
    plans = [make_plan("a"), make_plan("b", keep_float="embedder"), make_plan("attention")]
    plans[2].kind = ATTENTION
    note_macs_shares(plans, {"a": 30, "b": 10, "attention": 40, "a convolution without a plan": 20})

    shares = compute_int8_shares(plans, num_params=64)

    assert shares["quant/macs_int8_share"] == pytest.approx(0.7)
    assert shares["quant/params_int8_share"] == 16 / 64, "an attention has no weights"


def test_bytes_count_each_tensor_once():
    module = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(4, 2, bias=False))

    assert count_module_bytes(module) == 2 * 4 * 2 * 4

    module[1].weight = module[0].weight
    module.register_buffer("codes", torch.zeros(5, dtype=torch.int8))
    module.register_buffer("absent", None)

    assert count_module_bytes(module) == 4 * 2 * 4 + 5


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count is in /proc")
def test_the_peak_memory_covers_a_large_allocation():
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    lines = Path("/proc/self/status").read_text().splitlines()
    kernel = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    assert read_peak_bytes(cpu) == pytest.approx(kernel, rel=0.05)


@pytest.mark.parametrize("baseline", ["yes", True], ids=repr)
def test_an_unknown_baseline_is_an_error(baseline):
    with pytest.raises(
        ConfigError, match=rf"metrics\.baseline is {baseline!r}; choose from cached, none, run"
    ):
        MetricsSettings(baseline=baseline)
