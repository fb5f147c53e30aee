"""Which diffusers class runs a checkpoint: the one that its repository names, or that of the settings.

`source` asks for it once it has a `model_index.json`; nothing is loaded here. What a mode means is data, of
`pipeline_modes.yaml` and of diffusers' AutoPipeline.
"""

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, get_args

import diffusers
from diffusers import DiffusionPipeline, ModularPipeline

from int8run.errors import ConfigError, suggest_similar
from int8run.models.family import read_model_options
from int8run.models.missing_library import read_late_attribute
from int8run.models.pipeline_modes import load_modes
from int8run.utils.paths import SHIPPED_PREFIX

CONTROLNET = "controlnet"  # the component, and the end of the keys in diffusers' tables
ANY_CONTROLNET = "ControlNetModel"
MAX_SUGGESTIONS = 6


def choose_pipeline_class(
    named: object, *, pipeline: str | None, mode: str | None, controlnet: str | None = None
) -> str:
    """The name of the class that runs a checkpoint.

    Args:
        named: the class that its `model_index.json` names.
        pipeline: `model.pipeline`, which takes its place.
        mode: `model.mode`, of either.
        controlnet: the class of the component `controlnet` in `model.parts`; None: there is none.

    Raises:
        ConfigError: for a class that diffusers does not have, and for a mode that this class has not.
    """
    own = str(named)
    if pipeline is not None:
        check_pipeline_name(pipeline)
        own = pipeline
    if mode is None:
        return own
    found = find_mode_class(own, mode, controlnet)
    if found is None:
        raise ConfigError(describe_missing_mode(own, mode, controlnet))
    return found


def check_pipeline_name(name: str) -> None:
    """Raise ConfigError unless diffusers has a pipeline of this name."""
    if is_pipeline(name):
        return
    is_listed = name in dir(diffusers)
    problem = "is no pipeline of" if is_listed else "is not in"
    # attributes are not asked for: each would import its module
    known = [other for other in dir(diffusers) if other.endswith("Pipeline")]
    raise ConfigError(
        f"model.pipeline={name} {problem} diffusers {diffusers.__version__}; {suggest_similar(name, known)}"
        "null takes the one that the repository names"
    )


def is_pipeline(name: str) -> bool:
    """Whether diffusers has a pipeline of this name that can be used here."""
    # diffusers puts a placeholder, which is no pipeline, where a library is missing
    cls = read_late_attribute(diffusers, name, f"the pipeline {name}")
    return isinstance(cls, type) and issubclass(cls, (DiffusionPipeline, ModularPipeline))


def is_modular(name: str) -> bool:
    """Whether diffusers has a modular pipeline of this name."""
    cls = read_late_attribute(diffusers, name, f"the pipeline {name}")
    return isinstance(cls, type) and issubclass(cls, ModularPipeline)


def find_mode_class(named: str, mode: str, controlnet: str | None) -> str | None:
    """The class of a mode for a checkpoint; None where there is none.

    Args:
        named: the class that the repository names.
        mode: its name.
        controlnet: the class of the component `controlnet`; None: there is none.
    """
    facts = load_modes()[mode]
    suffix = facts.suffixes.get(controlnet or "", f"-{CONTROLNET}" if controlnet else "")
    for table in facts.tables:
        found = find_in_table(named, table, suffix)
        if found is not None:
            return found
    return facts.pairs.get(named)


def find_in_table(named: str, table: str, suffix: str) -> str | None:
    """The class of one of diffusers' tables that belongs to the same checkpoints as another class.

    Args:
        named: the other class.
        table: name of the table.
        suffix: behind the key of the class.
    """
    from diffusers.pipelines import auto_pipeline

    classes: Mapping[str, type] = getattr(auto_pipeline, table)
    if named in [cls.__name__ for key, cls in classes.items() if key.endswith(suffix)]:
        return named
    for key in list_table_keys(named):
        cls = classes.get(key + suffix)
        if cls is not None:
            return cls.__name__
    return None


def list_table_keys(named: str) -> list[str]:
    """The keys of a class in all of diffusers' tables."""
    from diffusers.pipelines import auto_pipeline

    keys = []
    for classes in auto_pipeline.SUPPORTED_TASKS_MAPPINGS:
        keys += [key for key, cls in classes.items() if cls.__name__ == named]
    return list(dict.fromkeys(keys))


