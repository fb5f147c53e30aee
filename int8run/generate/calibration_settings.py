"""Settings of the calibration: what the float model generates for it, and how many activations are kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from int8run.errors import ConfigError, check_range
from int8run.generate.prompts import Sample, check_prompts
from int8run.generate.sample_inputs import NO_INPUTS, SampleInputs


@dataclass(frozen=True)
class CalibrationSettings:
    """What the float model generates to observe its activations.

    Prompts and noise differ from those that a result is judged by.

    Args:
        prompts: one image each.
        seed: of the first image; each following image has the next one.
        num_timesteps: denoiser calls of each image that are observed, spread evenly over its steps.
        max_tokens_per_layer: input tokens of each layer that are kept, over all images and timesteps.
        inputs: what the samples of the run bring, which the images take in turn; no setting.
    """

    prompts: Sequence[str]
    seed: int = 1000
    num_timesteps: int = 4
    max_tokens_per_layer: int = 2048
    inputs: Sequence[SampleInputs] = ()

    def __post_init__(self) -> None:
        check_prompts("calibration.prompts", self.prompts)
        if not self.prompts or not all(prompt.strip() for prompt in self.prompts):
            raise ConfigError(
                f"calibration.prompts is {list(self.prompts)!r}; it takes a list with at least one prompt, "
                "and none may be blank: calibration.prompts=[a fox,an owl]"
            )
        check_range("calibration.seed", self.seed, 0, 2**63 - 1, whole=True)
        check_range("calibration.num_timesteps", self.num_timesteps, 1, 1000, whole=True)
        check_range("calibration.max_tokens_per_layer", self.max_tokens_per_layer, 1, 2**20, whole=True)

    @property
    def samples(self) -> list[Sample]:
        """Prompt, seed and inputs of each image."""
        samples = []
        for number, prompt in enumerate(self.prompts):
            inputs = self.inputs[number % len(self.inputs)] if self.inputs else NO_INPUTS
            samples.append(Sample(prompt, self.seed + number, str(number), inputs=inputs))
        return samples

    def with_inputs(self, samples: Sequence[Sample]) -> "CalibrationSettings":
        """These settings for a pipeline that begins with images: with those of a run's samples."""
        inputs: list[SampleInputs] = []
        for sample in samples:
            if not sample.inputs.is_empty and sample.inputs not in inputs:
                inputs.append(sample.inputs)
            if len(inputs) == len(self.prompts):
                break
        return replace(self, inputs=tuple(inputs))
