"""What is known about text encoders, from `encoders/*.yaml`: which one a file holds, how its parts are called, and its configuration.

A file of an encoder is called by its name and holds the fields of `Encoder`. One without classes is known by its names alone: a file
of it is refused by name, and not taken for another. Canonical names are those of ComfyUI's stand-alone files; other spellings are in
`models/native_names/text_*.yaml`, under the encoders' names.

Sizes in `config` are read from a file:

    hidden_size: { rows: model.norm.weight } # or columns; of a tensor by its canonical name
    num_heads: { rows: model.layers.0.self_attn.q_proj.weight, over: head_dim } # divided by another field, or by a number
    depth: { count: visual.blocks.*.norm1.weight, default: 32 } # as many as there are; what holds where there is none
    tie_word_embeddings: { absent: lm_head.weight } # whether the file lacks it
"""

import copy
import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from int8run.errors import ConfigError, FileError, suggest
from int8run.models.detect import among, denoiser_of
from int8run.models.family import row_of, shipped_families
from int8run.models.layout import Layout, Part, Shape, denoiser_keys, meaning, to_model, why_dropped
from int8run.models.native import Names, names_of

log = logging.getLogger(__name__)
ENCODERS = Path(__file__).parent / "encoders"
# what full checkpoints and save nodes put before an encoder's names; and before each of them nothing
PREFIXES = re.compile(
    r"text_encoders\.\w+\.(?:transformer\.|model\.)?"
    r"|conditioner\.embedders\.\d+\.(?:transformer|model)\."
    r"|cond_stage_model\.(?:transformer|model)\."
    r"|(?:(?:clip|t5|umt5|llama|gemma|qwen|mistral|ministral)\w*|text_encoder(?:_\d+)?|te\d?)\.(?:transformer\.)?"
    r"|transformer\."
)
LORA = re.compile(r"lora_(?:up|down|mid|a|b)\b|\.(?:lokr|hada)_w", re.IGNORECASE)
VAE = re.compile(r"(?:^|\.)(?:first_stage_model|vae)\.|^(?:encoder|decoder)\.(?:conv_in|conv1|mid|mid_block|up_blocks|downsamples)\b")
SIZE_WORDS = {"rows", "columns", "count", "absent"}


