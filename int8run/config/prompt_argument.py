"""`prompt='…'` and `negative_prompt='…'` on the command line: prompts that are any text.

Hydra reads a value by a grammar in which brackets, commas, quotes and `$` mean something. What follows
`prompt=` or `negative_prompt=` is not read by it: `cli.py` rewrites the argument before hydra sees it.
"""

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Quote, QuotedString

from int8run.errors import ConfigError

ARGUMENT = "prompt="
FLAG = "--prompt"
NEGATIVE_ARGUMENT, NEGATIVE_SETTING = "negative_prompt=", "prompts.negative_prompt="
NEGATIVE_FLAGS = ("--negative_prompt", "--negative-prompt")
SETTINGS = ("prompts.prompts", "prompts.path")
REFERENCE = re.compile(r"(\\*)\$\{")


def rewrite_prompt_arguments(arguments: Sequence[str]) -> list[str]:
    """Turn all `prompt=…` into one `prompts.prompts=[…]`, in the place of the first.

    Args:
        arguments: of the command line.

    Raises:
        ConfigError: for `--prompt`, and for prompts that are given in two ways.
    """
    if any(argument == FLAG or argument.startswith(f"{FLAG}=") for argument in arguments):
        raise ConfigError(f"{FLAG} is no flag; give a prompt without dashes: prompt='a fox in the snow'")
    prompts = [argument.removeprefix(ARGUMENT) for argument in arguments if argument.startswith(ARGUMENT)]
    if not prompts:
        return list(arguments)
    for setting in SETTINGS:
        if any(argument.lstrip("+").startswith(f"{setting}=") for argument in arguments):
            raise ConfigError(
                f"prompt= and {setting}= both say what to generate; give one of them (prompt= may be given "
                "several times)"
            )
    override = f"{SETTINGS[0]}=[{','.join(quote_text(prompt) for prompt in prompts)}]"
    rewritten = []
    for argument in arguments:
        if not argument.startswith(ARGUMENT):
            rewritten.append(argument)
        elif override not in rewritten:
            rewritten.append(override)
    return rewritten


def rewrite_negative_prompt(arguments: Sequence[str]) -> list[str]:
    """Turn `negative_prompt=…` into `prompts.negative_prompt='…'`, in its place.

    Args:
        arguments: of the command line.

    Raises:
        ConfigError: for `--negative_prompt`, and for several negative prompts.
    """
    if any(argument.partition("=")[0] in NEGATIVE_FLAGS for argument in arguments):
        raise ConfigError(
            f"{NEGATIVE_FLAGS[0]} is no flag; give it without dashes: "
            f"{NEGATIVE_ARGUMENT}'blurry, low quality'"
        )
    given = [a for a in arguments if a.lstrip("+").startswith((NEGATIVE_ARGUMENT, NEGATIVE_SETTING))]
    if not any(argument.startswith(NEGATIVE_ARGUMENT) for argument in given):
        return list(arguments)
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)}: a command has one negative prompt; give one of them")
    text = given[0].removeprefix(NEGATIVE_ARGUMENT)
    return [f"{NEGATIVE_SETTING}{quote_text(text)}" if a == given[0] else a for a in arguments]


def quote_text(text: str) -> str:
    """A text as hydra's grammar and omegaconf's references read it back unchanged."""
    # a backslash before `${` makes it plain text, and so backslashes there count twice
    plain = REFERENCE.sub(lambda found: found[1] * 2 + r"\${", text)
    quoted: str = QuotedString(plain, Quote.single).with_quotes()
    return quoted
