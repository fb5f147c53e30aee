"""Whether the step times of a run can be trusted: the run itself and the report ask this one function."""

from collections.abc import Mapping

from int8run.metrics.names import SCATTERS, STEPS_SKIPPED_SHARE

MAX_SPREAD = 2.0  # of the 90th percentile over the median; the messages say "twice"
SCATTER_NOTE = (
    "Step times scatter by more than twice: other work ran on the machine, so the speeds say little."
)


def has_scattered_times(metrics: Mapping[str, float]) -> bool:
    """Whether one step in ten took more than MAX_SPREAD times the median, as on a busy machine.

    Float counts as much as INT8: the ratio of both is as unreliable as either.

    Args:
        metrics: of a run, by their public names.
    """
    if metrics.get(SCATTERS):  # runs of earlier versions do not have it
        return True
    # skipped steps take less than the others, on a quiet machine, too
    models = ("float",) if STEPS_SKIPPED_SHARE in metrics else ("speed", "float")
    for model in models:
        median = metrics.get(f"{model}/step_ms_p50", 0)
        if metrics.get(f"{model}/step_ms_p90", 0) > MAX_SPREAD * median:
            return True
    return False
