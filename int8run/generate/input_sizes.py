"""What size a pipeline makes of its inputs, said in one line for each pair of sizes.

`tasks.run` logs it. How a pipeline resizes an input is known from what came out alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL.Image import Image

from int8run.generate.media import read_size
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import IMAGE, VIDEO

SHAPE_TOLERANCE = 0.02  # of width / height: sizes are rounded to whole patches


@dataclass(frozen=True)
class Resized:
    """What became of the size of an input.

    Args:
        column: `image` or `video`.
        given: width and height of the file, in pixels.
        generated: those of the result.
        is_fitted: whether int8run brought the input to another size before the call (`sampler.fit_inputs`).
    """

    column: str
    given: tuple[int, int]
    generated: tuple[int, int]
    is_fitted: bool = False

    @property
    def changes_shape(self) -> bool:
        """Whether width and height change by different factors: the input is stretched, cut or bordered."""
        given_shape = self.given[0] / self.given[1]
        generated_shape = self.generated[0] / self.generated[1]
        return abs(generated_shape / given_shape - 1) > SHAPE_TOLERANCE

    def describe(self, pipeline: str) -> str:
        """One line: `FluxImg2ImgPipeline makes 64 x 64 pixels of an image of 100 x 80, …`.

        Args:
            pipeline: name of its class.
        """
        width, height = self.generated
        article = "an" if self.column == IMAGE else "a"
        what = f"{article} {self.column} of {self.given[0]} x {self.given[1]}"
        if self.is_fitted:
            line = f"sampler.fit_inputs brings {what} to {width} x {height} pixels"
            return f"{line}, whole, with borders" if self.changes_shape else line
        line = f"{pipeline} makes {width} x {height} pixels of {what}"
        if self.changes_shape:
            line += ", which has another shape; sampler.width and sampler.height set the size"
        return line


def list_resized(samples: Sequence[Sample], frames: Sequence[Sequence[Image]]) -> list[Resized]:
    """The sizes of inputs that a result does not have, each pair once.

    Args:
        samples: that were generated.
        frames: of each sample.

    Raises:
        FileError: when an input cannot be read any more.
    """
    found: dict[Resized, None] = {}
    for sample, sample_frames in zip(samples, frames, strict=True):
        for column in (IMAGE, VIDEO):
            files = sample.inputs.files.get(column)
            if files is None:
                continue
            given = read_size(column, files[0])
            is_fitted = files[0].size == sample_frames[0].size
            change = Resized(column, given, sample_frames[0].size, is_fitted)
            if change.given != change.generated:
                found[change] = None
    return list(found)