@dataclass(frozen=True)
class Mark:
    """How an encoder is known by the canonical names in a file.

    Args:
        all: fnmatch patterns; each matches some key.
        none: fnmatch patterns; none matches any key.
        rows: tensors and how many rows they have.
        not_rows: tensors and how many rows they do not have; one that the file lacks has none.
    """

    all: Sequence[str]
    none: Sequence[str] = ()
    rows: Mapping[str, int | Sequence[int]] = field(default_factory=dict)
    not_rows: Mapping[str, int | Sequence[int]] = field(default_factory=dict)

    def fits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether these are the tensors of such an encoder."""
        return (
            all(among(pattern, shapes) for pattern in self.all)
            and not any(among(pattern, shapes) for pattern in self.none)
            and all(key in shapes and first(shapes[key]) in listed(n) for key, n in self.rows.items())
            and not any(key in shapes and first(shapes[key]) in listed(n) for key, n in self.not_rows.items())
        )


@dataclass(frozen=True)
class Spare:
    """What not every class has a place for, and many files lack, since no text needs it: it is taken out of a model where they do.

    Args:
        pattern: fnmatch pattern of canonical names of parameters. None of them is in such a file.
        why: the reason.
        passes: when it is taken out, what comes in goes on as it is; else a call is an error.
        required: a class that has it needs it, so it is never taken out.
    """

    pattern: str
    why: str
    passes: bool = False
    required: bool = False


@dataclass(frozen=True)
class FloatRule:
    """Layers that stay float when weights are quantized here.

    Args:
        pattern: fnmatch pattern of canonical layer names.
        why: the reason, for people.
        formats: in which they do; none: in all.
    """

    pattern: str
    why: str
    formats: Sequence[str] = ()


@dataclass(frozen=True)
class Variant:
    """What of a configuration depends on sizes.

    Args:
        rows: tensors and how many rows they have.
        config: fields that are other for them.
    """

    rows: Mapping[str, int]
    config: Mapping[str, Any]


# fields of an encoder that are rows of a table, and what a row is
ROWS: Mapping[str, type] = {"fingerprints": Mark, "float_layers": FloatRule, "spare": Spare, "variants": Variant}


@dataclass(frozen=True)
class Encoder:
    """One text encoder, of one size or of several. The rows of its tables may be given as mappings, as YAML has them.

    Args:
        name: the word used for it everywhere.
        classes: of transformers that hold such weights, the usual one first; none: known and not supported.
        fingerprints: files that hold it; one of them fits.
        float_layers: rules for layers, by canonical names, that stay float when weights are quantized here; the first counts.
        tables: embeddings whose weight the model asks for, besides looking rows up; quantized ones are floats in memory.
        spare: what a text does not need, and files may lack.
        twins: names of tensors that are others once more, and of those.
        drop: canonical names that have no place in this encoder: the reason.
        tokens: of a usual call.
        tokenizer: where it is on the hub: `location` and `subfolder`.
        config: of its classes; sizes as in the module's docstring.
        variants: the same for some sizes.
    """

    name: str
    classes: Sequence[str] = ()
    fingerprints: Sequence[Mark] = ()
    float_layers: Sequence[FloatRule] = ()
    tables: Sequence[str] = ()
    spare: Sequence[Spare] = ()
    twins: Mapping[str, str] = field(default_factory=dict)
    drop: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 77
    tokenizer: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Variant] = ()

    def __post_init__(self) -> None:
        for name, kind in ROWS.items():
            rows = [row_of(kind, row, f"{self.name}.{name}.{i}") for i, row in enumerate(getattr(self, name))]
            object.__setattr__(self, name, tuple(rows))  # the class is frozen

    @property
    def names(self) -> Names:
        """Other spellings of its parts."""
        return names_of(self.name)

    def canonical(self, key: str) -> tuple[Part, ...]:
        """The tensors that a key of a file holds, one after the other; what is no name of this encoder stays as it is."""
        return meaning(key, self.names, {}, ())

    def wants_table(self, layer: str) -> bool:
        """Whether the model asks for the weight of an embedding itself; names as in `why_float`."""
        name = self.canonical(f"{layer}.weight")[0].key.removesuffix(".weight")
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.tables)

    def why_float(self, layer: str, form: str) -> str | None:
        """The reason why a layer stays float, or None when it is quantized.

        Args:
            layer: its name in a file or in the model, without `.weight`.
            form: the format of `clip=`.
        """
        names = [part.key.removesuffix(".weight") for part in self.canonical(f"{layer}.weight")]
        rules = [rule for rule in self.float_layers if not rule.formats or form in rule.formats]
        return next((rule.why for rule in rules if any(fnmatch.fnmatchcase(name, rule.pattern) for name in names)), None)


@dataclass(frozen=True)
class Found:
    """A text encoder in a file.

    Args:
        encoder: which.
        prefix: what stands before its names.
    """

    encoder: Encoder
    prefix: str


@cache
def shipped_encoders(folder: Path = ENCODERS) -> Mapping[str, Encoder]:
    """All encoders that are known, by name. Read when a job needs them."""
    return {
        file.stem: Encoder(name=file.stem, **yaml.safe_load(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.yaml"))
    }


def encoder_named(name: str) -> Encoder:
    """A supported encoder by its name.

    Raises:
        ConfigError: for a name that is none.
    """
    known = supported()
    if name not in known:
        raise ConfigError(f"no text encoder called {name!r}; {suggest(name, known)}choose from {', '.join(known)}")
    return known[name]


def encoder_of_class(class_name: str, shapes: Mapping[str, Shape]) -> Encoder | None:
    """The encoder that a model of a class is; None where no supported one has this class.

    Args:
        class_name: of transformers.
        shapes: of its parameters, by their names in the model or in a file. Where none of the class's fingerprints fits, such as for
            another size, the first encoder with the class is taken.
    """
    among_class = {name: encoder for name, encoder in supported().items() if class_name in encoder.classes}
    return next(iter([*recognised(shapes, among_class), *among_class.values()]), None)


def supported() -> dict[str, Encoder]:
    """The encoders that can be loaded."""
    return {name: encoder for name, encoder in shipped_encoders().items() if encoder.classes}


def identify(shapes: Mapping[str, Shape], which: str | None = None) -> Found:
    """The text encoder that a file holds.

    Args:
        shapes: all tensors of the file as they are stored.
        which: of several: the name of an encoder, its prefix or a word of it (`t5xxl`).

    Raises:
        FileError: when there is none, several and none is named, or one that is not supported.
    """
    found = encoders_in(shapes)
    if not found:
        raise FileError(f"the file holds no text encoder that is known: {what_else(shapes)}")
    chosen = [prefix for prefix, encoder in found.items() if which in (None, encoder.name, prefix, *prefix.split("."))]
    if len(chosen) != 1:
        held = ", ".join(f"{encoder.name} ({prefix or 'no prefix'})" for prefix, encoder in found.items())
        if chosen:
            names = " or ".join(found[prefix].name for prefix in chosen)
            raise FileError(f"the file holds several text encoders: {held}; say which it is to be: {names}")
        raise FileError(f"the file holds no text encoder called {which!r}; it holds {held}")
    encoder = found[chosen[0]]
    if not encoder.classes:
        raise FileError(f"the file holds the text encoder {encoder.name}, which int8run does not support; it has {', '.join(supported())}")
    return Found(encoder, chosen[0])


def encoders_in(shapes: Mapping[str, Shape]) -> dict[str, Encoder]:
    """All text encoders of a file, by what stands before their names."""
    found: dict[str, Encoder] = {}
    for prefix in prefixes_of(shapes):
        # with `text_encoders.llama.` known, `text_encoders.llama.model.` is the same encoder without its head
        if not any(prefix.startswith(other) for other in found):
            inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
            encoders = recognised(inside, shipped_encoders())
            if encoders:
                found[prefix] = encoders[0]
    return found


def prefixes_of(keys: Iterable[str]) -> list[str]:
    """What may stand before an encoder's names, the shortest first."""
    found = {""}
    for key in keys:
        match = PREFIXES.match(key)
        while match:
            found.add(match[0])
            # text_encoders.clip_l. before text_encoders.clip_l.transformer.
            match = PREFIXES.fullmatch(match[0].rpartition(".")[0].rpartition(".")[0] + ".")
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def recognised(shapes: Mapping[str, Shape], encoders: Mapping[str, Encoder]) -> list[Encoder]:
    """The encoders whose fingerprints fit tensors without a prefix."""
    spelled: list[tuple[Names, dict[str, Shape]]] = []
    found = []
    for encoder in encoders.values():
        canonical = next((those for names, those in spelled if names is encoder.names), None)
        if canonical is None:
            canonical = {encoder.canonical(key)[0].key: shape for key, shape in shapes.items()}
            spelled.append((encoder.names, canonical))
        if any(mark.fits(canonical) for mark in encoder.fingerprints):
            found.append(encoder)
    return found


