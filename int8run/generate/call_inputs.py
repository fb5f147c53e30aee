"""Which inputs the call of a pipeline takes and needs: read from its signature and `call_inputs.yaml`.

`input_arguments` makes the arguments of a call with it, `pipeline.sample_checks` refuses samples before
anything is loaded. No file is opened and no class is asked for its name here.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from int8run.generate.sample_inputs import (
    CONTROL_IMAGE,
    IMAGE,
    LAST_IMAGE,
    MASK_IMAGE,
    REFERENCE_IMAGES,
    STRENGTH,
    VIDEO,
    is_file_column,
)
from int8run.models.modular_pipeline import get_call_class

FACTS_FILE = Path(__file__).with_suffix(".yaml")
CONDITION_COLUMNS = (IMAGE, LAST_IMAGE, VIDEO)  # what an object of `conditions` can hold
# what a call is always given, besides the settings
GIVEN = ("self", "prompt", "args", "kwargs")


@dataclass(frozen=True)
class CallFacts:
    """What `call_inputs.yaml` says; see there."""

    spellings: Mapping[str, Sequence[str]]
    no_files: Sequence[str]
    control_components: Sequence[str]
    conditions: Sequence[str]
    object_classes: Mapping[str, Mapping[str, str]]
    several_images: Sequence[str]
    nested_images: Sequence[str]
    frame_tensors: Sequence[str]
    needs: Mapping[str, Sequence[str]]
    optional: Mapping[str, Sequence[str]]
    needs_one: Mapping[str, Sequence[str]]


@functools.cache
def load_facts() -> CallFacts:
    """Return what `call_inputs.yaml` says."""
    return CallFacts(**yaml.safe_load(FACTS_FILE.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class CallInputs:
    """The inputs that the call of one pipeline takes.

    Args:
        pipeline: name of its class.
        arguments: by column, the argument that it becomes; several columns may become one.
        needs: columns that cannot be left out.
        needs_one: columns of which one cannot.
        needed_arguments: further arguments without a default that no column is for.
        parameters: of the call, by name.
        several: columns that may hold more than one file.
        condition: the class of the objects in `conditions`; None: the call has none.
        takes_strength: whether it can be told how much of the image is replaced.
    """

    pipeline: str
    arguments: Mapping[str, str]
    needs: tuple[str, ...] = ()
    needs_one: tuple[str, ...] = ()
    needed_arguments: tuple[str, ...] = ()
    parameters: Mapping[str, inspect.Parameter] = field(default_factory=dict, repr=False)
    several: tuple[str, ...] = ()
    condition: type | None = None
    takes_strength: bool = False

    @property
    def takes(self) -> tuple[str, ...]:
        """The columns that it takes."""
        return tuple(self.arguments)

    @property
    def strength_skips_steps(self) -> bool:
        """Whether a strength below 1 leaves out the first steps."""
        return self.takes_strength and self.condition is None

    @property
    def default_strength(self) -> float | None:
        """The strength of a call that is given none; None where it takes none."""
        default = self.parameters[STRENGTH].default if self.strength_skips_steps else None
        return default if isinstance(default, int | float) else None

    def describe(self) -> str:
        """What it takes, for messages: `image (needed), mask_image, strength`."""
        words = []
        for column in self.takes:
            suffix = " (needed)" if column in self.needs else ""
            if column in self.needs_one:
                others = [other for other in self.needs_one if other != column]
                suffix = f" (needed, or {' or '.join(others)})"
            words.append(column + suffix)
        if self.takes_strength:
            words.append(STRENGTH)
        return ", ".join(words) or "no image and no video"


def read_call_inputs(cls: Any) -> CallInputs:
    """Read what the call of a pipeline's class takes and needs."""
    parameters = inspect.signature(get_call_class(cls).__call__).parameters
    components = inspect.signature(cls.__init__).parameters
    return find_call_inputs(cls.__name__, parameters, tuple(components))


