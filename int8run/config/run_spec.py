"""What one run is: every setting, checked, as one frozen object.

compose.py makes a RunSpec from the composed YAML. Only jobs/, tasks/, pipeline/build.py with its half
pipeline/add_int8.py, and api.py see it whole; what they call takes the few settings that it uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

from int8run.backends.base import Backend
from int8run.cache_steps.base import BOTH_MODELS, NONE, NoStepCache, StepCache
from int8run.config.effects import BUILD, BUILD_AND_FLOAT, NOTHING, affects, make_settings_key
from int8run.config.job import Job
from int8run.config.plugins import check_plugin_names
from int8run.config.run_modes import OFFLOAD_MODES, REDUCE_OVERHEAD
from int8run.config.step_cache_checks import check_step_cache
from int8run.config.step_precision_checks import check_shared_steps
from int8run.errors import ConfigError, check_bool, check_choice, check_range
from int8run.generate.calibration_settings import CalibrationSettings
from int8run.generate.prompts import PromptSet
from int8run.layers.plan import AUTO, FLOAT, Int8Settings
from int8run.lora.config import LoraSettings
from int8run.metrics.settings import MetricsSettings
from int8run.models.family import AutoFamily, ModelFamily, ModelSource, list_family_names
from int8run.models.sampling import Sampling, drop_schedule
from int8run.outlier.auto import AutoOutlier
from int8run.outlier.base import OutlierMethod
from int8run.quant.formats import FORMATS
from int8run.quant.rounding import Rounding
from int8run.text_encoders.base import TextEncoders
from int8run.tracking.base import Tracker
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import SAFETENSORS

# keys of `int8` that make a part of the INT8 model INT8, and what each makes
INT8_PARTS = {"attention": "INT8 attention", "convolutions": "INT8 convolutions", "vae": "an INT8 VAE"}


class Task(Protocol):
    """What the command does with its settings: run, quantize, inspect, audit, bench, search or report.

    A recorded task leaves status.json in its output folder; a tracked one is also logged by the tracker. One
    that makes runs starts others beside itself: it goes on with `resume=true`, is no job of a sweep, and
    `quality_db` is the quality that it looks for. What a task ignores are groups and keys of the command line
    that change nothing in it.
    """

    recorded: ClassVar[bool]
    tracked: ClassVar[bool]
    makes_runs: ClassVar[bool]
    ignores: ClassVar[frozenset[str]]

    def check(self, spec: "RunSpec") -> None:
        """Refuse what can be refused before there is a folder for the task."""
        ...

    def execute(self, spec: "RunSpec", job: Job) -> float | None:
        """Do it. A number is handed to sweepers."""
        ...


# -- what of a setting counts where not all of it does ---------------------------------------------


def select_calibration_for_build(spec: "RunSpec") -> object:
    """The calibration, where something is fitted to it."""
    return spec.calibration if spec.needs_calibration else None


def select_sampling_for_build(spec: "RunSpec") -> object:
    """The size of a step, which `backend=auto` measures with; with a calibration all of the sampling."""
    sampling = spec.sampling
    if spec.needs_calibration:
        return sampling
    return (sampling.height, sampling.width, sampling.batch)


def select_int8_for_build(spec: "RunSpec") -> object:
    """All but who computes which step: that both denoisers are in memory is noted with the metrics.

    With a quality budget it counts, because the search measures with these steps.
    """
    if spec.quality_db is not None:
        return spec.int8
    return replace(spec.int8, steps=None)


def select_metrics_for_build(spec: "RunSpec") -> object:
    """Which float models a baseline holds in memory."""
    return (spec.needs_float_denoiser, spec.needs_float_encoders)


def select_lora_for_build(spec: "RunSpec") -> object:
    """The files and how they are applied. Strengths are set afterwards, unless they are baked in."""
    stack, lora_base = spec.lora, spec.model.lora_base
    adapters = [(a.name, a.get_source(lora_base), a.components) for a in stack.adapters]
    strengths = stack.strengths if stack.is_baked else stack.is_scheduled
    return (stack.mode, strengths, stack.strict, stack.max_overhead, adapters)


def select_lora_for_float(spec: "RunSpec") -> object:
    """The files and every strength: the float model generates with them."""
    stack, lora_base = spec.lora, spec.model.lora_base
    adapters = [(a.get_source(lora_base), a.components, a.schedule) for a in stack.adapters]
    return (stack.strength, stack.text_strengths, stack.strict, adapters)


def select_cache_for_build(spec: "RunSpec") -> object:
    """Whether compiled blocks have a cache around them."""
    return spec.has_step_cache and spec.compile != "none"


def select_seed_for_build(spec: "RunSpec") -> object:
    """The seed of LoRAs that are rounded at random: with `auto` only where layers have no float weight."""
    is_random = spec.lora.mode == "stochastic"
    if spec.lora.mode == "auto":
        is_random = spec.int8.checkpoint is not None or not spec.needs_float_denoiser
    return spec.seed if spec.lora.adapters and is_random else None


def select_sampling(spec: "RunSpec") -> object:
    """The sampling with all defaults filled in."""
    return spec.sampling


def adapt_schedule(sampling: Sampling, steps: int | None) -> Sampling:
    """A sampling without what holds for its own number of steps alone, where another number is asked for.

    Args:
        sampling: of a checkpoint or a few-step LoRA.
        steps: that are asked for; None: its own.
    """
    return sampling if steps in (None, sampling.steps) else drop_schedule(sampling)


# -- all settings ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunSpec:
    """One job. The fields are the groups and keys of the command line, in the words of `conf/`.

    Each field declares what it has an effect on; see effects.py.
    """

    task: Task = field(metadata=NOTHING)
    model: ModelSource = field(metadata=BUILD_AND_FLOAT)
    model_type: ModelFamily | AutoFamily = field(metadata=BUILD)
    int8: Int8Settings = field(metadata=affects(build=select_int8_for_build))
    outlier: OutlierMethod | AutoOutlier = field(metadata=BUILD)
    rounding: Rounding = field(metadata=BUILD)
    calibration: CalibrationSettings = field(metadata=affects(build=select_calibration_for_build))
    backend: Backend = field(metadata=BUILD)
    lora: LoraSettings = field(
        metadata=affects(build=select_lora_for_build, float_baseline=select_lora_for_float)
    )
    clip: TextEncoders = field(metadata=BUILD)
    sampler: Sampling = field(
        metadata=affects(build=select_sampling_for_build, float_baseline=select_sampling)
    )
    prompts: PromptSet = field(metadata=NOTHING)
    metrics: MetricsSettings = field(metadata=affects(build=select_metrics_for_build))
    tracker: Tracker = field(metadata=NOTHING)
    cache_steps: StepCache = field(
        default_factory=NoStepCache, metadata=affects(build=select_cache_for_build)
    )
    cache: DiskCache = field(default_factory=DiskCache, metadata=NOTHING)
    quality_db: float | None = field(default=None, metadata=BUILD)
    save: str | None = field(default=None, metadata=BUILD)
    lora_dir: str | None = field(default=None, metadata=BUILD_AND_FLOAT)
    compile: str = field(default="none", metadata=BUILD_AND_FLOAT)
    attention: str = field(default="native", metadata=BUILD_AND_FLOAT)
    offload: str = field(default="none", metadata=BUILD)
    seed: int = field(default=0, metadata=affects(build=select_seed_for_build))
    device: str = field(default="auto", metadata=BUILD_AND_FLOAT)
    progress: bool = field(default=True, metadata=NOTHING)
    resume: bool = field(default=False, metadata=NOTHING)
    sync: str | None = field(default=None, metadata=NOTHING)
    recipe: str | None = field(default=None, metadata=NOTHING)
    plugins: Sequence[str] = field(default=(), metadata=NOTHING)

    def __post_init__(self) -> None:
        check_choice("compile", self.compile, ("none", "blocks", "full", REDUCE_OVERHEAD))
        check_choice("offload", self.offload, OFFLOAD_MODES)
        check_choice("model.quant_format", self.model.quant_format, ("auto", *FORMATS))
        self.check_family()
        check_range("seed", self.seed, 0, 2**63 - 1, whole=True)
        check_bool("progress", self.progress)
        check_bool("resume", self.resume)
        check_plugin_names(self.plugins)
        self.check_quality_target()
        self.check_int8_is_enabled()
        self.check_save()
        self.check_negative_prompt()
        self.check_offload_combinations()
        resolved = self.lora.resolve_for_base(self.model.lora_base, self.sampler.steps)
        object.__setattr__(self, "lora", resolved)  # the class is frozen
        self.lora.find_preset(self.model.lora_base)  # raises where two LoRAs bring one
        if self.int8.attention is None:
            # a budget weighs what attention costs; without one a run would lose quality that nobody weighs
            has_budget = self.quality_db is not None and not self.task.makes_runs
            chosen = AUTO if has_budget else FLOAT
            object.__setattr__(self, "int8", replace(self.int8, attention=chosen))
        self.check_output_type()
        cache = self.cache_steps if self.has_step_cache else None
        check_shared_steps(self.int8, offload=self.offload, cache=cache)
        if self.has_step_cache:
            check_step_cache(
                self.cache_steps,
                self.sampling,
                has_int8=self.int8.enable,
                baseline=self.metrics.baseline,
                compile_mode=self.compile,
                offload=self.offload,
            )

    # -- settings that do not go together ----------------------------------------------------------

    def check_family(self) -> None:
        """Raise ConfigError where the model's family is neither one that ships nor one of the user's."""
        known = [*list_family_names()]
        if isinstance(self.model_type, AutoFamily):
            known += self.model_type.families or ()
        else:
            known.append(self.model_type.name)
        if self.model.family is not None:
            check_choice("model.family", self.model.family, known)

    def check_output_type(self) -> None:
        """Raise ConfigError where the pipeline would return something else than images."""
        output_type = self.sampling.extra.get("output_type", "pil")
        if output_type == "latent":
            raise ConfigError("sampler.extra.output_type=latent makes no images to compare; leave it out")
        check_choice("sampler.extra.output_type", output_type, ("pil",))

    def check_negative_prompt(self) -> None:
        """Raise ConfigError for a negative prompt in two places."""
        if self.prompts.negative_prompt is not None and "negative_prompt" in self.sampler.extra:
            raise ConfigError(
                "prompts.negative_prompt and sampler.extra.negative_prompt are the same thing; give "
                "prompts.negative_prompt alone"
            )

    def check_quality_target(self) -> None:
        """Raise ConfigError unless mixed precision and the quality to reach are set together."""
        if self.quality_db is not None:
            check_range("quality_db", self.quality_db, 0, 200)
        if self.task.makes_runs:  # it looks for that quality, by whatever means
            return
        self.int8.check_has_budget(has_budget=self.has_mixed_precision)
        if self.has_mixed_precision != (self.quality_db is not None):
            raise ConfigError(
                "model_type.mixed_precision=auto keeps layers float until quality_db is met; set both, such "
                "as model_type.mixed_precision=auto quality_db=40, or neither"
            )

    def check_int8_is_enabled(self) -> None:
        """Raise ConfigError where a setting needs INT8 layers and there are none."""
        if self.int8.enable:
            return
        if self.has_mixed_precision or self.save is not None or self.int8.checkpoint is not None:
            raise ConfigError(
                "int8.enable=false makes no INT8 layers; quality_db, save and int8.checkpoint need some"
            )
        for part, described in INT8_PARTS.items():
            choice = getattr(self.int8, part)
            if choice not in (FLOAT, None):
                raise ConfigError(
                    f"int8.enable=false and int8.{part}={choice} contradict each other; for {described} "
                    "alone set backend=float"
                )

    def check_save(self) -> None:
        """Raise ConfigError unless `save` is a file or folder that can be written."""
        if self.save is None:
            return
        if not isinstance(self.save, str) or Path(self.save).suffix not in ("", SAFETENSORS):
            raise ConfigError(
                f"save={self.save} is neither a {SAFETENSORS} file nor a folder (a name without a suffix); "
                "nothing else can be written"
            )

    def check_offload_combinations(self) -> None:
        """Raise ConfigError where offloading would have two models to move, or to move what may not move."""
        if self.offload != "none" and self.compile == REDUCE_OVERHEAD:
            raise ConfigError(
                f"compile={REDUCE_OVERHEAD} records where each tensor lies, and offload={self.offload} moves "
                "them; choose compile=blocks or full, or offload=none"
            )
        if self.offload != "none" and self.runs_both_models:
            raise ConfigError(
                f"offload={self.offload} moves one model to a GPU and back, metrics.baseline=run holds two; "
                "set offload=none where there is no GPU, else metrics.baseline=cached (float first, then "
                "INT8) or none"
            )

    # -- what follows from the settings ------------------------------------------------------------

    @property
    def sampling(self) -> Sampling:
        """The sampler's settings, else those a few-step LoRA was made for, else the checkpoint's own."""
        preset = self.lora.find_preset(self.model.lora_base, self.sampler.steps)
        if preset is None:
            return self.sampler.with_defaults(adapt_schedule(self.model.sampling, self.sampler.steps))
        few_steps = adapt_schedule(preset.sampling, self.sampler.steps)
        steps = self.sampler.steps or few_steps.steps
        default = few_steps.with_defaults(adapt_schedule(self.model.sampling, steps))
        return self.sampler.with_defaults(default)

    @property
    def candidate(self) -> str:
        """What is compared with the float model: `int8`, or `clip` with quantized text encoders alone.

        `float` where there is nothing but the float model.
        """
        if self.int8.enable:
            return "int8"
        return "clip" if self.clip.is_quantized else "float"

    @property
    def has_comparison(self) -> bool:
        """Whether there is anything to compare with the float model."""
        return self.candidate != "float"

    @property
    def runs_both_models(self) -> bool:
        """Whether the float model and the candidate are in memory together and generate in turn."""
        return self.metrics.baseline == "run" and self.has_comparison

    @property
    def saves_single_file(self) -> bool:
        """Whether `save=` writes one file; else it writes a folder, or nothing."""
        return self.save is not None and Path(self.save).suffix != ""

    @property
    def has_step_cache(self) -> bool:
        """Whether the INT8 model skips what it has computed in earlier steps."""
        return self.cache_steps.name != NONE

    @property
    def splits_loss(self) -> bool:
        """Whether the INT8 model generates without its step cache, too."""
        return self.has_step_cache and self.cache_steps.split and self.metrics.baseline != "none"

    @property
    def has_cached_float(self) -> bool:
        """Whether the float model generates with the step cache, too."""
        return self.has_step_cache and self.cache_steps.models == BOTH_MODELS

    @property
    def has_mixed_precision(self) -> bool:
        """Whether sensitive layers stay float until `quality_db` is met."""
        return self.model_type.mixed_precision == "auto"

    @property
    def needs_calibration(self) -> bool:
        """Whether the float model generates the calibration images."""
        if not self.int8.enable:
            return False
        is_fitted = self.outlier.needs_calibration or self.rounding.needs_calibration
        return self.has_mixed_precision or (is_fitted and self.int8.checkpoint is None)

    @property
    def uses_calibration_prompts(self) -> bool:
        """Whether INT8 images depend on `calibration`: layers are fitted to it, or a step cache is."""
        return self.needs_calibration or self.cache_steps.num_calibration_prompts > 0

    @property
    def needs_float_denoiser(self) -> bool:
        """Whether the whole float denoiser is in memory."""
        if not self.int8.enable or self.int8.has_float_steps:
            return True
        return self.metrics.baseline == "run" or self.needs_calibration

    @property
    def needs_float_encoders(self) -> bool:
        """Whether the float text encoders are in memory: for the float images, or for the calibration."""
        return not self.clip.is_quantized or self.metrics.baseline == "run" or self.needs_calibration

    @property
    def float_only(self) -> "RunSpec":
        """The same job with the float model alone."""
        return replace(
            self,
            int8=self.int8.turn_off(),
            clip=TextEncoders(),
            cache_steps=NoStepCache(),
            save=None,
            quality_db=None,
            model_type=replace(self.model_type, mixed_precision="none"),
            metrics=replace(self.metrics, baseline="none", perceptual=(), measures={}, noise_floor=False),
        )

    @property
    def build_key(self) -> str:
        """The settings that decide which model is built, as text: equal keys, equal model."""
        return make_settings_key(self, "build")

    @property
    def float_key(self) -> str:
        """The settings that decide what the float model generates, as text, without the prompts."""
        return make_settings_key(self, "float_baseline")
