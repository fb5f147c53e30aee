"""INT8 weights by SDNQ (https://github.com/Disty0/sdnq), which says in a config.json alone how it made them.

Its weights are told by the name of their scales, `L.scale`. No tensor says whether they are rotated: each
group of columns is multiplied by a Hadamard matrix, the regular one where its size is a power of 4, else
Sylvester's. `detect.py` finds out with this module. Other weights of SDNQ, of fewer bits, with low-rank parts
or in groups, are refused.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from int8run.checkpoints.declared_format import DeclaredFormat
from int8run.checkpoints.powers import is_power_of_4, round_up_to_power_of_2
from int8run.checkpoints.reader import TensorFiles
from int8run.checkpoints.unsupported import SDNQ, has_sdnq_scale, make_unsupported_error, read_quant_config
from int8run.errors import ConfigError, FileError
from int8run.utils.paths import expand_path
from int8run.utils.plurals import count_noun
from int8run.utils.untrusted_json import parse_untrusted_json

METHODS = ("sdnq", "sdnq_training")
DEFAULT_GROUP_SIZE, MIN_GROUP_SIZE = 256, 4
MAX_GROUP_SIZE = 4096
WORD = re.compile(r"hadamard(?:_(?P<size>[0-9]{1,5}))?")
# of SDNQ's config, what says how weights are rotated
ROTATION_SETTINGS = {"use_hadamard", "hadamard_group_size"}
# format names of INT8 rows -> columns that are rotated together; 0: none
GROUP_SIZE_BY_FORMAT = {"int8_tensorwise": 0, "int8_rowwise": 0, "int8_convrot": DEFAULT_GROUP_SIZE}


@dataclass(frozen=True)
class SdnqMethod:
    """How SDNQ made the INT8 weights of a file.

    Args:
        hadamard_group_size: columns that are rotated together in wide weights; 0: none are.
    """

    hadamard_group_size: int

    def get_group_size(self, columns: int) -> int:
        """Columns that are rotated together in a weight: a power of 2 that divides them; 0: none."""
        if not self.hadamard_group_size:
            return 0
        limit = min(columns, self.hadamard_group_size)
        group_size = round_up_to_power_of_2(limit)
        while columns % group_size:
            group_size //= 2
        return group_size if group_size >= MIN_GROUP_SIZE else 0

    def is_sylvester(self, columns: int) -> bool:
        """Whether a weight is rotated by Sylvester's matrix."""
        group_size = self.get_group_size(columns)
        return group_size > 0 and not is_power_of_4(group_size)


def find_sdnq_method(files: TensorFiles, names: list[str], declared: DeclaredFormat) -> SdnqMethod | None:
    """How SDNQ made the weights of a file; None where it made none.

    Args:
        files: the checkpoint.
        names: of the layers.
        declared: where no SDNQ config is beside the file, `sdnq` decides, then `quant_format`.

    Raises:
        ConfigError: `model.sdnq` is not understood, or the file has no SDNQ weight.
        FileError: nothing says how the weights were made, a config cannot be read, `model.sdnq` and the
            config contradict each other, or weights are not matrices, or are rotated and not INT8.
    """
    weights = [name for name in names if has_sdnq_scale(files, name)]
    word = declared.sdnq
    named = None if word is None else parse_word(word)
    if not weights:
        if named is not None:
            raise ConfigError(
                f"model.sdnq={word}, and {files.path} has no weight whose scale is in `scale`, as SDNQ "
                "writes it; leave it out: model.sdnq=null"
            )
        return None
    config = read_quant_config(files)
    if config.get("quant_method") in METHODS:
        method = parse_config(config, f"the config beside {files.path}")
        if named not in (None, method):
            raise FileError(
                f"model.sdnq={word}, and the config beside {files.path} says "
                f"{describe_method(method)}; they contradict each other"
            )
    elif named is not None:
        method = named
    elif declared.quant_format in GROUP_SIZE_BY_FORMAT:
        method = SdnqMethod(GROUP_SIZE_BY_FORMAT[declared.quant_format])
    else:
        raise make_lost_config_error(files, weights)
    check_readable(files, weights, method)
    return method


def describe_method(method: SdnqMethod) -> str:
    """The word of `model.sdnq` for a method."""
    return f"hadamard_{method.hadamard_group_size}" if method.hadamard_group_size else "none"


