"""What a run is given besides its settings: samples, LoRA headers, and where images and progress go.

`tasks.run` makes a `RunInputs` before a model is loaded; everything that generates is given it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from int8run.config.run_spec import RunSpec
from int8run.generate.prompts import Sample, split_batches
from int8run.lora.header_info import LoraHeader, read_lora_headers
from int8run.report.console import Progress
from int8run.tasks.image_writer import ImageWriter
from int8run.utils.paths import expand_path


@dataclass(frozen=True)
class RunInputs:
    """What a run is given besides its settings.

    Args:
        headers: of the LoRA files, in the order of the stack.
        writer: saves the images, and has the samples.
        progress: shows the steps.
    """

    headers: Sequence[LoraHeader]
    writer: ImageWriter
    progress: Progress

    @property
    def samples(self) -> Sequence[Sample]:
        """All samples of the run, in order."""
        return self.writer.samples

    def get_first_batch(self, spec: RunSpec) -> Sequence[Sample]:
        """The samples of the pipeline's first call."""
        return split_batches(self.samples, spec.sampling.batch)[0]


def read_headers(spec: RunSpec) -> list[LoraHeader]:
    """Read the headers of the LoRA files, in the order of the stack."""
    lora_dir = None if spec.lora_dir is None else expand_path(spec.lora_dir)
    return read_lora_headers(spec.lora, spec.model.lora_base, lora_dir)