def find_call_inputs(
    name: str, parameters: Mapping[str, inspect.Parameter], components: Sequence[str] = ()
) -> CallInputs:
    """Find the inputs among the parameters of a call.

    Args:
        name: of the pipeline's class.
        parameters: of its call, by name.
        components: of the pipeline.
    """
    facts = load_facts()
    arguments = find_arguments(parameters, components)
    condition = find_condition_class(name, parameters)
    if condition is not None:
        argument = next(word for word in facts.conditions if word in parameters)
        arguments |= dict.fromkeys(CONDITION_COLUMNS, argument)
    takes_several = name in facts.several_images
    if takes_several and REFERENCE_IMAGES not in arguments:
        arguments[REFERENCE_IMAGES] = arguments[IMAGE]
    needs = list(facts.needs.get(name, ()))
    for column, argument in arguments.items():
        is_optional = column in facts.optional.get(name, ()) or argument in facts.conditions
        shares_argument = column == REFERENCE_IMAGES and argument == arguments.get(IMAGE)
        if is_needed(parameters[argument]) and not is_optional and not shares_argument:
            needs.append(column)
    several = [REFERENCE_IMAGES] if is_list(parameters.get(arguments.get(REFERENCE_IMAGES, ""))) else []
    if takes_several:
        several = [IMAGE, REFERENCE_IMAGES]
    return CallInputs(
        pipeline=name,
        arguments=arguments,
        needs=tuple(dict.fromkeys(needs)),
        needs_one=tuple(facts.needs_one.get(name, ())),
        needed_arguments=find_needed_arguments(parameters, arguments),
        parameters=parameters,
        several=tuple(several),
        condition=condition,
        takes_strength=STRENGTH in parameters or condition is not None,
    )


def find_arguments(parameters: Mapping[str, inspect.Parameter], components: Sequence[str]) -> dict[str, str]:
    """The argument of each column, without those of `conditions`.

    Args:
        parameters: of a call, by name.
        components: of its pipeline.
    """
    facts = load_facts()
    arguments: dict[str, str] = {}
    for column, spellings in facts.spellings.items():
        found = [word for word in spellings if word in parameters]
        if found:
            arguments[column] = found[0]
    has_control = any(component in facts.control_components for component in components)
    if has_control and CONTROL_IMAGE not in arguments and IMAGE in arguments:
        # the image of a ControlNet's text-to-image pipeline is what it is controlled by
        arguments = {CONTROL_IMAGE: arguments.pop(IMAGE), **arguments}
    for word, parameter in parameters.items():
        # a switch may end so, too
        may_be_file = parameter.default in (None, parameter.empty) and word not in facts.no_files
        if may_be_file and is_file_column(word) and word not in arguments.values():
            arguments[word] = word
    if list(arguments) == [MASK_IMAGE]:
        return {}  # a mask of something else, such as sound
    return arguments


def find_condition_class(pipeline: str, parameters: Mapping[str, inspect.Parameter]) -> type | None:
    """The class of the objects that `conditions` takes; None where there is none.

    Args:
        pipeline: name of its class.
        parameters: of its call, by name.
    """
    for word in load_facts().conditions:
        if word in parameters:
            return find_object_class(pipeline, parameters[word])
    return None


def find_object_class(pipeline: str, parameter: inspect.Parameter) -> type | None:
    """The class of diffusers that an argument takes, alone or in a list; None where it takes none.

    Args:
        pipeline: name of its class.
        parameter: of its call.
    """
    path = load_facts().object_classes.get(pipeline, {}).get(parameter.name)
    if path is not None:
        module, _, name = path.rpartition(".")
        found: type = getattr(importlib.import_module(module), name)
        return found
    pending = [parameter.annotation]
    while pending:
        option = pending.pop(0)
        pending += get_args(option)
        if isinstance(option, type) and option.__module__.startswith("diffusers."):
            return option
    return None


def find_needed_arguments(
    parameters: Mapping[str, inspect.Parameter], arguments: Mapping[str, str]
) -> tuple[str, ...]:
    """The arguments without a default that no column is for.

    Args:
        parameters: of a call, by name.
        arguments: of its columns.
    """
    needed = []
    for name, parameter in parameters.items():
        is_variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if is_variadic or name in GIVEN or name in arguments.values():
            continue
        if parameter.default is parameter.empty:
            needed.append(name)
    return tuple(needed)


def is_needed(parameter: inspect.Parameter) -> bool:
    """Whether a call cannot do without an argument.

    It has no default, or its default is None and its type is not: pipelines write `image: Image = None` for
    an image that they need, and `image: Image | None = None` for one that may be left out.
    """
    if parameter.default is parameter.empty:
        return True
    return parameter.default is None and not allows_none(parameter.annotation)


def allows_none(annotation: object) -> bool:
    """Whether None is a value of a type; where nothing or a name alone is known, it is."""
    if annotation is inspect.Parameter.empty or isinstance(annotation, str):
        return True
    return annotation is NoneType or NoneType in get_args(annotation)


def is_list(parameter: inspect.Parameter | None) -> bool:
    """Whether an argument takes a list and no single thing."""
    if parameter is None:
        return False
    options = get_args(parameter.annotation) if get_origin(parameter.annotation) is not list else ()
    choices = [option for option in options or (parameter.annotation,) if option is not NoneType]
    return all(get_origin(choice) is list for choice in choices)
