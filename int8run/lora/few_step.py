"""LoRAs that make a model generate in few steps: how each is meant to be run.

A preset is a row of `few_step.yaml`. It is named at an adapter (`few_step: lcm`), or recognized by the words
in a file's name and header. `lora/config.py` takes settings from it, `lora/few_step_differences.py` compares
a run with it.
"""

import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from int8run.errors import ConfigError, check_choice, check_range
from int8run.models.sampling import Sampling
from int8run.utils.plurals import count_noun

TABLE_FILE = Path(__file__).with_name("few_step.yaml")
SOURCES = ("model card", "community", "measured")
# texts of a header that may name the kind of LoRA
TITLE_KEYS = ("modelspec.title", "modelspec.usage_hint", "ss_output_name")
MAX_TEXT_CHARS = 500
# in a list of words: the word that follows must not be there
WITHOUT_MARK = "without "
# `8steps`, `4-step`
STEPS_PATTERN = re.compile(r"(?<![a-z0-9])(\d{1,2})[-_ ]?steps?(?![a-z0-9])")


@dataclass(frozen=True)
class FewStepPreset:
    """How a few-step LoRA is meant to be run on one base model; a row of `few_step.yaml`.

    Args:
        name: of the preset.
        base: of the model, as in `bases.yaml`.
        steps: recommended number of steps.
        scheduler: class in diffusers.
        source: `model card`, `community` or `measured`.
        guidance: recommended `guidance_scale`; None: the pipeline has none.
        strength: of this LoRA.
        steps_range: the lowest and highest number of steps that work; None: only `steps`.
        guidance_range: the lowest and highest guidance that work; None: only `guidance`.
        scheduler_settings: what differs from the base model's own scheduler.
        extra: further arguments of the pipeline.
        companions: highest advised strength of other LoRAs beside it; None: not known.
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
        preset = self.title
        check_range(f"steps of {preset}", self.steps, 1, 1000, whole=True)
        check_range(f"strength of {preset}", self.strength, -20, 20)
        check_choice(f"source of {preset}", self.source, SOURCES)
        if self.guidance is None and self.guidance_range is not None:
            raise ConfigError(f"{preset} has a guidance_range and no guidance; give both or none")
        self.complete_ranges()
        check_limits(preset, "steps", self.steps, self.steps_range)
        check_limits(preset, "guidance", self.guidance, self.guidance_range)
        if not self.scheduler.endswith("Scheduler"):
            raise ConfigError(
                f"{preset} has scheduler {self.scheduler!r}; give a class of diffusers, such as LCMScheduler"
            )
        if self.companions is not None:
            check_range(f"companions of {preset}", self.companions, 0, 20)
        self.check_values_per_step()

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"few-step preset {self.name!r} for {self.base!r}"

    def complete_ranges(self) -> None:
        """Make ranges of the recommended values alone, where none are given."""
        if self.steps_range is None:
            object.__setattr__(self, "steps_range", (self.steps, self.steps))
        if self.guidance_range is None and self.guidance is not None:
            object.__setattr__(self, "guidance_range", (self.guidance, self.guidance))

    def check_values_per_step(self) -> None:
        """Check that lists with a value for each step have as many.

        Raises:
            ConfigError: naming the preset and the list.
        """
        for name in ("sigmas", "timesteps"):
            values = self.extra.get(name)
            if values is not None and len(values) != self.steps:
                steps = count_noun(self.steps, "step")
                raise ConfigError(f"{self.title} has {len(values)} {name} for {steps}; give one for each")

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


def check_limits(preset: str, name: str, value: float | None, limits: Sequence[float] | None) -> None:
    """Check that the range of a setting is a range, with the recommended value in it.

    Raises:
        ConfigError: naming the preset and the setting.
    """
    if limits is None or value is None:
        return
    if len(limits) != 2 or not limits[0] <= value <= limits[1]:
        raise ConfigError(
            f"{preset} has {name}_range {list(limits)} and {name} {value}; "
            "a range is [lowest, highest] around it"
        )


# -- the table of presets ------------------------------------------------------------------------------------


@functools.cache
def load_table() -> Mapping[str, Any]:
    """The content of `few_step.yaml`."""
    table: Mapping[str, Any] = yaml.safe_load(TABLE_FILE.read_text(encoding="utf-8"))
    return table


def list_presets(base: str | None = None) -> list[str]:
    """Names of all presets, or of those for one base model."""
    presets = load_table()["presets"]
    if base is None:
        return list(presets)
    return [name for name, preset in presets.items() if base in preset["bases"]]


def has_preset(name: str, base: str) -> bool:
    """Whether a preset is made for a base model."""
    return name in list_presets(base)


def get_preset(name: str, base: str, steps: int | None = None) -> FewStepPreset:
    """The settings of a preset for a base model.

    Args:
        name: of the preset.
        base: a model's `lora_base`.
        steps: the number of steps that the file was made for, where it is known (`parse_steps_in_name`).
            None, or a number that the preset does not allow: that of the preset.

    Raises:
        ConfigError: for an unknown preset, or a base that it is not made for; the message lists what there
            is.
    """
    check_choice("few_step", name, list_presets())
    bases = load_table()["presets"][name]["bases"]
    if base not in bases:
        others = ", ".join(list_presets(base)) or "none"
        raise ConfigError(
            f"few_step preset {name!r} is not made for {base!r}; it is for {', '.join(sorted(bases))}. "
            f"Presets for {base!r}: {others}"
        )
    row = dict(bases[base])
    by_steps = row.pop("by_steps", {})
    preset = FewStepPreset(name=name, base=base, **row)
    low, high = preset.steps_range or (preset.steps, preset.steps)
    if steps is None or not low <= steps <= high:
        return preset
    changes = dict(by_steps.get(steps, {}))
    if "guidance" in changes:
        changes.setdefault("guidance_range", None)  # that of the row is for its own guidance
    return replace(preset, steps=steps, steps_range=(steps, steps), **changes)


# -- what a file says of itself ------------------------------------------------------------------------------


def detect_preset(path: Path, metadata: Mapping[str, str], base: str | None = None) -> str | None:
    """The preset that a file is for, by words in its name, its hub repository, its title or its usage hint.

    Only whole words count: `hyperrealistic` does not contain `hyper`, nor `turbopants` `turbo`.

    Args:
        path: of the file.
        metadata: of its header.
        base: only presets that are made for this base model; None: any.

    Returns:
        None when no preset has such words.
    """
    for name in list_presets(base):
        if matches_any_words(load_table()["presets"][name]["words"], path, metadata):
            return name
    return None


def parse_steps_in_name(path: Path) -> int | None:
    """The number of steps in a file's name (`Hyper-SDXL-8steps-lora`), or None."""
    match = STEPS_PATTERN.search(path.stem.lower())
    return int(match[1]) if match else None


