"""Detects which text encoders a file holds by the names and shapes in its header.

Called when a file is opened; where a folder's config names the class, only the encoder of that class is
looked up. No weight is read.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from int8run.errors import FileError
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import load_families
from int8run.models.fingerprint import has_match
from int8run.models.key_mapping import KeyMappingSet
from int8run.models.state_dict_adapter import find_denoiser_keys, resolve_key
from int8run.models.tensor_part import Shape
from int8run.text_encoders.registry import EncoderFamily, list_supported_encoders, load_encoders

# what full checkpoints and save nodes put before an encoder's names
ENCODER_PREFIX = re.compile(
    r"text_encoders\.\w+\.(?:transformer\.|model\.)?"
    r"|conditioner\.embedders\.\d+\.(?:transformer|model)\."
    r"|cond_stage_model\.(?:transformer|model)\."
    r"|(?:(?:clip|t5|umt5|llama|gemma|qwen|mistral|ministral)\w*|text_encoder(?:_\d+)?|te\d?)\.(?:transformer\.)?"
    r"|transformer\."
)
LORA_KEY = re.compile(r"lora_(?:up|down|mid|a|b)\b|\.(?:lokr|hada)_w", re.IGNORECASE)
VAE_KEY = re.compile(
    r"(?:^|\.)(?:first_stage_model|vae)\."
    r"|^(?:encoder|decoder)\.(?:conv_in|conv1|mid|mid_block|up_blocks|downsamples)\b"
)
# of text encoders in one file; the largest checkpoints have three
MAX_PREFIXES = 32
# how many similar encoders the message names
SHOWN_NEAR_MISSES = 3


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
    """Return the encoder that a model of a class is; None where no supported one has this class.

    Args:
        class_name: of transformers.
        shapes: of its parameters, by their names in the model or in a file. Where none of the class's
            fingerprints matches, such as for another size, the first encoder with the class is taken.
    """
    candidates = {
        name: encoder for name, encoder in list_supported_encoders().items() if class_name in encoder.classes
    }
    for encoder in (*match_encoders(shapes, candidates), *candidates.values()):
        return encoder
    return None


def detect_encoder(shapes: Mapping[str, Shape], which: str | None = None) -> DetectedEncoder:
    """Return the text encoder that a file holds.

    Args:
        shapes: all tensors of the file as they are stored.
        which: of several: the name of an encoder, its prefix or a part of it (`t5xxl`).

    Raises:
        FileError: when there is none, several and none is named, or one that is not supported.
    """
    found = find_encoders(shapes)
    if not found:
        raise FileError(f"the file holds no text encoder that is known: {describe_contents(shapes)}")
    prefix = choose_prefix(found, which)
    encoder = found[prefix]
    if not encoder.classes:
        supported = ", ".join(list_supported_encoders())
        raise FileError(
            f"the file holds the text encoder {encoder.name}, which int8run does not support; "
            f"it has {supported}"
        )
    return DetectedEncoder(encoder, prefix)


def choose_prefix(found: Mapping[str, EncoderFamily], which: str | None) -> str:
    """Return the prefix of the one encoder that is meant.

    Args:
        found: the encoders of a file by prefix.
        which: as for `detect_encoder`.

    Raises:
        FileError: when none or several are meant.
    """
    chosen = []
    for prefix, encoder in found.items():
        own_names = (encoder.name, prefix, *prefix.split("."))
        if which is None or which in own_names:
            chosen.append(prefix)
    if len(chosen) == 1:
        return chosen[0]
    held = ", ".join(f"{encoder.name} ({prefix or 'no prefix'})" for prefix, encoder in found.items())
    if not chosen:
        raise FileError(f"the file holds no text encoder called {which!r}; it holds {held}")
    names = " or ".join(found[prefix].name for prefix in chosen)
    raise FileError(f"the file holds several text encoders: {held}; choose one: {names}")


def find_encoders(shapes: Mapping[str, Shape]) -> dict[str, EncoderFamily]:
    """Return all text encoders of a file, by what stands before their names.

    Raises:
        FileError: for more of them than any file has: each one is looked for among all names.
    """
    found: dict[str, EncoderFamily] = {}
    prefixes = find_prefixes(shapes)
    if len(prefixes) > MAX_PREFIXES:
        raise FileError(
            f"the names in the file begin with {len(prefixes)} prefixes of text encoders (one is "
            f"{prefixes[-1]!r}), {MAX_PREFIXES} are allowed; ask who made the file"
        )
    for prefix in prefixes:
        # with `text_encoders.llama.` known, `text_encoders.llama.model.` is the same encoder without its head
        if any(prefix.startswith(other) for other in found):
            continue
        inside = {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}
        encoders = match_encoders(inside, load_encoders())
        if encoders:
            found[prefix] = encoders[0]
    return found


def find_prefixes(keys: Iterable[str]) -> list[str]:
    """Return what may stand before an encoder's names, the shortest first; nothing is always one of them."""
    found = {""}
    for key in keys:
        match = ENCODER_PREFIX.match(key)
        while match:
            prefix = match[0]
            found.add(prefix)
            # of text_encoders.clip_l.transformer. the shorter text_encoders.clip_l. is another
            shorter = prefix.removesuffix(".").rpartition(".")[0] + "."
            match = ENCODER_PREFIX.fullmatch(shorter)
    return sorted(found, key=lambda prefix: (len(prefix), prefix))


