"""INT8's error inside and outside the mask of an edit, beside formulas written with torch alone."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from int8run.metrics.edits import (
    CHANGE_THRESHOLD,
    EditSource,
    find_changed_pixels,
    measure_regions,
    read_mask,
)

SIZE = (12, 8)  # width, height


def make_image(seed=0, size=SIZE):
    """An image of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_mask(box, size=SIZE):
    """A mask that is white inside a box."""
    mask = Image.new("L", size, 0)
    mask.paste(255, box)
    return mask


def shift_colors(image, amount, box):
    """The image with all colors inside a box moved by an amount, which may wrap nowhere."""
    pixels = np.asarray(image).astype(int)
    left, top, right, bottom = box
    region = pixels[top:bottom, left:right]
    pixels[top:bottom, left:right] = np.where(region + amount <= 255, region + amount, region - amount)
    return Image.fromarray(pixels.astype(np.uint8))


def compute_expected_psnr(image, float_image, mask):
    """20 log10(1 / rmse) of the colors where the mask is white."""
    x, y = (torch.from_numpy(np.asarray(i).copy()).double() / 255 for i in (image, float_image))
    inside = torch.from_numpy(np.asarray(mask).copy()) > 127
    error = torch.sqrt(torch.mean((x[inside] - y[inside]) ** 2))
    return 20 * math.log10(1 / error.item())


def test_the_error_is_told_apart_inside_and_outside_a_given_mask():
    float_image, box = make_image(), (2, 1, 9, 6)
    noisy = shift_colors(shift_colors(float_image, 3, (0, 0, *SIZE)), 20, box)
    mask = make_mask(box)

    found = measure_regions([noisy], [float_image], EditSource(masks=[mask]))

    outside = mask.point(lambda value: 255 - value)
    assert found == {
        "masked_psnr_db": pytest.approx(compute_expected_psnr(noisy, float_image, mask)),
        "unmasked_psnr_db": pytest.approx(compute_expected_psnr(noisy, float_image, outside)),
        "masked_share": pytest.approx(7 * 5 / (12 * 8)),
    }
    assert found["masked_psnr_db"] < found["unmasked_psnr_db"] - 10


def test_a_known_difference_has_a_known_psnr():
    mask = make_mask((0, 0, 6, 8))
    gray, lighter = Image.new("RGB", SIZE, (100, 100, 100)), Image.new("RGB", SIZE, (110, 110, 110))

    found = measure_regions([lighter], [gray], EditSource(masks=[mask]))

    assert found["masked_psnr_db"] == found["unmasked_psnr_db"] == pytest.approx(20 * math.log10(25.5))


def test_identical_parts_have_an_infinite_psnr():
    float_image, box = make_image(), (2, 1, 9, 6)
    noisy = shift_colors(float_image, 20, box)

    found = measure_regions([noisy], [float_image], EditSource(masks=[make_mask(box)]))

    assert found["unmasked_psnr_db"] == math.inf
    assert found["masked_psnr_db"] == pytest.approx(20 * math.log10(255 / 20))


@pytest.mark.parametrize(
    ("box", "missing", "share"),
    [((0, 0, 0, 0), "masked_psnr_db", 0.0), ((0, 0, *SIZE), "unmasked_psnr_db", 1.0)],
    ids=["empty", "full"],
)
def test_a_side_of_the_mask_without_pixels_has_no_number(box, missing, share):
    images = [shift_colors(make_image(), 5, (0, 0, *SIZE))], [make_image()]

    found = measure_regions(*images, EditSource(masks=[make_mask(box)]))

    assert missing not in found
    assert found["masked_share"] == share
    assert not any(math.isnan(value) for value in found.values())


def test_without_a_mask_it_is_where_the_float_edit_differs_from_its_input():
    image, changed, box = make_image(), (4, 2, 10, 7), (0, 0, *SIZE)
    float_edit = shift_colors(image, 60, changed)
    int8_edit = shift_colors(float_edit, 4, box)

    derived = measure_regions([int8_edit], [float_edit], EditSource(images=[image]))
    given = measure_regions([int8_edit], [float_edit], EditSource(masks=[make_mask(changed)]))

    assert derived == given


