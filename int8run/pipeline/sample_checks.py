"""Refuses samples and sampler settings that the model's pipeline does not take, before anything is loaded.

`tasks.run` calls `check_samples` once it has the samples. What a pipeline takes is read from its class, which
the repository's index names; no weight is read or downloaded.
"""

import logging
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from int8run.errors import ConfigError, suggest_similar
from int8run.generate.call_inputs import CallInputs, read_call_inputs
from int8run.generate.pipeline_call import SETTING_ARGUMENTS
from int8run.generate.prompt_row import ROW_COLUMNS
from int8run.generate.prompts import Sample
from int8run.generate.sample_inputs import SampleInputs
from int8run.generate.step_count import count_taken_steps, get_strength
from int8run.models.family import ModelSource
from int8run.models.model_folders import read_source_index
from int8run.models.modular_pipeline import get_call_class
from int8run.models.pipeline_class import (
    MAX_SUGGESTIONS,
    get_pipeline_class,
    is_modular,
    list_models_with_pipeline,
    list_modes,
)
from int8run.models.repository_pipelines import find_named_pipeline
from int8run.models.sampling import SCHEDULE_ARGUMENTS, Sampling
from int8run.models.source import find_known_class, find_pipeline_class

log = logging.getLogger(__name__)
PROMPT = "prompt"


def check_samples(model: ModelSource, samples: Sequence[Sample], asked: Sampling, sampling: Sampling) -> None:
    """Check that a model's pipeline takes what the samples bring, and that they bring what it needs.

    Logs which of the checkpoint's own settings another pipeline for it does not take.

    Args:
        model: the settings of the model.
        samples: to generate.
        asked: the sampler settings that the user has set.
        sampling: the same with all defaults.

    Raises:
        ConfigError: for the first sample or setting that does not fit.
        FileError: when the model's repository is not there.
    """
    known = find_known_class(model)
    if known is not None:
        # before the hub is asked for anything
        check_samples_of_class(known, model, samples, asked, sampling)
    name = find_pipeline_class(model)
    if name != known:
        check_samples_of_class(name, model, samples, asked, sampling)
    call = read_known_call(name, model)
    if call is not None:
        report_unused(call, samples, sampling)


def report_unused(call: CallInputs, samples: Sequence[Sample], sampling: Sampling) -> None:
    """Log what a pipeline does not take: prompts, and the checkpoint's settings for its own pipeline.

    Args:
        call: what the pipeline takes.
        samples: to generate.
        sampling: with all defaults.
    """
    unused = list_unused_settings(call, sampling)
    if unused:
        log.info(
            "%s takes no %s, which the checkpoint's settings have for its own pipeline",
            call.pipeline,
            ", ".join(unused),
        )
    prompts = {sample.prompt for sample in samples}
    if PROMPT not in call.parameters and len(prompts) > 1:
        log.warning(
            "%s takes no prompt: its %d prompts change nothing but the names of the files; "
            "'prompts.prompts=[upscaled]' makes one of each input",
            call.pipeline,
            len(prompts),
        )


def check_samples_of_class(
    name: str, model: ModelSource, samples: Sequence[Sample], asked: Sampling, sampling: Sampling
) -> None:
    """The checks of `check_samples`, once the class of the pipeline is known.

    Args:
        name: of the class.
        model: the settings of the model.
        samples: to generate.
        asked: the sampler settings that the user has set.
        sampling: the same with all defaults.
    """
    call = read_known_call(name, model)
    if call is None:
        return  # loading refuses it
    if is_modular(name):
        # what its blocks hand to each other has no default either
        call = replace(call, needed_arguments=())
    for sample in samples:
        check_argument_names(call, sample.inputs)
        check_columns(call, sample.inputs, model)
        check_needed_arguments(call, sample.inputs, sampling)
        check_strength(call, sample, sampling)
    check_settings(call, asked)


def find_call(model: ModelSource) -> CallInputs:
    """What a model's pipeline takes.

    Raises:
        ConfigError: when diffusers does not have its pipeline.
        FileError: when the model's repository is not there.
    """
    name = find_pipeline_class(model)
    call = read_known_call(name, model)
    if call is None:
        raise ConfigError(f"diffusers {diffusers.__version__} does not have {name}")
    return call


def read_known_call(name: str, model: ModelSource) -> CallInputs | None:
    """What a pipeline takes; None for one that diffusers does not have.

    Args:
        name: class of the pipeline.
        model: whose pipeline it is.
    """
    cls = get_pipeline_class(name)
    if cls is DiffusionPipeline:
        return None
    return read_call_inputs(get_call_class(cls, model.workflow))


