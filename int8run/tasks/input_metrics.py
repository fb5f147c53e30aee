"""What edits and videos keep: adds to each sample's quality what its inputs are needed for, and says how.

Called by `tasks.run` after images were compared as such. The numbers are those of `metrics.edits` and
`metrics.videos`.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from int8run.generate.generate import Generation
from int8run.generate.prompts import Sample
from int8run.metrics.edits import CHANGE_THRESHOLD, MASKED_PSNR, UNMASKED_PSNR, EditSource, measure_regions
from int8run.metrics.quality import SampleQuality
from int8run.metrics.videos import compare_drift, measure_flicker
from int8run.tasks.input_images import open_edit_source, open_first_frame
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
MAX_SHOWN = 3  # samples that a line of the log names


def measure_edits_and_videos(
    samples: Sequence[Sample],
    candidate: Generation,
    baseline: Generation,
    quality: Sequence[SampleQuality],
) -> list[SampleQuality]:
    """Add the metrics of edits and videos to those of images.

    Args:
        samples: that were generated.
        candidate: of the INT8 model.
        baseline: of the float model.
        quality: of each sample, without these metrics.

    Raises:
        FileError: when an input cannot be read any more.
    """
    notes = EditNotes()
    completed = []
    compared = zip(samples, candidate.frames, baseline.frames, quality, strict=True)
    for sample, frames, float_frames, known in compared:
        source = open_edit_source(sample.inputs, len(frames))
        values = measure_regions(frames, float_frames, source)
        notes.add(sample.key, source, frames[0].size, values)
        values |= measure_flicker(frames, float_frames)
        frame_rows = known.frames
        first_frame = open_first_frame(sample.inputs, len(frames))
        if first_frame is not None:
            drift, drift_rows = compare_drift(frames, float_frames, first_frame)
            values |= drift
            frame_rows = [row | added for row, added in zip(frame_rows, drift_rows, strict=True)]
        completed.append(replace(known, values=known.values | values, frames=frame_rows))
    notes.log()
    return completed


class EditNotes:
    """Collects what a reader of the numbers has to know, so that it is one line for all samples."""

    def __init__(self) -> None:
        self.derived: list[str] = []
        self.resized: list[str] = []
        self.without_inside: list[str] = []
        self.without_outside: list[str] = []

    def add(self, key: str, source: EditSource, size: tuple[int, int], values: dict[str, float]) -> None:
        """Note one sample.

        Args:
            key: of the sample.
            source: what it began with.
            size: width and height of its result.
            values: what was measured inside and outside its mask; empty without one.
        """
        if not values:
            return
        compared = source.masks or source.images
        if not source.masks:
            self.derived.append(key)
        if any(image.size != size for image in compared):
            width, height = compared[0].size
            self.resized.append(f"{key} ({width} x {height} to {size[0]} x {size[1]})")
        if MASKED_PSNR not in values:
            self.without_inside.append(key)
        if UNMASKED_PSNR not in values:
            self.without_outside.append(key)

    def log(self) -> None:
        """Log one line for each kind of note."""
        notes = {
            f"no mask is given; it is where a color of the float edit differs from its input by more than "
            f"{CHANGE_THRESHOLD:.0%}": self.derived,
            "masks, or the inputs that tell them, are resized to the result": self.resized,
            f"the mask has no pixel inside; there is no quality/{MASKED_PSNR}": self.without_inside,
            f"the mask has no pixel outside; there is no quality/{UNMASKED_PSNR}": self.without_outside,
        }
        for note, keys in notes.items():
            if keys:
                log.info("%s: %s", note, shorten_list(keys))


def shorten_list(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    shown = list(names[:MAX_SHOWN])
    num_left_out = len(names) - len(shown)
    if num_left_out:
        shown.append(f"and {count_noun(num_left_out, 'more sample')}")
    return ", ".join(shown)
