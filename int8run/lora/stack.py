"""A LoRA stack as configured: which files, how strong, and how they are applied."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from int8run.errors import ConfigError, in_range, one_of, switch

MODES = ("auto", "dynamic", "bake")
STRENGTH_LIMIT = 20


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a stack.

    Args:
        name: what the tracker and the messages call it.
        path: a `.safetensors` file, the name of a shipped LoRA, a hub id with `weight_name`, or a mapping from a
            model's `lora_base` to one of these.
        strength: −20…20; 0 leaves the LoRA out.
    """

    name: str
    path: str | Mapping[str, Any] | None
    strength: float = 1.0
    weight_name: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(f"LoRA {self.name!r} has no path; set lora.adapters.0.path=<file.safetensors> (or its place in the list)")
        in_range(f"strength of LoRA {self.name!r}", self.strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)

    def source(self, lora_base: str) -> tuple[str, str | None]:
        """The path and weight name for a base model.

        Raises:
            ConfigError: when the mapping has no entry for it; the message lists those that have one.
        """
        chosen: Any = self.path
        if isinstance(chosen, Mapping):
            if lora_base not in chosen:
                raise ConfigError(
                    f"LoRA {self.name!r} has no source for base model {lora_base!r}; it has one for "
                    f"{', '.join(sorted(chosen))}; add an entry under lora.adapters…path or choose another lora="
                )
            chosen = chosen[lora_base]
        if isinstance(chosen, Mapping):
            missing = [key for key in ("repo", "weight_name") if key not in chosen]
            if missing:
                raise ConfigError(
                    f"LoRA {self.name!r}: its source for {lora_base!r} has no {missing[0]}; a hub source is repo and weight_name"
                )
            return chosen["repo"], chosen["weight_name"]
        return chosen, self.weight_name


@dataclass(frozen=True)
class LoraStack:
    """Adapters in order, with one mode for all.

    Args:
        mode: `dynamic` keeps a low-rank branch beside each INT8 layer, so that a strength changes without a rebuild;
            `bake` adds the LoRAs to the float weights before quantization; `auto` is `dynamic`.
        strength: scales every adapter of the stack.
        strict: unmatched keys are an error instead of a warning.
    """

    adapters: Sequence[Adapter] = ()  # or mappings with an Adapter's fields, as a command line gives them
    mode: str = "auto"
    strength: float = 1.0
    strict: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(to_adapter(a) for a in self.adapters))
        one_of("lora.mode", self.mode, MODES)
        switch("lora.strict", self.strict)
        in_range("lora.strength", self.strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)
        names = [a.name for a in self.adapters]
        repeated = {n for n in names if names.count(n) > 1}
        if repeated:
            raise ConfigError(f"lora.adapters has the name {sorted(repeated)[0]!r} twice; give each adapter its own name")
        for adapter in self.adapters:
            in_range(
                f"strength of LoRA {adapter.name!r} times lora.strength", adapter.strength * self.strength,
                -STRENGTH_LIMIT, STRENGTH_LIMIT,
            )  # fmt: skip

    @property
    def bakes(self) -> bool:
        """Whether strengths are part of the build."""
        return self.mode == "bake"

    @property
    def strengths(self) -> list[float]:
        """The strength of each adapter with the stack's own strength multiplied in."""
        return [a.strength * self.strength for a in self.adapters]


def to_adapter(given: object) -> Adapter:
    """An Adapter as it is, or one made from a mapping with its fields.

    Raises:
        ConfigError: for anything else, or a mapping with other fields; the message lists them.
    """
    if isinstance(given, Adapter):
        return given
    known = [f.name for f in fields(Adapter)]
    if not isinstance(given, Mapping) or not {"name", "path"} <= set(given) <= set(known):
        raise ConfigError(f"an entry of lora.adapters is {given!r}; it takes name and path, and may have {', '.join(known[2:])}")
    return Adapter(**given)
