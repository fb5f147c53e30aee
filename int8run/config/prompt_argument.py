"""`prompt='…'` on the command line: a prompt that is any text.

Hydra reads a value by a grammar in which brackets, commas, quotes and `$` mean something. What follows
`prompt=` is not read by it: `cli.py` rewrites the argument before hydra sees it.
"""

import re
from collections.abc import Sequence

from hydra.core.override_parser.types import Quote, QuotedString

from int8run.errors import ConfigError

ARGUMENT = "prompt="
FLAG = "--prompt"
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


def quote_text(text: str) -> str:
    """A text as hydra's grammar and omegaconf's references read it back unchanged."""
    # a backslash before `${` makes it plain text, and so backslashes there count twice
    plain = REFERENCE.sub(lambda found: found[1] * 2 + r"\${", text)
    return QuotedString(plain, Quote.single).with_quotes()
