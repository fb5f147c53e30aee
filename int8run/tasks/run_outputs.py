"""What a run writes into its output folder.

Called by `tasks.run`. A tracker copies the folder afterwards.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from int8run import __version__
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.generate.call_inputs import read_call_inputs
from int8run.generate.generated_sampling import is_skipped, is_tiled, list_rounded, read_generated_sampling
from int8run.generate.prompts import Sample
from int8run.generate.step_count import get_strength
from int8run.metrics.quality import SampleQuality
from int8run.models.loader import read_library_versions
from int8run.models.resolve_weights import WEIGHTS_NAME
from int8run.models.sampling import Sampling
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.store_layers import get_vae_folder, list_saved_files
from int8run.report.image_files import GridRow, make_image_grid
from int8run.report.run_files import collect_environment, write_json, write_layers_csv
from int8run.report.sample_entry import InputEntry
from int8run.tasks.image_writer import IMAGES, ImageWriter
from int8run.tasks.input_images import InputImages, open_input_images
from int8run.tasks.model_card import Comparison, write_card
from int8run.tasks.model_facts import describe_model, name_model
from int8run.tasks.noise_floor_metrics import describe_noise_floor
from int8run.tasks.result_grid import make_grid_rows, name_grid_columns
from int8run.tasks.run_metrics import RunComparison, collect_series
from int8run.tracking.run_record import RESULTS, RESULTS_SCHEMA
from int8run.tracking.secrets import mask_secret_settings
from int8run.utils.paths import expand_path

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

    write_layer_tables(spec, built, output_dir)
    environment = collect_environment(built.device, read_library_versions())
    write_json(environment, output_dir / "environment.json")
    results = collect_results(
        spec, built, comparison, metrics=metrics, environment=environment, images=entries
    )
    # the last file, so that a folder that has it is complete
    write_json(results, output_dir / RESULTS)


def collect_results(
    spec: RunSpec,
    built: BuiltModel,
    comparison: RunComparison,
    *,
    metrics: Mapping[str, float],
    environment: Mapping[str, object],
    images: Sequence[Mapping[str, object]],
) -> dict[str, object]:
    """What stands in metrics.json.

    Args:
        spec: the settings.
        built: the model that ran.
        comparison: what it generated.
        metrics: by their public names.
        environment: the machine and the versions of libraries.
        images: what is recorded of each sample.
    """
    # as it was generated, which may not be what was asked
    generated = read_generated_sampling(spec.sampling, comparison.candidate)
    results = {
        "schema": RESULTS_SCHEMA,
        # what others need to compare the numbers with theirs, in this one file
        "int8run": __version__,
        "model": name_model(str(spec.model.location)),
        "recipe": describe_model(spec, spec.candidate),
        "environment": environment,
        "metrics": metrics,
        "statistics": comparison.statistics.to_json(),
        "series": collect_series(comparison),
        "sampling": asdict(generated),
        "rounded": collect_rounded(spec, built, comparison, generated),
        "images": images,
    }
    if comparison.noise_floor is not None:
        results["noise_floor"] = describe_noise_floor(comparison.noise_floor, comparison.equivalences)
    return results


def write_layer_tables(spec: RunSpec, built: BuiltModel, output_dir: Path) -> None:
    """Write what happened to each layer of the denoiser and its ControlNets, and of what else became INT8."""
    plans = list(built.plans)
    for controlnet in built.controlnets:
        plans += controlnet.named_plans
    write_layers_csv(plans, output_dir / "layers.csv")
    if built.vae is not None:
        write_layers_csv(built.vae.plans, output_dir / "vae.csv")
    if spec.clip.is_quantized:
        write_layers_csv(built.encoders.plans, output_dir / "text_encoders.csv")


def collect_rounded(
    spec: RunSpec, built: BuiltModel, comparison: RunComparison, generated: Sampling
) -> dict[str, dict[str, int]]:
    """What a pipeline did not take as it was asked, by setting; empty where it took all.

    Steps that a strength leaves out, and those of further tiles, are what was asked for.

    Args:
        spec: the settings.
        built: the model.
        comparison: of all samples.
        generated: as it came out.
    """
    call = read_call_inputs(type(built.pipe))
    strength = get_strength(call, comparison.samples, spec.sampling)
    rounded = {}
    for change in list_rounded(spec.sampling, generated):
        if not is_skipped(change, strength) and not is_tiled(change, call.parameters):
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


def write_run_card(
    spec: RunSpec, job: Job, built: BuiltModel, metrics: Mapping[str, float], comparison: RunComparison
) -> None:
    """Write the card of what `save=` holds, where the run saved anything.

    Args:
        spec: the settings.
        job: whose folder has the files of the run.
        built: the model that was saved.
        metrics: by their public names.
        comparison: of the samples.
    """
    if spec.save is None:
        return
    saved = list_saved_files(spec.save, built.denoisers["int8"])
    environment = collect_environment(built.device, read_library_versions())
    compared = Comparison(
        environment=environment,
        num_samples=len(comparison.samples),
        sample_noun="video" if comparison.candidate.is_video else "image",
    )
    vae = None
    if built.vae is not None:
        vae = expand_path(get_vae_folder(spec.save)).absolute() / WEIGHTS_NAME
    write_card(spec, job, saved, metrics, comparison=compared, vae=vae)
