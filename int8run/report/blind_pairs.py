"""The blind comparison of a report: which images people may judge side by side without their names.

`html_page` puts it on the page and `blind.js` shows it; `votes` checks against it what people chose. Knows
nothing of HTML.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from int8run.report.image_gallery import Gallery, GalleryRow
from int8run.utils.text import make_visible

FLOAT = "float"  # the contender that every run is compared with by its own float images
ID_LENGTH = 16  # hexadecimal digits of a report's id


@dataclass(frozen=True)
class Contender:
    """What an image is of.

    Args:
        key: `float`, or the tag of a run.
        name: as people read it, after they have chosen.
    """

    key: str
    name: str


@dataclass(frozen=True)
class BlindSample:
    """The images of one row of the gallery.

    Args:
        caption: prompt and seed.
        images: id of the INT8 image, by the tag of its run.
        float_images: id of the float image, by the tag of the run that it was compared with.
    """

    caption: str
    images: Mapping[str, str]
    float_images: Mapping[str, str]

    def get_pair(self, first: str, second: str) -> tuple[str, str] | None:
        """The ids of the images of two contenders; None where one of them has none."""
        images = (self.get_image(first, second), self.get_image(second, first))
        if images[0] is None or images[1] is None:
            return None
        return images[0], images[1]

    def get_image(self, contender: str, opponent: str) -> str | None:
        """The id of a contender's image; the float model's is that of its opponent's run."""
        if contender == FLOAT:
            return self.float_images.get(opponent)
        return self.images.get(contender)


@dataclass(frozen=True)
class BlindComparison:
    """Everything that can be compared on a page.

    Args:
        report_id: of these images; votes name it.
        contenders: float, where any run has a float image, and the runs.
        samples: one per row of the gallery.
    """

    report_id: str
    contenders: Sequence[Contender]
    samples: Sequence[BlindSample]

    def to_json(self, title: str) -> dict[str, object]:
        """What `blind.js` reads.

        Args:
            title: of the page, for the file of votes.
        """
        samples = []
        for sample in self.samples:
            entry = {
                "caption": make_visible(sample.caption),
                "images": sample.images,
                "floats": sample.float_images,
            }
            samples.append(entry)
        contenders = [
            {"key": contender.key, "name": make_visible(contender.name)} for contender in self.contenders
        ]
        return {
            "report": self.report_id,
            "title": make_visible(title),
            "contenders": contenders,
            "samples": samples,
        }


def build_blind_comparison(gallery: Gallery) -> BlindComparison | None:
    """What people may compare; None where no two different images stand beside each other."""
    samples = [build_sample(row) for row in gallery.rows]
    if not any(has_two_images(sample) for sample in samples):
        return None
    contenders = []
    if gallery.has_float_images:
        contenders.append(Contender(FLOAT, FLOAT))
    for run in gallery.runs:
        contenders.append(Contender(run.tag, run.name))
    return BlindComparison(
        report_id=compute_report_id(samples, gallery.digests),
        contenders=contenders,
        samples=samples,
    )


def build_sample(row: GalleryRow) -> BlindSample:
    """The images of a row by their runs."""
    images = {}
    float_images = {}
    for cell in row.cells:
        if cell.image is not None:
            images[cell.run.tag] = cell.image
        if cell.float_image is not None:
            float_images[cell.run.tag] = cell.float_image
    return BlindSample(row.caption, images, float_images)


def has_two_images(sample: BlindSample) -> bool:
    """Whether a sample has two images that are not the same."""
    return len({*sample.images.values(), *sample.float_images.values()}) > 1


def compute_report_id(samples: Sequence[BlindSample], digests: Mapping[str, str]) -> str:
    """The same for the same images of the same runs, whatever the page is called and whenever it is made.

    Args:
        samples: of the page.
        digests: of the pixels of each image, by its id.
    """
    content = []
    for sample in samples:
        images = {tag: digests[image] for tag, image in sample.images.items()}
        float_images = {tag: digests[image] for tag, image in sample.float_images.items()}
        content.append([sample.caption, images, float_images])
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:ID_LENGTH]
