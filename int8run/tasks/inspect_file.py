"""`task=inspect`: what a safetensors file is, told from its header alone."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from int8run.checkpoints.provenance import PROVENANCE_KEY, read_provenance
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.header import read_header
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.lora import few_step
from int8run.lora.base_model import detect_lora_base
from int8run.lora.key_parsing import parse_key
from int8run.lora.metadata import iter_trigger_words, describe_header
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.state_dict_adapter import find_denoiser_keys, find_prefix
from int8run.text_encoders.detect import DetectedEncoder, detect_encoder
from int8run.utils.disk_cache import DiskCache


def inspect_cache(store: DiskCache) -> Table:
    """What is kept on disk for later runs."""
    kept = store.list_files()
    total = sum(entry.bytes for entry in kept)
    table = Table(
        title=escape(f"{store.path}: {total / 1e9:.2f} of {store.limit_gb:g} GB"), title_justify="left"
    )
    for column in ("kind", "made from", "size", "last used"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for entry in reversed(kept):
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(
            entry.path.parent.name,
            escape(describe_cache_entry(entry.path)),
            f"{entry.bytes / 1e6:.1f} MB",
            used,
        )
    return table


def describe_cache_entry(path: Path) -> str:
    """One line on a file of the cache, from its header."""
    try:
        note = read_provenance(path, read_header(path)[1])
    except FileError:
        return f"{path.name}, damaged"
    if not note:
        return path.name
    drawn = f"{note['drawings']} drawings" if "drawings" in note else None
    facts = [
        note.get("model"),
        note.get("family"),
        note.get("outlier"),
        note.get("rounding"),
        drawn,
        *(name for name, *_ in note.get("loras", [])),
    ]
    return ", ".join(str(fact) for fact in facts if fact)


def inspect_file(location: str) -> Table:
    """A table of what the header says: kind, tensors, LoRA ranks and triggers, quantized layers, metadata."""
    path = Path(location).expanduser()
    if path.is_dir():
        return inspect_folder(path)
    header, metadata = read_header(path)
    table = Table(title=escape(path.name), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    add = lambda name, value: table.add_row(name, escape(str(value)))  # noqa: E731
    dtypes = Counter(entry["dtype"] for entry in header.values())
    add("kind", classify_file(header))
    add("size", f"{path.stat().st_size / 1e6:.1f} MB, {len(header)} tensors")
    add("dtypes", ", ".join(f"{n} × {dtype}" for dtype, n in dtypes.most_common()))
    told = set()
    if classify_file(header) == "LoRA":
        for name, value in describe_lora(path, header, metadata):
            add(name, value)
            told.add(value)
    else:
        with TensorFiles.open(path) as files:
            for name, value in describe_checkpoint(files):
                add(name, value)
    for key, value in sorted(metadata.items()):
        if value in told or key == PROVENANCE_KEY:
            continue
        add(
            f"header: {key[:60]}", value if len(value) <= 200 else f"{value[:200]}… ({len(value)} characters)"
        )
    return table


def inspect_folder(path: Path) -> Table:
    """The same of a checkpoint in several files."""
    with TensorFiles.open(path) as files:
        table = Table(title=escape(str(path)), title_justify="left", show_header=False)
        table.add_column(style="bold")
        table.add_column(overflow="fold")
        size = sum(info.nbytes for info in files.values())
        table.add_row("size", f"{size / 1e6:.1f} MB, {len(files)} tensors in {len(files.files)} files")
        for name, value in describe_checkpoint(files):
            table.add_row(name, escape(value))
    return table


def describe_checkpoint(files: TensorFiles) -> Iterator[tuple[str, str]]:
    """What is worth knowing of a checkpoint: its family, how each layer is stored, and how int8run made it. What is wrong is said."""
    encoder = find_text_encoder(files)
    prefix = encoder.prefix if encoder else find_prefix(files)
    yield "prefix", prefix or "none"
    try:
        layers = read_layers(files, prefix)
    except FileError as error:
        yield "cannot be read", str(error)
        return
    if encoder:
        yield "text encoder", f"{encoder.encoder.name} ({' or '.join(encoder.encoder.classes)})"
        yield "to use it", f"clip=auto clip.path={files.path}"
    else:
        yield from describe_family(files, prefix, layers)
    for label, count in Counter(layer.label for layer in layers.values()).most_common():
        yield "layers", f"{count} × {label}"
    note = read_provenance(files.path, files.metadata)
    if note:
        yield "made by", f"int8run {note.get('int8run')} from {note.get('model')}"
        facts = {name: note.get(name) for name in ("outlier", "rounding", "loras", "seed")}
        yield (
            "settings",
            ", ".join(f"{name} {value}" for name, value in facts.items() if value not in (None, [])),
        )
        reasons = (
            Counter(map(str, note["kept_float"].values()))
            if isinstance(note.get("kept_float"), dict)
            else Counter()
        )
        yield "kept float", "; ".join(f"{n} × {why}" for why, n in reasons.items()) or "none"


def find_text_encoder(files: TensorFiles) -> DetectedEncoder | None:
    """The text encoder that a file without a denoiser holds."""
    shapes = {key: info.shape for key, info in files.items()}
    try:
        return (
            None
            if detect_denoiser(find_denoiser_keys(shapes), load_families().values())
            else detect_encoder(shapes)
        )
    except (ConfigError, FileError):  # none, or one that the rows below tell more about
        return None


def describe_family(
    files: TensorFiles, prefix: str, layers: Mapping[str, CheckpointLayer]
) -> Iterator[tuple[str, str]]:
    """The denoiser that a file holds."""
    beside = {key for layer in layers.values() for key in layer.sibling_keys}
    known = get_logical_shapes(files, layers)
    shapes = {
        key.removeprefix(prefix): shape
        for key, shape in known.items()
        if key.startswith(prefix) and key not in beside
    }
    try:
        found = detect_denoiser(shapes, load_families().values(), shapes)
        yield (
            "family",
            f"{found[0].name} ({found[1]})"
            if found
            else "unknown: no fingerprint in conf/model_type matches",
        )
    except ConfigError as error:
        yield "family", str(error)


def describe_lora(path: Path, header: dict[str, dict], metadata: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is worth knowing of a LoRA file, as name and text.

    Raises:
        FileError: for a shape that no LoRA has.
    """
    keys = {key: parse_key(key) for key in header}
    ranks: Counter[int] = Counter()
    for key, (_, _, part, _) in keys.items():
        if part == "down":
            if not header[key]["shape"]:
                raise FileError(f"{path}: {key} has shape []; a low-rank pair has two dimensions")
            ranks[header[key]["shape"][0]] += 1
    modules = Counter(
        component for component, _ in {(k.component, k.name) for k in keys.values() if k.part is not None}
    )
    listed = f", rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    yield "LoRA", f"{', '.join(f'{component} {n} modules' for component, n in modules.items())}{listed}"
    kinds = Counter(ADAPTER_TYPES[k.part] for k in keys.values() if k.part in ADAPTER_TYPES)
    yield "kinds", ", ".join(f"{n} × {name}" for name, n in kinds.items()) or "none that can be applied"
    unknown = Counter(k.reason for k in keys.values() if k.part is None)
    if unknown:
        yield "cannot be applied", "; ".join(f"{n} keys: {reason}" for reason, n in unknown.items())
    yield "first module", next(k.name for k in keys.values())
    base = detect_lora_base(header, metadata)
    yield (
        "base model",
        str(base)
        if base
        else metadata.get("modelspec.architecture", "not told by names, shapes or tags")[:200],
    )
    triggers = list(iter_trigger_words(path, metadata))
    for found in triggers[:3]:
        yield (
            "trigger words",
            f"{', '.join(found.words)} ({found.source}{', from its training data' if found.is_guessed else ''})",
        )
    if not triggers:
        yield "trigger words", "not named"
    preset = few_step.detect_preset(path, metadata, base.name if base else None)
    other = few_step.detect_preset(path, metadata)
    if preset is not None:
        yield "few steps", f"looks like preset {preset}: set few_step: {preset} at its adapter"
    elif other is not None:
        yield "few steps", f"its words are those of preset {other}, which is not made for this base model"
    yield from describe_header(path, metadata, header).items()


# the part that stands for each kind of change
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
}


QUANTIZED_DTYPES = {"I8", "F8_E4M3", "F8_E5M2", "U8"}  # dtypes of weights


def classify_file(header: dict[str, dict]) -> str:
    """LoRA, quantized checkpoint or plain weights, by key suffixes and dtypes."""
    if any(
        parse_key(key).part in ADAPTER_TYPES or parse_key(key).reason.startswith("unsupported adapter type")
        for key in header
    ):
        return "LoRA"
    dtypes = {entry["dtype"] for key, entry in header.items() if key.endswith(".weight")} & QUANTIZED_DTYPES
    if any(key.endswith(".comfy_quant") for key in header):
        return "quantized checkpoint with ComfyUI markers"
    if dtypes and any(key.endswith(("_scale", ".scale_weight", "_scale_inv")) for key in header):
        return f"quantized checkpoint ({', '.join(sorted(dtypes))} with scales)"
    return "plain weights"
