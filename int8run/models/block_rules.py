"""Blocks at the beginning and the end of a denoiser that stay float, as rules of its family.

The first blocks see the noisy input as it is, and no block repairs an error of the last ones. Which lists of
blocks an image passes is data of the family. Rules are those of `ignore`, so that layers, convolutions,
attentions and `task=quantize` need not know of blocks.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from int8run.errors import ConfigError
from int8run.models.boundary_blocks import SETTING, parse_boundary_blocks
from int8run.models.family import IgnoreRule, ModelFamily


def keep_boundary_blocks(family: ModelFamily, prefixes: Sequence[str], layers: Iterable[str]) -> ModelFamily:
    """The family with rules for the blocks that its `keep_blocks` names.

    Args:
        family: of a denoiser.
        prefixes: of its repeated blocks (`transformer_blocks.0.`), for a family that names no lists.
        layers: names of its Linears, and of its convolutions.

    Raises:
        ConfigError: where it has fewer blocks, or none.
    """
    if family.keep_blocks is None:
        return family
    asked = parse_boundary_blocks(family.keep_blocks)
    blocks = list_main_blocks(family, prefixes, layers)
    if asked.first + asked.last > len(blocks):
        lists = ", ".join(list_block_lists(family, prefixes)) or "no list of blocks"
        raise ConfigError(
            f"{SETTING}={asked} keeps {asked.first + asked.last} blocks float, and the denoiser has "
            f"{len(blocks)} ({lists}); ask for fewer"
        )
    rules = []
    for number, block in enumerate(blocks[: asked.first]):
        rules.append(IgnoreRule(f"{block}.*", f"kept float: block {number} of the first {asked.first}"))
    start = len(blocks) - asked.last
    for number, block in enumerate(blocks[start:], start):
        rules.append(IgnoreRule(f"{block}.*", f"kept float: block {number} of the last {asked.last}"))
    return replace(family, ignore=(*family.ignore, *rules))


def list_block_lists(family: ModelFamily, prefixes: Sequence[str]) -> list[str]:
    """Names of the lists whose blocks an image passes, in their order.

    Args:
        family: of a denoiser.
        prefixes: of its repeated blocks.
    """
    if family.main_blocks or family.blocks:
        return list(family.main_blocks or family.blocks)
    return list(dict.fromkeys(prefix.removesuffix(".").rpartition(".")[0] for prefix in prefixes))


def list_main_blocks(family: ModelFamily, prefixes: Sequence[str], layers: Iterable[str]) -> list[str]:
    """The blocks that an image passes, in their order: `transformer_blocks.0`.

    Args:
        family: of a denoiser.
        prefixes: of its repeated blocks.
        layers: names of its layers.
    """
    names = list(layers)
    blocks = []
    for block_list in list_block_lists(family, prefixes):
        of_list = re.compile(rf"{re.escape(block_list)}\.(\d+)\.")
        numbers = {int(match[1]) for match in map(of_list.match, names) if match is not None}
        blocks += [f"{block_list}.{number}" for number in sorted(numbers)]
    return blocks
