"""Output folders of runs, as a run leaves them, and the page of a report as a parsed document."""

import csv
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from int8run.report.columns import DENOISER_BYTES, DENOISER_RATIO, PSNR_DB, SPEED_RATIO, STEP_MS
from int8run.report.html_page import write_report
from int8run.report.run_files import LAYER_COLUMNS
from int8run.report.runs import Run, name_runs
from int8run.tracking.run_record import Record, find_records, read_record

SSIM = "quality/ssim"
MACHINE = {
    "python": "3.11",
    "device": "cpu",
    "threads": 2,
    "cpu": "EPYC",
    "git": None,
    "versions": {"torch": "2.13.0"},
}
# elements that have no end tag
VOID_TAGS = {"area", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def make_metrics(
    step: float | None = 10.0,
    ratio: float | None = 2.0,
    psnr: float | None = 50.0,
    ssim: float | None = 0.99,
    size: float | None = 30e6,
    **more: float,
) -> dict[str, float]:
    """Metrics of a run; None leaves one out."""
    values = {
        STEP_MS: step,
        "speed/step_ms_p90": None if step is None else 1.1 * step,
        SPEED_RATIO: ratio,
        PSNR_DB: psnr,
        SSIM: ssim,
        DENOISER_BYTES: size,
        DENOISER_RATIO: 2.0,
        **more,
    }
    return {name: value for name, value in values.items() if value is not None}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


def write_layers(path: Path, layers: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, LAYER_COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(layers)


def make_status(number: int, overrides: Sequence[str], params: Mapping[str, str]) -> dict[str, Any]:
    """What status.json says of a job of a sweep that ended well."""
    overridden = dict(override.split("=", 1) for override in overrides)
    return {
        "state": "FINISHED",
        "error": None,
        "task": "run",
        "name": " ".join(overrides),
        "overrides": list(overrides),
        "choices": {},
        "params": {"model": "tiny"} | overridden | dict(params),
        "sweep": "s",
        "number": number,
        "config_hash": "0",
        "build_key": "0",
        "objective": PSNR_DB,
        "started": 1790000000.0 + 60 * number,
        "ended": 1790000050.0 + 60 * number,
        "host": "box",
        "jobs_at_once": 1,
    }


def write_run(
    folder: Path,
    number: int = 0,
    overrides: Sequence[str] = (),
    params: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
    images: Sequence[Mapping[str, Any]] = (),
    layers: Sequence[Mapping[str, Any]] = (),
    environment: Mapping[str, Any] | None = MACHINE,
    state: str = "FINISHED",
    num_samples: int = 0,
    **status: Any,
) -> Record:
    """The record of an output folder as a run writes it; `metrics=None`: it ended before it measured.

    With `num_samples` there are as many samples and timings, which scatter by little around the metrics.
    """
    run_folder = folder / str(number)
    run_folder.mkdir(parents=True, exist_ok=True)
    all_status = make_status(number, overrides, params or {}) | {"state": state} | status
    write_json(run_folder / "status.json", all_status)
    if metrics is not None:
        texts = {name: spell_non_finite(value) for name, value in metrics.items()}
        entries = [*images, *make_sample_entries(metrics, number, num_samples)]
        series = make_series(metrics, number, num_samples)
        write_json(run_folder / "metrics.json", {"metrics": texts, "series": series, "images": entries})
    if environment:
        write_json(run_folder / "environment.json", environment)
    if layers:
        write_layers(run_folder / "layers.csv", layers)
    return read_record(run_folder)


def make_sample_entries(metrics: Mapping[str, float], number: int, count: int) -> list[dict[str, Any]]:
    """Samples whose PSNRs differ much from each other, and from those of another run as the metrics do."""
    psnr = metrics.get(PSNR_DB)
    if psnr is None or math.isnan(psnr):
        return []
    entries = []
    for index, jitter in enumerate(make_jitter(number, count)):
        scatter = 3.0 * (index % 3 - 1) + 0.05 * jitter
        entry = {"key": f"s{index}", "prompt": f"p{index}", "seed": 0, "file": f"images/{index}.png"}
        entries.append({**entry, "width": 64, "height": 64, "psnr_db": spell_non_finite(psnr + scatter)})
    return entries


def make_series(metrics: Mapping[str, float], number: int, count: int) -> dict[str, list[float]]:
    """Timings of a run that scatter by one in a thousand."""
    step, ratio = metrics.get(STEP_MS), metrics.get(SPEED_RATIO)
    if step is None or not count:
        return {}
    step_ms = [step * (1 + 0.001 * jitter) for jitter in make_jitter(number, count)]
    series = {"series/block_step_ms": step_ms}
    if ratio is not None:
        series["series/float_block_step_ms"] = [step * ratio] * count
    return series


def make_jitter(number: int, count: int) -> list[float]:
    """Numbers around a mean of zero, other ones in each run."""
    numbers = np.random.default_rng(number).normal(size=count)
    return [float(one) for one in numbers - numbers.mean()] if count > 1 else [0.0] * count


def spell_non_finite(value: float) -> float | str:
    """A number as metrics.json has it: JSON has no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_runs(
    folder: Path,
    metrics: Sequence[Mapping[str, float]],
    options: Sequence[str] = ("none", "convrot"),
    key: str = "outlier",
    num_samples: int = 0,
) -> list[Run]:
    """A named run for each option of a setting."""
    records = [
        write_run(folder, number, [f"{key}={option}"], metrics=values, num_samples=num_samples)
        for number, (option, values) in enumerate(zip(options, metrics, strict=True))
    ]
    return name_runs(records)


def write_strengths_by_outlier(
    folder: Path,
    psnr: Callable[[float, str], float],
    left_out: Sequence[int] = (),
    num_samples: int = 0,
) -> list[Run]:
    """Named runs of three strengths times two outlier methods; psnr(strength, outlier)."""
    for number, (strength, outlier) in enumerate(itertools.product((0, 0.5, 1), ("none", "convrot"))):
        if number in left_out:
            continue
        is_rotated = outlier != "none"
        metrics = make_metrics(10 + is_rotated, 2 - is_rotated, psnr(strength, outlier))
        overrides = [f"lora.strength={strength}", f"outlier={outlier}"]
        write_run(folder, number, overrides, metrics=metrics, num_samples=num_samples)
    return name_runs(find_records(folder))


def make_layer_row(name: str, output: object = None, weight: object = None, why: str = "") -> dict[str, Any]:
    """A row of layers.csv: INT8, or float for the reason `why`."""
    return {
        "name": name,
        "quantized": "false" if why else "true",
        "why_not": why,
        "outlier": "none",
        "rounding": "absmax",
        "backend_used": "cpu",
        "output_sqnr_db": output or "",
        "weight_sqnr_db": weight or "",
    }


def make_noise_image(seed: int, side: int = 16) -> Image.Image:
    """An image that differs from those of other seeds."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_sample(
    run_folder: Path,
    key: str,
    prompt: str,
    image: Image.Image,
    float_image: Image.Image | None = None,
    seed: int = 0,
    **values: Any,
) -> dict[str, Any]:
    """The image files of a sample, and its entry in metrics.json."""
    folder = run_folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / f"{key}.png")
    entry = {"key": key, "prompt": prompt, "seed": seed, "file": f"images/{key}.png", **values}
    if float_image is not None:
        float_image.save(folder / f"{key}_float.png")
        entry["float"] = f"images/{key}_float.png"
    return entry


