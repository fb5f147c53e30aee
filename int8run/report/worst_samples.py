"""The samples of each run that are the furthest from float, with links to where the page shows them.

Called by `html_page`. A run names them in metrics.json; the gallery has most of them.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from int8run.report.columns import PSNR_DB, format_psnr
from int8run.report.image_gallery import Gallery
from int8run.report.runs import Run
from int8run.report.sample_files import SampleKey, list_sample_keys

SAMPLE_PSNR = "psnr_db"
MAX_RUNS = 50  # whose samples are listed


@dataclass(frozen=True)
class WorstSample:
    """A sample: what it is called, how far from float it is, and where it is shown."""

    caption: str
    psnr: str
    href: str


@dataclass(frozen=True)
class WorstSamples:
    """The worst samples of a run, the worst first."""

    run: Run
    samples: Sequence[WorstSample]


def list_worst_samples(runs: Sequence[Run], gallery: Gallery, page_folder: Path) -> list[WorstSamples]:
    """The worst samples of each run that names some; none of runs of earlier versions.

    Args:
        runs: of the report.
        gallery: of the page.
        page_folder: where the page will be.
    """
    row_of_sample: dict[SampleKey, int] = {}
    for number, row in enumerate(gallery.rows):
        # of a video the first of its stills
        row_of_sample.setdefault(row.key._replace(frame=""), number)
    listed = []
    for run in runs[:MAX_RUNS]:
        statistics = run.record.statistics.get(PSNR_DB, {})
        samples = []
        key_by_name = name_samples(run)
        for name in statistics.get("worst", []):
            if name in key_by_name:
                samples.append(describe_sample(run, name, key_by_name[name], row_of_sample, page_folder))
        if samples:
            listed.append(WorstSamples(run, samples))
    return listed


def name_samples(run: Run) -> dict[str, SampleKey]:
    """What a run's samples have in common with those of other runs, by their names in metrics.json."""
    images = run.record.images
    keys = list_sample_keys(images)
    return {str(sample.get("key")): key for sample, key in zip(images, keys, strict=True)}


def describe_sample(
    run: Run, name: str, key: SampleKey, row_of_sample: Mapping[SampleKey, int], page_folder: Path
) -> WorstSample:
    """One sample, with a link to its row in the gallery, or to its file where the page has no room for it.

    Args:
        run: that generated it.
        name: in metrics.json.
        key: of the sample.
        row_of_sample: rows of the gallery.
        page_folder: where the page will be.
    """
    sample = next(image for image in run.record.images if image.get("key") == name)
    if key in row_of_sample:
        href = f"#sample-{row_of_sample[key]}"
    else:
        file = os.path.relpath((run.record.folder / sample["file"]).absolute(), page_folder.absolute())
        href = quote(Path(file).as_posix())
    return WorstSample(
        caption=f"{key.prompt} · seed {key.seed}",
        psnr=format_psnr(sample.get(SAMPLE_PSNR)),
        href=href,
    )
