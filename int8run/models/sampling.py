"""Settings of how images are generated: steps, guidance, size, scheduler; the settings behind `sampler=`.

A checkpoint has its own defaults (`model.sampling`), and a few-step LoRA may change them. The pipeline is not
known here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from int8run.errors import ConfigError, check_bool, check_range

# arguments of a pipeline's call that fix the number of its steps
SCHEDULE_ARGUMENTS = ("sigmas", "timesteps")
NUM_FRAMES = "num_frames"  # argument of the pipelines of videos


@dataclass(frozen=True)
class Sampling:
    """How to generate images; a field that is None takes the checkpoint's own value.

    Args:
        steps: denoising steps.
        guidance: guidance scale.
        height: of an image, in pixels.
        width: of an image, in pixels.
        batch: images of one call.
        extra: further arguments of the pipeline's call, passed as they are.
        scheduler: a scheduler class of diffusers, made from the checkpoint's own scheduler config; None: the
            checkpoint's own.
        scheduler_settings: what differs from that config.
        fit_inputs: bring input images to `height` × `width` before the call, which needs both.

    Raises:
        ConfigError: for a value outside its range or of another type.
    """

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)
    fit_inputs: bool | None = None

    def __post_init__(self) -> None:
        self.check_numbers()
        if self.fit_inputs is not None:
            check_bool("sampler.fit_inputs", self.fit_inputs)
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ConfigError(
                f"sampler.scheduler is {self.scheduler!r}; "
                "it takes the name of a class of diffusers, such as LCMScheduler"
            )
        check_mapping("sampler.extra", self.extra, example="{max_sequence_length: 256}")
        check_mapping("sampler.scheduler_settings", self.scheduler_settings, example="{shift: 3.0}")

    def check_numbers(self) -> None:
        """Raise ConfigError for a number outside its range."""
        if self.steps is not None:
            check_range("sampler.steps", self.steps, 1, 1000, whole=True)
        if self.guidance is not None:
            check_range("sampler.guidance", self.guidance, 0, 100)
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None:
                check_range(f"sampler.{name}", size, 8, 16384, whole=True)
        check_range("sampler.batch", self.batch, 1, 1024, whole=True)

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Width and height that input images are brought to; None: they stay as they are."""
        if not self.fit_inputs or self.width is None or self.height is None:
            return None
        return self.width, self.height

    def with_defaults(self, default: "Sampling") -> "Sampling":
        """Return these settings, with the default's in the place of each that is None."""
        unset = [f.name for f in fields(self) if getattr(self, f.name) is None]
        # settings belong to a scheduler: another one would not understand them
        is_same_scheduler = self.scheduler in (None, default.scheduler)
        default_settings = default.scheduler_settings if is_same_scheduler else {}
        return replace(
            self,
            **{name: getattr(default, name) for name in unset},
            scheduler_settings={**default_settings, **self.scheduler_settings},
            extra={**default.extra, **self.extra},
        )


def check_mapping(name: str, value: object, example: str) -> None:
    """Raise ConfigError unless a setting is a mapping of names to values."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{name} is {value!r}; it takes names and values, such as {example}")


def drop_schedule(sampling: Sampling) -> Sampling:
    """A sampling without the lists that fix the number of its steps: they have an entry for each."""
    extra = {name: value for name, value in sampling.extra.items() if name not in SCHEDULE_ARGUMENTS}
    return replace(sampling, extra=extra)