def what_else(shapes: Mapping[str, Shape]) -> str:
    """What a file without a text encoder holds, and what to do with it."""
    if any(LORA.search(key) for key in shapes):
        return "it is a LoRA; a LoRA is given with lora="
    inside = {name: shapes[key] for name, key in denoiser_keys(shapes).items()}
    held = denoiser_of(inside, shipped_families().values(), inside)
    if held is not None:
        return f"it holds the denoiser of {held[0].name}; that is given as model.location"
    if any(VAE.search(key) for key in shapes):
        return "it holds a VAE, which is not quantized"
    lacks = {
        encoder.name: missing
        for encoder in supported().values()
        for mark in encoder.fingerprints
        if len(missing := [key for key in mark.all if not among(key, shapes)]) < len(mark.all)
    }
    names = ", ".join(list(shapes)[:3]) or "none"
    near = "; ".join(f"{name} would have {', '.join(missing) or 'other sizes'}" for name, missing in list(lacks.items())[:3])
    return f"{len(shapes)} tensors, such as {names}; " + (near or f"known are {', '.join(supported())}")


def canonical_names(encoder: Encoder, shapes: Mapping[str, Shape]) -> tuple[dict[str, tuple[Part, ...]], dict[str, str]]:
    """The canonical names of a file's tensors.

    Args:
        shapes: logical shapes by names without prefix, without what belongs to quantized layers.

    Returns:
        What each canonical tensor is made of; and the keys that have no place, with the reason.

    Raises:
        FileError: when two tensors are one, or rows cannot be shared out.
    """
    kept, dropped = with_place(encoder, shapes)
    found: dict[str, tuple[Part, ...]] = {}
    for key, shape in kept.items():
        parts = encoder.canonical(key)
        if (len(parts) > 1 and first(shape) % len(parts)) or (parts[0].transposed and len(shape) != 2):
            what = " + ".join(part.key for part in parts)
            raise FileError(f"{key} holds {what} of {encoder.name}, but its shape is {list(shape)}; the file is damaged")
        rows = first(shape) // len(parts)
        for i, part in enumerate(parts):
            if part.key in found:
                raise FileError(f"the file holds {part.key} of {encoder.name} twice: as {found[part.key][0].key} and as {key}; remove one")
            cut = slice(i * rows, (i + 1) * rows) if len(parts) > 1 else None
            found[part.key] = (Part(key, cut, transposed=part.transposed),)
    return found, dropped


