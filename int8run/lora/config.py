"""A LoRA stack as configured: which files, how strong, and how they are applied."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.lora.few_step import FewStepPreset, get_preset, parse_steps_in_name

MODES = ("auto", "dynamic", "bake", "stochastic")
STRENGTH_LIMIT = 20
USUAL_STRENGTHS = (-1, 2)
# `transformer` and `transformer_2`: of a pipeline with two denoisers, one alone
COMPONENTS = ("denoiser", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3")
# fraction of the steps -> strength from there on
Schedule = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a stack.

    Args:
        name: what the tracker and the messages call it.
        path: a `.safetensors` file, a name in `lora_dir`, the name of a shipped LoRA, a hub id with `weight_name`, or a mapping
            from a model's `lora_base` to one of these.
        strength: −20…20; 0 leaves the LoRA out; a list of [fraction of the steps, strength from there on] changes it on the way.
            None: 1, or what the few-step preset says.
        text_strength: of its text-encoder part; None: the strength at the first step.
        components: parts of the file that are applied; None: all.
        enabled: false leaves the LoRA out.
        few_step: a preset of `few_step.yaml`: steps, scheduler and guidance that the LoRA was made for.
    """

    name: str
    path: str | Mapping[str, Any] | None
    strength: float | Schedule | None = None
    text_strength: float | None = None
    components: Sequence[str] | None = None
    weight_name: str | None = None
    enabled: bool = True
    few_step: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError(
                f"LoRA {self.name!r} has no path; set lora.adapters.0.path=<file.safetensors> (or its place in the list)"
            )
        check_bool(f"enabled of LoRA {self.name!r}", self.enabled)
        if isinstance(self.strength, Sequence) and not isinstance(self.strength, str):
            check_schedule(f"strength of LoRA {self.name!r}", self.strength)
        elif self.strength is not None:
            check_range(f"strength of LoRA {self.name!r}", self.strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)
        if self.text_strength is not None:
            check_range(
                f"text_strength of LoRA {self.name!r}", self.text_strength, -STRENGTH_LIMIT, STRENGTH_LIMIT
            )
        if isinstance(self.components, str):
            raise ConfigError(
                f"components of LoRA {self.name!r} is {self.components!r}; it takes a list: [{self.components}]"
            )
        for component in self.components or ():
            check_choice(f"a component of LoRA {self.name!r}", component, COMPONENTS)

    def find_preset(self, lora_base: str, steps: int | None = None) -> FewStepPreset | None:
        """The settings that the LoRA was made for on a base model; the number of steps that its file's name says wins.

        Args:
            steps: that were asked for; None: the preset's own.

        Raises:
            ConfigError: when there is no such preset for it.
        """
        if self.few_step is None:
            return None
        source, weight_name = self.get_source(lora_base)
        return get_preset(self.few_step, lora_base, parse_steps_in_name(Path(weight_name or source)) or steps)

    @property
    def schedule(self) -> Schedule:
        """The strength as a schedule; one entry where it does not change."""
        if isinstance(self.strength, Sequence):
            return self.strength
        return ((0.0, 1.0 if self.strength is None else self.strength),)

    def get_source(self, lora_base: str) -> tuple[str, str | None]:
        """The path and weight name for a base model.

        Raises:
            ConfigError: when the mapping has no entry for it; the message lists those that have one.
        """
        chosen: Any = self.path
        if isinstance(chosen, Mapping):
            if lora_base not in chosen:
                raise ConfigError(
                    f"LoRA {self.name!r} has no source for base model {lora_base!r}; it has one for "
                    f"{', '.join(sorted(chosen))}; add an entry under the path of that adapter, or choose another lora="
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
class LoraSettings:
    """Adapters in order, with one mode for all.

    Args:
        mode: `dynamic` keeps a low-rank branch beside each INT8 layer, so that a strength changes without a rebuild; `bake` adds the
            LoRAs to the float weights before they are rounded; `stochastic` adds them to the integers, rounded at random; `auto`
            takes, layer by layer, the first of dynamic, bake and stochastic that the LoRA's kind, `max_overhead` and the weights allow.
        strength: scales every adapter of the stack, text encoders included.
        strict: unmatched keys are an error instead of a warning.
        insert_triggers: add the trigger words that a file names to every prompt that lacks them.
        max_overhead: with `auto`, the share of a layer's time that its branch may cost, measured on this machine.
    """

    adapters: Sequence[Adapter] = ()  # or mappings with an Adapter's fields, as a command line gives them
    mode: str = "auto"
    strength: float = 1.0
    strict: bool = True
    insert_triggers: bool = False
    max_overhead: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(parse_adapter(a) for a in self.adapters))
        check_choice("lora.mode", self.mode, MODES)
        check_bool("lora.strict", self.strict)
        check_bool("lora.insert_triggers", self.insert_triggers)
        check_range("lora.strength", self.strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)
        check_range("lora.max_overhead", self.max_overhead, 0, 100)
        names = [a.name for a in self.adapters]
        repeated = {n for n in names if names.count(n) > 1}
        if repeated:
            raise ConfigError(
                f"lora.adapters has the name {sorted(repeated)[0]!r} twice; give each adapter its own name"
            )
        for adapter in self.adapters:
            for _, strength in (*adapter.schedule, (0, adapter.text_strength or 0)):
                check_range(
                    f"strength of LoRA {adapter.name!r} times lora.strength",
                    strength * self.strength,
                    -STRENGTH_LIMIT,
                    STRENGTH_LIMIT,
                )
        scheduled = [a.name for a in self.adapters if a.enabled and len(a.schedule) > 1]
        if scheduled and self.mode in ("bake", "stochastic"):
            raise ConfigError(
                f"LoRA {scheduled[0]!r} has a schedule of strengths, which lora.mode={self.mode} cannot follow; set lora.mode=dynamic"
            )

    def resolve_for_base(self, lora_base: str, steps: int | None = None) -> "LoraSettings":
        """The adapters that are enabled, with strengths that nobody set taken from their few-step presets.

        Raises:
            ConfigError: when an adapter has no source or no preset for this base model.
        """
        enabled = [a for a in self.adapters if a.enabled]
        for adapter in enabled:
            adapter.get_source(lora_base)
        presets = [(a, a.find_preset(lora_base, steps)) for a in enabled]
        return replace(
            self,
            adapters=[
                replace(a, strength=1.0 if p is None else p.strength) if a.strength is None else a
                for a, p in presets
            ],
        )

    def find_preset(self, lora_base: str, steps: int | None = None) -> FewStepPreset | None:
        """The preset of the adapter that brings one and is in use.

        Raises:
            ConfigError: when two do.
        """
        used = [a for a, on in zip(self.adapters, self.is_used, strict=True) if on]
        found = {a.name: p for a in used if (p := a.find_preset(lora_base, steps)) is not None}
        if len(found) > 1:
            raise ConfigError(
                f"LoRAs {' and '.join(map(repr, found))} both bring few-step settings; leave one of them out"
            )
        return next(iter(found.values()), None)

    @property
    def is_used(self) -> list[bool]:
        """Whether each adapter does anything at any time."""
        moments = [self.get_strengths_at(moment) for moment in self.change_points]
        return [
            any(at_moment) or bool(text)
            for *at_moment, text in zip(*moments, self.text_strengths, strict=True)
        ]

    @property
    def is_baked(self) -> bool:
        """Whether strengths are part of the build."""
        return self.mode == "bake"

    @cached_property
    def change_points(self) -> list[float]:
        """Fractions of the steps at which a strength changes, in order; the first is 0."""
        return sorted({float(fraction) for a in self.adapters for fraction, _ in a.schedule} | {0.0})

    def get_strengths_at(self, fraction: float) -> list[float]:
        """The strength of each adapter after a fraction of the steps, with the stack's own strength multiplied in."""
        found = []
        for adapter in self.adapters:
            passed = bisect.bisect_right([entry[0] for entry in adapter.schedule], fraction)
            found.append(adapter.schedule[passed - 1][1] * self.strength)
        return found

    @property
    def strengths(self) -> list[float]:
        """The strength of each adapter at the first step."""
        return self.get_strengths_at(0)

    @property
    def text_strengths(self) -> list[float]:
        """The strength of each adapter's text-encoder part."""
        firsts = zip(self.adapters, self.strengths, strict=True)
        return [s if a.text_strength is None else a.text_strength * self.strength for a, s in firsts]

    @property
    def is_scheduled(self) -> bool:
        """Whether a strength changes from step to step."""
        return len(self.change_points) > 1

    def list_unusual_strengths(self) -> list[str]:
        """One line for each strength outside of what LoRAs are made for."""
        low, high = USUAL_STRENGTHS
        lines = []
        for adapter in self.adapters:
            values = [s * self.strength for _, s in (*adapter.schedule, (0, adapter.text_strength or 0))]
            odd = [v for v in values if not low <= v <= high]
            if odd:
                lines.append(
                    f"LoRA {adapter.name!r} has strength {odd[0]:g}; usual are {low} to {high}, beyond them pictures often break"
                )
        return lines


