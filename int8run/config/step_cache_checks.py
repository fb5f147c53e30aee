"""Settings that do not go together with a step cache; `RunSpec` asks before anything is loaded."""

from int8run.cache_steps.base import ATTENTION, BOTH_MODELS, StepCache
from int8run.config.run_modes import REDUCE_OVERHEAD
from int8run.errors import ConfigError
from int8run.models.sampling import Sampling

# of a denoiser that is compiled as a whole, hooks between its blocks are a part
WHOLE_MODES = ("full", REDUCE_OVERHEAD)


def check_step_cache(
    cache: StepCache,
    sampling: Sampling,
    *,
    has_int8: bool,
    baseline: str,
    compile_mode: str,
    offload: str,
) -> None:
    """Check a step cache beside the settings of a run.

    Args:
        cache: is one, and not `none`.
        sampling: of the run.
        has_int8: whether there is an INT8 model.
        baseline: `metrics.baseline`.
        compile_mode: `compile`.
        offload: of the run.

    Raises:
        ConfigError: where they cannot work together.
    """
    option = f"cache_steps={cache.name}"
    if not has_int8:
        raise ConfigError(
            f"{option} is put on the INT8 model, and int8.enable=false makes none; "
            f"cache_steps.models={BOTH_MODELS} measures the float model with it beside the INT8 one"
        )
    if cache.models == BOTH_MODELS and baseline != "run":
        raise ConfigError(
            f"cache_steps.models={BOTH_MODELS} generates with the float model once more, and "
            f"metrics.baseline={baseline} does not keep it; set metrics.baseline=run, or "
            "cache_steps.models=int8"
        )
    if compile_mode in WHOLE_MODES:
        raise ConfigError(
            f"{option} decides between blocks what is computed, and compile={compile_mode} makes one "
            "graph of all; set compile=blocks or none"
        )
    if compile_mode != "none" and cache.skips == ATTENTION:
        raise ConfigError(
            f"{option} decides inside each block what is computed, which compile={compile_mode} would "
            "compile anew in each step; set compile=none, or a cache of whole blocks, such as "
            "cache_steps=first_block"
        )
    if offload == "model" and cache.hooks_denoiser:
        raise ConfigError(
            f"{option} has a hook on the whole denoiser, which offload=model replaces after each call; set "
            "offload=group or none, or another cache"
        )
    if sampling.steps is not None:
        cache.check_steps(sampling.steps)
