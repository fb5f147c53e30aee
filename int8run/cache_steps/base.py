"""What a step cache is: the settings behind `cache_steps=`, and how one is put on a denoiser.

Each option is one class in this folder, with its limits and its hooks, which are those of diffusers.
`pipeline.step_cache` puts them on for the length of a call and counts what they skip. Composing settings
imports no diffusers: the classes import it when they are put on.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

from torch import nn

from int8run.errors import ConfigError, check_bool, check_choice

NONE = "none"
INT8_MODEL, BOTH_MODELS = "int8", "both"
# what a cache skips: repeated blocks, behind or around one that decides, or the attention inside them
BLOCKS, ATTENTION = "blocks", "attention"
# up to so many steps leave a cache hardly any to skip: the first ones are computed, and so is the last
FEW_STEPS = 4
MEASURED_BESIDE = ("models", "split")
TIMESTEPS = 1000  # of training, on whose scale ranges of timesteps are given


@dataclass
class StepPosition:
    """Where in a pipeline's call its denoiser is called.

    Args:
        step: number of the step.
        num_steps: of the call.
        timestep: on a scale from TIMESTEPS, which is noise, to 0.
        sigma: share of noise in the latents, from 1 to 0, of a flow; None: the scheduler has another kind.
    """

    step: int = 0
    num_steps: int = 1
    timestep: float = float(TIMESTEPS)
    sigma: float | None = None


@dataclass(frozen=True)
class CacheCalls:
    """How a denoiser is called while a cache is on it.

    Args:
        position: is kept up to date.
        num_calls: of one image, for each prompt that guidance has.
        ratios: for `magcache`: how much larger each step's residual is than that of the step before.
        is_batched: whether one call has the prompt and the negative one in a batch.
        output_format: dimensions of the output, by diffusers' letters.
    """

    position: StepPosition
    num_calls: int
    ratios: Sequence[float] = ()
    is_batched: bool = False
    output_format: str = "BCHW"


class StepCache(Protocol):
    """An option of `cache_steps=`.

    Args:
        models: which models have it: `int8`, or `both`, where the float model with it is measured, too.
        split: whether the model without it generates, too, which splits the loss.

    `skips` is BLOCKS or ATTENTION, `hooks_denoiser` whether one of its hooks is on the denoiser itself, and
    `needs_equal_blocks` whether all blocks must return as many tensors.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: ClassVar[str]
    skips: ClassVar[str]
    hooks_denoiser: ClassVar[bool]
    needs_equal_blocks: ClassVar[bool]

    @property
    def models(self) -> str:
        """`int8` or `both`."""
        ...

    @property
    def split(self) -> bool:
        """Whether the model without it generates, too."""
        ...

    @property
    def num_calibration_prompts(self) -> int:
        """How many images are generated to measure `CacheCalls.ratios`; 0: it needs none."""
        ...

    @property
    def takes_two_denoisers(self) -> bool:
        """Whether it can be on two denoisers of a pipeline, each of which has a part of the steps."""
        ...

    def check_steps(self, num_steps: int) -> None:
        """Raise ConfigError where nothing could be skipped in as many steps."""
        ...

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """Register diffusers' hooks on a denoiser.

        Raises:
            ValueError: of diffusers, for a module that it does not know.
        """
        ...

    def force(self) -> "StepCache":
        """The same cache with settings that skip the second of two equal calls."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepCacheSettings:
    """Settings that all step caches have; see `StepCache`."""

    models: str = INT8_MODEL
    split: bool = True
    hooks_denoiser: ClassVar[bool] = False
    needs_equal_blocks: ClassVar[bool] = False

    @property
    def num_calibration_prompts(self) -> int:
        """It needs none."""
        return 0

    @property
    def takes_two_denoisers(self) -> bool:
        """It counts the steps of each by itself."""
        return True

    def __post_init__(self) -> None:
        check_choice("cache_steps.models", self.models, (INT8_MODEL, BOTH_MODELS))
        check_bool("cache_steps.split", self.split)


@dataclass(frozen=True)
class NoStepCache:
    """Every step is computed."""

    name: ClassVar[str] = NONE
    skips: ClassVar[str] = ""
    hooks_denoiser: ClassVar[bool] = False
    needs_equal_blocks: ClassVar[bool] = False
    models: str = field(default=INT8_MODEL, init=False)
    split: bool = field(default=False, init=False)
    num_calibration_prompts: ClassVar[int] = 0
    takes_two_denoisers: ClassVar[bool] = True

    def check_steps(self, num_steps: int) -> None:
        """Any number will do."""

    def put_on(self, denoiser: nn.Module, calls: CacheCalls) -> None:
        """There is nothing to put on."""

    def force(self) -> "NoStepCache":
        """There is nothing to force."""
        return self


def list_cache_settings(cache: StepCache) -> dict[str, Any]:
    """The settings of a cache that change what is generated, by name: not what is measured beside it."""
    names = [setting.name for setting in fields(cache) if setting.name not in MEASURED_BESIDE]
    return {name: getattr(cache, name) for name in names}


@contextmanager
def quiet_logger(name: str) -> Iterator[None]:
    """Keep a logger of a library from saying what is known, but for errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def check_computed_steps(described: str, num_computed: int, num_steps: int) -> None:
    """Raise ConfigError where a cache is told to compute all steps.

    Args:
        described: the settings that say so.
        num_computed: steps that are computed in any case.
        num_steps: of a call.
    """
    if num_computed >= num_steps:
        raise ConfigError(
            f"{described} computes {num_computed} steps in any case, of {num_steps}: nothing could be "
            "skipped; compute fewer of them, take more sampler.steps, or leave cache_steps out"
        )


def check_timesteps(name: str, limits: object) -> tuple[int, int]:
    """Two timesteps, the smaller first.

    Args:
        name: of the setting.
        limits: what it was set to.

    Raises:
        ConfigError: for anything else.
    """
    numbers = tuple(limits) if isinstance(limits, Sequence) and not isinstance(limits, str) else ()
    are_whole = all(isinstance(number, int) and not isinstance(number, bool) for number in numbers)
    if len(numbers) == 2 and are_whole and -1 <= numbers[0] < numbers[1] <= TIMESTEPS + 1:
        return numbers
    raise ConfigError(
        f"{name} is {limits!r}; give two whole numbers from -1 to {TIMESTEPS + 1}, the smaller first: "
        "between these timesteps steps are skipped"
    )
