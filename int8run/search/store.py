"""search.json: what a search is and its trials, so that another start goes on with it.

The runs in the trials' folders are the truth of how they ended; this file says which recipe each has, what
was predicted and what was measured.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from int8run.errors import ConfigError, FileError
from int8run.report.run_files import write_json
from int8run.search.trials import Trial

SCHEMA = 1
MAX_DIFFERENCES = 5  # that a message lists


@dataclass(frozen=True)
class SearchIdentity:
    """What must be the same where a search goes on.

    Args:
        command: overrides of the command that may not change.
        space: as `SearchSpace.to_json` describes it.
        settings: of the base recipe and of how trials are judged, flat.
    """

    command: Sequence[str]
    space: Mapping[str, Any]
    settings: Mapping[str, str]


def read_trials(path: Path, identity: SearchIdentity) -> list[Trial]:
    """The trials of an earlier start; none where there was none.

    Args:
        path: of search.json.
        identity: of the search that goes on.

    Raises:
        ConfigError: the file is of another search; names what differs.
        FileError: it is damaged, or of another version.
    """
    if not path.exists():
        return []
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        schema = facts["schema"]
        trials = [Trial.from_json(trial) for trial in facts["trials"]] if schema == SCHEMA else []
        space, settings = dict(facts["space"]), dict(facts["settings"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"{path} is damaged: {error!r}; begin anew in another folder: hydra.run.dir=FOLDER"
        ) from error
    if schema != SCHEMA:
        raise FileError(f"{path} has schema {schema}, and this version of int8run reads {SCHEMA}")
    differences = list_differences("task.space.", space, json.loads(json.dumps(identity.space)))
    differences += list_differences("", settings, identity.settings)
    if differences:
        shown = "; ".join(differences[:MAX_DIFFERENCES])
        more = len(differences) - MAX_DIFFERENCES
        if more > 0:
            shown += f"; and {more} more"
        raise ConfigError(
            f"{path.parent} holds another search: {shown}. Give the same settings, or "
            "another folder: hydra.run.dir=FOLDER"
        )
    return trials


def list_differences(prefix: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two mappings, one text for each key."""
    differences = []
    for key in dict.fromkeys([*earlier, *now]):
        if earlier.get(key) != now.get(key):
            there, here = describe(earlier.get(key)), describe(now.get(key))
            differences.append(f"{prefix}{key} is {there} there and {here} here")
    return differences


def describe(value: object) -> str:
    """A value in a message; of a whole ingredient its choices alone."""
    if value is None:
        return "missing"
    if isinstance(value, Mapping) and "choices" in value:
        return f"[{', '.join(value['choices'])}]"
    return str(value)


def write_search(
    path: Path, identity: SearchIdentity, trials: Sequence[Trial], facts: Mapping[str, Any]
) -> None:
    """Write search.json whole or not at all.

    Args:
        path: of the file.
        identity: of the search.
        trials: so far.
        facts: what else is known: the goal, and at the end what was found.
    """
    write_json(
        {
            "schema": SCHEMA,
            "command": list(identity.command),
            **facts,
            "space": identity.space,
            "settings": identity.settings,
            "trials": [trial.to_json() for trial in trials],
        },
        path,
    )
