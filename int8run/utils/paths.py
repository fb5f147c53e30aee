"""Paths as settings name them, and the folder of the user in which things are kept for the next run.

Python raises four unrelated errors for a text that can be no path. Here all of them are one FileError.
"""

import errno
import os
import stat
import tempfile
from pathlib import Path

from int8run.errors import FileError

CACHE_NAME = "int8run"
ASSETS_FOLDER = Path(__file__).parents[1] / "assets"
SHIPPED_PREFIX = "shipped:"  # what is inside this package: `shipped:tiny`
SAFETENSORS = ".safetensors"  # the suffix of checkpoints and LoRAs
GGUF = ".gguf"  # of checkpoints of ComfyUI-GGUF and llama.cpp, which are read and not written
# reading from one of these may never end
SPECIAL_FILES = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def expand_path(location: str | Path) -> Path:
    """Make a path of a text, with `~` and `~name` replaced by the folder of that user.

    Raises:
        FileError: for a user without a folder, and for a text that no file can be called.
    """
    text = str(location)
    check_path(text)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # pathlib's, for a user that is not known
        user = Path(text).parts[0]
        raise FileError(
            f"{text}: no home folder is known for {user}; write the path out, or ./{text} for a file here"
        ) from error


def to_local_path(location: str) -> Path:
    """Make a path of a text that may name something inside this package; it need not exist.

    Raises:
        FileError: as `expand_path`.
    """
    if location.startswith(SHIPPED_PREFIX):
        return ASSETS_FOLDER / location.removeprefix(SHIPPED_PREFIX)
    return expand_path(location)


def check_path(location: str | Path) -> None:
    """Raise FileError for a text that no file can be called."""
    text = str(location)
    if "\0" in text:
        raise FileError(f"{text} can be no path: it has a NUL character; leave that out")
    try:
        os.fsencode(text)
    except UnicodeEncodeError as error:
        letter = text[error.start]
        raise FileError(f"{text} can be no path: {letter} is half of a character; leave that out") from error


def check_readable(setting: str, path: Path, *, takes_folder: bool = True) -> None:
    """Check that a path names something that can be read.

    Args:
        setting: that names it, for the message.
        path: to check.
        takes_folder: whether it may be a folder.

    Raises:
        FileError: it is missing, is no file, or may not be read.
    """
    named = f"{setting}={path}"
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise FileError(f"{named}: no such file (looked for {path.absolute()})") from None
    except OSError as error:
        raise FileError(f"{named} cannot be looked for: {error.strerror or error}") from error
    is_folder = stat.S_ISDIR(mode)
    if is_folder and not takes_folder:
        raise FileError(f"{named} is a folder; name a file in it")
    if not stat.S_ISREG(mode) and not is_folder:
        raise FileError(f"{named} is {name_special_file(mode)}, and neither a file nor a folder")
    needed = os.R_OK
    if is_folder:
        needed |= os.X_OK  # to enter it
    if not os.access(path, needed):
        raise FileError(
            f"{named} cannot be read: permission denied; let your user read it (chmod u+rX, chown)"
        )


def check_replaceable(path: Path) -> None:
    """Check that nothing but a file is at a path, before a new file is moved there.

    A move puts a file in the place of a device or a pipe, too: root would take `/dev/null` from everybody.

    Raises:
        OSError: something else is there, or the path cannot be looked for.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, f"it is {name_special_file(mode)}, which a file would replace")


def name_special_file(mode: int) -> str:
    """What a path leads to that is neither a file nor a folder: `a pipe`."""
    for is_kind, name in SPECIAL_FILES:
        if is_kind(mode):
            return name
    return "something else"


def get_cache_folder() -> Path:
    """Return `~/.cache/int8run`; in a container whose user has no home, a private folder beside the
    temporary files.

    Raises:
        FileError: when that folder belongs to somebody else, who could put a library of theirs into it.
    """
    try:
        return Path.home() / ".cache" / CACHE_NAME
    except RuntimeError:  # pathlib's: no HOME, and the system does not know the user
        return make_private_folder(Path(tempfile.gettempdir()) / f"{CACHE_NAME}-{os.getuid()}")


def make_private_folder(folder: Path) -> Path:
    """Make a folder that nobody else can write to, unless it is there.

    Raises:
        FileError: when it is there and is not private, or cannot be made.
    """
    advice = "set HOME to a folder of yours"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise FileError(f"{folder} cannot be made: {error.strerror or error}; {advice}") from error
    is_open_to_others = bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or is_open_to_others:
        raise FileError(f"{folder} is not a folder of yours alone; remove it, or {advice}")
    return folder
