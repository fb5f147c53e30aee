"""What a run writes into its output folder, and how it describes the model that it built.

Called by `tasks.run`. A tracker copies the folder afterwards.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL.Image import Image

from int8run.config.run_spec import RunSpec
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.generated_sampling import is_skipped, list_rounded, read_generated_sampling
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import MASK_IMAGE
from int8run.generate.step_count import get_strength
from int8run.layers.plan import LayerPlan
from int8run.lora.stack import LoraStack
from int8run.metrics.layers import compute_int8_shares
from int8run.metrics.quality import SampleQuality, select_key_frames
from int8run.models.loader import read_library_versions
from int8run.models.sampling import Sampling
from int8run.pipeline.built_model import BuiltModel
from int8run.report.image_files import (
    DIFFERENCE_GAIN,
    STRIP_COLUMNS,
    GridHeading,
    GridRow,
    make_difference_image,
    make_image_grid,
    make_image_strip,
)
from int8run.report.run_files import collect_environment, write_json, write_layers_csv
from int8run.report.sample_entry import InputEntry, describe_inputs
from int8run.tasks.image_writer import IMAGES, ImageWriter
from int8run.tasks.input_images import InputImages, open_input_images
from int8run.tasks.run_metrics import RunComparison, collect_series
from int8run.tracking.secrets import mask_secret_settings
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ImageRecord:
    """One image or video in metrics.json.

    Args:
        sample: its prompt and seed.
        size: width and height in pixels.
        file: path below the output folder.
        stills: of a video, paths of some of its frames.
        float_file: the same of the float model; None without a baseline.
        float_stills: the same of the float model.
        quality: beside the float model; None without a baseline.
        inputs: the files that the sample began with.
    """

    sample: Sample
    size: tuple[int, int]
    file: str
    stills: Sequence[str]
    float_file: str | None
    float_stills: Sequence[str]
    quality: SampleQuality | None
    inputs: Sequence[InputEntry] = ()

    def to_json(self) -> dict[str, object]:
        """Return the entry of metrics.json; what does not apply has no key."""
        entry: dict[str, object] = {
            "key": self.sample.key,
            "prompt": self.sample.prompt,
            "seed": self.sample.seed,
            "width": self.size[0],
            "height": self.size[1],
            "file": self.file,
        }
        if self.sample.negative_prompt is not None:
            entry["negative_prompt"] = self.sample.negative_prompt
        if self.inputs:
            entry["inputs"] = [asdict(input_entry) for input_entry in self.inputs]
        if self.sample.inputs.strength is not None:
            entry["strength"] = self.sample.inputs.strength
        if self.sample.inputs.arguments:
            # a table in YAML may have dates, which JSON does not know
            arguments = json.dumps(dict(self.sample.inputs.arguments), default=str)
            entry["arguments"] = mask_secret_settings(json.loads(arguments))
        if self.quality is not None:
            entry |= self.quality.values
        if self.float_file is not None:
            entry["float"] = self.float_file
        if self.stills:
            entry["stills"] = self.stills
            entry["float_stills"] = self.float_stills
            if self.quality is not None:
                entry["frames"] = self.quality.frames
        return entry


def write_outputs(
    spec: RunSpec,
    built: BuiltModel,
    comparison: RunComparison,
    metrics: Mapping[str, float],
    writer: ImageWriter,
) -> None:
    """Write the grid, tables and metrics.json; the images and videos are there.

    Args:
        spec: the settings.
        built: the model that ran.
        comparison: what it generated.
        metrics: by their public names.
        writer: has saved the images.
    """
    output_dir = writer.output_dir
    has_inputs = any(sample.inputs.files for sample in comparison.samples)
    entries = []
    rows: list[GridRow] = []
    for index, sample in enumerate(comparison.samples):
        inputs = open_input_images(sample.inputs, comparison.candidate.frames[index])
        entry = make_record(spec, comparison, index, writer, inputs).to_json()
        entries.append(entry)
        rows += make_grid_rows(comparison, index, entry, inputs if has_inputs else None)
    make_image_grid(rows, name_grid_columns(spec, comparison)).save(output_dir / "grid.png")
    if comparison.candidate.has_sound:
        pipeline = type(built.pipe).__name__
        log.info("%s makes sound with its videos; it is neither compared nor kept", pipeline)

    write_layers_csv(built.plans, output_dir / "layers.csv")
    if spec.clip.is_quantized:
        write_layers_csv(built.encoders.plans, output_dir / "text_encoders.csv")
    environment = collect_environment(built.device, read_library_versions())
    write_json(environment, output_dir / "environment.json")
    generated = read_generated_sampling(spec.sampling, comparison.candidate)
    # the last file, so that a folder that has it is complete
    write_json(
        {
            "metrics": metrics,
            "series": collect_series(comparison),
            # as it was generated, which may not be what was asked
            "sampling": asdict(generated),
            "rounded": collect_rounded(spec, built, comparison, generated),
            "images": entries,
        },
        output_dir / "metrics.json",
    )


def collect_rounded(
    spec: RunSpec, built: BuiltModel, comparison: RunComparison, generated: Sampling
) -> dict[str, dict[str, int]]:
    """What a pipeline did not take as it was asked, by setting; empty where it took all.

    Steps that a strength leaves out are what was asked for.

    Args:
        spec: the settings.
        built: the model.
        comparison: of all samples.
        generated: as it came out.
    """
    strength = get_strength(read_call_inputs(type(built.pipe)), comparison.samples, spec.sampling)
    rounded = {}
    for change in list_rounded(spec.sampling, generated):
        if not is_skipped(change, strength):
            rounded[change.name] = {"asked": change.asked, "generated": change.generated}
    return rounded


def make_record(
    spec: RunSpec,
    comparison: RunComparison,
    index: int,
    writer: ImageWriter,
    inputs: Sequence[InputImages] = (),
) -> ImageRecord:
    """Describe what was generated for one sample.

    Args:
        spec: the settings.
        comparison: of all samples.
        index: of the sample.
        writer: has saved it.
        inputs: that it began with; their images are saved beside it.
    """
    sample = comparison.samples[index]
    first = comparison.candidate.frames[index][0]
    file, *stills = writer.files[spec.candidate, sample.key]
    float_file, float_stills = None, []
    if comparison.baseline is not None:
        float_file, *float_stills = writer.files["float", sample.key]
    return ImageRecord(
        sample=sample,
        size=(first.width, first.height),
        file=file,
        stills=stills,
        float_file=float_file,
        float_stills=float_stills,
        quality=comparison.quality[index] if comparison.quality else None,
        inputs=[save_input(input_images, writer.output_dir) for input_images in inputs],
    )


def save_input(input_images: InputImages, output_dir: Path) -> InputEntry:
    """Save what is shown of an input, and describe it.

    Args:
        input_images: of one file.
        output_dir: of the run.
    """
    names = input_images.save(output_dir / IMAGES)
    return InputEntry(
        column=input_images.column,
        name=input_images.file.name,
        sha256=input_images.file.sha256,
        images=[f"{IMAGES}/{name}" for name in names],
    )


def name_grid_columns(spec: RunSpec, comparison: RunComparison) -> list[GridHeading]:
    """The headings of the grid.

    Args:
        spec: the settings.
        comparison: of all samples.
    """
    columns: list[GridHeading] = []
    if any(sample.inputs.files for sample in comparison.samples):
        columns.append(name_inputs(comparison.samples))
    if comparison.baseline is None:
        return [*columns, name_candidate(spec)]
    return [*columns, "float", name_candidate(spec), f"difference x {DIFFERENCE_GAIN}"]


def name_inputs(samples: Sequence[Sample]) -> GridHeading:
    """What stands above the inputs: `image` and `mask`; `input` where samples have different ones."""
    labels_of_samples = {label_inputs(sample) for sample in samples if sample.inputs.files}
    if len(labels_of_samples) > 1:
        return "input"
    (labels,) = labels_of_samples
    return labels if len(labels) <= STRIP_COLUMNS else "input"


def label_inputs(sample: Sample) -> tuple[str, ...]:
    """A label for each input of a sample: its column, once where a column has several files."""
    labels: list[str] = []
    for column, files in sample.inputs.files.items():
        label = "mask" if column == MASK_IMAGE else column.replace("_", " ")
        labels += [label, *[""] * (len(files) - 1)]
    return tuple(labels)


def make_grid_rows(
    comparison: RunComparison,
    index: int,
    entry: Mapping[str, object],
    inputs: Sequence[InputImages] | None,
) -> list[GridRow]:
    """Make the row of a sample in the grid; for a video one row for each key frame, below a caption.

    Args:
        comparison: of all samples.
        index: of the sample.
        entry: of the sample in metrics.json.
        inputs: that it began with; None where the grid has no column for them.
    """
    sample = comparison.samples[index]
    frames = comparison.candidate.frames[index]
    captions = [f"{sample.prompt} · seed {sample.seed}"]
    about_inputs = describe_inputs(entry)
    if about_inputs:
        captions.append(about_inputs)
    is_video = len(frames) > 1
    # an image stands below its last caption, a video's key frames have captions of their own
    rows: list[GridRow] = [(caption, []) for caption in (captions if is_video else captions[:-1])]
    for position, number in enumerate(select_key_frames(len(frames)).values()):
        caption = f"frame {number + 1} of {len(frames)}" if is_video else captions[-1]
        images: list[Image | None] = []
        if inputs is not None:
            images.append(make_input_cell(inputs, position, frames[0].size))
        images += make_grid_images(comparison, index, number)
        rows.append((caption, images))
    return rows


def make_input_cell(inputs: Sequence[InputImages], key_frame: int, size: tuple[int, int]) -> Image | None:
    """The inputs beside a key frame, side by side; None without any.

    Args:
        inputs: of the sample.
        key_frame: of its result, counted from 0.
        size: width and height of its result.
    """
    if not inputs:
        return None
    return make_image_strip([one.get_image(key_frame) for one in inputs], size)


def make_grid_images(comparison: RunComparison, index: int, frame: int) -> list[Image]:
    """The images of a row: that of the candidate; with a baseline between the float one and the difference.

    Args:
        comparison: of all samples.
        index: of the sample.
        frame: of the sample.
    """
    image = comparison.candidate.frames[index][frame]
    if comparison.baseline is None:
        return [image]
    float_image = comparison.baseline.frames[index][frame]
    return [float_image, image, make_difference_image(image, float_image)]


def describe_build(spec: RunSpec, built: BuiltModel, *, is_reused: bool) -> list[tuple[str, object]]:
    """Describe what was built, as names and values for the line before the bars.

    Args:
        spec: the settings.
        built: the model.
        is_reused: whether an earlier job built it.
    """
    facts: list[tuple[str, object]] = [("family", built.family.name), ("device", built.device)]
    facts += describe_layers(built)
    if spec.lora.adapters:
        facts.append(("lora", describe_loras(spec, built.loras)))
    for component, encoder in built.encoders.built.items():
        facts.append((component, list_counts(map(name_format, encoder.plans))))
    preset = spec.lora.find_preset(spec.model.lora_base, spec.sampler.steps)
    if preset is not None:
        scheduler = type(built.pipe.scheduler).__name__
        steps = count_noun(spec.sampling.steps or 0, "step")
        facts.append(("few steps", f"{preset.name}: {steps}, {scheduler}"))
    if spec.compile != "none":
        facts.append(("compile", spec.compile))
    if is_reused:
        facts.append(("model", "reused"))
    return facts


def name_format(plan: LayerPlan) -> str:
    """The format of a text encoder's layer."""
    return "float" if plan.skip_reason is not None else plan.rounding


