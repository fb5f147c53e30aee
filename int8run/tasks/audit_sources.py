"""What `task=audit` reads: the file, its base, and which tensors of the two belong together.

Called by `tasks.audit`. Everything is found out from headers, markers and scales; weights are read later.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from int8run.audit.base_weight import BaseFiles, BaseTensor
from int8run.audit.file_audit import AuditedFile
from int8run.audit.layer_findings import QUANTIZED
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.layer import FLOAT, GGUF, CheckpointLayer
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.quant_metadata import read_markers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.export.stream_plan import keep_own_names
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import AutoFamily, ModelFamily, load_families
from int8run.models.key_mapping import load_mappings
from int8run.models.original_names import to_original
from int8run.models.resolve_weights import ResolvedWeights
from int8run.models.state_dict_adapter import find_prefix, to_model
from int8run.models.tensor_part import Shape, TensorPart
from int8run.tasks.denoiser_checkpoint import DenoiserCheckpoint, has_original_names, recognize_checkpoint
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
MIN_SHARED_NAMES = 0.5  # of a file's tensors; a base with fewer has other names for them
UNKNOWN_FAMILY = "unknown"
Matches = dict[str, tuple[TensorPart, ...]]


@dataclass(frozen=True)
class ReadFile:
    """A checkpoint and what its headers say.

    Args:
        files: the checkpoint.
        layers: its weights by name.
        prefix: before the model's keys.
        denoiser: family and class; None where no fingerprint matches, as of a text encoder.
    """

    files: TensorFiles
    layers: Mapping[str, CheckpointLayer]
    prefix: str
    denoiser: tuple[ModelFamily, str] | None

    @property
    def family(self) -> str:
        """The family and the class in words."""
        if self.denoiser is None:
            return UNKNOWN_FAMILY
        family, class_name = self.denoiser
        return f"{family.name} ({class_name})"

    def get_shapes(self) -> dict[str, Shape]:
        """The model's tensors without prefix, and their logical shapes."""
        shapes = get_logical_shapes(self.files, self.layers)
        kept = keep_own_names(self.files, self.layers)
        return {key.removeprefix(self.prefix): shapes[key] for key in kept if key.startswith(self.prefix)}


def read_checkpoint(files: TensorFiles, declared: DeclaredFormat) -> ReadFile:
    """Find out what a file holds.

    Args:
        files: the file.
        declared: what the user says of it.

    Raises:
        FileError: a weight that cannot be read.
    """
    prefix = find_prefix(files)
    layers = read_layers(files, prefix, declared)
    found = ReadFile(files, layers, prefix, denoiser=None)
    shapes = found.get_shapes()
    try:
        denoiser = detect_denoiser(shapes, load_families().values(), shapes)
    except ConfigError as error:  # the names of more than one denoiser
        log.warning("%s: %s", files.path, error)
        return found
    return ReadFile(files, layers, prefix, denoiser)


def check_is_quantized(read: ReadFile) -> None:
    """Raise FileError for a file without a quantized layer, and for a GGUF file."""
    stored = {layer.storage_dtype for layer in read.layers.values()}
    if GGUF in stored:
        raise FileError(
            f"{read.files.path} is a GGUF file, which task=audit does not grade; task.base= takes it, beside "
            "a file that was made from it"
        )
    if stored - {FLOAT}:
        return
    raise FileError(
        f"{read.files.path} is not quantized: its {count_noun(len(read.layers), 'weight', 'are')} float; "
        "task=audit grades quantized files, task.path= names one"
    )


