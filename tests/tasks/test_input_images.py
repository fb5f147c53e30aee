"""What is shown of the inputs of a sample, beside its result."""

import numpy as np
import pytest
from PIL import Image

from int8run.generate.sample_inputs import SampleInputs, read_input_file
from int8run.tasks.input_images import open_first_frame, open_input_images


def make_image(seed, size=(32, 16)):
    """Noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def make_inputs(tmp_path):
    """A function that saves images or videos, and makes inputs of columns with them."""

    def make(**columns):
        files = {}
        for column, contents in columns.items():
            files[column] = []
            for number, content in enumerate(contents):
                path = tmp_path / f"{column}_{number}.png"
                frames = content if isinstance(content, list) else [content]
                frames[0].save(path, save_all=len(frames) > 1, append_images=frames[1:])
                files[column].append(read_input_file(path))
        return SampleInputs({column: tuple(found) for column, found in files.items()})

    return make


def test_the_edited_image_and_its_mask_are_as_large_as_the_result(make_inputs):
    inputs = make_inputs(image=[make_image(0)], mask_image=[Image.new("L", (32, 16), 255)])

    shown = open_input_images(inputs, [Image.new("RGB", (24, 24))])

    assert [one.column for one in shown] == ["image", "mask_image"]
    assert [one.images[0].size for one in shown] == [(24, 24), (24, 24)]


def test_further_inputs_keep_their_shape(make_inputs):
    inputs = make_inputs(image=[make_image(0), make_image(1)], reference_images=[make_image(2)])

    shown = open_input_images(inputs, [Image.new("RGB", (24, 24))])

    assert [one.images[0].size for one in shown] == [(24, 24), (24, 12), (24, 12)]


def test_a_video_shows_its_frames_at_the_key_frames_of_the_result(make_inputs):
    frames = [make_image(seed, (24, 24)) for seed in range(4)]
    inputs = make_inputs(video=[frames])

    (shown,) = open_input_images(inputs, [Image.new("RGB", (24, 24))] * 9)

    # the result's are 0, 4 and 8; a shorter video has its last frame there
    assert [image.tobytes() for image in shown.images] == [frames[n].tobytes() for n in (0, 3, 3)]
    names = shown.name_files()
    assert [name.rpartition("_")[2] for name in names] == ["first.png", "middle.png", "last.png"]


def test_equal_inputs_of_several_samples_are_saved_once(make_inputs, tmp_path):
    inputs = make_inputs(image=[make_image(0)])
    folder = tmp_path / "images"
    folder.mkdir()

    names = [open_input_images(inputs, [Image.new("RGB", (24, 24))])[0].save(folder) for _ in range(2)]

    assert names[0] == names[1]
    assert [path.name for path in folder.iterdir()] == names[0]
    (other,) = open_input_images(inputs, [Image.new("RGB", (48, 24))])
    assert other.save(folder) != names[0], "of a result with another size"


def test_a_video_begins_with_its_image_unless_another_video_drives_it(make_inputs):
    image = make_image(0)

    first = open_first_frame(make_inputs(image=[image]), num_frames=5)

    assert first.tobytes() == image.tobytes()
    assert open_first_frame(make_inputs(image=[image]), num_frames=1) is None
    driven = make_inputs(image=[image], pose_video=[[image, make_image(1)]])
    assert open_first_frame(driven, num_frames=5) is None
    assert open_first_frame(make_inputs(reference_images=[image]), num_frames=5) is None
