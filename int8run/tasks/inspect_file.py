"""`task=inspect task.path=…`: what a file or folder is, from its header.

`options.Inspect` calls `inspect_file`, which finds out what the path is and hands it to the module for that.
What is wrong with a file is shown in its table, if the header can be read at all.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from int8run.checkpoints.declared_format import UNDECLARED, DeclaredFormat
from int8run.checkpoints.gguf_header import begins_like_gguf
from int8run.checkpoints.header import read_header
from int8run.checkpoints.provenance import PROVENANCE_KEY
from int8run.checkpoints.reader import TensorFiles
from int8run.lora.find import find_lora_of_folder, get_file_title
from int8run.lora.key_parsing import parse_key
from int8run.lora.unread_types import ADAPTER_REASON
from int8run.tasks.file_description import (
    FileDescription,
    Row,
    count_names,
    format_size,
    shorten_header_value,
)
from int8run.tasks.inspect_checkpoint import describe_checkpoint, list_component_commands
from int8run.tasks.inspect_gguf import inspect_gguf
from int8run.tasks.inspect_image import PNG, inspect_image
from int8run.tasks.inspect_lora import ADAPTER_TYPES, Header, describe_lora
from int8run.tasks.inspect_pipeline import inspect_pipeline, is_pipeline_folder
from int8run.tasks.inspect_prompts import inspect_prompts, inspects_prompts
from int8run.utils.paths import GGUF, expand_path
from int8run.utils.plurals import count_noun

MAX_KEY_LENGTH = 60  # of a header's entry
LORA = "LoRA"
QUANTIZED_DTYPES = {"I8", "F8_E4M3", "F8_E5M2", "U8"}  # of weights
SCALE_SUFFIXES = ("_scale", ".scale_weight", "_scale_inv")
MARKER_SUFFIX = ".comfy_quant"
# of weights that are packed in ways which int8run does not read
PACKED_SUFFIX = ".qweight"


def inspect_file(location: str, declared: DeclaredFormat = UNDECLARED) -> FileDescription:
    """Describe a file with weights, a checkpoint in several files, a pipeline, an image of ours, or prompts.

    Args:
        location: a file, a folder with the files of one checkpoint or with a pipeline, a folder with a LoRA
            as PEFT and diffusers save it, a PNG, or a file for `prompts.path`; `~` is the home folder.
        declared: what the user says of a checkpoint; it decides what the file leaves open.

    Raises:
        FileError: when a header cannot be read.
    """
    path = expand_path(location)
    if path.is_dir():
        return inspect_folder(path, declared)
    if path.suffix.lower() == PNG:
        return inspect_image(path)
    if inspects_prompts(path):
        return inspect_prompts(path)
    if path.suffix.lower() == GGUF or begins_like_gguf(path):
        return inspect_gguf(path, declared)
    return inspect_single_file(path, declared)


def inspect_folder(path: Path, declared: DeclaredFormat) -> FileDescription:
    """Describe what a folder holds: a LoRA, a pipeline, or a checkpoint in several files.

    Args:
        path: of the folder.
        declared: what the user says of its files.
    """
    lora = find_lora_of_folder(path)
    if lora is not None:
        return inspect_single_file(lora, declared)
    if is_pipeline_folder(path):
        return inspect_pipeline(path, declared)
    with TensorFiles.open(path) as files:
        nbytes = sum(info.nbytes for info in files.values())
        num_tensors, num_files = count_noun(len(files), "tensor"), count_noun(len(files.files), "file")
        size: Row = ("size", f"{format_size(nbytes)}, {num_tensors} in {num_files}")
        rows = [size, *describe_checkpoint(files, declared)]
        return FileDescription(str(path), rows, list_component_commands(files))


def inspect_single_file(path: Path, declared: DeclaredFormat) -> FileDescription:
    """Describe a safetensors file: what it is, then what its header says in words of its own.

    Args:
        path: of the file.
        declared: what the user says of it.

    Raises:
        FileError: when its header cannot be read.
    """
    header, metadata = read_header(path)
    kind = classify_file(header)
    rows: list[Row] = [
        ("kind", kind),
        ("size", f"{format_size(path.stat().st_size)}, {count_noun(len(header), 'tensor')}"),
        ("dtypes", count_names(entry["dtype"] for entry in header.values())),
    ]
    if kind == LORA:
        lora_rows = list(describe_lora(path, header, metadata))
        shown = {value for _, value in lora_rows}
        return FileDescription(get_file_title(path), [*rows, *lora_rows, *describe_metadata(metadata, shown)])
    with TensorFiles.open(path) as files:
        rows += describe_checkpoint(files, declared)
        commands = list_component_commands(files)
    return FileDescription(path.name, [*rows, *describe_metadata(metadata)], commands)


def describe_metadata(metadata: Mapping[str, str], shown: Collection[str] = ()) -> Iterator[Row]:
    """Show the entries of a header's metadata, but those that are shown already.

    Args:
        metadata: of the header.
        shown: texts of other rows.
    """
    for key, value in sorted(metadata.items()):
        if value not in shown and key != PROVENANCE_KEY:
            yield f"header: {key[:MAX_KEY_LENGTH]}", shorten_header_value(value)


def classify_file(header: Header) -> str:
    """Tell a LoRA, a quantized checkpoint and plain weights apart, by key suffixes and dtypes."""
    if is_lora(header):
        return LORA
    if any(key.endswith(MARKER_SUFFIX) for key in header):
        return "quantized checkpoint with ComfyUI markers"
    weight_dtypes = {entry["dtype"] for key, entry in header.items() if key.endswith(".weight")}
    quantized = ", ".join(sorted(weight_dtypes & QUANTIZED_DTYPES))
    has_scales = any(key.endswith(SCALE_SUFFIXES) for key in header)
    if quantized and has_scales:
        return f"quantized checkpoint ({quantized} with scales)"
    return "plain weights"


def is_lora(header: Header) -> bool:
    """Whether a file holds adapters, of types that int8run applies or of others."""
    # checkpoints of nunchaku have low-rank halves beside their packed weights
    if any(key.endswith(PACKED_SUFFIX) for key in header):
        return False
    for key in header:
        parsed = parse_key(key)
        if parsed.part in ADAPTER_TYPES or parsed.reason.startswith(ADAPTER_REASON):
            return True
    return False
