"""What one run is: every setting, checked, as one frozen object."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from int8run.backends.base import Backend
from int8run.config.job import Job
from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.prompts import PromptSet
from int8run.layers.plan import Int8Settings
from int8run.lora.config import LoraSettings
from int8run.metrics.settings import MetricsSettings
from int8run.models.family import AutoFamily, ModelFamily, ModelSource
from int8run.models.sampling import SCHEDULE_ARGUMENTS, Sampling
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.quant.rounding import Rounding
from int8run.text_encoders.base import TextEncoders
from int8run.tracking.base import Tracker
from int8run.utils.disk_cache import DiskCache

SAFETENSORS = ".safetensors"


class Task(Protocol):
    """What a command does with its settings. A recorded one leaves status.json in its output folder, a tracked one is logged, too."""

    recorded: ClassVar[bool]
    tracked: ClassVar[bool]

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
    outlier: OutlierMethod | AutoOutlier
    rounding: Rounding
    calibration: CalibrationSettings
    backend: Backend
    lora: LoraSettings
    clip: TextEncoders
    sampler: Sampling
    prompts: PromptSet
    metrics: MetricsSettings
    tracker: Tracker
    cache: DiskCache = field(default_factory=DiskCache)
    quality_db: float | None = None
    save: str | None = None
    lora_dir: str | None = None
    compile: str = "none"
    attention: str = "native"
    offload: str = "none"
    seed: int = 0
    device: str = "auto"
    progress: bool = True
    resume: bool = False
    sync: str | None = None

    def __post_init__(self) -> None:
        check_choice("compile", self.compile, ("none", "blocks", "full"))
        check_choice("offload", self.offload, ("none", "model", "group"))
        check_range("seed", self.seed, 0, 2**63 - 1, whole=True)
        check_bool("progress", self.progress)
        check_bool("resume", self.resume)
        automatic = self.model_type.mixed_precision == "auto"
        if self.quality_db is not None:
            check_range("quality_db", self.quality_db, 0, 200)
        if automatic != (self.quality_db is not None):
            raise ConfigError(
                "model_type.mixed_precision=auto keeps layers float until quality_db is met; set both, such as "
                "model_type.mixed_precision=auto quality_db=40, or neither"
            )
        if not self.int8.enable and (automatic or self.save is not None or self.int8.checkpoint is not None):
            raise ConfigError(
                "int8.enable=false makes no INT8 layer; quality_db, save and int8.checkpoint need some"
            )
        if self.save is not None and (
            not isinstance(self.save, str) or Path(self.save).suffix not in ("", SAFETENSORS)
        ):
            raise ConfigError(
                f"save={self.save} is neither a {SAFETENSORS} file nor a folder (a name without a suffix); nothing else is written"
            )
        if self.offload != "none" and self.metrics.baseline == "run" and self.has_comparison:
            raise ConfigError(
                f"offload={self.offload} moves one model, and metrics.baseline=run holds two; set metrics.baseline=cached (float first, "
                "then INT8) or none"
            )
        object.__setattr__(self, "lora", self.lora.resolve_for_base(self.model.lora_base, self.sampler.steps))
        self.lora.find_preset(self.model.lora_base)  # at most one

    @property
    def sampling(self) -> Sampling:
        """What was asked for, else what a few-step LoRA was made for, else the checkpoint's own."""
        made_for = self.lora.find_preset(self.model.lora_base, self.sampler.steps)
        default = self.model.sampling
        if made_for is not None:
            wanted = made_for.sampling
            if self.sampler.steps not in (
                None,
                wanted.steps,
            ):  # a list of noise levels is one of so many steps
                wanted = replace(
                    wanted,
                    extra={
                        name: value for name, value in wanted.extra.items() if name not in SCHEDULE_ARGUMENTS
                    },
                )
            default = wanted.with_defaults(default)
        return self.sampler.with_defaults(default)

    @property
    def candidate(self) -> str:
        """What is compared with the float model: `int8`, or with a float denoiser `clip`; `float` is the float model alone."""
        return "int8" if self.int8.enable else "clip" if self.clip.is_quantized else "float"

    @property
    def has_comparison(self) -> bool:
        """Whether there is anything to compare with the float model."""
        return self.candidate != "float"

    @property
    def needs_float_encoders(self) -> bool:
        """Whether the float text encoders are in memory: where no others are, for the float pictures, and for the calibration's."""
        return not self.clip.is_quantized or self.metrics.baseline == "run" or self.needs_calibration

    @property
    def needs_float(self) -> bool:
        """Whether the whole float denoiser is in memory."""
        return not self.int8.enable or self.metrics.baseline == "run" or self.needs_calibration

    @property
    def needs_calibration(self) -> bool:
        """Whether the float model draws the calibration pictures."""
        fitted = self.int8.checkpoint is None and (
            self.outlier.needs_calibration or self.rounding.needs_calibration
        )
        return self.int8.enable and (fitted or self.model_type.mixed_precision == "auto")

    @property
    def float_key(self) -> str:
        """The part of the config that decides what the float model draws, as text, without the prompts."""
        stack = self.lora
        loras = [(a.get_source(self.model.lora_base), a.components, a.schedule) for a in stack.adapters]
        strengths = (stack.strength, stack.text_strengths, stack.strict, self.lora_dir)
        return repr((self.model, self.sampling, loras, strengths, self.compile, self.attention, self.device))

    @property
    def build_key(self) -> str:
        """The part of the config that decides the built model, as text: equal keys, equal model."""
        stack = self.lora
        adapters = [(a.name, a.get_source(self.model.lora_base), a.components) for a in stack.adapters]
        # of the strengths, only baked ones and whether they change on the way decide what is built
        strengths = stack.strengths if stack.is_baked else stack.is_scheduled
        # only weights that are rounded at random have a seed: they all, or with auto those whose float weight is not there
        integers = self.int8.checkpoint is not None or not self.needs_float
        rounds = stack.adapters and (stack.mode == "stochastic" or (stack.mode == "auto" and integers))
        lora = (
            stack.mode,
            strengths,
            stack.strict,
            self.lora_dir,
            stack.max_overhead,
            self.seed if rounds else None,
            adapters,
        )
        sampling = self.sampling
        shape = (
            sampling.height,
            sampling.width,
            sampling.batch,
        )  # backend=auto measures with the rows that they give
        # calibration pictures are drawn with all of the sampler
        calibration = (self.calibration, sampling, self.quality_db) if self.needs_calibration else None
        parts = (
            self.needs_float,
            self.needs_float_encoders,
            self.model,
            self.model_type,
            self.int8,
            self.outlier,
            self.rounding,
            calibration,
            self.save,
            self.backend,
            lora,
            self.clip,
            self.compile,
            self.attention,
            self.offload,
            self.device,
            shape,
        )
        return repr(parts)