def name_backend(plan: LayerPlan) -> str:
    """`cpu (avx512_vnni)`: the backend of a layer, with the instruction set of its kernels."""
    return f"{plan.backend_used} ({plan.instructions})" if plan.instructions else plan.backend_used


def describe_layers(built: BuiltModel) -> list[tuple[str, object]]:
    """Describe how much of the denoiser is INT8, and by which methods."""
    by_choice = sum(plan.is_float_by_choice for plan in built.plans)
    backends = sorted({name_backend(plan) for plan in built.plans if plan.backend_used})
    if not backends:
        return [("layers", f"all float, {by_choice} by choice" if by_choice else "all float")]
    int8 = [plan for plan in built.plans if plan.skip_reason is None]
    shares = compute_int8_shares(built.plans, built.num_params)
    num_int8 = f"{len(int8)} of {len(built.plans)} Linears INT8"
    macs_share = f"{shares['quant/macs_int8_share']:.1%} of the multiply-adds"
    if by_choice:
        macs_share += f", {by_choice} float by choice"
    return [
        ("layers", f"{num_int8}, {macs_share}"),
        # the method alone, without its parameters
        ("outlier", format_counts(plan.outlier.partition(" ")[0] for plan in int8)),
        ("rounding", format_counts(plan.rounding for plan in int8)),
        ("backend", "+".join(backends)),
    ]


