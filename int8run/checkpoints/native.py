"""INT8 checkpoints as one safetensors file, by ComfyUI's names: `weight` (int8), `weight_scale` and a `comfy_quant` marker a layer.

Layers without a transform and layers rotated by a regular Hadamard matrix are ComfyUI's own `int8_tensorwise`. The others carry a
format name of ours, which ComfyUI refuses: it would otherwise load them as if nothing had been done to them.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from int8run.checkpoints.header import read_header
from int8run.errors import FileError
from int8run.kernels.hadamard.reference import Rotation, regular_hadamard, sylvester_hadamard
from int8run.layers.linear import QuantizedLayer
from int8run.outlier.base import NONE, OutlierTransform
from int8run.quant.weight import QuantizedWeight

log = logging.getLogger(__name__)
COMFY, OURS = "int8_tensorwise", "int8run_transformed"
CONVROT = "convrot"
MARKER, SCALE, FACTOR = "comfy_quant", "weight_scale", "pre_quant_scale"
FLOATS = ("F32", "F16", "BF16")
NOTE = "int8run"  # the key of our note in the header's metadata


def write_checkpoint(location: str, layers: Mapping[str, QuantizedLayer], rest: Mapping[str, Tensor], note: Mapping[str, object]) -> Path:
    """Write INT8 layers and float tensors to a new file, then move it to its place, so that nobody meets half a file.

    Args:
        layers: by module name.
        rest: float tensors by key.
        note: how it was made, for the header.

    Raises:
        FileError: when it cannot be written.
    """
    tensors = {key: t.detach().contiguous().cpu() for key, t in rest.items()}
    for name, layer in layers.items():
        tensors[f"{name}.weight"] = layer.weight.qdata.contiguous().cpu()
        tensors[f"{name}.{SCALE}"] = layer.weight.scale.contiguous().cpu()
        tensors[f"{name}.{MARKER}"] = torch.tensor(list(json.dumps(marker(layer.transform)).encode()), dtype=torch.uint8)
        if layer.transform.factor is not None:
            tensors[f"{name}.{FACTOR}"] = layer.transform.factor.contiguous().cpu()
        if layer.bias is not None:
            tensors[f"{name}.bias"] = layer.bias.detach().contiguous().cpu()
    places = {t.data_ptr(): key for key, t in tensors.items()}
    # the format has no tensor under two names
    tensors = {key: t if places[t.data_ptr()] == key else t.clone() for key, t in tensors.items()}
    path = prepare_folder(location)
    fresh = path.with_name(f".{time.time_ns()}.safetensors")
    try:
        if path.exists():
            log.warning("save=%s replaces a file that is there", location)
        save_file(tensors, fresh, {"format": "pt", NOTE: json.dumps(note)})
        fresh.replace(path)
    except (OSError, SafetensorError) as error:
        raise unwritable(location, error) from error
    finally:
        with suppress(OSError):  # where no file can be there is none to remove
            fresh.unlink(missing_ok=True)
    return path


def prepare_folder(location: str) -> Path:
    """Make the folder of a file to be, and try whether it can be written to. Returns the file's absolute path.

    Raises:
        FileError: when it cannot.
    """
    path = Path(location).expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise unwritable(location, error) from error
    return path


def unwritable(location: str, error: Exception) -> FileError:
    """The error for a place that cannot be written to."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FileError(f"save={location} cannot be written: {reason}; choose a folder that you may write to")


def marker(transform: OutlierTransform) -> dict[str, object]:
    """What a reader must know of one layer besides its tensors."""
    if transform.method == NONE:
        return {"format": COMFY, "per_row": True}
    if transform.method == CONVROT:
        return {"format": COMFY, "convrot": True, "convrot_groupsize": transform.group_size, "per_row": True}
    kind = {"rotation": "sylvester" if transform.sylvester else "regular", "group_size": transform.group_size}
    return {
        "format": OURS, "outlier": transform.method, "settings": transform.settings, **(kind if transform.group_size else {}),
        "centered": transform.centered, "factor": transform.factor is not None,
    }  # fmt: skip


