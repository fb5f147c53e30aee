"""`task=inspect`: what a safetensors file is, from its header.

Tensors are read only where the header leaves the layers open: the small ones that describe them, and fp8
weights without a scale. All tensors of a file that int8run made are read, and compared with the hash in its
note. What is wrong with a file is shown in its table, if the header can be read at all.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from int8run.checkpoints.data_hash import check_data
from int8run.checkpoints.detect import AUTO, get_logical_shapes, read_layers
from int8run.checkpoints.header import read_header
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.provenance import PROVENANCE_KEY, read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.lora import few_step
from int8run.lora.base_model import detect_lora_base
from int8run.lora.find import find_lora_of_folder
from int8run.lora.key_groups import group_keys
from int8run.lora.key_parsing import parse_key
from int8run.lora.metadata import describe_header
from int8run.lora.trigger_words import iter_trigger_words
from int8run.lora.unread_types import ADAPTER_REASON, describe_unread_types, list_unread_types
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.state_dict_adapter import find_denoiser_keys, find_prefix
from int8run.text_encoders.detect import DetectedEncoder, detect_encoder
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun

MAX_KEY_LENGTH = 60  # of a header's entry
MAX_VALUE_LENGTH = 200
MAX_TRIGGERS = 3
# the part of an adapter that stands for its type
ADAPTER_TYPES = {
    "down": "LoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "diff": "diff",
    "diff_b": "bias",
    "on_input": "IA3",
    "w_norm": "norm",
    "dora_scale": "DoRA",
    "magnitude": "DoRA",
    "oft_blocks": "OFT or BOFT",
    "kohya_oft_blocks_0": "OFT",
    "oft_R": "OFT",
    "boft_R": "BOFT",
}
QUANTIZED_DTYPES = {"I8", "F8_E4M3", "F8_E5M2", "U8"}  # of weights
SCALE_SUFFIXES = ("_scale", ".scale_weight", "_scale_inv")
# the entry of each tensor in a safetensors header
Header = Mapping[str, Mapping]
# what a line of the table is about, and its text
Row = tuple[str, str]


def inspect_cache(cache: DiskCache) -> Table:
    """List what is kept on disk for later runs, the file that was used last on top."""
    files = cache.list_files()
    total = sum(file.bytes for file in files)
    title = f"{cache.path}: {total / 1e9:.2f} of {cache.limit_gb:g} GB"
    table = Table(title=title, title_justify="left")
    table.add_column("kind", overflow="fold")
    table.add_column("made from", overflow="fold")
    table.add_column("size", overflow="fold", justify="right")
    table.add_column("last used", overflow="fold")
    for file in reversed(files):
        table.add_row(
            file.path.parent.name,
            describe_cache_file(file.path),
            f"{file.bytes / 1e6:.1f} MB",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(file.used)),
        )
    return table


def describe_cache_file(path: Path) -> str:
    """Describe a file of the cache in one line, from its header."""
    try:
        provenance = read_provenance(path, read_header(path)[1])
    except FileError:
        return f"{path.name}, damaged"
    if not provenance:
        return path.name
    facts = [provenance.get(name) for name in ("model", "family", "outlier", "rounding")]
    if "drawings" in provenance:
        facts.append(count_noun(int(provenance["drawings"]), "image"))
    facts += [name for name, *_ in provenance.get("loras", [])]
    return ", ".join(str(fact) for fact in facts if fact)


def inspect_file(
    location: str, quant_format: str = AUTO, sdnq: str | Mapping[str, Any] | None = None
) -> Table:
    """Describe a safetensors file, or a checkpoint in several files.

    Args:
        location: a file, a folder with the files of one checkpoint, or a folder with a LoRA as PEFT and
            diffusers save it; `~` is the home folder.
        quant_format: `model.quant_format`, which decides what the file leaves open.
        sdnq: `model.sdnq`, likewise.

    Returns:
        A table without a head, a line for each fact.

    Raises:
        FileError: when a header cannot be read.
    """
    path = expand_path(location)
    if path.is_dir():
        lora = find_lora_of_folder(path)
        if lora is None:
            return inspect_folder(path, quant_format, sdnq)
        path = lora
    header, metadata = read_header(path)
    kind = classify_file(header)
    dtypes = Counter(entry["dtype"] for entry in header.values())
    rows: list[Row] = [
        ("kind", kind),
        ("size", f"{path.stat().st_size / 1e6:.1f} MB, {count_noun(len(header), 'tensor')}"),
        ("dtypes", format_counts(dtypes)),
    ]
    shown: set[str] = set()
    if kind == "LoRA":
        lora_rows = list(describe_lora(path, header, metadata))
        shown = {value for _, value in lora_rows}
        rows += lora_rows
    else:
        with TensorFiles.open(path) as files:
            rows += describe_checkpoint(files, quant_format, sdnq)
    for key, value in sorted(metadata.items()):
        if value not in shown and key != PROVENANCE_KEY:
            rows.append((f"header: {key[:MAX_KEY_LENGTH]}", shorten_value(value)))
    return build_table(path.name, rows)


def inspect_folder(path: Path, quant_format: str, sdnq: str | Mapping[str, Any] | None) -> Table:
    """Describe a checkpoint in several files; the settings as of `inspect_file`."""
    with TensorFiles.open(path) as files:
        nbytes = sum(info.nbytes for info in files.values())
        tensors, num_files = count_noun(len(files), "tensor"), count_noun(len(files.files), "file")
        size = f"{nbytes / 1e6:.1f} MB, {tensors} in {num_files}"
        return build_table(str(path), [("size", size), *describe_checkpoint(files, quant_format, sdnq)])


def build_table(title: str, rows: Iterable[Row]) -> Table:
    """Build the table of a file."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table


