"""Every error that a user can meet, each with the exit code that `int8run` ends with.

Imported by every other package, and imports none of them. Also holds the checks of single settings
(`check_range`, `check_bool`, `check_choice`), so that all of them are worded alike.
"""

import difflib
import errno
import unicodedata
from collections.abc import Collection, Iterable, Sequence

WRITE_ELSEWHERE = "write elsewhere: hydra.run.dir=FOLDER (of a sweep hydra.sweep.dir=FOLDER)"
# with one of these an operating system refuses to open or write a place that a setting may have named
REFUSED_ERRNOS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENXIO,  # a socket, or a device that is not there
    errno.ENODEV,
    errno.EBUSY,
    errno.EIO,
    errno.EFBIG,
    errno.EMFILE,
    errno.ENFILE,
)


class Int8RunError(Exception):
    """Base of all errors of int8run: one line that says what was wrong, what is allowed and what to do.

    Args:
        message: may hold a value of a setting, or names out of a stranger's file: their line breaks and other
            control characters are shown as escapes, so that the message stays one line and moves no terminal.
    """

    exit_code = 1

    def __init__(self, message: object = ""):
        super().__init__(escape_control_characters(str(message)))


class ConfigError(Int8RunError):
    """A setting that cannot work."""

    exit_code = 2


class FileError(Int8RunError):
    """A missing or damaged file."""

    exit_code = 3


class LoraError(FileError):
    """A LoRA that cannot be applied as asked."""


class SweepError(Int8RunError):
    """Some jobs of a sweep cannot run, or did not finish.

    Args:
        message: the only one with several lines: a line for each such job.
        exit_code: that of the jobs' own errors.
    """

    def __init__(self, message: str, exit_code: int):
        Exception.__init__(self, message)  # without escapes for its line breaks
        self.exit_code = exit_code


class BackendError(Int8RunError):
    """A device or backend that cannot run here."""

    exit_code = 4


class AuditError(Int8RunError):
    """An audited file with a worse grade than `task.min_grade` allows; all of it stands in audit.json."""

    exit_code = 5


class TrackingError(Int8RunError):
    """The store of the tracker does not answer. Whatever was to be logged is in the output folder."""


def escape_control_characters(text: str) -> str:
    """The text with each control character as Python would write it, such as `\\n` for a line break."""
    if text.isprintable():
        return text
    return "".join(repr(char)[1:-1] if unicodedata.category(char) == "Cc" else char for char in text)


def find_int8run_error(error: BaseException) -> Int8RunError | None:
    """Return the first Int8RunError in the chain of causes: hydra wraps what a class of ours raises."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, Int8RunError):
        cause = cause.__cause__
    return cause


def as_disk_full_error(error: BaseException, folder: object = "the output folder") -> FileError | None:
    """Return the message for a full disk if that is what `error` reports, else None.

    Libraries that write files report a full disk in classes of their own, some without an errno.

    Args:
        error: of any library.
        folder: where the file probably was, for an error that does not name it.
    """
    is_disk_full = getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)
    if not is_disk_full:
        return None
    file = getattr(error, "filename", None) or f"a file in {folder} or in the cache"
    return FileError(
        f"the disk is full, and {file} could not be written; free some room, or {WRITE_ELSEWHERE}, "
        "cache.folder=FOLDER"
    )


def as_not_writable_error(error: BaseException) -> FileError | None:
    """Return the message for a place that cannot be written if that is what `error` reports, else None."""
    if not isinstance(error, OSError) or error.errno not in REFUSED_ERRNOS or not error.filename:
        return None
    reason = str(error.strerror).lower()
    return FileError(
        f"{error.filename} cannot be opened or written: {reason}; check the path and who may use it, or "
        f"{WRITE_ELSEWHERE}"
    )


def check_range(name: str, value: float, low: float, high: float, *, whole: bool = False) -> None:
    """Check that a setting is a number in a range.

    Args:
        name: the setting, as on the command line.
        value: what it was set to.
        low: smallest allowed value.
        high: largest allowed value.
        whole: whether only whole numbers are allowed.

    Raises:
        ConfigError: when it is not.
    """
    number_type = int if whole else int | float
    # a bool is an int for Python
    is_number = isinstance(value, number_type) and not isinstance(value, bool)
    if is_number and low <= value <= high:
        return
    allowed = f"whole number from {low} to {high}" if whole else f"number from {low:g} to {high:g}"
    raise ConfigError(f"{name} is {value!r}; allowed is a {allowed}")


def check_bool(name: str, value: object) -> None:
    """Raise ConfigError unless `value` is a bool."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; choose true or false")


def check_texts(name: str, value: object, example: str) -> None:
    """Check that a setting is a list of texts, which may be empty.

    Args:
        name: the setting, as on the command line.
        value: what it was set to.
        example: an entry, for the message.

    Raises:
        ConfigError: when it is not.
    """
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [None]
    if not all(isinstance(item, str) and item for item in items):
        raise ConfigError(f"{name} is {value!r}; give a list of texts, such as [{example}]")


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`; a near miss gets a suggestion."""
    # a tuple also compares with lists and mappings, which a set or a dict cannot look up
    if value in tuple(allowed):
        return
    choices = ", ".join(sorted(allowed))
    raise ConfigError(f"{name} is {value!r}; {suggest_similar(str(value), allowed)}choose from {choices}")


def suggest_similar(name: str, known: Iterable[str]) -> str:
    """Return `did you mean 'x'? ` for a near miss, else an empty string."""
    near = find_similar(name, known)
    return f"did you mean {near!r}? " if near else ""


def suggest_setting(key: str, known: Iterable[str]) -> str:
    """Return `did you mean 'sampler.steps'? ` for a near miss among the settings beside it, else nothing.

    Args:
        key: dotted path that is not there.
        known: last words of the settings that are.
    """
    parent, dot, word = key.rpartition(".")
    near = find_similar(word, known)
    return f"did you mean '{parent}{dot}{near}'? " if near else ""


def find_similar(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that `name` may be a misspelling of; None where none is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return matches[0] if matches else None
