"""What is odd about the values of a LoRA file, gathered module by module and told in one line each.

Nothing here is an error: such files load, and a user should know before waiting for an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from int8run.lora.adapters.change import LoraChange
from int8run.lora.adapters.dora import DoRA
from int8run.lora.adapters.oft import OFT, StackedRows
from int8run.lora.parse import AUXILIARY_PARTS
from int8run.utils.plurals import count_noun

# alpha / rank outside of this range is often a mistake
USUAL_SCALES = (0.05, 4.0)
# no training ends at larger values
LARGEST_USUAL_VALUE = 1e3
BIAS_PARTS = {"diff_b", "b_norm", "up_bias"}


@dataclass
class SanityChecks:
    """Modules with something odd, each with the number that is."""

    num_modules: int = 0
    without_effect: list[str] = field(default_factory=list)
    unusual_scales: list[tuple[str, float]] = field(default_factory=list)
    large_values: list[tuple[str, float]] = field(default_factory=list)

    def add(self, name: str, peaks: Mapping[str, float], change: LoraChange) -> None:
        """Look at one module.

        Args:
            name: of the module.
            peaks: the largest magnitude of each of its parts.
            change: what the parts make together.
        """
        self.num_modules += 1
        peaks = {part: peak for part, peak in peaks.items() if part not in AUXILIARY_PARTS}
        if not has_effect(peaks, change):
            self.without_effect.append(name)

        largest = max(peaks.values())
        if largest > LARGEST_USUAL_VALUE:
            self.large_values.append((name, largest))

        low, high = USUAL_SCALES
        delta = change.weight_delta
        if delta is not None and delta.rank is not None and not low <= delta.scale <= high:
            self.unusual_scales.append((name, delta.scale))

    def list_notes(self) -> tuple[str, ...]:
        """One line for each thing worth knowing."""
        notes = []
        if self.without_effect:
            notes.append(self.describe_modules_without_effect())
        if self.unusual_scales:
            name, scale = self.unusual_scales[0]
            low, high = USUAL_SCALES
            share = f"{len(self.unusual_scales)} of {self.num_modules} modules"
            notes.append(
                f"alpha / rank is {scale:g} in {name} (unusual in {share}); usual is {low:g} to {high:g}: "
                "the LoRA may need another strength"
            )
        if self.large_values:
            name, value = max(self.large_values, key=lambda entry: entry[1])
            share = f"{count_noun(len(self.large_values), 'module')} above {LARGEST_USUAL_VALUE:g}"
            notes.append(f"values up to {value:.3g} in {name} ({share}): the file may be damaged")
        return tuple(notes)

    def describe_modules_without_effect(self) -> str:
        """How many modules do nothing; a file of which all do nothing was never trained."""
        if len(self.without_effect) == self.num_modules:
            return (
                f"the LoRA has no effect (B = 0 in {self.num_modules}/{self.num_modules} modules): "
                "untrained or zero-initialised file"
            )
        count, first = len(self.without_effect), self.without_effect[0]
        return f"{count} of {self.num_modules} modules have no effect (B = 0; first: {first})"


def has_effect(peaks: Mapping[str, float], change: LoraChange) -> bool:
    """Whether a module changes anything: a product with a factor of zeros is zero."""
    if isinstance(change.weight_delta, DoRA):
        return True  # its norms change a weight even then
    if isinstance(change.weight_delta, OFT | StackedRows):
        return not change.weight_delta.is_identity
    changes_bias = any(peaks.get(part) for part in BIAS_PARTS)
    if changes_bias:
        return True
    factors = [peak for part, peak in peaks.items() if part not in BIAS_PARTS]
    return bool(factors) and all(factors)
