"""Where the settings of a job came from, for the record."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.tracking.run_record import UNHASHED_SETTINGS
from int8run.tracking.secrets import mask_secrets
from int8run.tracking.setting_names import shorten_value, split_override


@dataclass(frozen=True)
class Job:
    """Where a RunSpec came from: the words of the command line, for the record."""

    settings: Mapping[str, Any]  # the resolved config
    choices: Mapping[str, str]  # group -> option
    overrides: Sequence[str]
    output_dir: Path
    sweep: str | None = None  # its identity, when the job is part of one
    number: int = 0  # in the sweep
    varying: Sequence[str] = ()  # keys that the sweep varies
    jobs_at_once: int = 1  # jobs of the sweep that share this machine

    def get_params(self) -> dict[str, str]:
        """The settings to compare between runs, flat: options by group, values by their key."""
        flat = dict(self.choices)
        for key, value in self.settings.items():
            if key not in UNHASHED_SETTINGS:
                flatten_settings(f"{key}.", value, flat)
        return flat

    @property
    def name(self) -> str:
        """The overrides that differ between the jobs of the sweep, else all overrides; without passwords."""
        differing = [word for word in self.overrides if split_override(word)[0] in self.varying]
        return mask_secrets(" ".join(differing or self.overrides)) or "defaults"


def flatten_settings(prefix: str, value: object, into: dict[str, str]) -> None:
    """`{a: {b: 1}}` -> `a.b: 1`. Targets stay in config.yaml; long values and rules are shortened."""
    name = prefix.rstrip(".")
    has_mappings = isinstance(value, list) and any(isinstance(entry, Mapping) for entry in value)
    # dozens of rules for a family: one param tells whether they differ
    is_rules = name.endswith(".ignore")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            flatten_settings(f"{prefix}{key}.", inner, into)
    elif isinstance(value, list) and has_mappings and not is_rules:
        for index, inner in enumerate(value):
            flatten_settings(f"{prefix}{index}.", inner, into)
    elif not name.endswith("_target_"):
        into.setdefault(name, shorten_value(mask_secrets(str(value))))
