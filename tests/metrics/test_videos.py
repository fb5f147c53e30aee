"""Flicker and drift of videos, beside formulas written with torch alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from int8run.metrics.videos import compare_drift, measure_drift, measure_flicker

SIZE = (10, 6)  # width, height


def make_video(seed, num_frames=4):
    """Frames of noise, away from the ends of the range."""
    pixels = np.random.default_rng(seed).integers(60, 190, (num_frames, SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def add_error(frames, errors):
    """Frames with an error of their own, in levels of 255."""
    shifted = []
    for frame, error in zip(frames, errors, strict=True):
        shifted.append(Image.fromarray((np.asarray(frame).astype(int) + error).astype(np.uint8)))
    return shifted


def to_tensor(frames):
    """[T, H, W, 3] in 0..1, float64."""
    return torch.stack([torch.from_numpy(np.asarray(frame).copy()).double() / 255 for frame in frames])


def test_flicker_is_the_error_of_the_differences_between_neighbours():
    floats = make_video(0)
    noise = np.random.default_rng(1).integers(-9, 10, (4, SIZE[1], SIZE[0], 3))
    frames = add_error(floats, noise)

    found = measure_flicker(frames, floats)

    x, y = to_tensor(frames), to_tensor(floats)
    differences = torch.diff(x, dim=0) - torch.diff(y, dim=0)
    assert found == {
        "flicker_err": pytest.approx(differences.square().mean().sqrt().item()),
        "frame_err": pytest.approx((x - y).square().mean().sqrt().item()),
    }


def test_an_error_that_stands_still_does_not_flicker():
    floats = make_video(0)
    noise = np.random.default_rng(1).integers(-9, 10, (SIZE[1], SIZE[0], 3))

    found = measure_flicker(add_error(floats, [noise] * 4), floats)

    assert found["flicker_err"] == 0 < found["frame_err"]


def test_an_error_that_changes_sign_flickers_twice_as_much_as_it_is_large():
    floats = make_video(0)

    found = measure_flicker(add_error(floats, [5, -5, 5, -5]), floats)

    assert found == {"frame_err": pytest.approx(5 / 255), "flicker_err": pytest.approx(10 / 255)}


def test_identical_videos_have_no_error():
    assert measure_flicker(make_video(0), make_video(0)) == {"flicker_err": 0, "frame_err": 0}


def test_an_image_has_no_flicker():
    assert measure_flicker(make_video(0, 1), make_video(1, 1)) == {}


def test_drift_is_the_distance_of_each_frame_from_the_input():
    start, video = make_video(5, 1)[0], make_video(0)

    found = measure_drift(video, start)

    distances = (to_tensor(video) - to_tensor([start])).square().mean(dim=(1, 2, 3)).sqrt()
    assert found == pytest.approx(distances.tolist())
    assert measure_drift([start, *video], start)[0] == 0


def test_both_models_drift_is_told():
    start = Image.new("RGB", SIZE, (100, 100, 100))
    floats = add_error([start] * 3, [0, 10, 20])
    frames = add_error([start] * 3, [0, 12, 30])

    values, rows = compare_drift(frames, floats, start)

    assert values == {"drift": pytest.approx(14 / 255), "float/drift": pytest.approx(10 / 255)}
    assert [row["drift"] for row in rows] == pytest.approx([0, 12 / 255, 30 / 255])
    assert [row["float/drift"] for row in rows] == pytest.approx([0, 10 / 255, 20 / 255])


def test_an_input_of_another_size_is_resized_to_the_frames():
    large = make_video(3, 1)[0].resize((40, 48))
    start = large.resize(SIZE, Image.Resampling.LANCZOS)

    assert measure_drift([start, start], large) == [0, 0]
    assert math.isfinite(measure_drift(make_video(0), large)[0])
