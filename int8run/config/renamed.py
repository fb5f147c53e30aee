"""Old names of settings and classes, which keep working for one release.

The tables at the top are data; the rest translates with them. The command line and `quantize_` translate
overrides, and `own_options` of compose.py lets hydra read a user's YAML files in today's names. Both happen
before the config is composed, so that nothing else in the package knows an old name. Each old name is
reported once.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from int8run.errors import ConfigError

log = logging.getLogger(__name__)
FIRST_WITHOUT = "0.3"  # the first release that does not know the old names


@dataclass(frozen=True)
class RenamedKey:
    """A setting that has a new name.

    Args:
        old: dotted path, where `*` stands for one part. The parts before the last are today's names.
        new: the same path with the new last part.
        values: values that have a new name, too.
    """

    old: str
    new: str
    values: Mapping[str, str] = field(default_factory=dict)

    @property
    def new_key(self) -> str:
        """The new last part."""
        return self.new.rpartition(".")[2]


MIXED_PRECISION = {"listed": "none"}
RENAMED_KEYS = (
    RenamedKey("model_type.keep_float", "model_type.mixed_precision", MIXED_PRECISION),
    RenamedKey("model_type.float_layers", "model_type.ignore"),
    RenamedKey("model_type.ignore.*.why", "model_type.ignore.*.reason"),
    RenamedKey("model_type.families.*.keep_float", "model_type.families.*.mixed_precision", MIXED_PRECISION),
    RenamedKey("model_type.families.*.float_layers", "model_type.families.*.ignore"),
    RenamedKey("model_type.families.*.ignore.*.why", "model_type.families.*.ignore.*.reason"),
    RenamedKey("backend.candidates.vnni", "backend.candidates.cpu"),
    RenamedKey("calibration.moments", "calibration.num_timesteps"),
    RenamedKey("calibration.rows", "calibration.max_tokens_per_layer"),
)
# options and other values that have a new name where the setting has none
RENAMED_VALUES = {("backend",): {"vnni": "cpu"}, ("clip", "kernel_backend"): {"vnni": "cpu"}}
RENAMED_TARGETS = {
    "int8run.backends.triton.tile": "int8run.backends.triton.parse_tile",
    "int8run.backends.vnni.Vnni": "int8run.backends.cpu.Cpu",
    "int8run.generate.calibration.Calibration": "int8run.generate.calibration_settings.CalibrationSettings",
    "int8run.lora.settings.Adapter": "int8run.lora.config.Adapter",
    "int8run.lora.settings.LoraSettings": "int8run.lora.config.LoraSettings",
    "int8run.metrics.base.Metrics": "int8run.metrics.settings.MetricsSettings",
    "int8run.models.family.Sampling": "int8run.models.sampling.Sampling",
    "int8run.quantize.Int8Settings": "int8run.layers.plan.Int8Settings",
    "int8run.spec.RunSpec": "int8run.config.run_spec.RunSpec",
    "int8run.store.Store": "int8run.utils.disk_cache.DiskCache",
    "int8run.tasks.Bench": "int8run.tasks.options.Bench",
    "int8run.tasks.Inspect": "int8run.tasks.options.Inspect",
    "int8run.tasks.Quantize": "int8run.tasks.options.Quantize",
    "int8run.tasks.Report": "int8run.tasks.options.Report",
    "int8run.tasks.Run": "int8run.tasks.options.Run",
}
SWEEP_PARAMS = ("hydra", "sweeper", "params")  # a mapping whose keys are overrides
REFERENCE = re.compile(r"\$\{([\w.]+)\}")
ESCAPED_REFERENCE = re.compile(r"\$\\\{.*?\\\}")
# an argument without any of these needs no look
OLD_WORDS = (
    *{rule.old.rpartition(".")[2] for rule in RENAMED_KEYS},
    *{old for names in RENAMED_VALUES.values() for old in names},
    *RENAMED_TARGETS,
)

Path = tuple[str, ...]
# called with the old and the new name of whatever is translated
Report = Callable[[str, str], None]


def report_once() -> Report:
    """A function that warns about each old name, the first time that it meets it."""
    reported: set[str] = set()

    def report(old: str, new: str) -> None:
        if old not in reported:
            reported.add(old)
            log.warning("%s is now %s; the old name works until %s", old, new, FIRST_WITHOUT)

    return report


# -- names -----------------------------------------------------------------------------------------


def find_rule(path: Path) -> RenamedKey | None:
    """The rule that renames the last part of a path, whose other parts are today's names, if there is one."""
    for rule in RENAMED_KEYS:
        if is_match(rule.old, path):
            return rule
    return None


def is_match(pattern: str, path: Path) -> bool:
    """Whether a path is the one of a rule, in which `*` stands for any one part."""
    parts = pattern.split(".")
    if len(parts) != len(path):
        return False
    return all(expected in ("*", part) for expected, part in zip(parts, path, strict=True))


def rename_path(path: Path, report: Report) -> Path:
    """A path in today's names."""
    renamed: Path = ()
    for part in path:
        renamed = (*renamed, part)
        rule = find_rule(renamed)
        if rule is not None:
            report(rule.old, rule.new)
            renamed = (*renamed[:-1], rule.new_key)
    return renamed


def rename_text(text: str, path: Path, report: Report) -> str:
    """A text in the config that has a new name, is the name of a class, or refers to other settings."""
    renamed = RENAMED_VALUES.get(path, {}).get(text, text)
    if renamed != text:
        setting = ".".join(path)
        report(f"{setting}={text}", f"{setting}={renamed}")
        return renamed
    if path[-1:] == ("_target_",):
        new = RENAMED_TARGETS.get(text, text)
        if new != text:
            report(text, new)
        return new

    def rename_reference(found: re.Match[str]) -> str:
        new_key = ".".join(rename_path(split(found[1]), report))
        return f"${{{new_key}}}"

    return REFERENCE.sub(rename_reference, text)