def with_place(encoder: Encoder, shapes: Mapping[str, Shape]) -> tuple[dict[str, Shape], dict[str, str]]:
    """The tensors that an encoder may have a place for, and the others with the reason."""
    dropped: dict[str, str] = {}
    for key in shapes:
        reason = why_dropped(key, encoder.names) or next(
            (why for name, why in encoder.drop.items() if encoder.canonical(key)[0].key == name), None
        )
        twin = encoder.twins.get(key)
        if reason is None and twin in shapes:
            reason = f"the same as {twin}"
        if reason is not None:
            dropped[key] = reason
    return {key: shape for key, shape in shapes.items() if key not in dropped}, dropped


def encoder_layout(encoder: Encoder, shapes: Mapping[str, Shape], model: nn.Module) -> Layout:
    """Find a model's parameters in a file.

    Args:
        encoder: that the file holds.
        shapes: logical shapes by names without prefix, without what belongs to quantized layers.
        model: of one of the encoder's classes; `take_out_spare` has seen it.

    Returns:
        Parts for every parameter and buffer of its `state_dict()`. Names that the model ties have the same parts, also where the file
        holds them only once.

    Raises:
        FileError: when a tensor has another shape than its parameter, or two tensors are one parameter.
    """
    held = model.state_dict(keep_vars=True)
    names = {name: encoder.canonical(name)[0].key for name in held}
    kept, dropped = with_place(encoder, shapes)
    found = to_model(kept, {names[name]: tuple(tensor.shape) for name, tensor in held.items()}, encoder.name)
    by_tensor = {id(tensor): found.parts[names[name]] for name, tensor in reversed(held.items()) if names[name] in found.parts}
    parts = {name: found.parts.get(names[name], by_tensor.get(id(tensor))) for name, tensor in held.items()}
    patterns = [rule.pattern for rule in encoder.spare]
    spare = {key for key in found.unused if any(fnmatch.fnmatchcase(encoder.canonical(key)[0].key, pattern) for pattern in patterns)}
    return Layout(
        {name: those for name, those in parts.items() if those is not None},
        tuple(key for key in found.unused if key not in spare),
        tuple(name for name, those in parts.items() if those is None),
        {**dropped, **found.dropped} | dict.fromkeys(spare, f"the {type(model).__name__} has no place for it"),
    )


