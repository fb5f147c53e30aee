"""`task=quantize task.component=vae`: the VAE of a pipeline from file to file, a few megabytes at a time.

`options.Quantize` calls `quantize_vae_file`. The weights stream as those of a denoiser do. What a convolution
is (its padding, its class) stands in no file of weights, so that the VAE's class is built without weights.
The layers are those that `int8.vae=int8 save=` makes INT8, with the same bits.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from int8run import __version__
from int8run.checkpoints.comfy_formats import TORCH_DTYPES
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.kept_dtype import KeptDtype
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.output_path import prepare_output_path
from int8run.checkpoints.reader import TensorFiles
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, FileError
from int8run.export.stream_plan import QuantizationRecipe, Target, keep_own_names, plan_targets
from int8run.export.stream_quantizer import write_targets
from int8run.export.weight_layers import BITS_OF_INT8
from int8run.layers.plan import LayerPlan
from int8run.layers.plan_summary import describe_skip_reasons
from int8run.models.family import ModelSource
from int8run.models.hub import check_repository, make_download_error
from int8run.models.loader import VAE, get_part_class
from int8run.models.model_folders import resolve_part_folder
from int8run.models.pipeline_index import has_pipeline_index
from int8run.models.resolve_weights import (
    CONFIG_NAME,
    READ_SUFFIXES,
    WEIGHTS_NAME,
    download_component,
    is_local,
)
from int8run.models.source import build_empty_model, read_config
from int8run.models.tensor_part import TensorPart
from int8run.models.vae_layers import load_vae_layers
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import NONE
from int8run.pipeline.vae import plan_vae
from int8run.report.console import Progress
from int8run.report.formatting import format_megabytes
from int8run.tasks.model_card import write_card
from int8run.tasks.quantize_checkpoint import check_streamable, write_config
from int8run.tasks.quantize_checkpoint_plan import choose_kept_dtype, count_kept_weights, log_copied
from int8run.tasks.quantize_common import (
    MegabyteProgress,
    collect_metrics,
    count_bytes,
    count_megabytes,
    describe_source,
    is_folder,
    log_ignored_settings,
    log_kept_dtype,
    merge_metadata,
    print_read_and_written,
    report_result,
    warn_replaced,
)
from int8run.utils.paths import expand_path, to_local_path

WEIGHT = ".weight"
NO_LAYER = "no Linear and no convolution"
# about denoisers alone; of a VAE `models/vae_layers.yaml` says which layers stay float
OF_A_DENOISER = frozenset(
    {"model_type", "model.quant_format", "model.sdnq", "int8.convolutions", "int8.group_size"}
)


@dataclass(frozen=True)
class VaeSource:
    """A VAE as its folder describes it.

    Args:
        folder: of its config and its weights.
        config: of its class.
        plans: of its Linears and convolutions, by name.
        parameters: names of all its tensors.
    """

    folder: Path
    config: Mapping[str, Any]
    plans: Mapping[str, LayerPlan]
    parameters: frozenset[str]

    @property
    def class_name(self) -> str:
        """Its class in diffusers."""
        return str(self.config.get("_class_name"))

    def find_skip_reason(self, key: str, parts: tuple[TensorPart, ...]) -> str | None:
        """Why a weight stays float; None: it becomes INT8.

        Args:
            key: of the weight.
            parts: what it is made of.
        """
        plan = self.plans.get(key.removesuffix(WEIGHT))
        return NO_LAYER if plan is None else plan.skip_reason


def quantize_vae_file(spec: RunSpec, job: Job) -> dict[str, float]:
    """Quantize the VAE of `model.location`, or of `model.parts.vae`, into the folder `save`.

    Leaves layers.csv and metrics.json in the output folder.

    Args:
        spec: the settings.
        job: where they came from, and where to write.

    Returns:
        Metrics by their public names.

    Raises:
        ConfigError: for settings that do not apply to a VAE, or when no layer becomes INT8.
        FileError: when the VAE cannot be read, or the result cannot be written.
    """
    check_settings(spec)
    log_ignored_settings(VAE, OF_A_DENOISER, job)
    prepare_output_path(str(spec.save))  # before the work whose result goes there
    vae = open_vae(find_vae_folder(spec.model))
    started = time.perf_counter()
    with TensorFiles.open(vae.folder) as files:
        path = choose_path(str(spec.save), vae)
        layers = read_layers(files)
        kept_dtype = choose_kept_dtype(files, layers, "", spec.model.dtype, job.overrides)
        recipe = make_recipe(spec, kept_dtype)
        targets = plan_vae_targets(files, layers, vae, recipe)
        log_kept_dtype(count_kept_weights(targets, layers), kept_dtype)
        plans = [target.plan for target in targets if target.plan is not None]
        print_header(spec, files, vae, path, plans)
        metadata = build_metadata(spec, files, vae, plans)
        bytes_written = write_vae(spec, files, layers, targets, path, metadata, recipe)
        bytes_read = count_bytes(files)
    write_config(vae.config, path.with_name(CONFIG_NAME))
    seconds = time.perf_counter() - started
    metrics = collect_metrics(plans, bytes_read=bytes_read, bytes_written=bytes_written, seconds=seconds)
    write_card(spec, job, [], metrics, vae=path)
    facts = {"source": str(vae.folder), "save": str(path), VAE: vae.class_name}
    report_result(job, path, plans, metrics, facts)
    return metrics


def check_settings(spec: RunSpec) -> None:
    """Raise ConfigError for what does not apply to a VAE."""
    if spec.int8.bits != BITS_OF_INT8:
        raise ConfigError(
            f"int8.bits={spec.int8.bits}: the layers of a VAE have 8 bits, as int8.vae=int8 makes them; set "
            "int8.bits=8"
        )
    outlier = check_streamable(spec)
    if outlier.name != NONE:
        raise ConfigError(
            f"outlier={outlier.name}: the layers of a VAE are plain INT8, as int8.vae=int8 makes them; set "
            "outlier=none"
        )
    if not is_folder(spec.save):
        raise ConfigError(
            f"save={spec.save}: a VAE is written as a folder, whose config names its class; set save=my-vae"
        )


def find_vae_folder(model: ModelSource) -> Path:
    """The folder of the VAE: that of `model.parts.vae`, of the pipeline, or the location itself.

    Raises:
        FileError: when it is not there, or cannot be downloaded.
    """
    if VAE in model.parts:
        return resolve_part_folder(VAE, model.parts[VAE][1])
    location = str(model.location)
    if model.base is not None and is_single_file(location):
        location = model.base
    folder = to_local_path(location)
    if has_pipeline_index(folder):
        folder = folder / VAE
    if folder.is_dir():
        return folder
    if is_local(location) or location.count("/") != 1:
        raise FileError(
            f"{folder}: no such folder; task.component=vae takes the folder of a pipeline or of a VAE, or "
            "the id of a pipeline on the hub"
        )
    check_repository(location, "model.location", model.revision)
    try:
        return download_component(location, VAE, model.revision)
    except (OSError, ValueError) as error:
        raise make_download_error(location, "model.location", error) from error


def is_single_file(location: str) -> bool:
    """Whether a location is a file of weights, here or on the hub, and no folder."""
    return Path(location).suffix.lower() in READ_SUFFIXES


def open_vae(folder: Path) -> VaeSource:
    """Build the class of a VAE without weights, and plan its layers.

    Raises:
        ConfigError: for a class that diffusers does not have.
        FileError: when its config cannot be read.
    """
    config = read_config(folder)
    cls = get_part_class(VAE, str(config.get("_class_name")))
    module = build_empty_model(cls, config, VAE, torch.float32)
    plans = plan_vae(module, load_vae_layers())
    return VaeSource(
        folder=folder,
        config=config,
        plans={plan.name: plan for plan in plans},
        parameters=frozenset(module.state_dict()),
    )


def choose_path(save: str, vae: VaeSource) -> Path:
    """The file to write.

    Raises:
        ConfigError: when it would replace the source.
    """
    path = expand_path(save).absolute() / WEIGHTS_NAME
    if path.parent.exists() and path.parent.samefile(vae.folder):
        raise ConfigError(f"save={save} holds the source itself; choose another folder")
    return path


def make_recipe(spec: RunSpec, kept_dtype: KeptDtype) -> QuantizationRecipe:
    """How layers of a VAE become INT8.

    Args:
        spec: the settings.
        kept_dtype: of weights that are quantized in the source and stay float.
    """
    assert not isinstance(spec.outlier, AutoOutlier)  # `check_settings` allows `none` alone
    return QuantizationRecipe(
        spec.outlier, spec.rounding, TORCH_DTYPES[kept_dtype.name], has_convolutions=True
    )


def plan_vae_targets(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    vae: VaeSource,
    recipe: QuantizationRecipe,
) -> list[Target]:
    """What the new file holds.

    Args:
        files: the source.
        layers: its weights by name.
        vae: what it is.
        recipe: how layers become INT8.

    Raises:
        ConfigError: when no layer becomes INT8.
        FileError: for tensors with other names than those of the VAE's class.
    """
    names = keep_own_names(files, layers)
    unknown = sorted(set(names) - vae.parameters)
    if unknown:
        raise FileError(
            f"{vae.folder} has {unknown[0]}, which {vae.class_name} does not have under this name; "
            "task=run int8.vae=int8 save=FOLDER lets diffusers translate it"
        )
    targets = plan_targets(files, layers, names, vae.find_skip_reason, recipe)
    plans = [target.plan for target in targets if target.plan is not None]
    if not any(target.int8 for target in targets):
        raise ConfigError(
            f"no layer of {vae.class_name} becomes INT8 ({describe_skip_reasons(plans)}); nothing is written"
        )
    copied = [target for target in targets if target.copied]
    if copied:
        log_copied(copied)
    for plan in plans:
        known = vae.plans.get(plan.name)
        if known is not None:
            plan.shape = known.shape  # with the stride, which no file has
    return targets


def write_vae(
    spec: RunSpec,
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    targets: Sequence[Target],
    path: Path,
    metadata: Mapping[str, str],
    recipe: QuantizationRecipe,
) -> int:
    """Write the new file; returns its size in bytes."""
    with Progress(enabled=spec.progress).track_loop(
        "Quantizing megabytes", count_megabytes(files)
    ) as advance:
        progress = MegabyteProgress(advance)
        return write_targets(files, layers, targets, path, metadata, recipe, progress)


def build_metadata(
    spec: RunSpec, files: TensorFiles, vae: VaeSource, plans: Sequence[LayerPlan]
) -> dict[str, str]:
    """The metadata of the new file: that of the source, and how it was made.

    Args:
        spec: the settings.
        files: the source.
        vae: what it is.
        plans: of its layers.
    """
    rounding: Any = spec.rounding
    provenance: dict[str, object] = {
        "int8run": __version__,
        "model": str(spec.model.location),
        "revision": spec.model.revision,
        "source": describe_source(files),
        VAE: vae.class_name,
        "outlier": NONE,
        "rounding": spec.rounding.name,
        "settings": {"rounding": asdict(rounding)},
        "checkpoint": None,
        "kept_float": {plan.name: plan.skip_reason for plan in plans if plan.skip_reason is not None},
    }
    return merge_metadata(files.metadata, json.loads(json.dumps(provenance)))


def print_header(
    spec: RunSpec, files: TensorFiles, vae: VaeSource, path: Path, plans: Sequence[LayerPlan]
) -> None:
    """Print what is read and what is written."""
    print_read_and_written(
        read=[("read", vae.folder), ("size", format_megabytes(count_bytes(files))), (VAE, vae.class_name)],
        written=[
            ("write", path),
            ("INT8 layers", sum(plan.skip_reason is None for plan in plans)),
            ("rounding", spec.rounding.name),
        ],
    )
    warn_replaced(path, spec.save)
