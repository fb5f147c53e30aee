"""The place of `save=`, tried before the work whose result it will hold.

Called by the tasks that write a checkpoint.
"""

from pathlib import Path
from tempfile import TemporaryFile

from int8run.errors import FileError
from int8run.utils.paths import check_replaceable, expand_path


def prepare_output_path(location: str) -> Path:
    """Create the folder of a file that will be written, and check that it can be written to.

    Args:
        location: of the file; without a suffix, of a folder that is created itself.

    Returns:
        The absolute path.

    Raises:
        FileError: when it cannot be written to.
    """
    path = expand_path(location).absolute()
    try:
        if path.suffix:
            check_replaceable(path)
        folder = path.parent if path.suffix else path
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise make_save_error(location, error) from error
    return path


def make_save_error(location: str, error: Exception) -> FileError:
    """The error for a place that cannot be written to."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FileError(f"save={location} cannot be written: {reason}; choose a folder that you may write to")