def list_column_problems(call: CallInputs, columns: Collection[str]) -> list[str]:
    """Which of a row's images and videos a pipeline does not take, and which it needs besides.

    Args:
        call: what the pipeline takes.
        columns: of the row.
    """
    problems = [f"{call.pipeline} takes no {column}" for column in columns if column not in call.takes]
    problems += [f"{call.pipeline} needs {column}" for column in find_missing_columns(call, columns)]
    if lacks_one_of(call, columns):
        problems.append(f"{call.pipeline} needs {' or '.join(call.needs_one)}")
    return problems


def lacks_one_of(call: CallInputs, columns: Collection[str]) -> bool:
    """Whether a call needs one of several columns, and none of them is given."""
    return bool(call.needs_one) and not set(call.needs_one) & set(columns)


def find_missing_columns(call: CallInputs, columns: Collection[str]) -> list[str]:
    """The columns that a call needs and that are not among those that are given."""
    return [column for column in call.needs if column not in columns and not is_joined(call, column, columns)]


def check_columns(call: CallInputs, inputs: SampleInputs, model: ModelSource) -> None:
    """Raise ConfigError where a sample brings an image or a video too much, or lacks one.

    Args:
        call: what the pipeline takes.
        inputs: of the sample.
        model: for what else would do.
    """
    given = {column: files[0].label for column, files in inputs.files.items()}
    for column, label in given.items():
        if column not in call.takes:
            raise ConfigError(
                f"{label}: {call.pipeline} takes {describe_takes(call, column)}"
                f"{suggest_pipelines(model, given)}"
            )
        count = len(inputs.files[column])
        if count > 1 and column not in call.several:
            raise ConfigError(
                f"{label}: {call.pipeline} takes one {column}, and there are {count}; give one, or make each "
                "a row of a table"
            )
    missing = find_missing_columns(call, given)
    if missing:
        raise ConfigError(
            f"{call.pipeline} needs {', '.join(missing)}: {describe_settings(missing)}; it takes "
            f"{call.describe()}{suggest_modes(model, given)}"
        )
    if lacks_one_of(call, given):
        raise ConfigError(
            f"{call.pipeline} needs {' or '.join(call.needs_one)}: {describe_settings(call.needs_one[:1])}; "
            f"it takes {call.describe()}"
        )


def describe_takes(call: CallInputs, column: str) -> str:
    """`no mask_image; it takes image (needed), strength`; `no image and no video` where it takes neither."""
    if not call.takes and not call.takes_strength:
        return call.describe()
    return f"no {column}; it takes {call.describe()}"


def is_joined(call: CallInputs, column: str, given: Collection[str]) -> bool:
    """Whether another column that is given becomes the same argument: references where an image is needed."""
    same_argument = [other for other, name in call.arguments.items() if name == call.arguments[column]]
    return bool(set(same_argument) & set(given))


def describe_settings(columns: Iterable[str]) -> str:
    """How columns are given on the command line: `prompts.image=FILE prompts.mask_image=FILE`."""
    return " ".join(f"prompts.{column}=FILE" for column in columns)


def check_argument_names(call: CallInputs, inputs: SampleInputs) -> None:
    """Raise ConfigError for an argument that a call does not have, such as a column that is misspelled.

    Args:
        call: what the pipeline takes.
        inputs: of the sample.
    """
    place = f"{inputs.place}: " if inputs.place else ""
    for name in inputs.arguments:
        if name not in call.parameters:
            known = [*ROW_COLUMNS, *call.parameters]
            raise ConfigError(
                f"{place}{name} is not an argument of {call.pipeline}; {suggest_similar(name, known)}see the "
                "pipeline's documentation"
            )


def check_needed_arguments(call: CallInputs, inputs: SampleInputs, sampling: Sampling) -> None:
    """Raise ConfigError for an argument that a call needs and is not given.

    Args:
        call: what the pipeline takes.
        inputs: of the sample.
        sampling: may have it in `extra`.
    """
    for name in call.needed_arguments:
        if name not in inputs.arguments and name not in sampling.extra:
            raise ConfigError(
                f"{call.pipeline} cannot be called without {name}, which no input is for; if it is a number "
                f"or a text, set sampler.extra.{name}, else choose another pipeline"
            )


