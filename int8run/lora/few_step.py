"""LoRAs that make a model draw in few steps: what each wants, and what of a run speaks against it."""

import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, check_choice, check_range
from int8run.models.sampling import Sampling

TABLE_FILE = Path(__file__).with_name("few_step.yaml")
SOURCES = ("model card", "community", "measured")
TITLE_KEYS = ("modelspec.title", "modelspec.usage_hint", "ss_output_name")
MAX_TEXT = 500
WITHOUT_MARK = "without "
STEPS_PATTERN = re.compile(r"(?<![a-z0-9])(\d{1,2})[-_ ]?steps?(?![a-z0-9])")
STRENGTH_TOLERANCE = 0.1


@dataclass(frozen=True)
class FewStepPreset:
    """How a few-step LoRA wants to be run on one base model; a row of `few_step.yaml`.

    Args:
        name: of the preset.
        base: of the model, as in `bases.yaml`.
        steps, steps_range: recommended number of steps, and the lowest and highest that work; None: no other.
        guidance, guidance_range: the same for `guidance_scale`; None: the pipeline has none.
        scheduler: class in diffusers.
        scheduler_settings: what differs from the base model's own scheduler.
        extra: further arguments of the pipeline.
        strength: of this LoRA.
        companions: highest advised strength of other LoRAs beside it; None: nobody says.
        source: `model card`, or `community`.
        note: what else must be known.
    """

    name: str
    base: str
    steps: int
    scheduler: str
    source: str
    guidance: float | None = None
    strength: float = 1.0
    steps_range: Sequence[int] | None = None
    guidance_range: Sequence[float] | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)
    companions: float | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        what = f"few-step preset {self.name!r} for {self.base!r}"
        check_range(f"steps of {what}", self.steps, 1, 1000, whole=True)
        check_range(f"strength of {what}", self.strength, -20, 20)
        check_choice(f"source of {what}", self.source, SOURCES)
        if self.guidance is None and self.guidance_range is not None:
            raise ConfigError(f"{what} has a guidance_range and no guidance; give both or none")
        if self.steps_range is None:
            object.__setattr__(self, "steps_range", (self.steps, self.steps))
        if self.guidance_range is None and self.guidance is not None:
            object.__setattr__(self, "guidance_range", (self.guidance, self.guidance))
        for name, value, limits in (
            ("steps", self.steps, self.steps_range),
            ("guidance", self.guidance, self.guidance_range),
        ):
            if limits is not None and (len(limits) != 2 or not limits[0] <= value <= limits[1]):  # type: ignore[operator]
                raise ConfigError(
                    f"{what} has {name}_range {list(limits)} and {name} {value}; a range is [lowest, highest] around it"
                )
        if not self.scheduler.endswith("Scheduler"):
            raise ConfigError(
                f"{what} has scheduler {self.scheduler!r}; give a class of diffusers, such as LCMScheduler"
            )
        if self.companions is not None:
            check_range(f"companions of {what}", self.companions, 0, 20)
        for name in ("sigmas", "timesteps"):
            if name in self.extra and len(self.extra[name]) != self.steps:
                raise ConfigError(
                    f"{what} has {len(self.extra[name])} {name} for {self.steps} steps; give one for each step"
                )

    @property
    def sampling(self) -> Sampling:
        """The preset as settings of a run."""
        return Sampling(
            steps=self.steps,
            guidance=self.guidance,
            scheduler=self.scheduler,
            scheduler_settings=self.scheduler_settings,
            extra=self.extra,
        )


@functools.cache
def load_table() -> Mapping[str, Any]:
    """What `few_step.yaml` says."""
    return yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))


def list_presets() -> list[str]:
    """Names of all presets."""
    return list(load_table()["presets"])


def get_preset(name: str, base: str, steps: int | None = None) -> FewStepPreset:
    """The settings of a preset for a base model.

    Args:
        base: a model's `lora_base`.
        steps: the number of steps that the file was made for, where it is known (`steps_in_name`); None, or one that the preset
            cannot have: the preset's own.

    Raises:
        ConfigError: an unknown preset, or a base that it is not made for; the message lists what there is.
    """
    check_choice("few_step", name, list_presets())
    bases = load_table()["presets"][name]["bases"]
    if base not in bases:
        raise ConfigError(
            f"few_step preset {name!r} is not made for {base!r}; it is for {', '.join(sorted(bases))}. "
            f"Presets for {base!r}: {', '.join(p for p in list_presets() if base in load_table()['presets'][p]['bases']) or 'none'}"
        )
    row = dict(bases[base])
    by_steps = row.pop("by_steps", {})
    found = FewStepPreset(name=name, base=base, **row)
    low, high = found.steps_range or (found.steps, found.steps)
    if steps is None or not low <= steps <= high:
        return found
    changed = by_steps.get(steps, {})
    if "guidance" in changed and "guidance_range" not in changed:
        changed = {**changed, "guidance_range": None}
    return replace(found, steps=steps, steps_range=(steps, steps), **changed)