def split(key: str) -> Path:
    """`a.b` -> `("a", "b")`."""
    return tuple(key.split("."))


# -- trees -----------------------------------------------------------------------------------------


def rename_tree(node: Any, path: Path, report: Report) -> Any:
    """A part of the config in today's names.

    Args:
        node: dicts, lists and plain values, as YAML has them or as hydra parses an override.
        path: where it is in the config, in today's names.
        report: called for each old name.

    Raises:
        ConfigError: for a setting that is given under both names.
    """
    renamed = node
    match node:
        case dict() if path == SWEEP_PARAMS:
            renamed = rename_sweep_params(node, report)
        case dict():
            renamed = rename_mapping(node, path, report)
        case list():
            renamed = [rename_tree(item, (*path, str(i)), report) for i, item in enumerate(node)]
        case ChoiceSweep():
            renamed = replace(node, list=[rename_tree(choice, path, report) for choice in node.list])
        case QuotedString():
            renamed = replace(node, text=rename_text(node.text, path, report))
        case str():
            renamed = rename_text(node, path, report)
    return renamed


def rename_mapping(node: Mapping[Any, Any], path: Path, report: Report) -> dict[Any, Any]:
    """A mapping in today's names: its keys, and what it holds."""
    renamed = {}
    for key, value in node.items():
        rule = find_rule((*path, str(key)))
        if rule is None:
            renamed[key] = rename_tree(value, (*path, str(key)), report)
            continue
        if rule.new_key in node:
            raise ConfigError(f"{rule.old} and {rule.new} are the same setting; give {rule.new} alone")
        report(rule.old, rule.new)
        new_value = rename_choices(value, rule.values)
        renamed[rule.new_key] = rename_tree(new_value, (*path, rule.new_key), report)
    return renamed


def rename_choices(value: Any, new_values: Mapping[str, str]) -> Any:
    """The value of a renamed setting, where its values have new names; of a sweep each of them."""
    match value:
        case ChoiceSweep():
            return replace(value, list=[rename_choices(choice, new_values) for choice in value.list])
        case QuotedString():
            return replace(value, text=new_values.get(value.text, value.text))
        case str():
            return new_values.get(value, value)
    return value


def rename_sweep_params(params: Mapping[Any, Any], report: Report) -> dict[str, str]:
    """The jobs of a sweep that is written in a file: each entry is an override."""
    renamed = {}
    for key, value in params.items():
        new_key, _, new_value = rename_override(f"{key}={value}", report).partition("=")
        renamed[new_key] = new_value
    return renamed


# -- overrides -------------------------------------------------------------------------------------


def rename_overrides(arguments: Sequence[str], report: Report) -> list[str]:
    """Arguments of the command line, the overrides among them in today's names.

    Raises:
        ConfigError: for a mapping that gives a setting under both names.
    """
    return [rename_override(argument, report) for argument in arguments]


def rename_override(override: str, report: Report) -> str:
    """One override in today's names; what has none of the old ones is returned as it is."""
    if not any(word in override for word in OLD_WORDS):
        return override
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException:
        return override  # hydra says what is wrong with it, or it is no override
    old_path = split(parsed.key_or_group)
    path = rename_path(old_path, report)
    override = override.replace(parsed.key_or_group, ".".join(path), 1)

    new_value = value = parsed._value
    rule = find_rule((*path[:-1], old_path[-1]))
    if rule is not None:
        new_value = rename_choices(value, rule.values)
    new_value = rename_tree(new_value, path, report)
    if new_value == value:
        return override
    return f"{override.partition('=')[0]}={as_text(parsed, new_value)}"


def as_text(parsed: Override, value: Any) -> str:
    """A parsed value as one types it."""
    if not isinstance(value, ChoiceSweep):
        text = replace(parsed, _value=value).get_value_element_as_str()
        return ESCAPED_REFERENCE.sub(lambda found: found[0].replace("\\", ""), text)
    text = ",".join(as_text(parsed, choice) for choice in value.list)
    if value.shuffle:
        return f"shuffle({text})"
    return text if value.simple_form else f"choice({text})"


# -- files -----------------------------------------------------------------------------------------


@contextmanager
def old_names_in_files() -> Iterator[None]:
    """Let hydra read YAML files on disk, such as those of `--config-dir`, in today's names.

    Hydra's own reader stays registered, with another method: workers of a sweep are sent the registry, and a
    class of ours in it would clash with the one that they register themselves.
    """
    # hydra loads its plugins in a way of its own: this class is not the one that an import gives
    source_class = SourcesRegistry.instance().types["file"]
    read_as_written = source_class.load_config
    if getattr(read_as_written, "renames", False):  # we are inside another such block
        yield
        return
    report = report_once()

    def load_config(source: Any, config_path: str) -> ConfigResult:
        result = read_as_written(source, config_path)
        if isinstance(result.config, DictConfig):
            tree = OmegaConf.to_container(result.config, resolve=False)
            renamed = rename_tree(tree, find_package(config_path, result.header), report)
            if renamed != tree:
                result.config = OmegaConf.create(renamed)
        return result

    load_config.renames = True  # type: ignore[attr-defined]
    source_class.load_config = load_config
    try:
        yield
    finally:
        source_class.load_config = read_as_written


def find_package(config_path: str, header: Mapping[str, Any]) -> Path:
    """Where the settings of a file go in the config: its group, or what its `# @package` line says."""
    group = config_path.rpartition("/")[0].replace("/", ".")
    package = header.get("package") or "_group_"
    package = package.replace("_group_", group).replace("_global_", "")
    return tuple(part for part in package.split(".") if part)