def is_ours(marker: Mapping[str, Any]) -> bool:
    """Whether a marker holds what `marker` writes under our own format name."""
    settings = marker.get("settings")
    return (
        marker.get("format") == OURS
        and isinstance(marker.get("outlier"), str)
        and isinstance(settings, dict)
        and all(type(value) in (int, float) and -1e9 < value < 1e9 for value in settings.values())
        and marker.get("rotation") in (None, "regular", "sylvester")
        and ("rotation" in marker) == ("group_size" in marker)
        and all(isinstance(marker.get(key), bool) for key in ("centered", "factor"))
    )


@dataclass(frozen=True)
class Checkpoint:
    """An opened file: its header is read, its tensors are not.

    Args:
        markers: of each INT8 layer.
        note: how it was made; empty when another program wrote it.
    """

    path: Path
    markers: Mapping[str, Mapping[str, Any]]
    note: Mapping[str, Any]

    @property
    def rounding(self) -> str:
        """How its weights were rounded, as far as it says."""
        return str(self.note.get("rounding", "unknown"))

    def transforms(self) -> dict[str, OutlierTransform]:
        """The transform of each layer, without its factor.

        Raises:
            FileError: for a marker that cannot be understood.
        """
        return {name: self.transform(name, None) for name in self.markers}

    def layer(self, name: str, device: torch.device) -> QuantizedLayer:
        """Read one layer; its bias stays with the float model."""
        with opened(self.path, str(device)) as file:
            keys = set(file.keys())
            read = {key: file.get_tensor(f"{name}.{key}") for key in ("weight", SCALE, FACTOR) if f"{name}.{key}" in keys}
        factor = read[FACTOR].float() if FACTOR in read else None
        weight = QuantizedWeight(read["weight"], read[SCALE].float().reshape(-1, 1))
        return QuantizedLayer(weight, self.transform(name, factor).to(device), None)

    def transform(self, name: str, factor: Tensor | None) -> OutlierTransform:
        """What the marker of a layer says was done to it."""
        found = self.markers[name]
        if found.get("format") == COMFY and found.get("convrot"):
            group = found.get("convrot_groupsize", 256)
            return OutlierTransform(CONVROT, {"group_size": self.group(name, group)}, rotation=self.rotation(name, group, False))
        if found.get("format") == COMFY:
            return OutlierTransform()
        if not is_ours(found):
            shown = json.dumps(found)[:200]
            raise FileError(f"{self.path}: {name} has the marker {shown}; this version reads {COMFY} and {OURS}, which save= writes")
        kind = found.get("rotation")
        rotation = None if kind is None else self.rotation(name, found["group_size"], kind == "sylvester")
        return OutlierTransform(found["outlier"], found["settings"], factor, rotation, found["centered"])

    def group(self, name: str, size: object) -> int:
        """A group size out of a marker."""
        if not isinstance(size, int) or not 2 <= size <= 4096:  # `true` is 1
            raise FileError(f"{self.path}: {name} is rotated in groups of {size!r}, which is no group size")
        return size

    def rotation(self, name: str, size: object, sylvester: bool) -> Rotation:
        """The rotation that a marker names."""
        try:
            return Rotation((sylvester_hadamard if sylvester else regular_hadamard)(self.group(name, size)), sylvester)
        except ValueError as error:
            raise FileError(f"{self.path}: {name} is rotated in groups of {size!r}: {error}") from error


