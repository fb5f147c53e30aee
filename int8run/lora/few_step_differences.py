"""What of a run contradicts the few-step LoRA in it: one line for each setting.

`lora/header_info.py` warns with these lines. What the LoRAs are made for stands in `few_step.py`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from int8run.lora.few_step import FewStepPreset
from int8run.models.sampling import Sampling

# relative difference of strengths that is not worth a warning
STRENGTH_TOLERANCE = 0.1


def list_differences(
    preset: FewStepPreset,
    sampling: Sampling,
    *,
    scheduler: str | None = None,
    strength: float | None = None,
    companions: Mapping[str, float] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
) -> list[str]:
    """One line for each setting of a run that contradicts a preset; none when all agree.

    Args:
        preset: what the LoRA was made for.
        sampling: of the run; steps and guidance that are None are not compared.
        scheduler: class name of the scheduler that the run uses; None: that of `sampling`, not compared when
            it names none either.
        strength: of the few-step LoRA; None: not compared.
        companions: strengths of the other LoRAs, by name.
        scheduler_config: of the scheduler in use; None: the settings of `sampling`, compared as far as they
            go.
    """
    if scheduler_config is None:
        scheduler_config = sampling.scheduler_settings
    differences = [
        *compare_range("steps", sampling.steps, preset.steps, preset.steps_range),
        *compare_range("guidance", sampling.guidance, preset.guidance, preset.guidance_range),
        *compare_scheduler(preset, scheduler or sampling.scheduler, scheduler_config),
        *compare_extra(preset, sampling.extra),
    ]
    if strength is not None and not math.isclose(strength, preset.strength, rel_tol=STRENGTH_TOLERANCE):
        differences.append(Difference(f"its strength is {strength:g}", f"{preset.strength:g}"))

    lines = []
    for difference in differences:
        lines.append(f"{difference.found}; {preset.name} on {preset.base} is made for {difference.made_for}")
    return lines + list_strong_companions(preset, companions or {})


@dataclass(frozen=True)
class Difference:
    """One setting of a run that contradicts a preset.

    Args:
        found: a sentence on the setting of the run.
        made_for: what the preset has in its place.
    """

    found: str
    made_for: str


def compare_range(
    name: str, value: float | None, best: float | None, limits: Sequence[float] | None
) -> list[Difference]:
    """Compare a number of the sampler with the range of a preset.

    Args:
        name: of the number under `sampler`.
        value: of the run; None: not compared.
        best: of the preset.
        limits: the lowest and highest value of the preset; None: not compared.
    """
    if value is None or limits is None or limits[0] <= value <= limits[1]:
        return []
    return [Difference(f"sampler.{name} is {value:g}", format_best(best, limits))]


def compare_scheduler(
    preset: FewStepPreset, scheduler: str | None, config: Mapping[str, Any]
) -> list[Difference]:
    """Compare the class of a scheduler with that of a preset, and its settings where the class is the same.

    Args:
        preset: what the LoRA was made for.
        scheduler: class name; None: not compared.
        config: its settings, as far as they are known.
    """
    if scheduler is not None and scheduler != preset.scheduler:
        best = f"{preset.scheduler}{format_settings(preset.scheduler_settings)}"
        return [Difference(f"the scheduler is {scheduler}", best)]

    differences = []
    for name, best in preset.scheduler_settings.items():
        if name in config and config[name] != best:
            differences.append(Difference(f"the scheduler's {name} is {config[name]}", str(best)))
    return differences


def compare_extra(preset: FewStepPreset, extra: Mapping[str, Any]) -> list[Difference]:
    """Compare further arguments of the pipeline with those of a preset."""
    differences = []
    for name, best in preset.extra.items():
        value = extra.get(name)
        if value == best:
            continue
        shown = "not set" if value is None else value
        differences.append(Difference(f"sampler.extra.{name} is {shown}", str(best)))
    return differences


def list_strong_companions(preset: FewStepPreset, companions: Mapping[str, float]) -> list[str]:
    """One line for each other LoRA that is stronger than advised beside a preset's."""
    if preset.companions is None:
        return []
    limit = f"beside {preset.name} at most {preset.companions:g} is advised"
    lines = []
    for name, strength in companions.items():
        if abs(strength) > preset.companions:
            lines.append(f"LoRA {name!r} has strength {strength:g}; {limit}")
    return lines


def format_best(best: float | None, limits: Sequence[float]) -> str:
    """`4 (2 to 8)`, or `4` where no other value works."""
    if limits[0] == limits[1]:
        return f"{best:g}"
    return f"{best:g} ({limits[0]:g} to {limits[1]:g})"


def format_settings(settings: Mapping[str, Any]) -> str:
    """` with a=1, b=2`, or nothing."""
    if not settings:
        return ""
    texts = [f"{name}={value}" for name, value in settings.items()]
    return f" with {', '.join(texts)}"
