"""A LoRA stack as configured: which files, how strong, and how they are applied.

`conf/lora/*.yaml` name these classes; everything is checked when they are made, before any file is opened.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.lora.few_step import FewStepPreset, get_preset, parse_steps_in_name
from int8run.lora.find import get_default_name
from int8run.models.denoiser_components import DENOISER_COMPONENTS
from int8run.utils.step_schedule import Schedule, ScheduleKind, check_schedule, find_value_at

MODES = ("auto", "dynamic", "bake", "stochastic")
STRENGTH_LIMIT = 20
USUAL_STRENGTHS = (-1, 2)
# `transformer` and the like: one of the denoisers of a pipeline that has several
EXPERTS = tuple(name for name in DENOISER_COMPONENTS if name != "unet")
COMPONENTS = ("denoiser", *EXPERTS, "text_encoder", "text_encoder_2", "text_encoder_3")


@dataclass(frozen=True)
class Adapter:
    """One LoRA of a stack.

    Args:
        name: for the tracker and for messages; None: that of its file or folder.
        path: a `.safetensors` file, a folder that PEFT wrote, a name in `lora_dir`, the name of a shipped
            LoRA, a hub id with `weight_name`, or a mapping from a model's `lora_base` to one of these.
        strength: from -20 to 20; 0 leaves the LoRA out; a list of [fraction of the steps, strength from there
            on] changes it during the steps. None: 1, or that of the few-step preset.
        text_strength: of its part for text encoders; None: the strength at the first step.
        components: parts of the file that are applied; None: all.
        weight_name: the file in a hub repository.
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
            who = f"LoRA {self.name!r}" if self.name else "a LoRA"
            raise ConfigError(
                f"{who} has no path; set lora.adapters.0.path=<file.safetensors> (or its place in the list)"
            )
        if not self.name:
            object.__setattr__(self, "name", self.choose_name())
        check_bool(f"enabled of LoRA {self.name!r}", self.enabled)
        self.check_strengths()
        if isinstance(self.components, str):
            raise ConfigError(
                f"components of LoRA {self.name!r} is {self.components!r}; "
                f"it takes a list: [{self.components}]"
            )
        for component in self.components or ():
            check_choice(f"a component of LoRA {self.name!r}", component, COMPONENTS)

    def choose_name(self) -> str:
        """A name for a LoRA without one: that of its file or folder.

        Raises:
            ConfigError: when the base model chooses between several files.
        """
        if isinstance(self.path, Mapping):
            raise ConfigError(
                f"a LoRA with a path for each of {', '.join(sorted(map(str, self.path)))} has no name; "
                "give it one: lora.adapters.0.name=NAME (or its place in the list)"
            )
        return get_default_name(str(self.path), self.weight_name)

    def check_strengths(self) -> None:
        """Check that strengths are in range, and a schedule is one.

        Raises:
            ConfigError: naming the setting and the range.
        """
        if isinstance(self.strength, Sequence) and not isinstance(self.strength, str):
            name = f"strength of LoRA {self.name!r}"
            strengths = ScheduleKind("strength", "[[0,1],[0.5,0]]", partial(check_strength, name))
            check_schedule(name, self.strength, strengths)
        elif self.strength is not None:
            check_strength(f"strength of LoRA {self.name!r}", self.strength)
        if self.text_strength is not None:
            check_strength(f"text_strength of LoRA {self.name!r}", self.text_strength)

    def find_preset(self, lora_base: str, steps: int | None = None) -> FewStepPreset | None:
        """The settings that the LoRA was made for on a base model; None where it names no preset.

        Args:
            lora_base: of the model.
            steps: that were asked for; None: those of the preset. The number in the file's name wins over
                both.

        Raises:
            ConfigError: when there is no such preset for the base model.
        """
        if self.few_step is None:
            return None
        source, weight_name = self.get_source(lora_base)
        steps_in_name = parse_steps_in_name(Path(weight_name or source))
        return get_preset(self.few_step, lora_base, steps_in_name or steps)

    @property
    def schedule(self) -> Schedule:
        """The strength as a schedule; one entry where it does not change."""
        if isinstance(self.strength, Sequence):
            return self.strength
        strength = 1.0 if self.strength is None else self.strength
        return ((0.0, strength),)

    @property
    def all_strengths(self) -> list[float]:
        """Every strength that it has at any time, that of the text encoders included."""
        return [*(strength for _, strength in self.schedule), self.text_strength or 0]

    def get_source(self, lora_base: str) -> tuple[str, str | None]:
        """The path and weight name for a base model.

        Raises:
            ConfigError: when the mapping has no entry for it; the message lists those that have one.
        """
        source: Any = self.path
        if isinstance(source, Mapping):
            if lora_base not in source:
                raise ConfigError(
                    f"LoRA {self.name!r} has no source for base model {lora_base!r}; it has one for "
                    f"{', '.join(sorted(source))}; add an entry under the path of that adapter, "
                    "or choose another lora="
                )
            source = source[lora_base]
        if not isinstance(source, Mapping):
            return source, self.weight_name

        for key in ("repo", "weight_name"):
            if key not in source:
                raise ConfigError(
                    f"LoRA {self.name!r}: its source for {lora_base!r} has no {key}; "
                    "a hub source is repo and weight_name"
                )
        return source["repo"], source["weight_name"]


