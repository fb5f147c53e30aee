"""What is known about a model: facts about an architecture family and about one checkpoint, both from YAML."""

import fnmatch
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, check_choice, suggest_similar
from int8run.models.sampling import Sampling

log = logging.getLogger(__name__)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class IgnoreRule:
    """Linears that stay float: fnmatch pattern on the module name, and the reason that `layers.csv` shows."""

    pattern: str
    reason: str


@dataclass(frozen=True)
class DeferredGelu:
    """A GELU (tanh) that the quantization of the next layer can compute on the way; names are relative to a block.

    Args:
        activation: the module that computes it.
        source: the Linear whose output it takes.
        into: the Linear that reads the result, as the last of its input columns.
    """

    activation: str
    source: str
    into: str


@dataclass(frozen=True)
class Fingerprint:
    """How the weights of a denoiser are known by their names in a file, without the prefix that a file may put before all of them.

    Args:
        denoiser: the diffusers class that such weights belong to.
        all: fnmatch patterns; each matches some key.
        none: fnmatch patterns; none matches any key.
    """

    denoiser: str
    all: Sequence[str]
    none: Sequence[str] = ()


MIXED_PRECISION = ("none", "auto")
# the files that say what is known about each family
FAMILY_FOLDER = Path(__file__).parents[1] / "conf" / "model_type"
# fields of a family that are rows of a table, and what a row is
ITEM_TYPES: Mapping[str, type] = {
    "ignore": IgnoreRule,
    "deferred_gelu": DeferredGelu,
    "fingerprints": Fingerprint,
}


@dataclass(frozen=True)
class ModelFamily:
    """One architecture family. The rows of its tables may be given as mappings, as YAML has them.

    Args:
        name: the word used for it everywhere.
        denoisers: diffusers classes of the denoiser that belong to the family.
        mixed_precision: `none`: the layers of `ignore` stay float; `auto`: and the most sensitive ones, until `quality_db` is met.
        ignore: rules for Linears that stay float; the first that matches counts.
        same_input: groups of Linears, relative to a block, that read the same tensor: it is quantized once for all.
        deferred_gelu: activations that move into the quantization of the next layer.
        inputs: in_features of Linears by fnmatch pattern, where families share a class: each pattern matches some Linear, and all
            that it matches are this wide.
        fingerprints: files whose weights belong to the family.
        blocks: names of the lists of repeated blocks.
        lora_prefixes: words before the layer names in LoRA files made for it.
        hardware: the smallest that it makes sense on, in one sentence.
    """

    name: str
    denoisers: Sequence[str] = ()
    mixed_precision: str = "none"
    ignore: Sequence[IgnoreRule] = ()
    same_input: Sequence[Sequence[str]] = ()
    deferred_gelu: Sequence[DeferredGelu] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Sequence[Fingerprint] = ()
    blocks: Sequence[str] = ()
    lora_prefixes: Sequence[str] = ()
    hardware: str = ""

    def __post_init__(self) -> None:
        check_choice("model_type.mixed_precision", self.mixed_precision, MIXED_PRECISION)
        for name, kind in ITEM_TYPES.items():
            rows = [
                parse_item(kind, row, f"model_type.{name}.{i}") for i, row in enumerate(getattr(self, name))
            ]
            object.__setattr__(self, name, tuple(rows))  # the class is frozen

    def find_skip_reason(self, layer: str) -> str | None:
        """The reason why a Linear stays float, or None when it becomes INT8."""
        return next((rule.reason for rule in self.ignore if fnmatch.fnmatchcase(layer, rule.pattern)), None)

    def find_input_mismatch(self, linears: Mapping[str, int]) -> str | None:
        """What speaks against the family in the widths of a denoiser's Linears (name -> in_features), or None where they fit."""
        for pattern, width in self.inputs.items():
            found = {linears[name] for name in linears if fnmatch.fnmatchcase(name, pattern)}
            if found != {width}:
                widths = "/".join(map(str, sorted(found))) or "none"
                return f"{pattern} takes {width} inputs, the denoiser has {widths}"
        return None

    def resolve_family(
        self, denoiser: str, blocks: Sequence[str], linears: Mapping[str, int]
    ) -> "ModelFamily":
        """The family to use for a denoiser class. A named family is taken at its word, but a mismatch is said."""
        if self.denoisers and denoiser not in self.denoisers:
            log.warning(
                "model_type=%s is for %s, the denoiser is a %s", self.name, "/".join(self.denoisers), denoiser
            )
        elif wrong := self.find_input_mismatch(linears):
            log.warning("model_type=%s does not fit this %s: %s", self.name, denoiser, wrong)
        return self


