"""What `task=inspect` says about a checkpoint: its family, how its layers are stored, how int8run made it.

Called by `inspect_file` and `inspect_pipeline`. Tensors are read only where the header leaves the layers
open: the small ones that describe them, and fp8 weights without a scale. All tensors of a file that int8run
made are read, and compared with the hash in its note.
"""

from collections import Counter
from collections.abc import Iterator, Mapping

from int8run.checkpoints.data_hash import check_data
from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.detect import get_logical_shapes, read_layers
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.lora.key_parsing import parse_key
from int8run.lora.unread_types import describe_unread_types, list_unread_types
from int8run.models.detect_family import detect_denoiser, find_model_without_class
from int8run.models.family import load_families
from int8run.models.loader import VAE
from int8run.models.state_dict_adapter import find_denoiser_keys, find_prefix
from int8run.tasks.file_description import Row, format_list_setting, format_setting
from int8run.text_encoders.detect import DetectedEncoder, detect_encoder
from int8run.text_encoders.registry import find_gguf_encoder
from int8run.utils.plurals import count_noun

# settings of a job that are shown of its file, where they are set
SHOWN_SETTINGS = ("outlier", "rounding", "bits", "group_size", "loras", "seed")


def describe_checkpoint(files: TensorFiles, declared: DeclaredFormat) -> Iterator[Row]:
    """Describe a checkpoint.

    Args:
        files: of the checkpoint.
        declared: what the user says of it.
    """
    encoder = find_text_encoder(files)
    prefix = encoder.prefix if encoder is not None else find_prefix(files)
    yield "prefix", prefix or "none"
    unread = list_unread_types({parse_key(key).reason for key in files})
    if unread and encoder is None:
        yield "looks like", describe_unread_types(unread)
    try:
        layers = read_layers(files, prefix, declared)
    except (ConfigError, FileError) as error:
        yield "cannot be read", str(error)
        return
    vae = find_vae_class(files)
    if encoder is not None:
        yield "text encoder", f"{encoder.encoder.name} ({' or '.join(encoder.encoder.classes)})"
    elif vae:
        yield "VAE", vae
    else:
        yield "family", describe_family(files, prefix, layers)
    yield from describe_layers(layers)
    yield from describe_provenance(files)


def find_text_encoder(files: TensorFiles) -> DetectedEncoder | None:
    """Find the text encoder that a file without a denoiser holds.

    None also for a file with several of them, or one that cannot be read: other rows say more about it.
    """
    shapes = {key: info.shape for key, info in files.items()}
    try:
        if detect_denoiser(find_denoiser_keys(shapes), load_families().values()):
            return None
        named = find_gguf_encoder(files.metadata)
        return detect_encoder(shapes) if named is None else DetectedEncoder(named, "")
    except (ConfigError, FileError):
        return None


def find_vae_class(files: TensorFiles) -> str:
    """The class of the VAE in a file that int8run made; empty for other files."""
    return str(read_provenance(files.path, files.metadata).get(VAE, ""))


def describe_family(files: TensorFiles, prefix: str, layers: Mapping[str, CheckpointLayer]) -> str:
    """Name the family and the class of the denoiser in a file.

    Args:
        files: of the checkpoint.
        prefix: before the denoiser's keys.
        layers: quantized ones, whose scales are no tensors of the denoiser.
    """
    sibling_keys = {key for layer in layers.values() for key in layer.sibling_keys}
    shapes = {}
    for key, shape in get_logical_shapes(files, layers).items():
        if key.startswith(prefix) and key not in sibling_keys:
            shapes[key.removeprefix(prefix)] = shape
    try:
        detected = detect_denoiser(shapes, load_families().values(), shapes)
    except ConfigError as error:
        return str(error)
    named = find_model_without_class(shapes, shapes)
    if detected is None and named is not None:
        return (
            f"none: this is {named}, which diffusers has no class for, so it cannot be run; task=quantize "
            "makes its middle blocks INT8, or what a model_type of your own says"
        )
    if detected is None:
        return "unknown: no fingerprint in conf/model_type matches"
    family, class_name = detected
    return f"{family.name} ({class_name})"


def describe_layers(layers: Mapping[str, CheckpointLayer]) -> Iterator[Row]:
    """Count the layers by the way in which they are stored."""
    labels = Counter(layer.label for layer in layers.values())
    for label, count in labels.most_common():
        yield "layers", f"{count} × {label}"
    largest = [layer.largest for layer in layers.values() if layer.largest is not None]
    if largest:
        casts = count_noun(len(largest), "fp8 weight")
        yield "no scale", f"{casts}, casts by their numbers: they reach {max(largest):g}"


def describe_provenance(files: TensorFiles) -> Iterator[Row]:
    """Describe how int8run made a checkpoint; nothing when another program did."""
    provenance = read_provenance(files.path, files.metadata)
    if not provenance:
        return
    yield "made by", f"int8run {provenance.get('int8run')} from {provenance.get('model')}"
    yield "tensors", describe_data(files)
    settings = []
    for name in SHOWN_SETTINGS:
        value = provenance.get(name)
        if value not in (None, []):
            settings.append(f"{name} {value}")
    yield "settings", ", ".join(settings)
    attention = provenance.get("attention")
    if attention is not None:
        yield "attention", f"made with int8.attention={attention}; it has no weights, a run sets it again"
    yield "kept float", describe_kept_float(provenance.get("kept_float"))


def describe_kept_float(reasons_by_layer: object) -> str:
    """Count the reasons why layers stayed float.

    Args:
        reasons_by_layer: from a file's provenance, where anything may stand.
    """
    if not isinstance(reasons_by_layer, dict):
        return "none"
    reasons = Counter(str(reason) for reason in reasons_by_layer.values())
    return "; ".join(f"{count} × {reason}" for reason, count in reasons.items()) or "none"


def describe_data(files: TensorFiles) -> str:
    """Say whether a checkpoint of ours holds what was written; all of its tensors are read."""
    try:
        has_hash = check_data(files)
    except FileError as error:
        return str(error)
    if not has_hash:
        return "not checked: the file has no hash of them"
    return "as int8run wrote them, by their hash"


def list_component_commands(files: TensorFiles) -> list[Row]:
    """The words that use a file as a text encoder or as a VAE; none for other files."""
    vae = find_vae_class(files)
    if vae:
        folder = files.path if files.path.is_dir() else files.path.parent
        setting = format_list_setting("model.parts.vae", [vae, folder])
        return [("to use it", f"int8.vae=int8 {setting}")]
    if find_text_encoder(files) is None:
        return []
    return [("to use it", f"clip=auto {format_setting('clip.path', files.path)}")]
