"""One line and an exit code for every error that a user can meet.

cli.py and api.py call `explain_error`. It knows the errors of hydra, omegaconf and YAML besides those of
int8run. An error that it does not know gets no line: it is a bug, and is shown whole.
"""

import re
from collections.abc import Sequence
from typing import Any

from int8run.errors import (
    ConfigError,
    as_disk_full_error,
    as_not_writable_error,
    find_int8run_error,
    suggest_setting,
    suggest_similar,
)
from int8run.tracking.secrets import mask_secrets
from int8run.utils.plurals import count_noun

# hydra's, for `key=a,b` without -m
AMBIGUOUS = re.compile(
    r"Ambiguous value for argument '(?P<override>.*)'\n1\. To use it as a list", flags=re.DOTALL
)
# what omegaconf appends to its messages, each on a line of its own
OMEGACONF_DETAILS = re.compile(r"\n\s*(full_key|object_type|reference_type).*")
ADAPTER_SETTING = re.compile(r"lora\.adapters\[\d+\]\.\w+")
ENDLESS_CONFIG = (
    "the config never ends: a file names itself in its defaults list, or a value is nested too deep"
)
# of an error that is not known
UNKNOWN_EXIT_CODE = 1

# what the command line takes besides the settings of the config
MODEL_GROUP = "model/"
COMMAND_LINE_WORDS = ["negative_prompt", "prompt"]


def explain_error(error: BaseException) -> tuple[str | None, int]:
    """One line and an exit code for an error; None for one that no user should meet, which is shown whole.

    The line holds no passwords, which settings and addresses in it may have.
    """
    message, exit_code = describe_error(error)
    if message is None:
        return None, exit_code
    return mask_secrets(message), exit_code


def describe_error(error: BaseException) -> tuple[str | None, int]:
    """The line and the exit code of `explain_error`, as they come."""
    ours = find_int8run_error(error) or as_disk_full_error(error) or as_not_writable_error(error)
    if ours is not None:
        return str(ours), ours.exit_code
    for explain in (explain_hydra_error, explain_other_error):
        message = explain(error)
        if message is not None:
            return message, ConfigError.exit_code
    return None, UNKNOWN_EXIT_CODE


def explain_hydra_error(error: BaseException) -> str | None:
    """One line for an error of hydra or omegaconf; None for any other."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException) and error.options is not None:
        return explain_missing_option(str(error.missing_cfg_file), sorted(error.options))
    # hydra wraps the errors of omegaconf
    cause = error.__cause__ if isinstance(error, HydraException) else error
    message = explain_lookup_error(cause) or explain_ambiguity(error)
    if message is not None:
        return message
    if isinstance(error, OverrideParseException):
        return explain_override_error(error.override)
    if isinstance(cause, OmegaConfBaseException):
        return clean_omegaconf_text(cause)
    if isinstance(error, HydraException):
        return clean_omegaconf_text(error)
    return None


def explain_lookup_error(error: BaseException | None) -> str | None:
    """One line for a setting or an entry of a list that omegaconf did not find; None for another error."""
    from omegaconf.errors import ConfigAttributeError, ConfigIndexError, ConfigKeyError

    if isinstance(error, ConfigKeyError | ConfigAttributeError):
        return explain_unknown_setting(str(error.full_key or error.key), error.parent_node)
    if isinstance(error, ConfigIndexError):
        return explain_missing_entry(str(error.full_key), error.parent_node)
    return None


def explain_ambiguity(error: BaseException) -> str | None:
    """One line where hydra's error is about several values with commas; None for another error."""
    from hydra.errors import ConfigCompositionException

    if not isinstance(error, ConfigCompositionException):
        return None
    ambiguous = AMBIGUOUS.match(str(error))
    return explain_ambiguous_value(ambiguous["override"]) if ambiguous else None


def clean_omegaconf_text(error: BaseException) -> str:
    """The text of an error in one line, without the key and the container's type that omegaconf appends."""
    text = OMEGACONF_DETAILS.sub("", str(error))
    return " ".join(text.split())


def explain_other_error(error: BaseException) -> str | None:
    """One line for an error of Python or YAML that a config can cause; None for any other."""
    from yaml import YAMLError

    # omegaconf's, for a name where a list wants a number
    if isinstance(error, TypeError) and "is not an int" in str(error):
        return f"{error}: entries of a list are counted from 0, such as lora.adapters.0.strength=0.5"
    if isinstance(error, RecursionError):
        return ENDLESS_CONFIG
    if isinstance(error, YAMLError):
        return f"a YAML file of the config is damaged: {' '.join(str(error).split())}"
    return None