def take_out_spare(encoder: Encoder, shapes: Mapping[str, Shape], model: nn.Module) -> dict[str, str]:
    """Take out of a model what a text does not need and the file lacks altogether.

    Args:
        encoder: that the file holds.
        shapes: as for `encoder_layout`.
        model: is changed.

    Returns:
        The modules that were taken out, with the reason.
    """
    there = {part.key for key in with_place(encoder, shapes)[0] for part in encoder.canonical(key)}
    held = {name: (encoder.canonical(name)[0].key, parameter) for name, parameter in model.named_parameters(remove_duplicate=False)}
    filled = {id(parameter) for key, parameter in held.values() if key in there}
    taken: dict[str, str] = {}
    for rule in encoder.spare:
        spare = {name: parameter for name, (key, parameter) in held.items() if fnmatch.fnmatchcase(key, rule.pattern)}
        if not spare or rule.required or any(id(parameter) in filled for parameter in spare.values()):
            continue
        place = common_module(spare)
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity() if rule.passes else Absent(place, rule.why))
        taken[place] = rule.why
    for place, why in taken.items():
        log.info("%s is not in the file: %s", place, why)
    return taken


def common_module(names: Iterable[str]) -> str:
    """The innermost module that all these parameters are in."""
    paths = [name.split(".")[:-1] for name in names]
    same = [words[0] for words in zip(*paths, strict=False) if len(set(words)) == 1]
    depth = next((i for i, words in enumerate(zip(*paths, strict=False)) if len(set(words)) > 1), len(same))
    return ".".join(paths[0][:depth])


class Absent(nn.Module):
    """The place of a module that is not there."""

    def __init__(self, name: str, why: str):
        super().__init__()
        self.name, self.why = name, why

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse.

        Raises:
            FileError: always.
        """
        raise FileError(f"{self.name} is needed and was not in the text encoder's file: {self.why}")


def config_of(encoder: Encoder, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """The configuration of transformers for what a file holds: sizes from its shapes, the rest as the encoder was published.

    Args:
        shapes: as for `canonical_names`.

    Raises:
        FileError: when a tensor is missing that says a size, or sizes do not fit each other.
    """
    parts, _ = canonical_names(encoder, shapes)
    sizes: dict[str, Shape] = {}
    for name, (part, *_) in parts.items():
        shape = tuple(shapes[part.key])
        shape = shape if part.rows is None else (part.rows.stop - part.rows.start, *shape[1:])
        sizes[name] = shape[::-1] if part.transposed else shape
    config = Sizes(encoder.name, sizes).resolve(encoder.config)
    for variant in encoder.variants:
        if all(key in sizes and first(sizes[key]) == n for key, n in variant.rows.items()):
            config = merged(config, variant.config)
    return config


@dataclass(frozen=True)
class Sizes:
    """Reads sizes from shapes.

    Args:
        name: of the encoder, for messages.
        shapes: by canonical names.
    """

    name: str
    shapes: Mapping[str, Shape]

    def resolve(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A configuration with its sizes."""
        return {name: self.value(config, name) for name in config}

    def value(self, config: Mapping[str, Any], name: str) -> Any:
        """One field; others may be read for it."""
        value = config[name]
        if not isinstance(value, Mapping):
            return value
        if not SIZE_WORDS & set(value):
            return self.resolve(value)
        if "absent" in value:
            return value["absent"] not in self.shapes
        number = self.number(value)
        if not number:
            if "default" not in value:
                key = value.get("count") or value.get("rows") or value["columns"]
                raise FileError(f"the file has no {key}, which says the {name} of {self.name}; it is incomplete")
            return self.referred(config, value["default"])
        if "over" not in value:
            return number
        over = self.referred(config, value["over"])
        if number % over:
            key = value.get("rows") or value["columns"]
            raise FileError(
                f"{key} has {number} rows, no multiple of {over}: the {name} of this {self.name} cannot be told from the file; pass the "
                "config of its model"
            )
        return number // over

    def number(self, value: Mapping[str, Any]) -> int:
        """What a size asks for, 0 where the file does not have it."""
        if "count" in value:
            head, _, tail = value["count"].partition("*")
            numbered = re.compile(re.escape(head) + r"\d+" + re.escape(tail))
            return sum(numbered.fullmatch(key) is not None for key in self.shapes)
        key, dim = (value["rows"], 0) if "rows" in value else (value["columns"], 1)
        shape = self.shapes.get(key, ())
        return shape[dim] if len(shape) > dim and 0 not in shape else 0  # a table of no width may claim any number of rows

    def referred(self, config: Mapping[str, Any], value: Any) -> Any:
        """A number, or the field that is named."""
        return self.value(config, value) if isinstance(value, str) else value


