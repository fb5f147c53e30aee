"""Values with a comma that need no quotes on the command line, where hydra would take them for a sweep."""

import re
from collections.abc import Sequence

KEEP_BLOCKS = re.compile(r"(?P<setting>model_type\.keep_blocks)=(?P<value>(first|last):\d+,(first|last):\d+)")
SWEEP_FLAGS = ("-m", "--multirun")


def quote_keep_blocks(arguments: Sequence[str]) -> list[str]:
    """Put `model_type.keep_blocks=first:2,last:3` in quotes for hydra; in a sweep a comma parts two values.

    Args:
        arguments: of the command line.
    """
    if any(flag in arguments for flag in SWEEP_FLAGS):
        return list(arguments)
    quoted = []
    for argument in arguments:
        match = KEEP_BLOCKS.fullmatch(argument)
        quoted.append(argument if match is None else f"{match['setting']}='{match['value']}'")
    return quoted
