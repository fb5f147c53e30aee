"""How images are sampled: steps, guidance, scheduler, size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from int8run.errors import ConfigError, check_range

# arguments of a pipeline that fix the number of its steps
SCHEDULE_ARGUMENTS = ("sigmas", "timesteps")


@dataclass(frozen=True)
class Sampling:
    """How to sample; a field that is None takes the checkpoint's own value.

    Args:
        scheduler: a scheduler class of diffusers, made from the checkpoint's own scheduler config; None: the checkpoint's own.
        scheduler_settings: that differ from that config.
        extra: further arguments of the pipeline's call, passed as they are.
    """

    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    batch: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)
    scheduler: str | None = None
    scheduler_settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_range("sampler.steps", self.steps, 1, 1000, whole=True)
        if self.guidance is not None:
            check_range("sampler.guidance", self.guidance, 0, 100)
        for name in ("height", "width"):
            if getattr(self, name) is not None:
                check_range(f"sampler.{name}", getattr(self, name), 8, 16384, whole=True)
        if self.scheduler is not None and not isinstance(self.scheduler, str):
            raise ConfigError(
                f"sampler.scheduler is {self.scheduler!r}; it takes the name of a class of diffusers, such as LCMScheduler"
            )
        if not isinstance(self.extra, Mapping):
            raise ConfigError(
                f"sampler.extra is {self.extra!r}; it takes names and values, such as {{max_sequence_length: 256}}"
            )
        if not isinstance(self.scheduler_settings, Mapping):
            given = self.scheduler_settings
            raise ConfigError(
                f"sampler.scheduler_settings is {given!r}; it takes names and values, such as {{shift: 3.0}}"
            )
        check_range("sampler.batch", self.batch, 1, 1024, whole=True)

    def with_defaults(self, default: "Sampling") -> "Sampling":
        """These settings, with the default's where None."""
        open_fields = [f.name for f in fields(self) if getattr(self, f.name) is None]
        extra = {**default.extra, **self.extra}
        # settings belong to a scheduler: another one's would not be understood
        same = self.scheduler in (None, default.scheduler)
        settings = {**(default.scheduler_settings if same else {}), **self.scheduler_settings}
        return replace(
            self,
            **{name: getattr(default, name) for name in open_fields},
            scheduler_settings=settings,
            extra=extra,
        )