def plan_audit(read: ReadFile, base: ReadFile | None, model_type: ModelFamily | AutoFamily) -> AuditedFile:
    """All that is known of a file and its base before weights are read.

    Args:
        read: the file.
        base: to compare with; None: there is none.
        model_type: the family that the user chose, or auto.

    Raises:
        FileError: the base is another model.
    """
    matches: Mapping[str, BaseTensor] = {}
    base_files = None
    if base is not None:
        check_same_family(read, base)
        base_files = BaseFiles(base.files, base.layers, get_logical_shapes(base.files, base.layers))
        parts = match_tensors(read, base)
        check_any_match(read, base, parts)
        matches = {
            read.prefix + key: BaseTensor(base_files, add_prefix(own_parts, base.prefix))
            for key, own_parts in parts.items()
        }
    return AuditedFile(
        files=read.files,
        layers=read.layers,
        prefix=read.prefix,
        markers=read_markers(read.files, read.prefix),
        provenance=read_provenance(read.files.path, read.files.metadata),
        base=base_files,
        base_prefix="" if base is None else base.prefix,
        matches=matches,
        rules=find_rules(read, model_type),
    )


def add_prefix(parts: Iterable[TensorPart], prefix: str) -> tuple[TensorPart, ...]:
    """Parts with the keys that they have in the file."""
    return tuple(replace(part, key=prefix + part.key) for part in parts)


def check_same_family(read: ReadFile, base: ReadFile) -> None:
    """Raise FileError for a base of another family."""
    if read.denoiser is None or base.denoiser is None or read.denoiser[0].name == base.denoiser[0].name:
        return
    raise make_other_model_error(read, base)


def make_other_model_error(read: ReadFile, base: ReadFile) -> FileError:
    """The error for a base that cannot be that of a file."""
    return FileError(
        f"{base.files.path} is {base.family}, and {read.files.path} is {read.family}: the base is another "
        "model; name the float file that the quantized one was made from with task.base="
    )


def match_tensors(read: ReadFile, base: ReadFile) -> Matches:
    """Find out what each tensor of a file is made of in the base, names without prefixes.

    Args:
        read: the file.
        base: the base.

    Raises:
        FileError: tensors of the base that cannot be brought to the file's names.
    """
    own, others = read.get_shapes(), base.get_shapes()
    shared: Matches = {key: (TensorPart(key),) for key in own if key in others}
    denoiser = base.denoiser or read.denoiser
    if denoiser is None or len(shared) >= MIN_SHARED_NAMES * len(own):
        return shared
    _, class_name = denoiser
    is_original = has_original_names(own, class_name)
    if is_original == has_original_names(others, class_name):
        return shared
    try:
        if is_original:
            prefix = load_mappings(class_name).prefix
            renamed = to_original(others, class_name)
            found = {key.removeprefix(prefix): parts for key, parts in renamed.items()}
        else:
            found = dict(to_model(others, own, class_name).parts)
    except ConfigError as error:
        raise FileError(f"{base.files.path} cannot be compared with {read.files.path}: {error}") from error
    return {key: parts for key, parts in found.items() if key in own}


def check_any_match(read: ReadFile, base: ReadFile, parts: Matches) -> None:
    """Raise FileError where the base has none of the weights of a file."""
    weights = [layer.key.removeprefix(read.prefix) for layer in read.layers.values()]
    if not any(key in parts for key in weights):
        raise make_other_model_error(read, base)


def find_rules(read: ReadFile, model_type: ModelFamily | AutoFamily) -> dict[str, str] | None:
    """Why the family's rules keep each layer float, or that they quantize it; None without a family.

    Args:
        read: the file.
        model_type: the family that the user chose, or auto.
    """
    if read.denoiser is None and isinstance(model_type, AutoFamily):
        return None
    source = ResolvedWeights(Path(read.files.path))
    checkpoint = recognize_checkpoint(
        read.files, read.layers, prefix=read.prefix, source=source, model_type=model_type
    )
    return {
        name: find_rule(checkpoint, layer)
        for name, layer in read.layers.items()
        if len(layer.shape) == 2 and layer.key.removeprefix(read.prefix) in checkpoint.parameters
    }


def find_rule(checkpoint: DenoiserCheckpoint, layer: CheckpointLayer) -> str:
    """What the family's rules say of one layer."""
    return checkpoint.find_skip_reason(layer.key, (TensorPart(layer.key),)) or QUANTIZED
