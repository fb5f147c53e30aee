"""What a denoiser's checkpoint is: its family, its class in diffusers, and whose names its tensors have.

Found out from the headers and a config beside the file; no tensor is read. Called by
`tasks.quantize_checkpoint`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from int8run.checkpoints.comfy_int8 import WEIGHT
from int8run.checkpoints.detect import get_logical_shapes
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.export.stream_plan import keep_own_names
from int8run.models.block_rules import keep_boundary_blocks
from int8run.models.detect_family import detect_denoiser
from int8run.models.family import AutoFamily, ModelFamily, load_families
from int8run.models.key_mapping import KeyMapping, load_mappings
from int8run.models.name_pattern import match_pattern
from int8run.models.resolve_weights import ResolvedWeights
from int8run.models.state_dict_adapter import find_drop_reason, find_targets
from int8run.models.tensor_part import Shape, TensorPart

# a list of blocks, and a block of it: `transformer_blocks.0.`
BLOCK = re.compile(r"(?P<list>\w+\.)\d+\.")


@dataclass(frozen=True)
class DenoiserCheckpoint:
    """What a checkpoint is.

    Args:
        family: decides which layers stay float.
        class_name: diffusers class of the denoiser; empty when it is unknown.
        prefix: before the denoiser's keys in the file.
        parameters: of diffusers that each key, without prefix, stands for.
        is_original: whether the file has the names of the model's authors and not those of diffusers.
    """

    family: ModelFamily
    class_name: str
    prefix: str
    parameters: Mapping[str, tuple[str, ...]]
    is_original: bool

    def find_skip_reason(self, key: str, parts: tuple[TensorPart, ...]) -> str | None:
        """Find the reason why a weight stays float: that of any of the layers that it holds.

        Args:
            key: in the new file.
            parts: tensors of the source that the weight is made of.
        """
        source_keys = [part.key.removeprefix(self.prefix) for part in parts]
        names = [name for source_key in source_keys for name in self.parameters[source_key]]
        if not names:
            reason = find_drop_reason(source_keys[0], load_mappings(self.class_name))
            return f"not a layer of {self.class_name}: {reason}"
        for name in names:
            reason = self._find_parameter_skip_reason(name)
            if reason is None:
                continue
            if len(names) == 1:
                return reason
            return f"{reason} ({name.removesuffix(WEIGHT)} is a part of it)"
        return None

    def _find_parameter_skip_reason(self, name: str) -> str | None:
        if not name.endswith(WEIGHT):
            return "a table, not a Linear"
        return self.family.find_skip_reason(name.removesuffix(WEIGHT))


def recognize_checkpoint(
    files: TensorFiles,
    layers: Mapping[str, CheckpointLayer],
    *,
    prefix: str,
    source: ResolvedWeights,
    model_type: ModelFamily | AutoFamily,
) -> DenoiserCheckpoint:
    """Find out what a checkpoint is: from its config, else from its names and shapes.

    Args:
        files: the checkpoint.
        layers: its weights by name.
        prefix: before the denoiser's keys.
        source: where it was found, with a config of its class if there is one.
        model_type: the family that the user chose, or auto.

    Raises:
        ConfigError: when the names are those of more than one denoiser.
    """
    keys = [key.removeprefix(prefix) for key in keep_own_names(files, layers) if key.startswith(prefix)]
    detected = None
    if not source.class_name:
        logical_shapes = get_logical_shapes(files, layers)
        shapes = {key: logical_shapes[prefix + key] for key in keys}
        detected = detect_among(model_type, keys, shapes)

    if source.class_name:
        class_name = source.class_name
    elif detected is not None:
        _, class_name = detected
    else:
        class_name = get_only_denoiser(model_type)
    is_original = has_original_names(keys, class_name)
    parameters = map_parameters(keys, class_name, is_original=is_original)

    linears = find_linears(parameters, layers, prefix)
    blocks = find_repeated_blocks(linears)
    if isinstance(model_type, AutoFamily) and detected is not None:
        family = model_type.pass_settings(detected[0])
    else:
        denoiser = class_name or f"what {source.path.name} holds"
        family = model_type.resolve_family(denoiser, blocks, linears, source.pipeline)
    family = keep_boundary_blocks(family, blocks, linears)
    return DenoiserCheckpoint(
        family=family,
        class_name=class_name,
        prefix=prefix,
        parameters=parameters,
        is_original=is_original,
    )


def detect_among(
    model_type: ModelFamily | AutoFamily, keys: Sequence[str], shapes: Mapping[str, Shape]
) -> tuple[ModelFamily, str] | None:
    """Detect the family of a denoiser and its class; None where no fingerprint matches.

    Args:
        model_type: the family that the user chose, whose widths are not checked; or auto.
        keys: of the checkpoint, without prefix.
        shapes: logical shapes by key.

    Raises:
        ConfigError: when the names are those of more than one denoiser.
    """
    if isinstance(model_type, ModelFamily):
        return detect_denoiser(keys, [model_type])
    families = model_type.families or load_families()
    return detect_denoiser(keys, families.values(), shapes)


def get_only_denoiser(model_type: ModelFamily | AutoFamily) -> str:
    """Return the class of a family that has one denoiser; empty for any other."""
    if isinstance(model_type, ModelFamily) and len(model_type.denoisers) == 1:
        return model_type.denoisers[0]
    return ""


def has_original_names(keys: Iterable[str], class_name: str) -> bool:
    """Whether names are those of a model's authors and not those of diffusers.

    A few names of one side may look like names of the other, so the side that more names look like is chosen.

    Args:
        keys: of the checkpoint, without prefix.
        class_name: diffusers class of the denoiser.
    """
    mappings = load_mappings(class_name)
    rules = (*mappings.parameters, *mappings.names)
    num_original = num_diffusers = 0
    for key in keys:
        num_original += any(is_original_name(key, rule) for rule in rules)
        num_diffusers += any(is_diffusers_name(key, rule) for rule in rules)
    return num_original > num_diffusers


def is_original_name(key: str, rule: KeyMapping) -> bool:
    """Whether a key is one that a rule translates from."""
    return match_pattern(rule.original, rule.extract_name(key)) is not None


def is_diffusers_name(key: str, rule: KeyMapping) -> bool:
    """Whether a key is one that a rule translates to."""
    name = rule.extract_name(key)
    return any(match_pattern(target, name) is not None for target in rule.targets)


def map_parameters(
    keys: Sequence[str], class_name: str, *, is_original: bool
) -> Mapping[str, tuple[str, ...]]:
    """Map each key to the parameters of diffusers that it stands for; to none where the model has no such.

    Args:
        keys: of the checkpoint, without prefix.
        class_name: diffusers class of the denoiser.
        is_original: whether they are the names of the model's authors.
    """
    if is_original:
        return find_targets(keys, class_name)
    mappings = load_mappings(class_name)
    return {key: () if find_drop_reason(key, mappings) else (key,) for key in keys}


def find_linears(
    parameters: Mapping[str, tuple[str, ...]], layers: Mapping[str, CheckpointLayer], prefix: str
) -> dict[str, int]:
    """Find the Linears of the denoiser by their names in diffusers.

    Args:
        parameters: of diffusers by key of the checkpoint, without prefix.
        layers: weights of the checkpoint by name, with prefix.
        prefix: before the denoiser's keys.

    Returns:
        in_features by name.
    """
    linears = {}
    for key, names in parameters.items():
        layer = layers.get((prefix + key).removesuffix(WEIGHT))
        if layer is None or not key.endswith(WEIGHT):
            continue
        weights = [name for name in names if name.endswith(WEIGHT)]
        for name in weights:
            linears[name.removesuffix(WEIGHT)] = layer.columns
    return linears


def find_repeated_blocks(names: Iterable[str]) -> list[str]:
    """Find the prefixes of repeated blocks (`transformer_blocks.0.`), in the order of the names.

    A list with one block does not repeat it.
    """
    lists: dict[str, str] = {}  # block -> the list that it is in
    for name in names:
        match = BLOCK.match(name)
        if match is not None:
            lists[match[0]] = match["list"]
    counts = Counter(lists.values())
    return [block for block, block_list in lists.items() if counts[block_list] > 1]