def shorten_value(value: str) -> str:
    """Return the beginning of a long text and its length."""
    if len(value) <= MAX_VALUE_LENGTH:
        return value
    return f"{value[:MAX_VALUE_LENGTH]}… ({len(value)} characters)"


def format_counts(counts: Counter[str], separator: str = ", ") -> str:
    """`3 × F32, 2 × I8`: each name with its count, the most frequent first."""
    return separator.join(f"{count} × {name}" for name, count in counts.most_common())


def classify_file(header: Header) -> str:
    """Tell a LoRA, a quantized checkpoint and plain weights apart, by key suffixes and dtypes."""
    parsed_keys = [parse_key(key) for key in header]
    # checkpoints of nunchaku have low-rank halves beside their packed weights
    is_packed = any(key.endswith(".qweight") for key in header)
    for parsed in parsed_keys if not is_packed else ():
        if parsed.part in ADAPTER_TYPES or parsed.reason.startswith(ADAPTER_REASON):
            return "LoRA"
    if any(key.endswith(".comfy_quant") for key in header):
        return "quantized checkpoint with ComfyUI markers"
    weight_dtypes = {entry["dtype"] for key, entry in header.items() if key.endswith(".weight")}
    quantized = sorted(weight_dtypes & QUANTIZED_DTYPES)
    if quantized and any(key.endswith(SCALE_SUFFIXES) for key in header):
        return f"quantized checkpoint ({', '.join(quantized)} with scales)"
    return "plain weights"


def describe_checkpoint(
    files: TensorFiles, quant_format: str, sdnq: str | Mapping[str, Any] | None
) -> Iterator[Row]:
    """Describe a checkpoint: its family, how its layers are stored, and how int8run made it.

    Args:
        files: of the checkpoint.
        quant_format, sdnq: as of `inspect_file`.
    """
    encoder = find_text_encoder(files)
    prefix = encoder.prefix if encoder is not None else find_prefix(files)
    yield "prefix", prefix or "none"
    unread = list_unread_types({parse_key(key).reason for key in files})
    if unread and encoder is None:
        yield "looks like", describe_unread_types(unread)
    try:
        layers = read_layers(files, prefix, None if quant_format == AUTO else quant_format, sdnq)
    except (ConfigError, FileError) as error:
        yield "cannot be read", str(error)
        return
    if encoder is not None:
        yield "text encoder", f"{encoder.encoder.name} ({' or '.join(encoder.encoder.classes)})"
        yield "to use it", f"clip=auto clip.path={files.path}"
    else:
        yield "family", describe_family(files, prefix, layers)
    labels = Counter(layer.label for layer in layers.values())
    for label, count in labels.most_common():
        yield "layers", f"{count} × {label}"
    casts = [layer.largest for layer in layers.values() if layer.largest is not None]
    if casts:
        yield (
            "no scale",
            f"{count_noun(len(casts), 'fp8 weight')}, casts by their numbers: they reach {max(casts):g}",
        )
    yield from describe_provenance(files)


def find_text_encoder(files: TensorFiles) -> DetectedEncoder | None:
    """Find the text encoder that a file without a denoiser holds.

    None also for a file with several of them, or one that cannot be read: other rows say more about it.
    """
    shapes = {key: info.shape for key, info in files.items()}
    try:
        if detect_denoiser(find_denoiser_keys(shapes), load_families().values()):
            return None
        return detect_encoder(shapes)
    except (ConfigError, FileError):
        return None


def describe_family(files: TensorFiles, prefix: str, layers: Mapping[str, CheckpointLayer]) -> str:
    """Name the family and the class of the denoiser in a file.

    Args:
        files: of the checkpoint.
        prefix: before the denoiser's keys.
        layers: quantized ones, whose scales are no tensors of the denoiser.
    """
    sibling_keys = {key for layer in layers.values() for key in layer.sibling_keys}
    shapes = {}
    for key, shape in get_logical_shapes(files, layers).items():
        if key.startswith(prefix) and key not in sibling_keys:
            shapes[key.removeprefix(prefix)] = shape
    try:
        detected = detect_denoiser(shapes, load_families().values(), shapes)
    except ConfigError as error:
        return str(error)
    if detected is None:
        return "unknown: no fingerprint in conf/model_type matches"
    family, class_name = detected
    return f"{family.name} ({class_name})"


