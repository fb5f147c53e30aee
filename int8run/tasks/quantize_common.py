"""What all that quantizes from file to file shares: paths, progress, metadata, metrics, summary.

Called by `tasks.quantize_checkpoint`, `tasks.quantize_text_encoder` and `tasks.quantize_vae`.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from rich.text import Text

from int8run.checkpoints.data_hash import add_placeholder
from int8run.checkpoints.gguf_files import KEPT_PREFIX, count_types
from int8run.checkpoints.kept_dtype import KeptDtype
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.quant_metadata import METADATA_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.errors import ConfigError
from int8run.layers.plan import LayerPlan
from int8run.metrics.memory import read_peak_bytes
from int8run.report.console import print_lines
from int8run.report.formatting import format_megabytes, format_pairs
from int8run.report.run_files import write_json, write_layers_csv
from int8run.tracking.setting_names import select_keys
from int8run.utils.paths import SAFETENSORS, expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
MEGABYTE = 10**6
SQNR_METRIC = "weight_sqnr_db"
HASHED_BYTES = 4096  # of each tensor: they tell checkpoints of the same shapes apart


def resolve_new_file(save: str, files: TensorFiles) -> Path:
    """Return the absolute path of the file to write.

    Args:
        save: as the user gave it.
        files: the source.

    Raises:
        ConfigError: when it would replace a file of the source.
    """
    path = expand_path(save).absolute()
    for file in files.files:
        is_source = path == file.absolute() or (path.exists() and path.samefile(file))
        if is_source:
            raise ConfigError(f"save={save} is the source itself; choose another name")
    return path


def is_folder(save: str | None) -> bool:
    """Whether the new file is in a folder as diffusers and transformers have it."""
    return Path(str(save)).suffix != SAFETENSORS


class MegabyteProgress:
    """Counts bytes and advances a bar that counts megabytes.

    Args:
        advance: advances the bar by a number of megabytes.
    """

    def __init__(self, advance: Callable[[int], None]):
        self.advance = advance
        self.remainder = 0  # bytes that are not in the bar yet

    def __call__(self, count: int) -> None:
        """Count some bytes as done."""
        megabytes, self.remainder = divmod(self.remainder + count, MEGABYTE)
        self.advance(megabytes)


def count_megabytes(files: TensorFiles) -> int:
    """Return the length of the bar for reading a source, at least 1."""
    return max(1, count_bytes(files) // MEGABYTE)


def count_bytes(files: TensorFiles) -> int:
    """Return the bytes of all tensors of a source."""
    return sum(info.nbytes for info in files.values())


def hash_checkpoint(files: TensorFiles) -> str:
    """Return a hash that tells checkpoints apart without reading all of them."""
    digest = hashlib.sha256()
    buffer = torch.empty(HASHED_BYTES, dtype=torch.uint8)
    for key, info in files.items():
        digest.update(json.dumps([key, info.dtype, info.shape]).encode())
        beginning = buffer[: min(HASHED_BYTES, info.nbytes)]
        files.read_bytes(info.file, info.start, beginning)
        digest.update(beginning.numpy().data)
    return digest.hexdigest()


def describe_source(files: TensorFiles) -> dict[str, object]:
    """What the new file says of the source: its files, and of a GGUF file the types of its tensors."""
    source: dict[str, object] = {"files": [file.name for file in files.files]}
    if any(info.has_blocks for info in files.values()):
        types = count_types((info.dtype, info.form) for info in files.values())
        source["gguf_types"] = dict(types.most_common())
    return source


def log_ignored_settings(component: str, ignored: Collection[str], job: Job) -> None:
    """Log which settings of the command line `task=quantize` reads for denoisers and not for this component.

    Args:
        component: that is written.
        ignored: groups and keys.
        job: has the command line.
    """
    found = select_keys(job.overrides, ignored)
    if found:
        log.warning("task.component=%s ignores %s", component, ", ".join(found))


def log_dequantized_source(files: TensorFiles) -> None:
    """Log that the numbers of a GGUF file are quantized ones; nothing of another file."""
    labels = Counter(info.form.label for info in files.values() if info.form is not None and info.has_blocks)
    if labels:
        log.warning(
            "%s: %s in GGUF's blocks, dequantized and rounded once more; what they lost when the file was "
            "made is in no number of this task",
            files.path,
            ", ".join(f"{count_noun(count, 'tensor')} {name}" for name, count in labels.most_common()),
        )


def merge_metadata(source: Mapping[str, str], provenance: Mapping[str, object]) -> dict[str, str]:
    """Return the metadata of the new file: that of the source, and how the file was made.

    What the source says of its own quantized layers and of how it was made is left out, because it no
    longer holds; so is what a GGUF file says of itself.
    """
    kept = {}
    for key, text in source.items():
        if key not in (PROVENANCE_KEY, METADATA_KEY) and not key.startswith(KEPT_PREFIX):
            kept[key] = text
    return {"format": "pt", **kept, PROVENANCE_KEY: json.dumps(add_placeholder(provenance))}


def log_kept_dtype(count: int, kept_dtype: KeptDtype) -> None:
    """Log in which dtype weights are written that are quantized in the source and stay float."""
    if count:
        log.info(
            "%s quantized in the source and kept float: written in %s, %s",
            count_noun(count, "weight", "are"),
            kept_dtype.name,
            kept_dtype.reason,
        )


def print_read_and_written(
    *, read: Sequence[tuple[str, object]], written: Sequence[tuple[str, object]]
) -> None:
    """Print what is read and what is written, a line of names and values each."""
    print_lines(format_pairs(read), format_pairs(written))


def warn_replaced(path: Path, save: object) -> None:
    """Log that the new file takes the place of another one.

    Args:
        path: of the new file.
        save: as the user gave it.
    """
    if path.exists():
        log.warning("save=%s replaces an existing file", save)


def count_skip_reasons(plans: Sequence[LayerPlan]) -> Counter[str]:
    """Count the reasons why layers stay float.

    The name of a part, in parentheses, is left out: it differs from layer to layer.
    """
    return Counter(plan.skip_reason.split(" (")[0] for plan in plans if plan.skip_reason is not None)


def collect_metrics(
    plans: Sequence[LayerPlan],
    *,
    bytes_read: int,
    bytes_written: int,
    seconds: float,
    group: str = "quant",
    quantized: str = "int8",
) -> dict[str, float]:
    """Collect the numbers of the job.

    Args:
        plans: of all layers.
        bytes_read: size of the source.
        bytes_written: size of the new file.
        seconds: that the job took.
        group: first part of the names of layer metrics, as in `quant/layers_int8`.
        quantized: last part of the name of the number of quantized layers.

    Returns:
        Metrics by their public names.
    """
    num_quantized = sum(plan.skip_reason is None for plan in plans)
    metrics: dict[str, float] = {
        f"{group}/layers_{quantized}": num_quantized,
        f"{group}/layers_float": len(plans) - num_quantized,
    }
    sqnr_db = [plan.measured[SQNR_METRIC] for plan in plans if SQNR_METRIC in plan.measured]
    if sqnr_db:
        metrics[f"{group}/{SQNR_METRIC}_mean"] = sum(sqnr_db) / len(sqnr_db)
        metrics[f"{group}/{SQNR_METRIC}_min"] = min(sqnr_db)
    metrics["build/quantize_s"] = seconds
    metrics["build/read_bytes"] = bytes_read
    metrics["build/written_bytes"] = bytes_written
    metrics["build/read_bytes_per_s"] = bytes_read / seconds
    metrics["memory/peak_bytes"] = read_peak_bytes(torch.device("cpu"))
    return metrics


def report_result(
    job: Job,
    path: Path,
    plans: Sequence[LayerPlan],
    metrics: Mapping[str, float],
    facts: Mapping[str, object],
    *,
    quantized: str = "INT8",
) -> None:
    """Write layers.csv and metrics.json, and print what was done.

    Args:
        job: has the output folder.
        path: of the file that was written.
        plans: of all layers.
        metrics: by their public names.
        facts: about the source and the file, for metrics.json.
        quantized: what quantized layers are called.
    """
    layers_file = job.output_dir / "layers.csv"
    metrics_file = job.output_dir / "metrics.json"
    write_layers_csv(plans, layers_file)
    write_json({"metrics": metrics, **facts}, metrics_file)
    print_lines(*format_summary(plans, metrics, quantized))
    print_lines(f"files:    {path}, {layers_file}, {metrics_file}")


def format_summary(
    plans: Sequence[LayerPlan], metrics: Mapping[str, float], quantized: str = "INT8"
) -> list[Text]:
    """Say what was done, in two lines; see `report_result` for the arguments."""
    return [format_layers(plans, metrics, quantized), format_resources(metrics)]


def format_layers(plans: Sequence[LayerPlan], metrics: Mapping[str, float], quantized: str) -> Text:
    """How many layers are quantized and float, why, and what the quantized ones lost."""
    num_quantized = sum(plan.skip_reason is None for plan in plans)
    num_float = len(plans) - num_quantized
    float_layers = str(num_float)
    if num_float:
        reasons = "; ".join(f"{count} × {reason}" for reason, count in count_skip_reasons(plans).items())
        float_layers = f"{num_float} ({reasons})"
    layers: list[tuple[str, object]] = [
        (quantized, count_noun(num_quantized, "layer")),
        ("float", float_layers),
    ]
    # by the last word of their names: mean and min
    sqnr_db = {name.rpartition("_")[2]: value for name, value in metrics.items() if SQNR_METRIC in name}
    if sqnr_db:
        layers.append(("SQNR, mean / min", f"{sqnr_db['mean']:.1f} / {sqnr_db['min']:.1f} dB"))
    return format_pairs(layers)


def format_resources(metrics: Mapping[str, float]) -> Text:
    """The size of both files, and what the job took."""
    read, written = metrics["build/read_bytes"], metrics["build/written_bytes"]
    size = format_megabytes(written)
    if read:
        size = f"{format_megabytes(read)} → {size}, {written / read:.2f}×"
    speed = f"{format_megabytes(metrics['build/read_bytes_per_s'])}/s"
    return format_pairs(
        [
            ("size", size),
            ("time", f"{metrics['build/quantize_s']:.1f} s, {speed} read"),
            ("peak memory", format_megabytes(metrics["memory/peak_bytes"])),
        ]
    )