@dataclass(frozen=True)
class LoraSettings:
    """Adapters in order, with one mode for all.

    Args:
        adapters: the LoRAs; or mappings with an Adapter's fields, as a command line gives them.
        mode: `dynamic` keeps a low-rank branch beside each INT8 layer, so that a strength changes without a
            rebuild; `bake` adds the LoRAs to the float weights before they are rounded; `stochastic` adds
            them to the integers with stochastic rounding; `auto` takes, layer by layer, the first of dynamic,
            bake and stochastic that the adapter type, `max_overhead` and the weights allow.
        strength: scales every adapter of the stack, text encoders included.
        strict: keys that do not match the model are an error instead of a warning.
        insert_triggers: add the trigger words that a file names to every prompt that lacks them.
        max_overhead: with `auto`, the share of a layer's time that its branch may cost, measured on this
            machine.
    """

    adapters: Sequence[Adapter] = ()
    mode: str = "auto"
    strength: float = 1.0
    strict: bool = True
    insert_triggers: bool = False
    max_overhead: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "adapters", tuple(parse_adapter(given) for given in self.adapters))
        check_choice("lora.mode", self.mode, MODES)
        check_bool("lora.strict", self.strict)
        check_bool("lora.insert_triggers", self.insert_triggers)
        check_strength("lora.strength", self.strength)
        check_range("lora.max_overhead", self.max_overhead, 0, 100)
        self.check_adapters()

    def check_adapters(self) -> None:
        """Check what the adapters must be together, and with the settings of the stack.

        Raises:
            ConfigError: for a name that is there twice, a strength out of range, or a schedule that the mode
                cannot follow.
        """
        names = [adapter.name for adapter in self.adapters]
        for name in sorted(names):
            if names.count(name) > 1:
                raise ConfigError(
                    f"lora.adapters has the name {name!r} twice; give each adapter its own name"
                )

        for adapter in self.adapters:
            for strength in adapter.all_strengths:
                check_strength(
                    f"strength of LoRA {adapter.name!r} times lora.strength", strength * self.strength
                )

        for adapter in self.adapters:
            is_scheduled = adapter.enabled and len(adapter.schedule) > 1
            if is_scheduled and self.mode in ("bake", "stochastic"):
                raise ConfigError(
                    f"LoRA {adapter.name!r} has a schedule of strengths, which lora.mode={self.mode} "
                    "cannot follow; set lora.mode=dynamic"
                )

    def resolve_for_base(self, lora_base: str, steps: int | None = None) -> "LoraSettings":
        """The adapters that are enabled, with strengths that are not set taken from their few-step presets.

        Args:
            lora_base: of the model.
            steps: that were asked for; None: those of the presets.

        Raises:
            ConfigError: when an adapter has no source or no preset for this base model.
        """
        enabled = [adapter for adapter in self.adapters if adapter.enabled]
        for adapter in enabled:
            adapter.get_source(lora_base)  # raises where it has none

        resolved = []
        for adapter in enabled:
            preset = adapter.find_preset(lora_base, steps)
            if adapter.strength is None:
                strength = 1.0 if preset is None else preset.strength
                adapter = replace(adapter, strength=strength)
            resolved.append(adapter)
        return replace(self, adapters=resolved)

    def find_preset(self, lora_base: str, steps: int | None = None) -> FewStepPreset | None:
        """The few-step preset of the adapter that names one and is in use; None without one.

        Args:
            lora_base: of the model.
            steps: that were asked for; None: those of the preset.

        Raises:
            ConfigError: when two adapters name one.
        """
        presets: dict[str, FewStepPreset] = {}
        for adapter, is_used in zip(self.adapters, self.is_used, strict=True):
            preset = adapter.find_preset(lora_base, steps) if is_used else None
            if preset is not None:
                presets[adapter.name] = preset
        if len(presets) > 1:
            names = " and ".join(map(repr, presets))
            raise ConfigError(f"LoRAs {names} both bring few-step settings; leave one of them out")
        return next(iter(presets.values()), None)

    @property
    def is_used(self) -> list[bool]:
        """Whether each adapter does anything at any time."""
        by_time = [self.get_strengths_at(fraction) for fraction in self.change_points]
        by_adapter = zip(*by_time, self.text_strengths, strict=True)
        return [any(strengths) for strengths in by_adapter]

    @property
    def is_baked(self) -> bool:
        """Whether strengths are part of the build."""
        return self.mode == "bake"

    @cached_property
    def change_points(self) -> list[float]:
        """Fractions of the steps at which a strength changes, in order; the first is 0."""
        fractions = {float(fraction) for adapter in self.adapters for fraction, _ in adapter.schedule}
        return sorted(fractions | {0.0})

    def get_strengths_at(self, fraction: float) -> list[float]:
        """The strength of each adapter after a fraction of the steps, multiplied by that of the stack."""
        strengths = []
        for adapter in self.adapters:
            strengths.append(find_value_at(adapter.schedule, fraction) * self.strength)
        return strengths

    @property
    def strengths(self) -> list[float]:
        """The strength of each adapter at the first step."""
        return self.get_strengths_at(0)

    @property
    def largest_strengths(self) -> list[float]:
        """The strength of each adapter in the denoiser when it is farthest from 0."""
        by_time = [self.get_strengths_at(fraction) for fraction in self.change_points]
        return [max(strengths, key=abs) for strengths in zip(*by_time, strict=True)]

    @property
    def text_strengths(self) -> list[float]:
        """The strength of each adapter's part for text encoders."""
        text_strengths = []
        for adapter, strength in zip(self.adapters, self.strengths, strict=True):
            if adapter.text_strength is not None:
                strength = adapter.text_strength * self.strength
            text_strengths.append(strength)
        return text_strengths

    @property
    def is_scheduled(self) -> bool:
        """Whether a strength changes from step to step."""
        return len(self.change_points) > 1

    def list_unusual_strengths(self) -> list[str]:
        """One line for each adapter with a strength outside of what LoRAs are made for.

        A line for a strength where there is no LoRA, too.
        """
        low, high = USUAL_STRENGTHS
        lines = []
        if self.strength != 1 and not self.adapters:
            lines.append(
                f"lora.strength={self.strength:g} changes nothing: there is no LoRA; choose one with lora="
            )
        for adapter in self.adapters:
            strengths = [strength * self.strength for strength in adapter.all_strengths]
            unusual = [strength for strength in strengths if not low <= strength <= high]
            if unusual:
                lines.append(
                    f"LoRA {adapter.name!r} has strength {unusual[0]:g}; {low} to {high} are usual, "
                    "beyond them images often break"
                )
        return lines


def check_strength(name: str, strength: Any) -> None:
    """Check that a strength is in range.

    Raises:
        ConfigError: naming the setting and the range.
    """
    check_range(name, strength, -STRENGTH_LIMIT, STRENGTH_LIMIT)


def parse_adapter(given: object) -> Adapter:
    """An Adapter as it is, or one made from a mapping with its fields.

    Raises:
        ConfigError: for anything else, or a mapping with other fields; the message lists them.
    """
    if isinstance(given, Adapter):
        return given
    known = [field.name for field in fields(Adapter)]
    has_known_fields = isinstance(given, Mapping) and {"path"} <= set(given) <= set(known)
    if not isinstance(given, Mapping) or not has_known_fields:
        raise ConfigError(
            f"an entry of lora.adapters is {given!r}; "
            f"it takes path, and may have {', '.join(name for name in known if name != 'path')}"
        )
    return Adapter(**{"name": None, **given})
