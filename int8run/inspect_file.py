"""`task=inspect`: what a safetensors file is, told from its header alone."""

from collections import Counter
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from int8run.checkpoints.header import read_header
from int8run.errors import FileError
from int8run.lora.files import split_key, strip_prefixes, trigger_words


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
    down = {key: entry["shape"] for key, entry in header.items() if split_key(key)[1] == "down"}
    for key, shape in down.items():
        if not shape:
            raise FileError(f"{path}: {key} has shape []; a low-rank pair has two dimensions")
    pairs = {strip_prefixes(split_key(key)[0]): shape for key, shape in down.items()}
    if pairs:
        ranks = sorted({shape[0] for shape in pairs.values()})
        add("LoRA", f"{len(pairs)} modules, rank {', '.join(map(str, ranks))}")
        add("first module", next(iter(pairs)))
        add("base model", metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version") or "not named")
        add("trigger words", trigger_words(metadata) or "not named")
    for key, value in sorted(metadata.items()):
        add(f"header: {key[:60]}", value if len(value) <= 200 else f"{value[:200]}… ({len(value)} characters)")
    return table


def kind(header: dict[str, dict]) -> str:
    """LoRA, quantized checkpoint or plain weights, by key suffixes and dtypes."""
    if any(split_key(key)[1] == "down" for key in header):
        return "LoRA"
    dtypes = {entry["dtype"] for entry in header.values()}
    if any(key.endswith(".comfy_quant") for key in header):
        return "quantized checkpoint with ComfyUI markers"
    if dtypes & {"I8", "F8_E4M3", "F8_E5M2"} and any(key.endswith(("_scale", ".scale_weight", "_scale_inv")) for key in header):
        return f"quantized checkpoint ({', '.join(sorted(dtypes & {'I8', 'F8_E4M3', 'F8_E5M2'}))} with scales)"
    return "plain weights"
