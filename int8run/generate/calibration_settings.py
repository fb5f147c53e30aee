"""Which pictures a calibration draws, and how much of them is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.errors import ConfigError, check_range
from int8run.generate.prompts import Sample


@dataclass(frozen=True)
class CalibrationSettings:
    """What the float model draws to be looked at. Other prompts and noise than those a result is judged by.

    Args:
        prompts: one picture each.
        seed: of the first picture.
        num_timesteps: denoiser calls of each picture that are looked at, spread evenly over its steps.
        max_tokens_per_layer: input tokens of each layer that are kept, over all images and timesteps.
    """

    prompts: Sequence[str]
    seed: int = 1000
    num_timesteps: int = 4
    max_tokens_per_layer: int = 2048

    def __post_init__(self) -> None:
        listed = isinstance(self.prompts, Sequence) and not isinstance(self.prompts, str)
        if not listed or not self.prompts or not all(isinstance(p, str) and p.strip() for p in self.prompts):
            raise ConfigError(
                f"calibration.prompts is {self.prompts!r}; it takes a list with at least one prompt: calibration.prompts=[a fox,an owl]"
            )
        check_range("calibration.seed", self.seed, 0, 2**63 - 1, whole=True)
        check_range("calibration.num_timesteps", self.num_timesteps, 1, 1000, whole=True)
        check_range("calibration.max_tokens_per_layer", self.max_tokens_per_layer, 1, 2**20, whole=True)

    @property
    def samples(self) -> list[Sample]:
        """Prompt and seed of each picture."""
        return [Sample(prompt, self.seed + i, str(i)) for i, prompt in enumerate(self.prompts)]
