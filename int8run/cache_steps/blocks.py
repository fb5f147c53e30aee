"""What the repeated blocks of denoisers return, for diffusers' caches: `blocks.yaml`, beside its own list."""

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import yaml
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import nn


@dataclass
class OwnBlockMetadata(TransformerBlockMetadata):
    """What one class of blocks returns, where its arguments may have names of their own.

    Some of diffusers' hooks ask for `hidden_states` by that name.

    Args:
        arguments: the block's names, by those.
    """

    arguments: Mapping[str, str] = field(default_factory=dict)

    def _get_parameter_from_args_kwargs(
        self, identifier: str, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = self.arguments.get(identifier, identifier)
        return super()._get_parameter_from_args_kwargs(name, args, kwargs)


def register_blocks(blocks: Iterable[nn.Module]) -> None:
    """Tell diffusers what some blocks return, where `blocks.yaml` knows it."""
    known = read_block_facts()
    for cls in {type(block) for block in blocks}:
        facts = known.get(f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}")
        if facts is not None:
            metadata = OwnBlockMetadata(
                return_hidden_states_index=facts["hidden_states"],
                return_encoder_hidden_states_index=facts.get("encoder_hidden_states"),
                arguments=facts.get("arguments", {}),
            )
            TransformerBlockRegistry.register(cls, metadata)


@functools.cache
def read_block_facts() -> Mapping[str, Mapping[str, Any]]:
    """`blocks.yaml`."""
    text = files("int8run.cache_steps").joinpath("blocks.yaml").read_text(encoding="utf-8")
    facts: Mapping[str, Mapping[str, Any]] = yaml.safe_load(text)
    return facts
