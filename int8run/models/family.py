"""What is known about a model: facts about its architecture family and about one checkpoint, both from YAML.

A family decides which layers stay float, which share an input, and how its files are recognized. All of it is
data of `conf/model_type` and `conf/model`; no code outside asks for the name of a family. No weights here.
"""

import fnmatch
import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, check_choice, suggest_similar
from int8run.models.boundary_blocks import normalize_boundary_blocks
from int8run.models.fingerprint import Fingerprint
from int8run.models.pipeline_modes import check_pipeline_settings
from int8run.models.sampling import Sampling
from int8run.utils.dtypes import FLOAT_DTYPES

log = logging.getLogger(__name__)
MIXED_PRECISION = ("none", "auto")
FAMILY_FOLDER = Path(__file__).parents[1] / "conf" / "model_type"
MODEL_FOLDER = FAMILY_FOLDER.parent / "model"
UNKNOWN_FAMILY = "unknown"  # name of the conservative rule


@dataclass(frozen=True)
class IgnoreRule:
    """Linears that stay float.

    Args:
        pattern: fnmatch pattern of module names.
        reason: why, as `layers.csv` shows it.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class DeferredGelu:
    """A GELU (tanh) that can be computed together with the quantization of the next layer's input.

    Names are relative to a block.

    Args:
        activation: the module that computes it.
        source: the Linear whose output it takes.
        into: the Linear that reads the result, as the last of its input columns.
    """

    activation: str
    source: str
    into: str


@dataclass(frozen=True)
class DeferredNorm:
    """A GroupNorm and its SiLU that a convolution can compute where it quantizes its input.

    Names are relative to a block.

    Args:
        norm: the GroupNorm.
        activation: the SiLU, which may serve several norms of the block.
        into: the convolution that reads the result.
        where: attributes of the block and their values, without which something comes between.
    """

    norm: str
    activation: str
    into: str
    where: Mapping[str, Sequence[Any]] = field(default_factory=dict)


# fields of a family that are lists of these; YAML has their items as mappings
ITEM_TYPES: Mapping[str, type] = {
    "ignore": IgnoreRule,
    "deferred_gelu": DeferredGelu,
    "deferred_norms": DeferredNorm,
    "fingerprints": Fingerprint,
}


@dataclass(frozen=True)
class ModelFamily:
    """One architecture family. Items of its lists may be given as mappings, as YAML has them.

    Args:
        name: as in `model_type=`.
        denoisers: diffusers classes of the denoiser that belong to the family.
        pipelines: diffusers classes of the pipelines whose denoiser belongs to it, where others have a
            denoiser of the same class and the same widths.
        mixed_precision: `none`: the layers of `ignore` stay float; `auto`: and the most sensitive ones, until
            `quality_db` is met.
        keep_blocks: further blocks that stay float, such as `first:2,last:3`; see `models.boundary_blocks`.
        ignore: rules for Linears that stay float; the first that matches counts.
        same_input: groups of Linears, relative to a block, that read the same tensor: it is quantized once
            for all of them.
        deferred_gelu: activations that move into the quantization of the next layer's input.
        deferred_norms: GroupNorms and SiLUs that move into the quantization of a convolution's input.
        inputs: in_features of Linears by fnmatch pattern, where families share a class: each pattern matches
            some Linear, and all that it matches are this wide.
        fingerprints: files whose weights belong to the family.
        blocks: names of the lists of repeated blocks.
        main_blocks: those of them that the image passes, in their order; empty: all of them.
        lora_prefixes: what LoRA files for it put before the layer names.
        hardware: the smallest that it is useful on, in one sentence.
    """

    name: str
    denoisers: Sequence[str] = ()
    pipelines: Sequence[str] = ()
    mixed_precision: str = "none"
    keep_blocks: str | Mapping[str, int] | None = None
    ignore: Sequence[IgnoreRule] = ()
    same_input: Sequence[Sequence[str]] = ()
    deferred_gelu: Sequence[DeferredGelu] = ()
    deferred_norms: Sequence[DeferredNorm] = ()
    inputs: Mapping[str, int] = field(default_factory=dict)
    fingerprints: Sequence[Fingerprint] = ()
    blocks: Sequence[str] = ()
    main_blocks: Sequence[str] = ()
    lora_prefixes: Sequence[str] = ()
    hardware: str = ""

    def __post_init__(self) -> None:
        check_choice("model_type.mixed_precision", self.mixed_precision, MIXED_PRECISION)
        object.__setattr__(self, "keep_blocks", normalize_boundary_blocks(self.keep_blocks))
        for name, item_type in ITEM_TYPES.items():
            items = parse_items(item_type, getattr(self, name), f"model_type.{name}")
            object.__setattr__(self, name, items)  # the class is frozen

    def find_skip_reason(self, layer: str) -> str | None:
        """Return the reason why a Linear stays float, or None when it becomes INT8."""
        for rule in self.ignore:
            if fnmatch.fnmatchcase(layer, rule.pattern):
                return rule.reason
        return None

    def find_input_mismatch(self, linears: Mapping[str, int]) -> str | None:
        """Return how a denoiser's layers differ from `inputs`; None where they agree.

        Args:
            linears: in_features of the denoiser's Linears by name.
        """
        for pattern, width in self.inputs.items():
            found = {linears[name] for name in linears if fnmatch.fnmatchcase(name, pattern)}
            if found != {width}:
                widths = "/".join(map(str, sorted(found))) or "none"
                return f"{pattern} takes {width} inputs, the denoiser has {widths}"
        return None

    def has_member(self, denoiser: str, pipeline: str | None) -> bool:
        """Return whether a denoiser belongs to the family, by its class or by the pipeline that it is in.

        Args:
            denoiser: its class in diffusers.
            pipeline: the class of its pipeline; None: not known.
        """
        return denoiser in self.denoisers or pipeline in self.pipelines

    def resolve_family(
        self,
        denoiser: str,
        blocks: Sequence[str],
        linears: Mapping[str, int],
        pipeline: str | None = None,
        convolutions: Sequence[str] = (),
    ) -> "ModelFamily":
        """Return this family: it was named, so it is used for any denoiser. A mismatch gives a warning.

        Args:
            denoiser: the denoiser's class in diffusers.
            blocks: as for `AutoFamily.resolve_family`.
            linears: in_features of the denoiser's Linears by name.
            pipeline: the class of its pipeline; None: not known.
            convolutions: names of its convolutions.
        """
        if self.denoisers and not self.has_member(denoiser, pipeline):
            known = "/".join(self.denoisers)
            log.warning("model_type=%s is for %s, the denoiser is a %s", self.name, known, denoiser)
        elif mismatch := self.find_input_mismatch(linears):
            log.warning("model_type=%s does not fit this %s: %s", self.name, denoiser, mismatch)
        return self


def parse_items(item_type: type, items: Iterable[Any], where: str) -> tuple[Any, ...]:
    """Return the items of a list of settings as objects.

    Args:
        item_type: the dataclass of one.
        items: objects of this class, or mappings of its fields, as YAML has them.
        where: the setting, for messages.

    Raises:
        ConfigError: as `parse_item`.
    """
    return tuple(parse_item(item_type, item, f"{where}.{i}") for i, item in enumerate(items))


def parse_item(item_type: type, item: Any, where: str) -> Any:
    """Return one item of a list of settings as an object.

    Raises:
        ConfigError: for a key that such an item does not have, or one that is missing.
    """
    if isinstance(item, item_type):
        return item
    known = [f.name for f in fields(item_type)]
    if not isinstance(item, Mapping):
        raise ConfigError(f"{where} is {item!r}; it takes {', '.join(known)}")
    for key in item:
        if key not in known:
            suggestion = suggest_similar(str(key), known)
            raise ConfigError(
                f"no setting called '{where}.{key}'; {suggestion}choose from {', '.join(known)}"
            )
    try:
        return item_type(**item)
    except TypeError as error:
        raise ConfigError(f"{where} is {dict(item)}; it needs {', '.join(known)}") from error


@functools.cache
def list_family_names() -> tuple[str, ...]:
    """The names of the families that ship, without opening their files."""
    names = {file.stem for file in FAMILY_FOLDER.glob("*.yaml")}
    return tuple(sorted(names - {"auto", "none"}))  # choices of `model_type=` that are no family


@functools.cache
def load_families() -> Mapping[str, ModelFamily]:
    """Return the families of `conf/model_type` by name; read only by jobs that need them.

    Left out are the files that name neither denoisers nor fingerprints, such as `none`.
    """
    families: dict[str, ModelFamily] = {}
    for file in sorted(FAMILY_FOLDER.glob("*.yaml")):
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        if settings.get("denoisers") or settings.get("fingerprints"):
            settings.pop("_target_", None)
            families[file.stem] = ModelFamily(**settings)
    return families


@dataclass(frozen=True)
class ModelOption:
    """What the YAML of an option of `model=` says, before it becomes a `ModelSource`.

    Args:
        location: of its checkpoint.
        family: that it is made for; None: any.
        pipeline: that it names; None: the one of its repository.
    """

    location: str
    family: str | None
    pipeline: str | None = None


@functools.cache
def read_model_options() -> Mapping[str, ModelOption]:
    """Return the options of `model=` that ship, by name."""
    options: dict[str, ModelOption] = {}
    for file in sorted(MODEL_FOLDER.glob("*.yaml")):
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        options[file.stem] = ModelOption(
            str(settings.get("location")), settings.get("family"), settings.get("pipeline")
        )
    return options


@dataclass(frozen=True)
class AutoFamily:
    """Chooses a family by the denoiser's class and the widths of its layers; `model_type=auto`.

    Of a denoiser that no family describes, only Linears inside the repeated blocks become INT8.

    Args:
        mixed_precision: as for `ModelFamily`; given to the family that is chosen.
        keep_blocks: the same.
        families: to choose from; None: all that ship.
    """

    mixed_precision: str = "none"
    keep_blocks: str | Mapping[str, int] | None = None
    families: Mapping[str, ModelFamily] | None = None
    name: str = "auto"

    def __post_init__(self) -> None:
        check_choice("model_type.mixed_precision", self.mixed_precision, MIXED_PRECISION)
        object.__setattr__(self, "keep_blocks", normalize_boundary_blocks(self.keep_blocks))

    def resolve_family(
        self,
        denoiser: str,
        blocks: Sequence[str],
        linears: Mapping[str, int],
        pipeline: str | None = None,
        convolutions: Sequence[str] = (),
    ) -> ModelFamily:
        """Return the family of a denoiser; for an unknown one the conservative rule, with a warning.

        Args:
            denoiser: the denoiser's class in diffusers.
            blocks: prefixes of the repeated blocks (`transformer_blocks.0.`), in model order.
            linears: in_features of the denoiser's Linears by name.
            pipeline: the class of its pipeline; None: not known.
            convolutions: names of its convolutions.
        """
        families = load_families() if self.families is None else self.families
        for family in families.values():
            if family.has_member(denoiser, pipeline) and family.find_input_mismatch(linears) is None:
                return self.pass_settings(family)
        log.warning(
            "model_type=auto does not know %s; only Linears inside its repeated blocks become INT8, "
            "the first and the last block stay float. Name one with model_type= (%s) or write one, as "
            "docs/extending.md shows",
            denoiser,
            ", ".join(sorted(families)),
        )
        return self.pass_settings(build_conservative_family(blocks, [*linears, *convolutions]))

    def pass_settings(self, family: ModelFamily) -> ModelFamily:
        """The family with what is set here for whichever is chosen."""
        keep_blocks = family.keep_blocks if self.keep_blocks is None else self.keep_blocks
        return replace(family, mixed_precision=self.mixed_precision, keep_blocks=keep_blocks)


def build_conservative_family(blocks: Sequence[str], layers: Iterable[str]) -> ModelFamily:
    """Return a family for a denoiser that no family describes.

    Its repeated blocks become INT8, but the very first and the very last; everything else stays float.
    """
    middle = tuple(blocks[1:-1])
    outside = [name for name in layers if not name.startswith(middle)]
    ignore = [IgnoreRule(name, "unknown architecture: outside the middle blocks") for name in outside]
    return ModelFamily(name=UNKNOWN_FAMILY, ignore=ignore)


@dataclass(frozen=True)
class ModelSource:
    """One checkpoint; the settings behind `model=`.

    Args:
        location: hub id, diffusers folder, `shipped:NAME` for a model inside this package, or a single
            .safetensors or .gguf file with the denoiser alone: a path, or `org/repo/path.safetensors` on the
            hub. Of a pipeline with two denoisers a mapping from their components to one file each.
        lora_base: the key of this checkpoint in a LoRA stack's sources.
        sampling: the checkpoint's own defaults.
        revision: on the hub.
        dtype: of the float model.
        base: hub id or diffusers folder of everything but the denoiser, when the location is a single file.
        parts: components that the repository lacks: by name, the class of transformers and where it is.
        quant_format: a format name of `clip=`, for what a file of quantized weights leaves open; `auto`: the
            file must say everything.
        sdnq: how SDNQ made the INT8 weights of a file without its config.json: `none`, `hadamard` (it rotated
            groups of 256 columns), `hadamard_<size>`, the path of a config.json, or its fields.
        family: that the sampling is made for; None: any. `pipeline.load` refuses another one.
        pipeline: class of diffusers that runs it; None: the one that the repository names.
        mode: short name of such a class: `img2img`, `inpaint`, … (`models/pipeline_modes.yaml`).
        workflow: the only one of a modular pipeline that is loaded and run, by its name in diffusers; None:
            all.
        skip_blocks: outermost blocks of a modular pipeline that are left out, such as one that rewrites
            prompts with a model of its own.
    """

    location: str | None
    lora_base: str
    sampling: Sampling
    revision: str | None = None
    dtype: str = "bfloat16"
    base: str | None = None
    parts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    quant_format: str = "auto"
    sdnq: str | Mapping[str, Any] | None = None
    family: str | None = None
    pipeline: str | None = None
    mode: str | None = None
    workflow: str | None = None
    skip_blocks: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_choice("model.dtype", self.dtype, FLOAT_DTYPES)
        if not self.location:
            raise ConfigError("model has no location; set model.location=<hub id or diffusers folder>")
        check_pipeline_settings(self.pipeline, self.mode)
        for name, part in self.parts.items():
            if isinstance(part, str) or len(part) != 2:
                raise ConfigError(
                    f"model.parts.{name} is {part!r}; it takes [class of transformers or diffusers, hub id "
                    "or folder]"
                )
