"""Asks the hub about a repository before anything of it is downloaded, and words what went wrong.

The libraries that download try again and again where there is no network, and say after half a minute what
was known at once. `source.py`, `resolve_weights.py` and the tasks call `check_repository` first.
"""

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import yaml

from int8run.errors import FileError
from int8run.utils.paths import SAFETENSORS
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
TIMEOUT_S = 10.0
MAX_REASON_LENGTH = 200
KNOWN_REPOSITORIES = Path(__file__).parent / "known_repositories.yaml"
BFLOAT16_BYTES = 2
UNKNOWN_SIZE = "its size is not known here"


@dataclass(frozen=True)
class KnownRepository:
    """What is known of a repository without asking the hub.

    Args:
        parameters_b: billions of parameters of everything that its pipeline loads.
        file_bytes: that one takes in its files; None: not known.
        gated: whether its terms must be accepted first.
        license: as its page calls it; None: not known here.
    """

    parameters_b: float
    file_bytes: int | None = None
    gated: bool = False
    license: str | None = None

    def describe_size(self) -> str:
        """`about 34 GB to download, about 34 GB of memory as bfloat16; gated: its terms must be accepted`."""
        memory = f"about {self.parameters_b * BFLOAT16_BYTES:.0f} GB of memory as bfloat16"
        if self.file_bytes is None:
            sizes = f"{memory}; how much is to download is not known here"
        else:
            sizes = f"about {self.parameters_b * self.file_bytes:.0f} GB to download, {memory}"
        return f"{sizes}; gated: its terms must be accepted on its page" if self.gated else sizes


@functools.cache
def read_known_repositories() -> Mapping[str, KnownRepository]:
    """Return what `known_repositories.yaml` says, by repository."""
    settings = yaml.safe_load(KNOWN_REPOSITORIES.read_text(encoding="utf-8"))
    return {repository: KnownRepository(**facts) for repository, facts in settings.items()}


def check_repository(repository: str, setting: str, revision: str | None = None) -> None:
    """Raise an error at once where a download cannot succeed; say how large it is where it can.

    A repository of which something is here already is not asked for: its files may be complete.

    Args:
        repository: `organization/name`.
        setting: what it was given as, such as `model.location`.
        revision: on the hub.

    Raises:
        FileError: without a network, for an unknown or private repository, and for a gated one without
            access.
    """
    from huggingface_hub import HfApi

    errors = list_hub_errors()
    if has_snapshot(repository, revision):
        return
    hub = HfApi()
    try:
        info = hub.model_info(repository, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        if info.gated:
            hub.auth_check(repository)
    except errors as error:
        raise make_access_error(repository, setting, error, revision) from error
    num_bytes = 0
    for file in info.siblings or ():
        if file.rfilename.endswith(SAFETENSORS):
            num_bytes += file.size or 0
    log.info("Downloading %s, whose weights are %.1f GB in all variants", repository, num_bytes / 1e9)


def list_hub_errors() -> tuple[type[Exception], ...]:
    """What a question to the hub raises: its own errors and those of the network."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # each version has another library for the network, whose errors these are made from
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    return (OSError, HFValidationError, *network_errors)


def has_snapshot(repository: str, revision: str | None) -> bool:
    """Whether files of a repository are in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(repository, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def make_access_error(
    repository: str, setting: str, error: Exception, revision: str | None = None
) -> FileError:
    """Return the error for a repository that the hub does not give, or was not asked for.

    Args:
        repository: `organization/name`.
        setting: what it was given as.
        error: of the hub, or of the network.
        revision: on the hub.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    given = f"{setting}={repository}"
    if isinstance(error, GatedRepoError):
        return FileError(
            f"{given} is gated: accept its terms at https://huggingface.co/{repository}, log "
            f"in with `hf auth login`, and start again; or set {setting} to a folder that you have"
        )
    if isinstance(error, RevisionNotFoundError):
        return FileError(f"{given} has no revision {revision!r} on the hub")
    if isinstance(error, RepositoryNotFoundError):
        return FileError(
            f"{given} is not on this machine, and the hub knows no repository of that name, "
            f"or it is private (`hf auth login`); set {setting} to a folder that you have"
        )
    if isinstance(error, HFValidationError):
        return FileError(
            f"{given} is not on this machine, and no repository of the hub can be called so; "
            f"set {setting} to a folder that you have, or to org/name"
        )
    known = read_known_repositories().get(repository)
    size = UNKNOWN_SIZE if known is None else known.describe_size()
    return FileError(
        f"{given} is not on this machine, and the hub cannot be reached "
        f"({describe_reason(error)}); set {setting} to a folder that you have, or fetch it where there "
        f"is a network: hf download {repository} ({size})"
    )


def make_download_error(location: str, setting: str, error: Exception) -> FileError:
    """Return the error for a location that is not here and whose download failed after it began."""
    return FileError(
        f"{setting}={location} is not on this machine and could not be downloaded "
        f"({describe_reason(error)}); set {setting} to a folder that you have, "
        "or log in where the model is gated: hf auth login"
    )


def download_dataset_file(repository: str, file: str, revision: str, licence: str) -> Path:
    """A file of a data set, from the hub's cache where it is there.

    Args:
        repository: `organization/name`.
        file: in it.
        revision: the commit.
        licence: as its publisher states it, for the message.

    Raises:
        FileError: when it is not here and cannot be downloaded, with the command that fetches it.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    # a ValueError: a file outside of the repository
    errors: tuple[type[Exception], ...] = (*list_hub_errors(), ValueError)
    download = partial(hf_hub_download, repository, file, revision=revision, repo_type="dataset")
    try:
        try:
            return Path(download(local_files_only=True))
        except LocalEntryNotFoundError:
            # else the download tries for half a minute where there is no network
            HfApi().dataset_info(repository, revision=revision, timeout=TIMEOUT_S)
            return Path(download())
    except errors as error:
        raise FileError(
            f"prompts.hub={repository} is not on this machine and could not be downloaded "
            f"({describe_reason(error)}); where there is a network (licence: {licence}): hf download "
            f"{repository} {file} --repo-type dataset --revision {revision}; or name a copy with "
            "prompts.path=FILE"
        ) from error


def describe_reason(error: Exception) -> str:
    """`OSError: no such host`, in one line."""
    return f"{type(error).__name__}: {shorten_error(error, MAX_REASON_LENGTH)}"