def merged(config: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with some fields replaced, inner ones too."""
    inner = {
        name: merged(config[name], value)
        for name, value in more.items()
        if isinstance(value, Mapping) and isinstance(config.get(name), Mapping)
    }
    return {**config, **more, **inner}


def skeleton(class_name: str, config: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    """A text encoder whose parameters have shapes and no values; buffers that no checkpoint holds are there.

    Args:
        class_name: of transformers.
        config: of the class; a class for text alone takes its part of the config of a model that sees.

    Raises:
        ConfigError: for a class that transformers does not have.
        FileError: when the class does not take the config.
    """
    from accelerate import init_empty_weights
    from huggingface_hub.errors import StrictDataclassError

    cls, own = model_class(class_name), config
    kind = cls.config_class
    if "text_config" in config and "text_config" not in kind.sub_configs:
        own = {name: config[name] for name in ("tie_word_embeddings",) if name in config} | dict(config["text_config"])
    try:
        with init_empty_weights(include_buffers=False):
            model = cls(kind.from_dict(copy.deepcopy(dict(own))))  # transformers completes inner ones in place
        model.tie_weights()  # parameters without values were made one by one
    except (TypeError, ValueError, KeyError, AttributeError, AssertionError, ZeroDivisionError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:300]
        raise FileError(f"the config does not fit {class_name}: {reason}; take the one of its model") from error
    full = set(getattr(cls, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:  # as transformers' loader does
        full |= set(getattr(cls, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        if not full & set(name.split(".")):
            parameter.data = parameter.data.to(dtype)
    return model.eval().requires_grad_(False)


def model_class(class_name: str) -> Any:
    """A model's class of transformers.

    Raises:
        ConfigError: when transformers does not have it.
    """
    import transformers

    cls = getattr(transformers, class_name, None)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise ConfigError(f"transformers {transformers.__version__} has no model class {class_name!r}")
    return cls


def load_tokenizer(tokenizer: Mapping[str, str]) -> Any:
    """The tokenizer of an encoder.

    Args:
        tokenizer: `location` and `subfolder`, as `Encoder.tokenizer` and the metadata of a loaded file have them.

    Raises:
        FileError: when it is not here and cannot be fetched.
    """
    from transformers import AutoTokenizer

    location, subfolder = tokenizer["location"], tokenizer.get("subfolder", "")
    try:
        return AutoTokenizer.from_pretrained(location, subfolder=subfolder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FileError(
            f"the tokenizer {location}{f' ({subfolder})' if subfolder else ''} is not on this machine and could not be fetched: {reason}; "
            "take the one of your pipeline, or log in where the model is gated: hf auth login"
        ) from error


def first(shape: Shape) -> int:
    """How many rows; a single number has none."""
    return shape[0] if len(shape) else 0


def listed(value: int | Sequence[int]) -> Sequence[int]:
    """A number as a list of one."""
    return [value] if isinstance(value, int) else value
