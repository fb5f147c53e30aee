"""What a path can be: each makes one in a folder and returns it. `paths.py` tries them in every setting."""

import os
import socket
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "int8run"
SHIPPED_LORA = PACKAGE / "assets" / "lora" / "ink.safetensors"


def make_fifo(folder: Path) -> str:
    """A pipe to which nobody writes."""
    path = folder / "fifo.safetensors"
    os.mkfifo(path)
    return str(path)


def make_socket(folder: Path) -> str:
    """A socket on which nobody listens."""
    path = folder / "socket.safetensors"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    return str(path)


def make_unreadable_file(folder: Path) -> str:
    """A file that only its owner, another one, may read."""
    path = folder / "unreadable.safetensors"
    path.write_bytes(SHIPPED_LORA.read_bytes())
    path.chmod(0)
    return str(path)


def make_unreadable_folder(folder: Path) -> str:
    """A folder that may not be entered."""
    path = folder / "unreadable"
    path.mkdir()
    (path / "model_index.json").write_text("{}")
    path.chmod(0)
    return str(path)


def make_in_unreadable_folder(folder: Path) -> str:
    """A file in a folder that may not be entered."""
    return f"{make_unreadable_folder(folder)}/a.safetensors"


def make_read_only_folder(folder: Path) -> str:
    """A folder in which nothing can be made."""
    path = folder / "read-only"
    path.mkdir()
    path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    return str(path)


def make_in_read_only_folder(folder: Path) -> str:
    """A file in a folder in which nothing can be made."""
    return f"{make_read_only_folder(folder)}/a.safetensors"


def make_empty_folder(folder: Path) -> str:
    """A folder with nothing in it."""
    path = folder / "empty"
    path.mkdir()
    return str(path)


def make_folder_like_a_file(folder: Path) -> str:
    """A folder that is called as a file is."""
    path = folder / "folder.safetensors"
    path.mkdir()
    return str(path)


def make_empty_file(folder: Path) -> str:
    """A file of no bytes."""
    path = folder / "empty.safetensors"
    path.touch()
    return str(path)


def make_plain_file(folder: Path) -> str:
    """A file without a suffix, of random text."""
    path = folder / "plain"
    path.write_text("not what it should be\n")
    return str(path)


def make_inside_file(folder: Path) -> str:
    """A path through a file."""
    return f"{make_plain_file(folder)}/a.safetensors"


def make_file_with_slash(folder: Path) -> str:
    """A file, with a slash at its end."""
    return f"{make_empty_file(folder)}/"


def make_dangling_link(folder: Path) -> str:
    """A link to what is not there."""
    path = folder / "dangling.safetensors"
    path.symlink_to(folder / "gone" / "a.safetensors")
    return str(path)


def make_link_loop(folder: Path) -> str:
    """A link to itself."""
    path = folder / "loop.safetensors"
    path.symlink_to(path)
    return str(path)


def make_in_link_loop(folder: Path) -> str:
    """A path through a link to itself."""
    return f"{make_link_loop(folder)}/a.safetensors"


KINDS: Mapping[str, Callable[[Path], str]] = {
    "absent": lambda folder: f"{folder}/no/such",
    "absent file": lambda folder: f"{folder}/no/such.safetensors",
    "300 letters": lambda folder: f"{folder}/{'a' * 300}",
    "300 letters, file": lambda folder: f"{folder}/{'a' * 300}.safetensors",
    "300 letters alone": lambda folder: "a" * 300,
    "5000 letters": lambda folder: f"{folder}/{'a/' * 2500}a.safetensors",
    "pipe": make_fifo,
    "socket": make_socket,
    "unreadable file": make_unreadable_file,
    "unreadable folder": make_unreadable_folder,
    "in an unreadable folder": make_in_unreadable_folder,
    "read-only folder": make_read_only_folder,
    "in a read-only folder": make_in_read_only_folder,
    "empty folder": make_empty_folder,
    "folder like a file": make_folder_like_a_file,
    "empty file": make_empty_file,
    "plain file": make_plain_file,
    "inside a file": make_inside_file,
    "file with a slash": make_file_with_slash,
    "dangling link": make_dangling_link,
    "link loop": make_link_loop,
    "in a link loop": make_in_link_loop,
    "/dev/null": lambda folder: "/dev/null",
    "/dev/zero": lambda folder: "/dev/zero",
    "/dev/full": lambda folder: "/dev/full",
    "/proc/self/mem": lambda folder: "/proc/self/mem",
    "in /proc": lambda folder: "/proc/self/a.safetensors",
    "NUL": lambda folder: f"{folder}/a\0b.safetensors",
    "not UTF-8": lambda folder: f"{folder}/a\udcff.safetensors",
    "half a letter": lambda folder: f"{folder}/a\ud800.safetensors",
    "line break": lambda folder: f"{folder}/a\nb.safetensors",
    "~unknown": lambda folder: "~nobody_of_this_name/a.safetensors",
    "~unknown alone": lambda folder: "~nobody_of_this_name",
    "empty": lambda folder: "",
    "dot": lambda folder: ".",
    "root": lambda folder: "/",
    "spaces": lambda folder: "   ",
}