def check_strength(call: CallInputs, sample: Sample, sampling: Sampling) -> None:
    """Raise ConfigError for a strength that a pipeline does not take, or that leaves no step.

    Args:
        call: what the pipeline takes.
        sample: that brings it.
        sampling: with the number of steps.
    """
    if sample.inputs.strength is not None and not call.takes_strength:
        raise ConfigError(
            f"{call.pipeline} takes no strength; leave prompts.strength out: it takes {call.describe()}"
        )
    strength = get_strength(call, [sample], sampling)
    is_scheduled = any(name in sampling.extra for name in SCHEDULE_ARGUMENTS)
    if sampling.steps is None or is_scheduled or count_taken_steps(sampling.steps, strength) > 0:
        return
    raise ConfigError(
        f"a strength of {strength:g} leaves none of sampler.steps={sampling.steps}; set prompts.strength to "
        f"{math.ceil(1000 / sampling.steps) / 1000:g} or more, or more steps"
    )


def check_settings(call: CallInputs, asked: Sampling) -> None:
    """Raise ConfigError for a sampler setting of the user's that a pipeline does not take.

    Args:
        call: what the pipeline takes.
        asked: what the user has set.
    """
    for argument, setting in SETTING_ARGUMENTS.items():
        if getattr(asked, setting) is not None and argument not in call.parameters:
            reason = f"leave sampler.{setting} out"
            if setting in ("height", "width") and call.takes:
                reason = f"its images have the size of their input: leave sampler.{setting} out"
            raise ConfigError(f"{call.pipeline} takes no {argument}; {reason}")
    if is_modular(call.pipeline):
        return  # what its blocks take is known once they are loaded
    for name in asked.extra:
        if name not in call.parameters:
            raise ConfigError(
                f"sampler.extra.{name} is not an argument of {call.pipeline}; "
                f"{suggest_similar(name, list(call.parameters))}see the pipeline's documentation"
            )


def list_unused_settings(call: CallInputs, sampling: Sampling) -> list[str]:
    """The settings of a checkpoint that a pipeline for it does not take, as they are set.

    Args:
        call: what the pipeline takes.
        sampling: with all defaults.
    """
    settings: dict[str, Any] = {}
    for argument, setting in SETTING_ARGUMENTS.items():
        settings[argument] = (f"sampler.{setting}", getattr(sampling, setting))
    for name, value in sampling.extra.items():
        settings[name] = (f"sampler.extra.{name}", value)
    return [
        f"{setting}={value}"
        for argument, (setting, value) in settings.items()
        if value is not None and argument not in call.parameters
    ]


# -- what else would do ------------------------------------------------------------------------------


def suggest_pipelines(model: ModelSource, columns: Collection[str]) -> str:
    """Which modes of the same model and which other models take some columns; empty where none does.

    Args:
        model: the settings of the model.
        columns: that are given.
    """
    return format_choices([*list_fitting_modes(model, columns), *list_fitting_models(columns)], columns)


def suggest_modes(model: ModelSource, columns: Collection[str]) -> str:
    """Which modes of the same model take some columns alone; empty where none does."""
    return format_choices(list_fitting_modes(model, columns), columns)


def format_choices(choices: Sequence[str], columns: Collection[str]) -> str:
    """`; for image: model.mode=img2img or model=tiny_edit`; empty without a choice."""
    if not choices:
        return ""
    named = ", ".join(columns) or "text alone"
    return f"; for {named}: {' or '.join(choices[:MAX_SUGGESTIONS])}"


def list_fitting_modes(model: ModelSource, columns: Collection[str]) -> list[str]:
    """The modes of the same checkpoint that take exactly what is given or need no more."""
    controlnet = model.parts.get("controlnet")
    named = model.pipeline or find_named_pipeline(model) or str(read_source_index(model).get("_class_name"))
    found = []
    for mode, class_name in list_modes(named, controlnet[0] if controlnet else None).items():
        if fits_columns(class_name, columns):
            found.append(f"model.mode={mode}")
    return found


def list_fitting_models(columns: Collection[str]) -> list[str]:
    """The options of `model=` whose YAML names a pipeline that takes what is given and needs no more."""
    return list_models_with_pipeline(lambda class_name: fits_columns(class_name, columns))


def fits_columns(class_name: str, columns: Collection[str]) -> bool:
    """Whether a pipeline takes all of some columns and needs no others."""
    call = read_call_inputs(get_call_class(get_pipeline_class(class_name)))
    is_complete = set(call.needs) <= set(columns) and not lacks_one_of(call, columns)
    return set(columns) <= set(call.takes) and is_complete