def describe_provenance(files: TensorFiles) -> Iterator[Row]:
    """Describe how int8run made a checkpoint; nothing when another program did."""
    provenance = read_provenance(files.path, files.metadata)
    if not provenance:
        return
    yield "made by", f"int8run {provenance.get('int8run')} from {provenance.get('model')}"
    yield "tensors", describe_data(files)
    settings = []
    for name in ("outlier", "rounding", "loras", "seed"):
        value = provenance.get(name)
        if value not in (None, []):
            settings.append(f"{name} {value}")
    yield "settings", ", ".join(settings)
    kept_float = provenance.get("kept_float")
    reasons = Counter(map(str, kept_float.values())) if isinstance(kept_float, dict) else Counter()
    yield "kept float", "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "none"


def describe_data(files: TensorFiles) -> str:
    """Say whether a checkpoint of ours holds what was written; all of its tensors are read."""
    try:
        has_hash = check_data(files)
    except FileError as error:
        return str(error)
    return "as int8run wrote them, by their hash" if has_hash else "not checked: the file has no hash of them"


def describe_lora(path: Path, header: Header, metadata: Mapping[str, str]) -> Iterator[Row]:
    """Describe a LoRA file: what it changes, what it is made for, how to call it up.

    Args:
        path: of the file; sidecar files beside it are read, too.
        header: entries of its tensors.
        metadata: of its header.

    Raises:
        FileError: for a shape that no LoRA has.
        LoraError: for several adapters in one file.
    """
    groups = group_keys(path, header)
    modules = Counter(module.component for module in groups.modules)
    counts = [f"{component} {count_noun(count, 'module')}" for component, count in modules.items()]
    module_counts = ", ".join(counts)
    ranks = find_ranks(path, header)
    yield "LoRA", f"{module_counts}, rank {', '.join(map(str, ranks))}" if ranks else module_counts

    parts = [part for module in groups.modules for part in module.by_part]
    types = Counter(ADAPTER_TYPES[part] for part in parts if part in ADAPTER_TYPES)
    type_counts = ", ".join(f"{count} × {name}" for name, count in types.items())
    yield "adapter types", type_counts or "none that can be applied"
    reasons = Counter(groups.skipped.values())
    if reasons:
        left_out = [f"{count_noun(count, 'key')}: {reason}" for reason, count in reasons.items()]
        yield "cannot be applied", "; ".join(left_out)
    unread = list_unread_types(reasons)
    if unread:
        yield "what to do", describe_unread_types(unread)
    yield "first module", parse_key(next(iter(header))).name

    base = detect_lora_base(header, metadata)
    if base is not None:
        yield "base model", str(base)
    else:
        architecture = metadata.get("modelspec.architecture", "unknown from names, shapes and tags")
        yield "base model", architecture[:MAX_VALUE_LENGTH]
    yield from describe_triggers(path, metadata)
    yield from describe_few_step(path, metadata, base.name if base is not None else None)
    yield from describe_header(path, metadata, header).items()


def find_ranks(path: Path, header: Header) -> list[int]:
    """Find the ranks of low-rank pairs, in ascending order.

    Raises:
        FileError: for a pair without a shape.
    """
    ranks = set()
    for key, entry in header.items():
        if parse_key(key).part != "down":
            continue
        if not entry["shape"]:
            raise FileError(f"{path}: {key} has shape []; a low-rank pair has two dimensions")
        ranks.add(entry["shape"][0])
    return sorted(ranks)


def describe_triggers(path: Path, metadata: Mapping[str, str]) -> Iterator[Row]:
    """Describe the trigger words, the most reliable ones first."""
    triggers = list(iter_trigger_words(path, metadata))
    if not triggers:
        yield "trigger words", "not named"
    for trigger in triggers[:MAX_TRIGGERS]:
        source = f"{trigger.source}, from its training data" if trigger.is_guessed else trigger.source
        yield "trigger words", f"{', '.join(trigger.words)} ({source})"


def describe_few_step(path: Path, metadata: Mapping[str, str], base: str | None) -> Iterator[Row]:
    """Describe the few-step preset whose name the file bears, if any.

    Args:
        path: of the file.
        metadata: of its header.
        base: name of the base model that it is made for; None where that is unknown.
    """
    preset = few_step.detect_preset(path, metadata, base)
    if preset is not None:
        yield "few steps", f"looks like preset {preset}: set few_step: {preset} at its adapter"
        return
    other_preset = few_step.detect_preset(path, metadata)
    if other_preset is not None:
        yield (
            "few steps",
            f"named like preset {other_preset}, which is not made for this base model",
        )