def match_encoders(shapes: Mapping[str, Shape], encoders: Mapping[str, EncoderFamily]) -> list[EncoderFamily]:
    """Return the encoders whose fingerprints match tensors without a prefix."""
    # encoders with the same key mappings have the same canonical names: a file has thousands of keys
    by_mappings: list[tuple[KeyMappingSet, dict[str, Shape]]] = []
    matching: list[EncoderFamily] = []
    for encoder in encoders.values():
        mappings = encoder.key_mappings
        canonical = next((known for same, known in by_mappings if same is mappings), None)
        if canonical is None:
            canonical = {resolve_key(key, mappings)[0].key: shape for key, shape in shapes.items()}
            by_mappings.append((mappings, canonical))
        if any(fingerprint.matches(canonical) for fingerprint in encoder.fingerprints):
            matching.append(encoder)
    return matching


def describe_contents(shapes: Mapping[str, Shape]) -> str:
    """Return what a file without a text encoder holds, and what to do with it."""
    if any(LORA_KEY.search(key) for key in shapes):
        return "it is a LoRA; a LoRA is given with lora="
    denoiser_shapes = {name: shapes[key] for name, key in find_denoiser_keys(shapes).items()}
    denoiser = detect_denoiser(denoiser_shapes, load_families().values(), denoiser_shapes)
    if denoiser is not None:
        family, _ = denoiser
        return f"it holds the denoiser of {family.name}; that is given as model.location"
    if any(VAE_KEY.search(key) for key in shapes):
        return "it holds a VAE, which is not quantized"
    names = ", ".join(list(shapes)[:3]) or "none"
    near_misses = describe_near_misses(shapes) or f"known are {', '.join(list_supported_encoders())}"
    return f"{len(shapes)} tensors, such as {names}; {near_misses}"


def describe_near_misses(shapes: Mapping[str, Shape]) -> str:
    """Return what a file lacks of the encoders that it has some names of; empty where there are none."""
    missing_names: dict[str, list[str]] = {}
    for encoder in list_supported_encoders().values():
        for fingerprint in encoder.fingerprints:
            missing = [key for key in fingerprint.all if not has_match(key, shapes)]
            if len(missing) < len(fingerprint.all):
                missing_names[encoder.name] = missing
    descriptions = []
    for name, missing in missing_names.items():
        descriptions.append(f"{name} would have {', '.join(missing) or 'other sizes'}")
    return "; ".join(descriptions[:SHOWN_NEAR_MISSES])