def parse_item(kind: type, row: Any, where: str) -> Any:
    """A row of a family's table: one that is made already, or the mapping that YAML has.

    Raises:
        ConfigError: for a key that such a row does not have, or one that is missing.
    """
    if isinstance(row, kind):
        return row
    known = [f.name for f in fields(kind)]
    if not isinstance(row, Mapping):
        raise ConfigError(f"{where} is {row!r}; it takes {', '.join(known)}")
    for key in row:
        if key not in known:
            raise ConfigError(
                f"no setting called '{where}.{key}'; {suggest_similar(str(key), known)}choose from {', '.join(known)}"
            )
    try:
        return kind(**row)
    except TypeError as error:
        raise ConfigError(f"{where} is {dict(row)}; it needs {', '.join(known)}") from error


@functools.cache
def load_families() -> Mapping[str, ModelFamily]:
    """The families of `conf/model_type` that name what belongs to them, by name. Read when a job needs them, not by every one."""
    found = {
        file.stem: yaml.safe_load(file.read_text(encoding="utf-8"))
        for file in sorted(FAMILY_FOLDER.glob("*.yaml"))
    }
    return {
        name: ModelFamily(**{key: value for key, value in family.items() if key != "_target_"})
        for name, family in found.items()
        if family.get("denoisers") or family.get("fingerprints")
    }


@dataclass(frozen=True)
class AutoFamily:
    """Decides by the denoiser's class and the inputs that a family names.

    For an unknown one only Linears inside the repeated blocks become INT8.

    Args:
        families: to choose from; None: all that ship.
    """

    mixed_precision: str = "none"
    families: Mapping[str, ModelFamily] | None = None
    name: str = "auto"

    def __post_init__(self) -> None:
        check_choice("model_type.mixed_precision", self.mixed_precision, MIXED_PRECISION)

    def resolve_family(self, denoiser: str, blocks: Sequence[str], linears: Mapping[str, int]) -> ModelFamily:
        """The family of a denoiser, else the conservative rule with a warning.

        Args:
            blocks: names of the repeated block lists, with `.` at the end of each block's own prefix, in model order.
            linears: in_features of the denoiser's Linears by name.
        """
        families = load_families() if self.families is None else self.families
        for family in families.values():
            if denoiser in family.denoisers and family.find_input_mismatch(linears) is None:
                return replace(family, mixed_precision=self.mixed_precision)
        log.warning(
            "model_type=auto does not know %s; only Linears inside its repeated blocks become INT8, the first and the last "
            "block stay float. Name one with model_type= (%s) or write one: docs in conf/model_type/",
            denoiser,
            ", ".join(sorted(families)),
        )
        return replace(build_conservative_family(blocks, linears), mixed_precision=self.mixed_precision)


def build_conservative_family(blocks: Sequence[str], linears: Iterable[str]) -> ModelFamily:
    """The rule for a denoiser that nobody described: its repeated blocks but the very first and the very last, nothing else."""
    middle = tuple(blocks[1:-1])
    rules = [
        IgnoreRule(n, "unknown architecture: outside the middle blocks")
        for n in linears
        if not n.startswith(middle)
    ]
    return ModelFamily(name="unknown", ignore=rules)


@dataclass(frozen=True)
class ModelSource:
    """One checkpoint.

    Args:
        location: hub id, diffusers folder, `shipped:NAME` for a model inside this package, or a single .safetensors file with the
            denoiser alone: a path, or `org/repo/path.safetensors` on the hub.
        lora_base: the key of this checkpoint in a LoRA stack's sources.
        dtype: dtype of the float model.
        sampling: the checkpoint's own defaults.
        base: hub id or diffusers folder of everything but the denoiser, when the location is a single file.
        parts: components that the repository lacks: by name, the class of transformers and where it is.
    """

    location: str | None
    lora_base: str
    sampling: Sampling
    revision: str | None = None
    dtype: str = "bfloat16"
    base: str | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, DTYPES)
        if not self.location:
            raise ConfigError("model has no location; set model.location=<hub id or diffusers folder>")
        for name, part in self.parts.items():
            if isinstance(part, str) or len(part) != 2:
                raise ConfigError(
                    f"model.parts.{name} is {part!r}; it takes [class of transformers, hub id or folder]"
                )