def test_a_given_mask_goes_before_a_derived_one():
    image, float_edit, mask = make_image(), make_image(1), make_mask((0, 0, 3, 3))

    found = measure_regions([make_image(2)], [float_edit], EditSource(images=[image], masks=[mask]))

    assert found["masked_share"] == 9 / 96


def test_one_color_above_the_threshold_makes_a_pixel_changed():
    below = math.floor(CHANGE_THRESHOLD * 255)
    image = Image.new("RGB", (3, 1), (100, 100, 100))
    edit = image.copy()
    edit.putpixel((0, 0), (100 + below, 100 - below, 100))
    edit.putpixel((1, 0), (100, 100, 100 - below - 1))

    assert find_changed_pixels(edit, image).tolist() == [[False, True, False]]


def test_an_unchanged_edit_has_no_changed_part():
    image = make_image()

    found = measure_regions([image], [image], EditSource(images=[image]))

    assert found == {"masked_share": 0, "unmasked_psnr_db": math.inf}


def test_inputs_of_another_size_are_resized_as_diffusers_does():
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(
        vae_scale_factor=1, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )
    mask = make_mask((7, 3, 29, 20), (37, 23))

    expected = processor.preprocess(mask, height=SIZE[1], width=SIZE[0])

    assert read_mask(mask, SIZE).tolist() == expected[0, 0].bool().tolist()
    large = make_image(size=(64, 48))
    resized = VaeImageProcessor(vae_scale_factor=1).resize(large, SIZE[1], SIZE[0])
    assert not find_changed_pixels(resized, large).any()


@pytest.mark.parametrize(("gray", "is_inside"), [(0, False), (127, False), (128, True), (255, True)])
def test_a_gray_mask_is_cut_at_half(gray, is_inside):
    assert read_mask(Image.new("L", (2, 2), gray), (2, 2)).tolist() == [[is_inside] * 2] * 2


def test_one_mask_holds_for_all_frames_of_a_video_and_their_errors_are_one():
    box, float_frames = (2, 1, 9, 6), [make_image(seed) for seed in range(3)]
    # levels by which the frames differ inside the mask; one frame is exact
    levels = (0, 6, 12)
    frames = [shift_colors(frame, level, box) for frame, level in zip(float_frames, levels, strict=True)]

    found = measure_regions(frames, float_frames, EditSource(masks=[make_mask(box)]))

    mean_square = np.mean(np.square(levels))
    assert found["masked_psnr_db"] == pytest.approx(10 * math.log10(255**2 / mean_square))
    assert found["unmasked_psnr_db"] == math.inf


def test_a_mask_for_each_frame_holds_for_that_frame():
    float_frames = [make_image(0), make_image(1)]
    boxes = [(0, 0, 6, 8), (6, 0, 12, 8)]
    frames = [shift_colors(frame, 9, box) for frame, box in zip(float_frames, boxes, strict=True)]

    found = measure_regions(frames, float_frames, EditSource(masks=[make_mask(box) for box in boxes]))

    assert found == {
        "masked_share": 0.5,
        "masked_psnr_db": pytest.approx(20 * math.log10(255 / 9)),
        "unmasked_psnr_db": math.inf,
    }


def test_the_frames_of_a_shorter_input_video_tell_the_masks_that_they_can():
    float_frames = [make_image(seed) for seed in range(3)]
    frames = [*float_frames[:2], make_image(9)]

    found = measure_regions(frames, float_frames, EditSource(images=float_frames[:2]))

    assert found == {"masked_share": 0, "unmasked_psnr_db": math.inf}


def test_a_sample_without_inputs_has_no_regions():
    assert measure_regions([make_image()], [make_image()], EditSource()) == {}
