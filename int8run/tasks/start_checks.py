"""Refuses what cannot be run on this machine, or not by this model, before anything is loaded.

`cli` calls this for a single job before its output folder is made, `tasks.run` for the jobs of a sweep. The
hub is not asked.
"""

from int8run.config.run_spec import RunSpec
from int8run.models.loader import pick_device
from int8run.models.source import check_known_pipeline
from int8run.pipeline.load import check_device
from int8run.pipeline.step_settings import select_load_settings


def check_start(spec: RunSpec) -> None:
    """Check the device, the backend and offloading on it, and the mode of a pipeline that is known.

    Raises:
        BackendError: for a device or a backend that cannot run here, or offloading where nothing can move.
        ConfigError: for a mode that the pipeline does not have.
    """
    check_device(select_load_settings(spec), pick_device(spec.device))
    check_known_pipeline(spec.model)