def describe_missing_mode(named: str, mode: str, controlnet: str | None) -> str:
    """The message for a mode that a checkpoint has not: which it has, and what else can be given."""
    with_controlnet = find_mode_class(named, mode, ANY_CONTROLNET) if controlnet is None else None
    if with_controlnet is not None:
        return (
            f"model.mode={mode} of a checkpoint of {named} is run by {with_controlnet}, which needs a "
            f"ControlNet: give it with 'model.parts.{CONTROLNET}=[CLASS, FOLDER]'"
        )
    pairs = [f"{other} ({found})" for other, found in list_modes(named, controlnet).items()]
    has = f"it has {', '.join(pairs)}" if pairs else "it has no mode"
    models = list_models_with_pipeline(lambda other: find_mode_class(other, mode, None) is not None)
    others = f"these have it: {', '.join(models[:MAX_SUGGESTIONS])}" if models else "choose another model"
    return (
        f"model.mode={mode} does not exist for a checkpoint of {named}; {has}; {others}; or name a class of "
        "diffusers with model.pipeline"
    )


def list_models_with_pipeline(is_fitting: Callable[[str], bool]) -> list[str]:
    """The options of `model=` whose YAML names a pipeline that fits.

    Those that ship come first: they run at once.

    Args:
        is_fitting: whether the class of a pipeline does, by its name.
    """
    shipped: list[str] = []
    others: list[str] = []
    for name, option in read_model_options().items():
        if option.pipeline is None or not is_fitting(option.pipeline):
            continue
        is_shipped = str(option.location).startswith(SHIPPED_PREFIX)
        (shipped if is_shipped else others).append(f"model={name}")
    return [*shipped, *others]


def list_modes(named: str, controlnet: str | None = None) -> dict[str, str]:
    """The modes that a checkpoint has, and the class of each.

    Args:
        named: the class that the repository names.
        controlnet: the class of the component `controlnet`; None: there is none.
    """
    found = {mode: find_mode_class(named, mode, controlnet) for mode in load_modes()}
    return {mode: cls for mode, cls in found.items() if cls is not None}


def get_pipeline_class(name: str) -> Any:
    """The pipeline class of a name; the base class where diffusers does not have it.

    The base class forgets components that a pipeline calls optional, and reads them itself.
    """
    return getattr(diffusers, name) if is_pipeline(name) else DiffusionPipeline


def check_pipeline_fits(
    name: str, index: Mapping[str, Any], parts: Mapping[str, str], setting: str, checked: Collection[str]
) -> None:
    """Check that a repository has what a pipeline is made of, before any of it is read.

    Args:
        name: class of the pipeline.
        index: `model_index.json` of the repository.
        parts: classes of the components that come from elsewhere.
        setting: that chose the class, such as `model.mode=img2img`.
        checked: components whose class must be the one that the pipeline names.

    Raises:
        ConfigError: when a component is missing or is of another class, or when the pipeline has no place for
            a given component.
    """
    cls = get_pipeline_class(name)
    if issubclass(cls, ModularPipeline):
        return  # which of its components a call needs depends on the inputs; the call says what is missing
    held = {component: entry[1] for component, entry in index.items() if is_held(entry)} | dict(parts)
    missing = [component for component in list_needed_components(cls) if component not in held]
    if missing:
        raise ConfigError(
            f"{setting} is run by {name}, which needs {', '.join(missing)}, and the repository has none; "
            f"give it with 'model.parts.{missing[0]}=[CLASS, FOLDER]', or choose another pipeline"
        )
    classes = list_component_classes(cls)
    for component in checked:
        found, allowed = held.get(component), classes.get(component)
        if found is None or (allowed is not None and (found in allowed or not allowed)):
            continue
        takes = f"takes no {component}"
        if allowed:
            takes = f"takes a {' or '.join(sorted(allowed))} as {component}"
        raise ConfigError(
            f"{setting} is run by {name}, which {takes}, and there is a {found}; the repository is for "
            f"{index.get('_class_name')}"
        )


def is_held(entry: object) -> bool:
    """Whether an entry of `model_index.json` is a component that the repository has."""
    return isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], str)


def list_needed_components(cls: Any) -> list[str]:
    """The components that a pipeline cannot be made without."""
    parameters = inspect.signature(cls.__init__).parameters
    optional = getattr(cls, "_optional_components", ())
    needed = []
    for name, parameter in parameters.items():
        is_named = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
        if is_named and parameter.default is parameter.empty and name not in optional:
            needed.append(name)
    return needed


def list_component_classes(cls: Any) -> dict[str, frozenset[str]]:
    """The diffusers models that a pipeline takes as each of its components; none where it says nothing."""
    allowed: dict[str, frozenset[str]] = {}
    for name, parameter in inspect.signature(cls.__init__).parameters.items():
        options = get_args(parameter.annotation) or (parameter.annotation,)
        models = [option for option in options if is_model(option)]
        allowed[name] = frozenset(model.__name__ for model in models)
    return allowed


def is_model(option: object) -> bool:
    """Whether a class is a denoiser or another model of diffusers."""
    return isinstance(option, type) and issubclass(option, diffusers.ModelMixin)
