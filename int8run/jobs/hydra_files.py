"""What hydra itself writes into an output folder: `.hydra/*.yaml` and `multirun.yaml`, without passwords.

Hydra writes a job's settings and overrides as they were typed, before the job starts, and has no setting for
what is left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra.core import utils as hydra_utils
from omegaconf import OmegaConf

from int8run.tracking.secrets import mask_secret_settings


def mask_config(config: Any) -> Any:
    """A config of omegaconf as it may be kept: references stay references, passwords are masked."""
    return OmegaConf.create(
        mask_secret_settings(OmegaConf.to_container(config, resolve=False, enum_to_str=True))
    )


@contextmanager
def masked_hydra_files() -> Iterator[None]:
    """Let hydra write its files without passwords."""
    save_config = hydra_utils._save_config

    def save_masked_config(config: Any, filename: str, output_dir: Path) -> None:
        save_config(mask_config(config), filename, output_dir)

    hydra_utils._save_config = save_masked_config
    try:
        yield
    finally:
        hydra_utils._save_config = save_config