def write_input(run_folder: Path, column: str, name: str, *images: Image.Image) -> dict[str, Any]:
    """The image files of an input, and its entry in metrics.json; several images are those of a video."""
    folder = run_folder / "images"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, image in enumerate(images):
        files.append(f"images/input_{Path(name).stem}_{number}.png")
        image.save(run_folder / files[-1])
    content = b"".join(image.tobytes() for image in images)
    digest = hashlib.sha256(content).hexdigest()
    return {"column": column, "name": name, "sha256": digest, "images": files}


class ParsedPage(HTMLParser):
    """The elements of a page with their attributes and text, and the tags that are not closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.elements: list[dict[str, Any]] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.unbalanced += [element["tag"] for element in self.open]

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID_TAGS:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append({"tag": tag, "text": "", **dict(attrs)})

    def handle_endtag(self, tag):
        if tag in VOID_TAGS:
            return
        if not self.open or self.open[-1]["tag"] != tag:
            self.unbalanced.append(tag)
            return
        self.open.pop()

    def handle_data(self, data):
        for element in self.open:
            element["text"] += data

    def find_all(self, tag: str, **attributes: str) -> list[dict[str, Any]]:
        """The elements with this tag and these attributes; `class_` stands for `class`."""
        return [
            element
            for element in self.elements
            if element["tag"] == tag
            and all(element.get(name.rstrip("_")) == value for name, value in attributes.items())
        ]


def render_report(records: Sequence[Record], folder: Path, title: str = "a sweep") -> tuple[ParsedPage, str]:
    """Write `report.html` into a folder: the parsed page and its HTML."""
    write_report(records, folder / "report.html", title)
    html = (folder / "report.html").read_text()
    return ParsedPage(html), html