def detect_preset(path: Path, metadata: Mapping[str, str], base: str | None = None) -> str | None:
    """The preset that a file gives away by words in its name, its hub repository, its title or its usage hint; None: no such words.

    Only whole words count: `hyperrealistic` is no `hyper`, `turbopants` no `turbo`.

    Args:
        base: only presets that are made for this base model; None: any.
    """
    for name, entry in load_table()["presets"].items():
        if (base is None or base in entry["bases"]) and matches_any_words(entry["words"], path, metadata):
            return name
    return None


def parse_steps_in_name(path: Path) -> int | None:
    """The number of steps that a file's name says (`Hyper-SDXL-8steps-lora`), or None."""
    match = STEPS_PATTERN.search(path.stem.lower())
    return int(match[1]) if match else None


def is_for_training_only(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a file's words say that it serves training and spoils pictures."""
    return matches_any_words(load_table()["training_only"], path, metadata)


def warn_about_distilled_model(name: str, model: str) -> str | None:
    """A warning when the model draws in few steps by itself, by the words of its location; None when it does not.

    Args:
        name: of the preset.
        model: hub id or folder of the model.
    """
    text = extract_words(Path(model).name)
    if not any(has_words(words, text) for words in load_table()["distilled_models"]):
        return None
    return (
        f"{model} is made for few steps already; a few-step LoRA ({name}) on top of it overcooks the picture"
    )


def list_differences(
    preset: FewStepPreset,
    sampling: Sampling,
    scheduler: str | None = None,
    strength: float | None = None,
    companions: Mapping[str, float] | None = None,
    scheduler_config: Mapping[str, Any] | None = None,
) -> list[str]:
    """One line for each setting of a run that contradicts a preset; none when all agree.

    Args:
        sampling: of the run; steps and guidance that are None are not judged.
        scheduler: class name of the scheduler that the run uses; None: that of `sampling`, not judged when it names none either.
        strength: of the few-step LoRA; None: not judged.
        companions: strengths of the other LoRAs, by name.
        scheduler_config: that the scheduler ends up with; None: the settings of `sampling`, judged as far as they stand there.
    """
    made_for = f"{preset.name} on {preset.base} is made for"
    lines = []
    for name, value, best, limits in (
        ("steps", sampling.steps, preset.steps, preset.steps_range),
        ("guidance", sampling.guidance, preset.guidance, preset.guidance_range),
    ):
        if value is not None and limits is not None and not limits[0] <= value <= limits[1]:
            span = f"{best:g}" if limits[0] == limits[1] else f"{best:g} ({limits[0]:g} to {limits[1]:g})"
            lines.append(f"sampler.{name} is {value:g}; {made_for} {span}")
    scheduler = scheduler or sampling.scheduler
    settings = sampling.scheduler_settings if scheduler_config is None else scheduler_config
    if scheduler is not None and scheduler != preset.scheduler:
        lines.append(
            f"the scheduler is {scheduler}; {made_for} {preset.scheduler}{format_settings(preset.scheduler_settings)}"
        )
    else:
        wrong = {
            name: settings[name]
            for name, value in preset.scheduler_settings.items()
            if name in settings and settings[name] != value
        }
        lines += [
            f"the scheduler's {name} is {value}; {made_for} {preset.scheduler_settings[name]}"
            for name, value in wrong.items()
        ]
    for name, value in preset.extra.items():
        given = sampling.extra.get(name)
        if given != value:
            lines.append(
                f"sampler.extra.{name} is {'not set' if given is None else given}; {made_for} {value}"
            )
    if strength is not None and not math.isclose(strength, preset.strength, rel_tol=STRENGTH_TOLERANCE):
        lines.append(f"its strength is {strength:g}; {made_for} {preset.strength:g}")
    for other, value in (companions or {}).items():
        if preset.companions is not None and abs(value) > preset.companions:
            lines.append(
                f"LoRA {other!r} has strength {value:g}; beside {preset.name} at most {preset.companions:g} is advised"
            )
    return lines


def format_settings(settings: Mapping[str, Any]) -> str:
    """` with a=1, b=2`, or nothing."""
    return f" with {', '.join(f'{name}={value}' for name, value in settings.items())}" if settings else ""


def matches_any_words(choices: Iterable[Iterable[str]], path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether any of the lists of words stands in the file's name, or in one text of its header."""
    # with the repository where the file lies in a hub cache: many are called `pytorch_lora_weights`
    name = " ".join([*(part for part in path.parts if part.startswith("models--")), path.stem])
    texts = [extract_words(text) for text in (name, *(metadata.get(key, "") for key in TITLE_KEYS))]
    return any(has_words(words, text) for words in choices for text in texts)


def extract_words(text: str) -> set[str]:
    """The words of a text in small letters, with and without their digits: `wan22-8steps` -> wan22, wan, 8step, Nstep, …"""
    text = text[:MAX_TEXT].lower()
    words = set(re.findall(r"[a-z0-9]+", text))
    # `step0001000` is how far a training was
    found = {word for steps in STEPS_PATTERN.findall(text) for word in (f"{int(steps)}step", "Nstep")}
    return words | {word.strip("0123456789") for word in words} | found


def has_words(words: Iterable[str], text: Collection[str]) -> bool:
    """Whether a text has all of these words, and none that is marked `without`."""
    return all(
        (word.removeprefix(WITHOUT_MARK) not in text) if word.startswith(WITHOUT_MARK) else word in text
        for word in words
    )
