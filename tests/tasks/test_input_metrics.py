"""What a run measures of edits and videos, and what it says about their masks."""

import logging
import math

import numpy as np
import pytest
import torch
from PIL import Image

from int8run.generate.generate import Generation
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import SampleInputs, read_input_file
from int8run.metrics.quality import SampleQuality, average_frames, average_quality
from int8run.tasks.input_metrics import measure_edits_and_videos

SIZE = (16, 16)


def make_image(seed, size=SIZE):
    """Noise away from the ends of the range."""
    pixels = np.random.default_rng(seed).integers(60, 190, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def lighten(image, levels):
    """An image whose colors are all moved by so many levels."""
    return image.point(lambda value: value + levels)


@pytest.fixture
def make_sample(tmp_path):
    """A function that makes a sample of image files, given as columns."""

    def make(key="000_fox_s0", **images):
        files = {}
        for column, image in images.items():
            path = tmp_path / f"{key}_{column}.png"
            image.save(path)
            files[column] = (read_input_file(path),)
        return Sample("fox", 0, key, inputs=SampleInputs(files))

    return make


def measure(samples, frames, float_frames):
    """The completed qualities of samples that had a PSNR for each frame."""
    known = []
    for sample_frames in frames:
        rows = [{"psnr_db": 30.0} for _ in sample_frames]
        known.append(SampleQuality({"psnr_db": 30.0}, rows))
    latents = [torch.ones(1, 4)] * len(frames)
    candidate, baseline = (Generation(frames=f, trajectories=latents) for f in (frames, float_frames))
    return measure_edits_and_videos(samples, candidate, baseline, known)


def test_an_edit_with_a_mask_has_an_error_on_both_sides(make_sample):
    mask = Image.new("L", SIZE, 0)
    mask.paste(255, (0, 0, 8, 16))
    edit = make_image(1)

    (quality,) = measure([make_sample(image=make_image(0), mask_image=mask)], [[lighten(edit, 5)]], [[edit]])

    psnr = pytest.approx(20 * math.log10(255 / 5))
    assert quality.values == {
        "psnr_db": 30.0,
        "masked_share": 0.5,
        "masked_psnr_db": psnr,
        "unmasked_psnr_db": psnr,
    }


def test_a_mask_that_is_derived_and_one_that_is_resized_are_said(make_sample, caplog):
    mask = Image.new("L", (32, 32), 255)
    samples = [make_sample("a", image=make_image(0)), make_sample("b", image=make_image(0), mask_image=mask)]
    frames = [[make_image(1)], [make_image(1)]]

    with caplog.at_level(logging.INFO):
        measure(samples, frames, frames)

    lines = [record.message for record in caplog.records]
    assert lines == [
        "no mask is given; it is where a color of the float edit differs from its input by more than 10%: a",
        "masks, or the inputs that tell them, are resized to the result: b (32 x 32 to 16 x 16)",
        "the mask has no pixel outside; there is no quality/unmasked_psnr_db: b",
    ]


def test_many_samples_are_one_line(make_sample, caplog):
    samples = [make_sample(f"s{number}", image=make_image(0)) for number in range(5)]
    frames = [[make_image(0)]] * 5

    with caplog.at_level(logging.INFO):
        measure(samples, frames, frames)

    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].endswith(": s0, s1, s2, and 2 more samples")
    assert lines[1].startswith("the mask has no pixel inside; there is no quality/masked_psnr_db")


def test_a_video_that_begins_with_an_image_has_drift_and_flicker(make_sample):
    start = make_image(0)
    float_video = [lighten(start, levels) for levels in (0, 10, 20)]
    video = [lighten(start, levels) for levels in (0, 12, 18)]

    (quality,) = measure([make_sample(image=start)], [video], [float_video])

    assert quality.values == {
        "psnr_db": 30.0,
        "frame_err": pytest.approx(math.sqrt((2**2 + 2**2) / 3) / 255),
        "flicker_err": pytest.approx(math.sqrt((2**2 + 4**2) / 2) / 255),
        "drift": pytest.approx(10 / 255),
        "float/drift": pytest.approx(10 / 255),
    }
    assert [row["drift"] for row in quality.frames] == pytest.approx([0, 12 / 255, 18 / 255])
    assert all("psnr_db" in row for row in quality.frames)


def test_a_video_of_one_frame_is_measured_as_an_image(make_sample):
    (quality,) = measure([make_sample(image=make_image(0))], [[make_image(1)]], [[make_image(1)]])

    assert "masked_share" in quality.values
    assert not {"flicker_err", "drift"} & set(quality.values)


def test_a_prompt_alone_adds_nothing_to_an_image():
    (quality,) = measure([Sample("fox", 0, "k")], [[make_image(0)]], [[make_image(1)]])

    assert quality.values == {"psnr_db": 30.0}


def test_a_video_of_a_prompt_alone_has_flicker_and_no_drift():
    videos = [[make_image(0), make_image(1)]], [[make_image(2), make_image(3)]]

    (quality,) = measure([Sample("fox", 0, "k")], *videos)

    assert set(quality.values) == {"psnr_db", "frame_err", "flicker_err"}


def test_means_are_over_the_samples_that_have_a_metric(make_sample):
    start = make_image(0)
    video = [start, lighten(start, 10)]
    samples = [make_sample("a", image=start), Sample("fox", 0, "b")]

    found = measure(samples, [video, video], [video, video])

    means = average_quality(found)
    assert means["quality/drift"] == found[0].values["drift"]
    assert means["quality/flicker_err"] == 0
    assert average_frames(found, "drift") == pytest.approx([0, 10 / 255])
    assert not any(math.isnan(value) for value in means.values())


def test_an_input_that_is_a_video_is_compared_frame_by_frame(tmp_path):
    frames = [make_image(0), make_image(1)]
    path = tmp_path / "in.png"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=100)
    sample = Sample("fox", 0, "k", inputs=SampleInputs({"video": (read_input_file(path),)}))
    edit = [frames[0], lighten(frames[1], 60)]

    (quality,) = measure([sample], [edit], [edit])

    assert quality.values["masked_share"] == 0.5, "the second frame alone is changed"
    assert quality.values["masked_psnr_db"] == quality.values["unmasked_psnr_db"] == math.inf
    assert "drift" not in quality.values
