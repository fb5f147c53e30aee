"""Which text encoders a file holds, told by the names and shapes in its header."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from int8run.errors import FileError
from int8run.models.detect_family import detect_denoiser, has_match
from int8run.models.family import load_families
from int8run.models.key_mapping import KeyMappingSet
from int8run.models.state_dict_adapter import Shape, find_denoiser_keys
from int8run.text_encoders.registry import EncoderFamily, list_supported_encoders, load_encoders

# what full checkpoints and save nodes put before an encoder's names; and before each of them nothing
PREFIXES = re.compile(
    r"text_encoders\.\w+\.(?:transformer\.|model\.)?"
    r"|conditioner\.embedders\.\d+\.(?:transformer|model)\."
    r"|cond_stage_model\.(?:transformer|model)\."
    r"|(?:(?:clip|t5|umt5|llama|gemma|qwen|mistral|ministral)\w*|text_encoder(?:_\d+)?|te\d?)\.(?:transformer\.)?"
    r"|transformer\."
)


LORA = re.compile(r"lora_(?:up|down|mid|a|b)\b|\.(?:lokr|hada)_w", re.IGNORECASE)


VAE = re.compile(
    r"(?:^|\.)(?:first_stage_model|vae)\.|^(?:encoder|decoder)\.(?:conv_in|conv1|mid|mid_block|up_blocks|downsamples)\b"
)


@dataclass(frozen=True)
class DetectedEncoder:
    """A text encoder in a file.

    Args:
        encoder: which.
        prefix: what stands before its names.
    """

    encoder: EncoderFamily
    prefix: str


def find_encoder_of_class(class_name: str, shapes: Mapping[str, Shape]) -> EncoderFamily | None:
    """The encoder that a model of a class is; None where no supported one has this class.

    Args:
        class_name: of transformers.
        shapes: of its parameters, by their names in the model or in a file. Where none of the class's fingerprints fits, such as for
            another size, the first encoder with the class is taken.
    """
    among_class = {
        name: encoder for name, encoder in list_supported_encoders().items() if class_name in encoder.classes
    }
    return next(iter([*match_encoders(shapes, among_class), *among_class.values()]), None)


def detect_encoder(shapes: Mapping[str, Shape], which: str | None = None) -> DetectedEncoder:
    """The text encoder that a file holds.

    Args:
        shapes: all tensors of the file as they are stored.
        which: of several: the name of an encoder, its prefix or a word of it (`t5xxl`).

    Raises:
        FileError: when there is none, several and none is named, or one that is not supported.
    """
    found = find_encoders(shapes)
    if not found:
        raise FileError(f"the file holds no text encoder that is known: {describe_contents(shapes)}")
    chosen = [
        prefix
        for prefix, encoder in found.items()
        if which in (None, encoder.name, prefix, *prefix.split("."))
    ]
    if len(chosen) != 1:
        held = ", ".join(f"{encoder.name} ({prefix or 'no prefix'})" for prefix, encoder in found.items())
        if chosen:
            names = " or ".join(found[prefix].name for prefix in chosen)
            raise FileError(f"the file holds several text encoders: {held}; say which it is to be: {names}")
        raise FileError(f"the file holds no text encoder called {which!r}; it holds {held}")
    encoder = found[chosen[0]]
    if not encoder.classes:
        raise FileError(
            f"the file holds the text encoder {encoder.name}, which int8run does not support; it has {', '.join(list_supported_encoders())}"
        )
    return DetectedEncoder(encoder, chosen[0])


def find_encoders(shapes: Mapping[str, Shape]) -> dict[str, EncoderFamily]:
    """All text encoders of a file, by what stands before their names."""
    found: dict[str, EncoderFamily] = {}
    for prefix in find_prefixes(shapes):
        # with `text_encoders.llama.` known, `text_encoders.llama.model.` is the same encoder without its head
        if not any(prefix.startswith(other) for other in found):
            inside = {
                key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)
            }
            encoders = match_encoders(inside, load_encoders())
            if encoders:
                found[prefix] = encoders[0]
    return found


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """What may stand before an encoder's names, the shortest first."""
    found = {""}
    for key in keys:
        match = PREFIXES.match(key)
        while match:
            found.add(match[0])
            # text_encoders.clip_l. before text_encoders.clip_l.transformer.
            match = PREFIXES.fullmatch(match[0].rpartition(".")[0].rpartition(".")[0] + ".")
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def match_encoders(shapes: Mapping[str, Shape], encoders: Mapping[str, EncoderFamily]) -> list[EncoderFamily]:
    """The encoders whose fingerprints fit tensors without a prefix."""
    spelled: list[tuple[KeyMappingSet, dict[str, Shape]]] = []
    found = []
    for encoder in encoders.values():
        canonical = next((those for names, those in spelled if names is encoder.key_mappings), None)
        if canonical is None:
            canonical = {encoder.to_canonical(key)[0].key: shape for key, shape in shapes.items()}
            spelled.append((encoder.key_mappings, canonical))
        if any(mark.fits(canonical) for mark in encoder.fingerprints):
            found.append(encoder)
    return found


def describe_contents(shapes: Mapping[str, Shape]) -> str:
    """What a file without a text encoder holds, and what to do with it."""
    if any(LORA.search(key) for key in shapes):
        return "it is a LoRA; a LoRA is given with lora="
    inside = {name: shapes[key] for name, key in find_denoiser_keys(shapes).items()}
    held = detect_denoiser(inside, load_families().values(), inside)
    if held is not None:
        return f"it holds the denoiser of {held[0].name}; that is given as model.location"
    if any(VAE.search(key) for key in shapes):
        return "it holds a VAE, which is not quantized"
    lacks = {
        encoder.name: missing
        for encoder in list_supported_encoders().values()
        for mark in encoder.fingerprints
        if len(missing := [key for key in mark.all if not has_match(key, shapes)]) < len(mark.all)
    }
    names = ", ".join(list(shapes)[:3]) or "none"
    near = "; ".join(
        f"{name} would have {', '.join(missing) or 'other sizes'}"
        for name, missing in list(lacks.items())[:3]
    )
    return f"{len(shapes)} tensors, such as {names}; " + (
        near or f"known are {', '.join(list_supported_encoders())}"
    )
