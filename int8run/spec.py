"""What one run is: every setting, checked, as one frozen object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from int8run.backends.base import Backend
from int8run.errors import in_range, one_of, switch
from int8run.generate.prompts import PromptSet
from int8run.lora.stack import LoraStack
from int8run.metrics.base import Metrics
from int8run.models.family import AutoFamily, ModelFamily, ModelSource, Sampling
from int8run.outlier.base import OutlierMethod
from int8run.quantize import Int8Settings
from int8run.text_encoders.keep import KeepTextEncoders
from int8run.tracking.base import Tracker


@dataclass(frozen=True)
class Job:
    """Where a RunSpec came from: the words of the command line, for the record."""

    settings: Mapping[str, Any]  # the resolved config
    choices: Mapping[str, str]  # group -> option
    overrides: Sequence[str]
    sweep: str | None  # the sweep's folder, when the job is part of one
    output_dir: Path

    def params(self) -> dict[str, str]:
        """The settings that one compares between runs, flat: options by group, values by their key on the command line."""
        flat = dict(self.choices)
        flatten("", self.settings, flat)
        return flat

    @property
    def name(self) -> str:
        """What differs from the defaults, in the words of the command line."""
        return " ".join(self.overrides) or "defaults"


def flatten(prefix: str, value: object, into: dict[str, str]) -> None:
    """`{a: {b: 1}}` -> `a.b: 1`; targets, rules and long texts stay in config.yaml."""
    name = prefix.rstrip(".")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            flatten(f"{prefix}{key}.", inner, into)
    elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
        for index, inner in enumerate(value):
            flatten(f"{prefix}{index}.", inner, into)
    elif not name.endswith("_target_") and ".keep_float." not in prefix and len(str(value)) <= 250:
        into.setdefault(name, str(value))


class Task(Protocol):
    """What a command does with its settings."""

    def execute(self, spec: "RunSpec", job: Job) -> float | None:
        """Do it; a number is handed to sweepers."""
        ...


@dataclass(frozen=True)
class RunSpec:
    """One job. The fields are the groups and keys of the command line, in the words of `conf/`."""

    task: Task
    model: ModelSource
    model_type: ModelFamily | AutoFamily
    int8: Int8Settings
    outlier: OutlierMethod
    backend: Backend
    lora: LoraStack
    clip: KeepTextEncoders
    sampler: Sampling
    prompts: PromptSet
    metrics: Metrics
    tracker: Tracker
    compile: str = "none"
    attention: str = "native"
    seed: int = 0
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        one_of("compile", self.compile, ("none", "blocks", "full"))
        in_range("seed", self.seed, 0, 2**63 - 1, whole=True)
        switch("progress", self.progress)
        for adapter in self.lora.adapters:
            adapter.source(self.model.lora_base)  # every adapter must have one for this model

    @property
    def build_key(self) -> str:
        """The part of the config that decides the built model, as text: equal keys, equal model."""
        adapters = [(a.name, a.source(self.model.lora_base), a.strength if self.lora.bakes else None) for a in self.lora.adapters]
        lora = (self.lora.bakes, self.lora.strength if self.lora.bakes else None, self.lora.strict, adapters)
        shape = (self.sampler.height, self.sampler.width, self.sampler.batch)  # backend=auto measures with the rows that they give
        parts = (self.model, self.model_type, self.int8, self.outlier, self.backend, lora, self.clip, self.compile,
                 self.attention, self.device, shape)  # fmt: skip
        return repr(parts)