def is_for_training_only(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the words of a file say that it is a help in training, which spoils images."""
    return matches_any_words(load_table()["training_only"], path, metadata)


def warn_about_distilled_model(name: str, model: str) -> str | None:
    """A warning when the model generates in few steps by itself, as its location tells; else None.

    Args:
        name: of the preset.
        model: hub id or folder of the model.
    """
    words = extract_words(Path(model).name)
    if not any(has_words(needed, words) for needed in load_table()["distilled_models"]):
        return None
    return f"{model} is made for few steps already; a few-step LoRA ({name}) on top of it overcooks the image"


def matches_any_words(choices: Iterable[Iterable[str]], path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether any of the lists of words stands in the file's name, or in one text of its header.

    Args:
        choices: lists of words, each of them enough.
        path: of the file.
        metadata: of its header.
    """
    # with the repository where the file lies in a hub cache: many are called `pytorch_lora_weights`
    repositories = [part for part in path.parts if part.startswith("models--")]
    texts = [" ".join([*repositories, path.stem])]
    texts += [metadata.get(key, "") for key in TITLE_KEYS]
    for text in texts:
        words = extract_words(text)
        if any(has_words(needed, words) for needed in choices):
            return True
    return False


def extract_words(text: str) -> set[str]:
    """The words of a text in small letters, with and without digits.

    `wan22-8steps` -> wan22, wan, 8steps, steps, 8step, Nstep.
    """
    text = text[:MAX_TEXT_CHARS].lower()
    words = set(re.findall(r"[a-z0-9]+", text))
    without_digits = {word.strip("0123456789") for word in words}
    # only `8steps`: `step0001000` is how far a training was
    steps = {f"{int(number)}step" for number in STEPS_PATTERN.findall(text)}
    if steps:
        steps.add("Nstep")
    return words | without_digits | steps


def has_words(needed: Iterable[str], words: Collection[str]) -> bool:
    """Whether all of the needed words are there, and none that is marked with `without`."""
    for word in needed:
        must_be_there = not word.startswith(WITHOUT_MARK)
        is_there = word.removeprefix(WITHOUT_MARK) in words
        if is_there != must_be_there:
            return False
    return True
