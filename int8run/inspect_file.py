"""`task=inspect`: what a safetensors file is, told from its header alone."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from int8run.checkpoints.header import read_header
from int8run.errors import FileError
from int8run.lora import few_step
from int8run.lora.bases import base_of
from int8run.lora.keys import split_key
from int8run.lora.metadata import all_triggers, describe


def inspect_file(location: str) -> Table:
    """A table of what the header says: kind, tensors, LoRA ranks and triggers, quantization marks, metadata."""
    path = Path(location).expanduser()
    header, metadata = read_header(path)
    table = Table(title=escape(path.name), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    add = lambda name, value: table.add_row(name, escape(str(value)))  # noqa: E731
    dtypes = Counter(entry["dtype"] for entry in header.values())
    add("kind", kind(header))
    add("size", f"{path.stat().st_size / 1e6:.1f} MB, {len(header)} tensors")
    add("dtypes", ", ".join(f"{n} × {dtype}" for dtype, n in dtypes.most_common()))
    told = set()
    if kind(header) == "LoRA":
        for name, value in lora_rows(path, header, metadata):
            add(name, value)
            told.add(value)
    for key, value in sorted(metadata.items()):
        if value in told:
            continue
        add(f"header: {key[:60]}", value if len(value) <= 200 else f"{value[:200]}… ({len(value)} characters)")
    return table


def lora_rows(path: Path, header: dict[str, dict], metadata: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What is worth knowing of a LoRA file, as name and text.

    Raises:
        FileError: for a shape that no LoRA has.
    """
    keys = {key: split_key(key) for key in header}
    ranks: Counter[int] = Counter()
    for key, (_, _, part, _) in keys.items():
        if part == "down":
            if not header[key]["shape"]:
                raise FileError(f"{path}: {key} has shape []; a low-rank pair has two dimensions")
            ranks[header[key]["shape"][0]] += 1
    modules = Counter(component for component, _ in {(k.component, k.name) for k in keys.values() if k.part is not None})
    listed = f", rank {', '.join(map(str, sorted(ranks)))}" if ranks else ""
    yield "LoRA", f"{', '.join(f'{component} {n} modules' for component, n in modules.items())}{listed}"
    kinds = Counter(KINDS[k.part] for k in keys.values() if k.part in KINDS)
    yield "kinds", ", ".join(f"{n} × {name}" for name, n in kinds.items()) or "none that can be applied"
    unknown = Counter(k.reason for k in keys.values() if k.part is None)
    if unknown:
        yield "cannot be applied", "; ".join(f"{n} keys: {reason}" for reason, n in unknown.items())
    yield "first module", next(k.name for k in keys.values())
    base = base_of(header, metadata)
    yield "base model", str(base) if base else metadata.get("modelspec.architecture", "not told by names, shapes or tags")[:200]
    triggers = list(all_triggers(path, metadata))
    for found in triggers[:3]:
        yield "trigger words", f"{', '.join(found.words)} ({found.source}{', from its training data' if found.guessed else ''})"
    if not triggers:
        yield "trigger words", "not named"
    preset = few_step.detect(path, metadata, base.name if base else None)
    other = few_step.detect(path, metadata)
    if preset is not None:
        yield "few steps", f"looks like preset {preset}: set few_step: {preset} at its adapter"
    elif other is not None:
        yield "few steps", f"its words are those of preset {other}, which is not made for this base model"
    yield from describe(path, metadata, header).items()


# the part that stands for each kind of change
KINDS = {
    "down": "LoRA", "hada_w1_a": "LoHa", "lokr_w1": "LoKr", "lokr_w1_a": "LoKr", "diff": "diff", "diff_b": "bias", "on_input": "IA3",
    "w_norm": "norm", "dora_scale": "DoRA", "magnitude": "DoRA",
}  # fmt: skip


def kind(header: dict[str, dict]) -> str:
    """LoRA, quantized checkpoint or plain weights, by key suffixes and dtypes."""
    if any(split_key(key).part in KINDS or split_key(key).reason.startswith("unsupported kind") for key in header):
        return "LoRA"
    dtypes = {entry["dtype"] for entry in header.values()}
    if any(key.endswith(".comfy_quant") for key in header):
        return "quantized checkpoint with ComfyUI markers"
    if dtypes & {"I8", "F8_E4M3", "F8_E5M2"} and any(key.endswith(("_scale", ".scale_weight", "_scale_inv")) for key in header):
        return f"quantized checkpoint ({', '.join(sorted(dtypes & {'I8', 'F8_E4M3', 'F8_E5M2'}))} with scales)"
    return "plain weights"