def describe_loras(spec: RunSpec, loras: LoraStack) -> str:
    """Describe the LoRAs by their strengths, in order where one changes, and how they are applied."""
    strengths = []
    for adapter in spec.lora.adapters:
        scheduled = [f"{strength * spec.lora.strength:g}" for _, strength in adapter.schedule]
        strengths.append(f"{adapter.name} {'→'.join(scheduled)}")
    if spec.lora.is_baked:
        how = "baked"
    elif loras.layers_by_mode:
        how = format_counts(Counter(loras.layers_by_mode).elements())
    else:
        how = "merged"
    return f"{', '.join(strengths)} ({how})"


def format_counts(names: Iterable[str]) -> str:
    """Return the one name, or each name with its count: `convrot 20, none 12`."""
    counts = Counter(names)
    if len(counts) == 1:
        return next(iter(counts))
    return list_counts(counts.elements())


def list_counts(names: Iterable[str]) -> str:
    """Return each name with its count, the most frequent first: `nvfp4 96, float 3`."""
    return ", ".join(f"{name} {count}" for name, count in Counter(names).most_common())


def name_candidate(spec: RunSpec) -> str:
    """Return what the candidate is called beside the float model.

    With INT8 disabled and nothing else changed it is the float model itself.
    """
    names = {"int8": "INT8", "clip": f"clip={spec.clip.format}", "float": "float (int8.enable=false)"}
    return names[spec.candidate]
