"""What size a pipeline makes of its inputs is said once for each pair of sizes."""

from dataclasses import replace
from pathlib import Path

from PIL import Image

from int8run.generate.input_sizes import list_resized
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import SampleInputs, read_input_file


def make_sample(path: Path, size: tuple[int, int], column: str = "image") -> Sample:
    """A sample that begins with a file of this size."""
    frames = [Image.new("L", size, shade) for shade in (0, 255)]
    if path.suffix == ".gif":
        frames[0].save(path, save_all=True, append_images=frames[1:])
    else:
        frames[0].save(path)
    return Sample("a", 0, path.stem, inputs=SampleInputs({column: (read_input_file(path),)}))


def test_each_pair_of_sizes_is_said_once(tmp_path: Path) -> None:
    samples = [
        make_sample(tmp_path / "a.png", (100, 80)),
        make_sample(tmp_path / "b.png", (100, 80)),
        make_sample(tmp_path / "c.png", (128, 128)),
        make_sample(tmp_path / "d.png", (64, 64)),
        make_sample(tmp_path / "e.gif", (32, 32), "video"),
        Sample("a", 0, "f"),
    ]
    frames = [[Image.new("RGB", (64, 64))]] * len(samples)

    lines = [resized.describe("MyPipeline") for resized in list_resized(samples, frames)]

    assert lines == [
        "MyPipeline makes 64 x 64 pixels of an image of 100 x 80, which has another shape; sampler.width and "
        "sampler.height set the size",
        "MyPipeline makes 64 x 64 pixels of an image of 128 x 128",
        "MyPipeline makes 64 x 64 pixels of a video of 32 x 32",
    ]


def test_what_int8run_fits_is_not_put_down_to_the_pipeline(tmp_path: Path) -> None:
    samples = [make_sample(tmp_path / "a.png", (100, 80)), make_sample(tmp_path / "b.png", (128, 128))]
    fitted = []
    for sample in samples:
        (file,) = sample.inputs.files["image"]
        inputs = SampleInputs({"image": (replace(file, size=(64, 64)),)})
        fitted.append(replace(sample, inputs=inputs))
    frames = [[Image.new("RGB", (64, 64))]] * len(samples)

    lines = [resized.describe("MyPipeline") for resized in list_resized(fitted, frames)]

    assert lines == [
        "sampler.fit_inputs brings an image of 100 x 80 to 64 x 64 pixels, whole, with borders",
        "sampler.fit_inputs brings an image of 128 x 128 to 64 x 64 pixels",
    ]