def check_schedule(name: str, entries: Schedule) -> None:
    """Refuse a schedule that is not one.

    Raises:
        ConfigError: naming the entry and the form.
    """
    form = "[[fraction of the steps, strength], …] with rising fractions from 0 on, such as [[0,1],[0.5,0]]"
    for entry in entries:
        if isinstance(entry, str) or not isinstance(entry, Sequence) or len(entry) != 2:
            raise ConfigError(f"{name} is {list(entries)!r}; a schedule is {form}")
        check_range(f"fraction in the {name}", entry[0], 0, 1)
        check_range(name, entry[1], -STRENGTH_LIMIT, STRENGTH_LIMIT)
    fractions = [entry[0] for entry in entries]
    if not fractions or fractions[0] != 0 or any(a >= b for a, b in itertools.pairwise(fractions)):
        raise ConfigError(f"{name} is {list(entries)!r}; a schedule is {form}")


def parse_adapter(given: object) -> Adapter:
    """An Adapter as it is, or one made from a mapping with its fields.

    Raises:
        ConfigError: for anything else, or a mapping with other fields; the message lists them.
    """
    if isinstance(given, Adapter):
        return given
    known = [f.name for f in fields(Adapter)]
    if not isinstance(given, Mapping) or not {"name", "path"} <= set(given) <= set(known):
        raise ConfigError(
            f"an entry of lora.adapters is {given!r}; it takes name and path, and may have {', '.join(known[2:])}"
        )
    return Adapter(**given)