def make_lost_config_error(files: TensorFiles, weights: list[str]) -> FileError:
    """The error for weights of SDNQ without its config; `weights` are their layers."""
    return FileError(
        f"{files.path}: {count_noun(len(weights), 'weight', 'have')} a scale in `scale`, as SDNQ writes it "
        f"(first: {weights[0]}), and its config.json alone says whether they are rotated; put that file "
        "beside it, or set model.sdnq=<config.json>, model.sdnq=none or model.sdnq=hadamard "
        "(clip=int8_rowwise or clip=int8_convrot for a text encoder)"
    )


def parse_word(word: str | Mapping[str, Any]) -> SdnqMethod:
    """What `model.sdnq` says: `none`, `hadamard`, `hadamard_128`, a config.json, or the fields of one.

    Raises:
        ConfigError: for anything else.
        FileError: for a config.json that cannot be read.
    """
    if isinstance(word, Mapping):
        return parse_setting(word)
    if word == "none":
        return SdnqMethod(0)
    match = WORD.fullmatch(word)
    if match is not None:
        group_size = int(match["size"] or DEFAULT_GROUP_SIZE)
        return parse_setting({"use_hadamard": True, "hadamard_group_size": group_size})
    if not word.endswith(".json"):
        raise ConfigError(
            f"model.sdnq={word} is none of none, hadamard (groups of {DEFAULT_GROUP_SIZE} columns), "
            "hadamard_<size>, and no config.json"
        )
    return read_config_file(word)


def parse_setting(fields: Mapping[str, Any]) -> SdnqMethod:
    """What SDNQ's fields say that `model.sdnq` itself gives, not a file.

    Raises:
        ConfigError: where a config with these fields is refused.
    """
    try:
        return parse_config(fields, "model.sdnq")
    except FileError as error:
        raise ConfigError(str(error)) from error


def read_config_file(location: str) -> SdnqMethod:
    """What a config.json that `model.sdnq` names says.

    Raises:
        FileError: it cannot be read, or is not a config of SDNQ.
    """
    path = expand_path(location)
    try:
        found = parse_untrusted_json(path.read_bytes(), allows_repeats=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"model.sdnq={location} cannot be read: {reason}") from error
    config = None
    if isinstance(found, dict):
        config = found.get("quantization_config", found)
    if not isinstance(config, dict) or config.get("quant_method") not in METHODS:
        raise FileError(f"model.sdnq={location} is no config of SDNQ: it names no quant_method {METHODS[0]}")
    return parse_config(config, f"model.sdnq={location}")


def parse_config(config: Mapping[str, Any], where: str) -> SdnqMethod:
    """What SDNQ's own `quantization_config` says.

    Args:
        config: its fields.
        where: it comes from, for messages.

    Raises:
        FileError: for layers that are rotated each in its own way, or a size that no matrix has.
    """
    per_layer = config.get("modules_quant_config")
    if isinstance(per_layer, dict):
        check_layer_settings(per_layer, where)
    if not config.get("use_hadamard", False):
        return SdnqMethod(0)
    return SdnqMethod(check_group_size(config.get("hadamard_group_size", DEFAULT_GROUP_SIZE), where))


def check_layer_settings(per_layer: Mapping[str, Any], where: str) -> None:
    """Raise FileError when SDNQ's config rotates a layer in another way than the others.

    Args:
        per_layer: what it says about single layers, by name.
        where: it comes from, for the error.
    """
    for name, settings in per_layer.items():
        if isinstance(settings, dict) and ROTATION_SETTINGS & set(settings):
            raise FileError(
                f"{where} rotates {name} in its own way, which int8run does not read; "
                "diffusers with sdnq does"
            )


def check_group_size(size: Any, where: str) -> int:
    """Return the size of rotated groups; raise FileError where SDNQ cannot have it."""
    if type(size) is not int or not MIN_GROUP_SIZE <= size <= MAX_GROUP_SIZE:
        raise FileError(
            f"{where} names groups of {size!r} columns; SDNQ rotates {MIN_GROUP_SIZE} to {MAX_GROUP_SIZE}"
        )
    return size


def check_readable(files: TensorFiles, names: list[str], method: SdnqMethod) -> None:
    """Raise FileError for weights of SDNQ that are not matrices, or rotated and not INT8."""
    for name in names:
        info = files[f"{name}.weight"]
        if len(info.shape) != 2 or (info.dtype != "I8" and method.hadamard_group_size):
            raise make_unsupported_error(files, SDNQ, f"{info.key} is {info.dtype} {list(info.shape)}")
