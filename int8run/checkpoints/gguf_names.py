"""What llama.cpp's converter did to the tensors of a language model: their names, and their numbers.

Facts are in `gguf_architectures.yaml`. A denoiser's tensors have the names that its authors gave them, and
stay as they are. `gguf_files` asks for each tensor; no tensor is read here.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import NamedTuple

import yaml

from int8run.checkpoints.gguf_blocks import StoredForm
from int8run.checkpoints.gguf_cursor import Value
from int8run.checkpoints.gguf_header import GgufHeader, GgufTensor
from int8run.errors import FileError

FACTS_FILE = Path(__file__).with_name("gguf_architectures.yaml")
ARCHITECTURE_KEY = "general.architecture"
LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
# a tensor of a layer in llama.cpp's names; denoisers have other ones
LLAMA_LAYER = re.compile(r"(?:^|\.)blk\.\d+\.")


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's converter does to one kind of model; fields as in the YAML file."""

    names: Mapping[str, str] = field(default_factory=dict)
    paired_rows: Mapping[str, str] = field(default_factory=dict)
    without: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    cut_rows: Sequence[str] = ()
    added: Mapping[str, float] = field(default_factory=dict)

    def fit(self, patterns: Collection[str]) -> "Architecture":
        """The same for a file, with the names that count where it has not all layers.

        Args:
            patterns: of the layers that the file has.
        """
        names = dict(self.names)
        for layers, other_names in self.without.items():
            if layers not in patterns:
                names |= other_names
        return replace(self, names=names)


class AdaptedTensor(NamedTuple):
    """A tensor under the name that transformers has for it, and how its numbers lie; None: row by row."""

    key: str
    form: StoredForm | None


@cache
def load_architectures() -> Mapping[str, Architecture]:
    """What `gguf_architectures.yaml` says, by `general.architecture`."""
    rows = yaml.safe_load(FACTS_FILE.read_text(encoding="utf-8"))
    return {name: Architecture(**row) for name, row in rows.items()}


def name_architecture(metadata: Mapping[str, Value]) -> str:
    """The architecture that a file names; empty where it names none."""
    name = metadata.get(ARCHITECTURE_KEY, "")
    return name if isinstance(name, str) else ""


def find_architecture(path: Path, header: GgufHeader) -> Architecture:
    """What was done to the tensors of a file; nothing to those of a denoiser.

    Args:
        path: of the file.
        header: of the file.

    Raises:
        FileError: for a language model of an architecture that is not known here.
    """
    name = name_architecture(header.metadata)
    known = load_architectures()
    if name in known:
        return known[name].fit({make_pattern(tensor.name) for tensor in header.tensors})
    llama_layer = next((tensor.name for tensor in header.tensors if LLAMA_LAYER.search(tensor.name)), None)
    if llama_layer is None:
        return Architecture()
    raise FileError(
        f"{path} cannot be read: it is a language model of the architecture {name or 'unknown'!r} in "
        f"llama.cpp's names ({llama_layer}); of these int8run reads {', '.join(known)}; take the "
        ".safetensors checkpoint"
    )


def make_pattern(name: str) -> str:
    """The layer that a tensor is of, with `*` for its numbers: `blk.*.attn_q` of `blk.3.attn_q.weight`."""
    module, dot, _ = name.rpartition(".")
    return LAYER_NUMBER.sub("*", module + dot).removesuffix(".")


def adapt_tensor(
    path: Path, tensor: GgufTensor, architecture: Architecture, metadata: Mapping[str, Value]
) -> AdaptedTensor:
    """Undo the converter's work on a tensor: find its name, and how to read its numbers.

    Args:
        path: of the file.
        tensor: of the file.
        architecture: what was done to its tensors.
        metadata: of the file.

    Raises:
        FileError: for rows that cannot be those of the heads that the file counts.
    """
    module, dot, parameter = tensor.name.rpartition(".")
    pattern = make_pattern(tensor.name)
    key = tensor.name
    if pattern in architecture.names:
        name = architecture.names[pattern]
        for number in LAYER_NUMBER.findall(module + dot):
            name = name.replace("*", number, 1)
        key = name + dot + parameter
    heads = 0
    if pattern in architecture.paired_rows:
        heads = count_heads(path, tensor, architecture.paired_rows[pattern], metadata)
    added = sum(amount for names, amount in architecture.added.items() if fnmatchcase(pattern, names))
    form = StoredForm(
        block=tensor.block,
        dtype=tensor.dtype,
        paired_heads=heads,
        added=added,
        may_lack_rows=pattern in architecture.cut_rows,
    )
    return AdaptedTensor(key, None if form.is_plain else form)


def count_heads(path: Path, tensor: GgufTensor, entry: str, metadata: Mapping[str, Value]) -> int:
    """How many heads the rows of a tensor are of.

    Args:
        path: of the file.
        tensor: of the file.
        entry: of the metadata that counts them, without the architecture.
        metadata: of the file.

    Raises:
        FileError: where it does not say, or the rows are no multiple of pairs of as many heads.
    """
    architecture = name_architecture(metadata)
    found = metadata.get(f"{architecture}.{entry}")
    if found is None and entry.endswith("_kv"):  # llama.cpp takes as many as for queries
        found = metadata.get(f"{architecture}.{entry.removesuffix('_kv')}")
    rows = tensor.shape[0] if tensor.shape else 0
    is_count = isinstance(found, int) and not isinstance(found, bool) and found > 0
    if not is_count or not rows or rows % (2 * found):  # type: ignore[operator]
        raise FileError(
            f"{path} cannot be read: {tensor.name} has {rows} rows, and {architecture}.{entry} in its "
            f"metadata, which counts their heads, is {str(found)[:40]}; the file is damaged or of another "
            "program"
        )
    assert isinstance(found, int)
    return found
