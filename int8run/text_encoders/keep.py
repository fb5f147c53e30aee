"""`clip=keep`: the model's own text encoders, as they are."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn


@dataclass(frozen=True)
class KeepTextEncoders:
    """Leaves every text encoder in the float model's dtype."""

    name: ClassVar[str] = "keep"


def find_text_encoders(components: dict[str, object]) -> dict[str, nn.Module]:
    """A pipeline's text encoders by component name."""
    return {n: m for n, m in components.items() if n.startswith("text_encoder") and isinstance(m, nn.Module)}
