"""Settings that do not go together with `int8.steps`; `RunSpec` asks before anything is loaded."""

from int8run.cache_steps.base import StepCache
from int8run.config.run_modes import GROUP_STREAM
from int8run.errors import ConfigError
from int8run.layers.plan import Int8Settings


def check_shared_steps(int8: Int8Settings, *, offload: str, cache: StepCache | None) -> None:
    """Check `int8.steps` beside the settings of a run.

    Args:
        int8: the settings with it.
        offload: of the run.
        cache: step cache of the run; None: it has none.

    Raises:
        ConfigError: where they cannot work together.
    """
    if int8.steps is None:
        return
    if not int8.enable:
        raise ConfigError(
            "int8.enable=false and int8.steps contradict each other: no step is INT8; set int8.steps=null"
        )
    if offload == GROUP_STREAM and int8.has_float_steps:
        raise ConfigError(
            f"offload={GROUP_STREAM} keeps a copy of every weight for the transfer, and the denoisers of "
            "int8.steps share some of them; choose offload=group or model"
        )
    if cache is not None and int8.has_float_steps:
        raise ConfigError(
            f"cache_steps={cache.name} reuses what the INT8 denoiser computed in the step before, which with "
            "int8.steps may have been another denoiser's; set int8.steps=null, or cache_steps=none"
        )
