"""Asks the hub about a repository before anything of it is downloaded.

The libraries that download try again and again where there is no network, and say after half a minute what
was known at once. `source.py`, `resolve_weights.py` and the tasks call `check_repository` first.
"""

import logging

from int8run.errors import FileError
from int8run.utils.text import shorten_error

log = logging.getLogger(__name__)
TIMEOUT_S = 10.0
MAX_REASON_LENGTH = 200
SAFETENSORS = ".safetensors"


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
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if has_snapshot(repository, revision):
        return
    hub = HfApi()
    try:
        info = hub.model_info(repository, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
        if info.gated:
            hub.auth_check(repository)
    except GatedRepoError as error:
        raise FileError(
            f"{setting}={repository} is gated: accept its terms at https://huggingface.co/{repository}, log "
            f"in with `hf auth login`, and start again; or set {setting} to a folder that you have"
        ) from error
    except RevisionNotFoundError as error:
        raise FileError(f"{setting}={repository} has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise FileError(
            f"{setting}={repository} is not on this machine, and the hub knows no repository of that name, "
            f"or it is private (`hf auth login`); set {setting} to a folder that you have"
        ) from error
    except HFValidationError as error:
        raise FileError(
            f"{setting}={repository} is not on this machine, and no repository of the hub can be called so; "
            f"set {setting} to a folder that you have, or to org/name"
        ) from error
    except Exception as error:  # each library of the network has its own
        raise FileError(
            f"{setting}={repository} is not on this machine, and the hub cannot be reached "
            f"({describe_reason(error)}); set {setting} to a folder that you have, or fetch it where there "
            f"is a network: hf download {repository}"
        ) from error
    sizes = [file.size or 0 for file in info.siblings or () if file.rfilename.endswith(SAFETENSORS)]
    log.info("Downloading %s, whose weights are %.1f GB in all variants", repository, sum(sizes) / 1e9)


def has_snapshot(repository: str, revision: str | None) -> bool:
    """Whether files of a repository are in the hub's own cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(repository, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return False
    return True


def make_download_error(location: str, setting: str, error: Exception) -> FileError:
    """Return the error for a location that is not here and whose download failed."""
    return FileError(
        f"{setting}={location} is not on this machine and could not be downloaded "
        f"({describe_reason(error)}); set {setting} to a folder that you have, "
        "or log in where the model is gated: hf auth login"
    )


def describe_reason(error: Exception) -> str:
    """`OSError: no such host`, in one line."""
    return f"{type(error).__name__}: {shorten_error(error, MAX_REASON_LENGTH)}"