def open_checkpoint(location: str, widths: Mapping[str, tuple[int, int]]) -> Checkpoint:
    """Read the header and the markers, and compare them with the model.

    Args:
        widths: (out_features, in_features) of each Linear of the model, by name.

    Raises:
        FileError: missing or damaged file; a layer that the model does not have or has in another shape; an INT8 weight without a
            scale or a marker; a group that does not divide.
    """
    path = Path(str(location)).expanduser()
    header, metadata = read_header(path)
    names = [key.removesuffix(".weight") for key, entry in header.items() if key.endswith(".weight") and entry["dtype"] == "I8"]
    if not names:
        dtypes = ", ".join(f"{n} × {d}" for d, n in Counter(e["dtype"] for e in header.values()).most_common())
        raise FileError(f"{path} holds no INT8 layer ({dtypes}); int8.checkpoint takes a file that save= wrote")
    unknown = [name for name in names if name not in widths]
    if unknown:
        raise FileError(
            f"{path}: {len(unknown)} of {len(names)} INT8 layers are not in this model (first: {unknown[0]}); it is for another"
        )
    for name in names:
        rows, columns = widths[name]
        for part, shapes in (("weight", [[rows, columns]]), (SCALE, [[rows, 1], [rows]]), (FACTOR, [[columns]])):
            entry = header.get(f"{name}.{part}")
            if entry is None and part == SCALE:
                raise FileError(f"{path}: {name} is INT8 and has no {SCALE}; the file is incomplete")
            if entry is not None and entry["shape"] not in shapes:
                raise FileError(
                    f"{path}: {name}.{part} has the shape {entry['shape']}, this model wants {shapes[0]}; it is for another model"
                )
            if entry is not None and part != "weight" and entry["dtype"] not in FLOATS:
                raise FileError(f"{path}: {name}.{part} is {entry['dtype']}; it takes {', '.join(FLOATS)}")
        entry = header.get(f"{name}.{MARKER}")
        if entry is None:
            raise FileError(f"{path}: {name} is INT8 and has no {MARKER} marker, so nobody knows whether it is rotated")
        if entry["dtype"] != "U8" or len(entry["shape"]) != 1:
            raise FileError(f"{path}: {name}.{MARKER} is {entry['dtype']} {entry['shape']}; a marker is a row of bytes, U8")
    parts = {f"{name}.{part}" for name in names for part in (SCALE, FACTOR, MARKER)}
    orphans = [key for key in header if key.endswith((f".{SCALE}", f".{FACTOR}", f".{MARKER}")) and key not in parts]
    if orphans:
        raise FileError(f"{path}: {orphans[0]} belongs to no INT8 weight; the file is damaged")
    with opened(path, "cpu") as file:
        markers = {name: parse(path, f"the marker of {name}", bytes(file.get_tensor(f"{name}.{MARKER}").tolist())) for name in names}
        for key in sorted(parts & set(header)):
            if not key.endswith(f".{MARKER}"):
                check_positive(path, key, file.get_tensor(key))
    checkpoint = Checkpoint(path, markers, parse(path, "the note in the header", metadata.get(NOTE, "{}").encode()))
    for name, transform in checkpoint.transforms().items():
        if bool(markers[name].get("factor")) != (f"{name}.{FACTOR}" in header):
            raise FileError(f"{path}: the marker of {name} and its {FACTOR} contradict each other; the file is damaged")
        group, columns = transform.group_size, widths[name][1]
        if group and columns % group:
            raise FileError(f"{path}: {name} is rotated in groups of {group}, which do not divide its {columns} inputs")
    return checkpoint


@contextmanager
def opened(path: Path, device: str) -> Iterator[Any]:
    """The file, to read tensors from; what the library finds wrong with it becomes an error of ours."""
    try:
        with safe_open(path, "pt", device=device) as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FileError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def check_positive(path: Path, key: str, numbers: Tensor) -> None:
    """Refuse scales and factors that no writer makes."""
    wrong = int((~(torch.isfinite(numbers) & (numbers > 0))).sum())
    if wrong:
        raise FileError(f"{path}: {wrong} of {numbers.numel()} numbers of {key} are not finite and above 0; the file is damaged")


def parse(path: Path, name: str, text: bytes) -> dict[str, Any]:
    """A JSON object out of a file."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: {name} is no JSON: {text[:80]!r}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path}: {name} is no JSON object: {text[:80]!r}")
    return found
