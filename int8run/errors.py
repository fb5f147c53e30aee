"""Every error a user can meet, each with the exit code that `int8run` ends with."""

import difflib
import errno
from collections.abc import Collection, Iterable

WRITE_ELSEWHERE = "write elsewhere: hydra.run.dir=FOLDER (of a sweep hydra.sweep.dir=FOLDER)"
REFUSED_ERRNOS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


class Int8RunError(Exception):
    """Base of all errors of ours: one line that says what was wrong, what is allowed and what to do."""

    exit_code = 1


class ConfigError(Int8RunError):
    """A setting that cannot work."""

    exit_code = 2


class FileError(Int8RunError):
    """A missing or damaged file."""

    exit_code = 3


class LoraError(FileError):
    """A LoRA that cannot be applied as asked."""


class BackendError(Int8RunError):
    """A device or backend that cannot run here."""

    exit_code = 4


class TrackingError(Int8RunError):
    """The store of the tracker does not answer. Whatever was to be logged is in the output folder."""


def find_int8run_error(error: BaseException) -> Int8RunError | None:
    """The error of ours that another one was made of: hydra wraps what a class says of its settings."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Int8RunError):
        cause = cause.__cause__
    return cause


def as_disk_full_error(error: BaseException, folder: object = "the output folder") -> FileError | None:
    """The words for a full disk, if that is what an error says; libraries that write files say it in classes of their own.

    Args:
        folder: where it probably was, when the error does not say.
    """
    if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
        return None
    what = getattr(error, "filename", None) or f"a file in {folder} or in the cache"
    return FileError(
        f"the disk is full, and {what} could not be written; free some room, or {WRITE_ELSEWHERE}, cache.folder=FOLDER"
    )


def as_not_writable_error(error: BaseException) -> FileError | None:
    """The words for a place that the system refuses, if that is what an error says."""
    if not isinstance(error, OSError) or error.errno not in REFUSED_ERRNOS or not error.filename:
        return None
    return FileError(
        f"{error.filename} cannot be opened or written: {str(error.strerror).lower()}; {WRITE_ELSEWHERE}"
    )


def check_range(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    """Raise ConfigError unless `value` is a number in low..high, a whole one if asked."""
    kind = int if whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
        span = f"whole number from {low} to {high}" if whole else f"number from {low:g} to {high:g}"
        raise ConfigError(f"{name} is {value!r}; allowed is a {span}")


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; choose true or false")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(
            f"{name} is {value!r}; {suggest_similar(str(value), allowed)}choose from {', '.join(sorted(allowed))}"
        )


def suggest_similar(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` for a near miss, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""
