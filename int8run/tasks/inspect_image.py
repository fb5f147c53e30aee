"""What `task=inspect` says about a PNG: what it was made with, and the command that makes it again.

Called by `inspect_file`. Our own images have a text chunk `int8run`, which `tasks.image_writer` writes; other
programs write one called `parameters`. Pixels are not decoded.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from int8run.config.prompt_argument import quote_text
from int8run.errors import FileError
from int8run.generate.input_files import INPUTS
from int8run.generate.sample_inputs import INPUT_COLUMNS
from int8run.layers.plan import Int8Settings
from int8run.models.family import MODEL_FOLDER
from int8run.tasks.file_description import FileDescription, Row, format_setting
from int8run.tasks.image_facts import INT8, describe_facts, find_unsaid
from int8run.tasks.image_writer import OWN_CHUNK, PARAMETERS_CHUNK
from int8run.tasks.model_facts import (
    INT8_SETTINGS,
    METHOD_GROUPS,
    SETTINGS_SUFFIX,
    find_changed_int8_settings,
    list_int8_settings,
    name_model,
)
from int8run.tasks.run_settings import (
    UnrepeatableSettingError,
    format_value,
    is_plain_list,
    list_candidate_words,
    list_other_words,
)
from int8run.utils.text import shorten_error
from int8run.utils.untrusted_json import parse_untrusted_json

LORA_OVERRIDE = "override /lora@_global_.lora"  # of an option of model= that brings LoRAs
PNG = ".png"
SAMPLER_SETTINGS = ("steps", "guidance", "height", "width", "scheduler")
# groups of further arguments
SAMPLER_MAPPINGS = ("extra", "scheduler_settings")


class NotRepeatableError(Exception):
    """An image does not name what is needed to make it again; the message says what is missing."""


def inspect_image(path: Path) -> FileDescription:
    """Describe a PNG by its text chunks.

    Raises:
        FileError: when it is no PNG, or its text chunks cannot be read.
    """
    width, height, texts = read_texts(path)
    size: Row = ("size", f"{path.stat().st_size / 1e3:.1f} kB, {width} x {height} pixels")
    if OWN_CHUNK not in texts:
        kind: Row = ("kind", "image, not made by int8run")
        parameters = texts.get(PARAMETERS_CHUNK, "it does not say")
        return FileDescription(path.name, [kind, size, ("made with", parameters)])

    facts = parse_facts(path, texts[OWN_CHUNK])
    rows: list[Row] = [("kind", "image"), size, *describe_facts(facts)]
    copies = find_input_copies(path, facts)
    try:
        command = format_command(facts, copies)
    except NotRepeatableError as reason:
        return FileDescription(path.name, [*rows, ("to repeat it", str(reason))])
    rows += [("not said", unsaid) for unsaid in find_unsaid(facts)]
    rows += [("not found", missing) for missing in find_missing_inputs(facts, copies)]
    return FileDescription(path.name, rows, [("to repeat it", command)])


def find_input_copies(path: Path, facts: Mapping[str, Any]) -> dict[tuple[str, int], Path]:
    """The run's own copies of what an image began with, where they are still beside it.

    Args:
        path: of the image, in the folder that its run wrote it to.
        facts: of the text chunk.

    Returns:
        By column, and place of the file in it.
    """
    named = facts.get("input_copies")
    if not isinstance(named, dict):  # by an earlier version
        return {}
    folder = path.absolute().parent.parent / INPUTS
    # somebody may have written a path of this machine into the image: names of this folder alone are taken
    kept = {file.name for file in folder.glob("*") if file.is_file()}
    found = {}
    for column, names in named.items():
        if not isinstance(names, list):
            continue
        for index, name in enumerate(names):
            if isinstance(name, str) and name in kept:
                found[column, index] = folder / name
    return found


def find_missing_inputs(facts: Mapping[str, Any], copies: Mapping[tuple[str, int], Path]) -> Iterator[str]:
    """What an image began with and is not beside it; `facts` are those that make a command."""
    for column, names in facts.get("inputs", {}).items():
        for index, name in enumerate(names):
            if (column, index) not in copies:
                yield f"{name}, no copy beside the image: the command takes it from the working folder"


def read_texts(path: Path) -> tuple[int, int, dict[str, str]]:
    """Read width, height and the text chunks of a PNG.

    Raises:
        FileError: when it is missing, or no PNG.
    """
    if not path.is_file():
        raise FileError(f"{path}: no such file")
    try:
        with Image.open(path, formats=["PNG"]) as image:
            texts = {str(key): str(text) for key, text in image.info.items() if isinstance(text, str)}
            return image.width, image.height, texts
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileError(f"{path} cannot be read as a PNG: {shorten_error(error)}") from error


def parse_facts(path: Path, text: str) -> dict[str, Any]:
    """Parse the text chunk of an image of ours.

    Raises:
        FileError: when it is not what int8run writes.
    """
    try:
        facts = parse_untrusted_json(text)
    except ValueError as error:
        raise FileError(f"{path}: its text chunk {OWN_CHUNK} {error}") from error
    if not isinstance(facts, dict) or not isinstance(facts.get("sampling"), dict):
        raise FileError(f"{path}: its text chunk {OWN_CHUNK} is not what int8run writes: {text[:80]!r}")
    return facts


def format_command(facts: Mapping[str, Any], copies: Mapping[tuple[str, int], Path]) -> str:
    """The command that makes an image again, as one types it.

    Args:
        facts: of the text chunk.
        copies: of the files that it began with, by column and place in it.

    Raises:
        NotRepeatableError: when they do not name all that is needed.
    """
    loras = str(facts.get("loras", ""))
    option = find_model_option(str(facts.get("model")), loras)
    if option is None and loras:
        raise NotRepeatableError(f"needs its LoRAs ({loras}), whose files the image does not name")
    if option is None:
        raise NotRepeatableError(f"needs the checkpoint {facts.get('model')}, which is no option of model=")
    words = ["int8run", format_setting("model", option), shlex.quote(f"prompt={facts.get('prompt', '')}")]
    if "negative_prompt" in facts:
        words.append(shlex.quote(f"negative_prompt={facts['negative_prompt']}"))
    words.append(format_setting("seed", facts.get("seed")))
    words += list_input_words(facts, copies)
    words += list_sampler_words(facts["sampling"])
    words += list_model_words(facts)
    try:
        words += list_setting_words(facts, option)
    except UnrepeatableSettingError as error:
        raise NotRepeatableError(str(error)) from error
    return " ".join(words)


def list_setting_words(facts: Mapping[str, Any], option: str) -> list[str]:
    """The words that set everything else; none where an earlier version did not say it.

    Args:
        facts: of the text chunk.
        option: of `model=`.

    Raises:
        UnrepeatableSettingError: for what no word sets again.
    """
    words: list[str] = []
    if facts.get("precision") == INT8 and facts.get("outlier") == "auto" and "outlier_candidates" in facts:
        words += list_candidate_words(facts["outlier_candidates"])
    settings = facts.get("settings", {})
    if facts.get("precision") != INT8 and isinstance(settings, dict):
        # the precision of a float image is its dtype, which has its word
        settings = {key: value for key, value in settings.items() if key != "model.dtype"}
    model_option = yaml.safe_load((MODEL_FOLDER / f"{option}.yaml").read_text(encoding="utf-8"))
    return words + list_other_words(settings, model_option)


def list_input_words(facts: Mapping[str, Any], copies: Mapping[tuple[str, int], Path]) -> list[str]:
    """The words that choose the pipeline and give it the inputs.

    Args:
        facts: of the text chunk.
        copies: of the inputs, by column and place in it; others lie in the working folder.

    Raises:
        NotRepeatableError: for an input that no setting is for, and for an argument that is more than a
            number or a text.
    """
    words = []
    for setting in ("pipeline", "mode"):
        if setting in facts:
            words.append(format_setting(f"model.{setting}", facts[setting]))
    for column, names in iterate_settings("inputs", facts.get("inputs", {})):
        if column not in INPUT_COLUMNS or not isinstance(names, list):
            raise NotRepeatableError(f"needs its input {column}, which stands in a prompt table alone")
        files = [copies.get((column, index), name) for index, name in enumerate(names)]
        words.append(format_files(f"prompts.{column}", files))
    if "strength" in facts:
        words.append(format_setting("prompts.strength", facts["strength"]))
    for name, value in iterate_settings("arguments", facts.get("arguments", {})):
        if not isinstance(value, str | int | float):
            raise NotRepeatableError(f"needs the argument {name}, which is no number or text")
        words.append(format_setting(f"++sampler.extra.{name}", value))
    return words


def format_files(setting: str, names: Sequence[object]) -> str:
    """The word that sets a setting to a file, or to a list of them."""
    if len(names) == 1:
        return format_setting(setting, names[0])
    listed = ",".join(quote_text(str(name)) for name in names)
    return shlex.quote(f"{setting}=[{listed}]")


def list_method_words(group: str, facts: Mapping[str, Any]) -> list[str]:
    """The words that choose an option and set its settings; none where an earlier version did not name it.

    Raises:
        NotRepeatableError: for a setting that is no number.
    """
    option = facts.get(group)
    if option is None:
        return []
    words = [format_setting(group, option)]
    settings = facts.get(f"{group}{SETTINGS_SUFFIX}", {})
    for name, value in iterate_settings(group, settings):
        if value is not None and not isinstance(value, int | float):
            raise NotRepeatableError(f"needs {group}.{name}, which is no number")
        shown = "null" if value is None else value
        words.append(format_setting(f"{group}.{name}", shown))
    return words


def list_int8_words(settings: object) -> list[str]:
    """The words that set those settings of `int8` that differ from the defaults.

    Args:
        settings: of the text chunk, names and values.

    Raises:
        NotRepeatableError: for the file of `int8.checkpoint`, whose folder the image does not name, and for
            what is no setting of this version, or no value of one.
    """
    known = list_int8_settings(Int8Settings())
    words = []
    for name, value in find_changed_int8_settings(dict(iterate_settings("int8", settings))).items():
        if name == "checkpoint":
            raise NotRepeatableError(f"needs int8.checkpoint ({value}), whose folder the image does not name")
        if name not in known:
            raise NotRepeatableError(f"needs int8.{name}, which this version does not have")
        is_list = isinstance(value, list) and is_plain_list(value)
        if value is not None and not is_list and not isinstance(value, str | int | float):
            raise NotRepeatableError(f"needs int8.{name}, which is no number, text or list")
        words.append(format_value(f"int8.{name}", value))
    return words


def iterate_settings(group: str, settings: object) -> Iterator[tuple[str, Any]]:
    """The names and values of a group of settings.

    Raises:
        NotRepeatableError: where somebody wrote names into the image that no setting has, and a shell would
            read.
    """
    if not isinstance(settings, dict):
        raise NotRepeatableError(f"needs {group}, of which the image has no names and values")
    for name, value in settings.items():
        if not (name.isascii() and name.isidentifier()):
            raise NotRepeatableError(f"needs {group}.{name!r}, which is no name of a setting")
        yield name, value


def find_model_option(name: str, loras: str) -> str | None:
    """Find the option of `model=` whose checkpoint bears a name, and which brings these LoRAs alone.

    Args:
        name: of the checkpoint.
        loras: names and strengths, such as `edit: 1`; empty for none.

    Returns:
        None where there is no such option.
    """
    for file in sorted(MODEL_FOLDER.glob("*.yaml")):
        option = yaml.safe_load(file.read_text(encoding="utf-8"))
        location = option.get("location")
        is_named = isinstance(location, str) and name_model(location) == name
        if is_named and read_own_loras(option) == loras:
            return file.stem
    return None


def read_own_loras(option: Mapping[str, Any]) -> str:
    """The LoRAs that an option of `model=` chooses, by names and strengths; empty for none."""
    for default in option.get("defaults", []):
        stack_name = default.get(LORA_OVERRIDE) if isinstance(default, Mapping) else None
        if stack_name is not None:
            file = MODEL_FOLDER.parent / "lora" / f"{stack_name}.yaml"
            adapters = yaml.safe_load(file.read_text(encoding="utf-8"))["adapters"]
            return ", ".join(f"{adapter['name']}: {adapter['strength']:g}" for adapter in adapters)
    return ""


def list_sampler_words(sampling: Mapping[str, Any]) -> list[str]:
    """The words that set the sampler as it was.

    Raises:
        NotRepeatableError: for a further argument that is more than a number or a text.
    """
    words = []
    for name in SAMPLER_SETTINGS:
        value = sampling.get(name)
        if value is not None:
            words.append(format_setting(f"sampler.{name}", value))
    for group in SAMPLER_MAPPINGS:
        for name, value in iterate_settings(f"sampler.{group}", sampling.get(group, {})):
            if not isinstance(value, str | int | float):
                raise NotRepeatableError(f"needs sampler.{group}.{name}, which is no number or text")
            # ++ sets also what the model's own settings lack
            words.append(format_setting(f"++sampler.{group}.{name}", value))
    return words


def list_model_words(facts: Mapping[str, Any]) -> list[str]:
    """The words that quantize the model as it was.

    Raises:
        NotRepeatableError: for text encoders from a file, which the image does not name.
    """
    words = []
    if facts.get("precision") == INT8:
        for group in METHOD_GROUPS:
            words += list_method_words(group, facts)
        words += list_int8_words(facts.get(INT8_SETTINGS, {}))
    else:
        words.append("int8.enable=false")
        words.append(format_setting("model.dtype", facts.get("precision")))
    encoder_format = facts.get("text_encoders")
    if encoder_format == "auto":
        raise NotRepeatableError("needs the file of its text encoders, which the image does not name")
    if encoder_format is not None:
        words.append(format_setting("clip", encoder_format))
    return words