def explain_missing_option(file: str, known: Sequence[str]) -> str:
    """One line for an option that a group does not have.

    Args:
        file: `group/option`, as hydra looked for it.
        known: options of the group; empty where there is no such group.
    """
    if file.startswith(MODEL_GROUP) and "/" in file.removeprefix(MODEL_GROUP):
        return explain_location(file.removeprefix(MODEL_GROUP))
    group, _, option = file.rpartition("/")
    if not known:
        return f"there is no group called {group!r}; `int8run --help` lists the groups"
    from int8run.config.plugins import suggest_plugin

    message = f"no {group} called {option!r}; {suggest_similar(option, known)}choose from {', '.join(known)}"
    message += suggest_plugin(group, option)
    if group == "lora":
        message += f"; one LoRA, by its name or file: lora=file lora.adapters.0.path={option}"
    return message


def explain_location(location: str) -> str:
    """One line for a repository or a path that was given as `model=`."""
    from int8run.config.help import list_options, read_option

    line = f"\nlocation: {location} "
    options = [name for name, file in list_options("model").items() if line in read_option(file)]
    if options:
        return f"model={location} is no option; it is the location of model={' or model='.join(options)}"
    return (
        f"model={location} is no option, which has no slash; give model.location={location}, and the option "
        "of model= that has the settings for it"
    )


def explain_unknown_setting(key: str, parent: Any) -> str:
    """One line for a setting that is not there.

    Args:
        key: dotted path.
        parent: the config in which it was looked for.
    """
    from int8run.config.help import find_options_with

    owners = find_options_with(key)
    if owners:
        return f"no setting called {key!r} in this config; {' or '.join(owners)} has it"
    left_out = find_adapter_field(key) if ADAPTER_SETTING.fullmatch(key) else None
    if left_out:
        plain_key = key.replace("[", ".").replace("]", "")
        return f"{left_out} is a setting that this stack leaves out; give it with a plus: +{plain_key}=…"

    known = list_public_names(parent)
    is_at_the_top = "." not in key
    if is_at_the_top:
        known += COMMAND_LINE_WORDS
    near = suggest_deeper_setting(key, parent) or suggest_setting(key, known)
    return f"no setting called {key!r}; {near}choose from {', '.join(sorted(known))}"


def suggest_deeper_setting(key: str, config: Any) -> str:
    """`did you mean 'sampler.steps'? ` where groups have a setting of that name, else an empty string."""
    groups = list_public_names(config)
    found = [f"{group}.{key}" for group in groups if key in list_public_names(config[group])]
    return f"did you mean {' or '.join(map(repr, found))}? " if found else ""


def list_public_names(config: Any) -> list[str]:
    """The settings of a config that a user may name; none of what is no mapping."""
    if not hasattr(config, "keys"):
        return []
    names = [str(name) for name in config]
    return [name for name in names if name != "hydra" and not name.startswith("_")]


def explain_missing_entry(key: str, entries: Any) -> str:
    """One line for an entry that a list does not have.

    Args:
        key: with the entry's number.
        entries: the list.
    """
    from omegaconf import ListConfig

    num_entries = len(entries) if isinstance(entries, list | ListConfig) else 0
    message = f"no setting called {key!r}: the list has {count_noun(num_entries, 'entry')}"
    if key.startswith("lora."):
        message += "; choose one that has it, such as lora=file or lora=stack_a"
    return message


def explain_override_error(override: str) -> str:
    """One line for an override that hydra's grammar does not read.

    Args:
        override: as it was typed.
    """
    key, equals, value = override.partition("=")
    if not equals:
        return f"{override!r} is no setting; write KEY=VALUE, or --help to see what there is"
    if key.rpartition(".")[2] == "prompts":
        text = value.strip("[]").replace("'", "'\\''")
        return (
            f"{override!r} cannot be read: brackets, colons, quotes and commas mean something in a list; "
            f"prompt='{text}' takes any text (several times for several prompts)"
        )
    if value.startswith(("[", "{")):
        return (
            f"{override!r} cannot be read: a list is [a,b], a mapping '{{key: value}}', and a text with "
            "brackets, colons, commas or quotes in it is quoted there: '{key: \"a, b\"}'"
        )
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    for_shell = f'{key}="{escaped}"'.replace("'", "'\\''")
    return (
        f"{override!r} cannot be read: brackets, colons, quotes and commas mean something; quote the text, "
        f"for int8run and for the shell: '{for_shell}'"
    )


def explain_ambiguous_value(override: str) -> str:
    """One line for several values with commas where one was expected."""
    key, _, value = override.partition("=")
    choices = f"for a job each add -m, for a list write {key}=[{value}]"
    if key.rpartition(".")[2] == "prompts":
        text = value.replace("'", "'\\''")
        return f"{override!r} are several values; {choices}, for one prompt with a comma prompt='{text}'"
    return f"{override!r} are several values; {choices}, for one text with a comma '{key}=\"{value}\"'"


def find_adapter_field(key: str) -> str | None:
    """The last word of a key, if an entry of a LoRA stack has such a setting."""
    from dataclasses import fields

    from int8run.lora.config import Adapter

    word = key.rpartition(".")[2]
    return word if word in {field.name for field in fields(Adapter)} else None
