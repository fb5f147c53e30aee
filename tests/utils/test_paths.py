"""Texts that can be no path, and the user's cache where there is no home."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from int8run.errors import FileError
from int8run.utils import paths
from int8run.utils.disk_cache import DiskCache
from int8run.utils.paths import check_path, check_readable, check_replaceable, expand_path, get_cache_folder

IMPOSSIBLE = {
    "NUL": ("a\0b", "has a NUL character"),
    "half a letter": ("a\ud800b", "is half of a character"),
    "unknown user": ("~nobody_of_this_name/a", "no home folder is known for ~nobody_of_this_name"),
}


@pytest.mark.parametrize("kind", IMPOSSIBLE)
def test_a_text_that_can_be_no_path_is_refused(kind: str) -> None:
    text, words = IMPOSSIBLE[kind]

    with pytest.raises(FileError, match=words):
        expand_path(text)
    with pytest.raises(FileError, match=words):
        DiskCache(folder=text)


def test_home_is_put_in_the_place_of_a_tilde(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")

    assert expand_path("~/a.safetensors") == Path("/home/me/a.safetensors")
    assert expand_path("a/~/b") == Path("a/~/b")


def test_a_name_that_is_not_utf_8_is_a_path() -> None:
    """The operating system gives such names, with the bytes as halves of characters that stand for them."""
    check_path("a\udcff.safetensors")


# -- no home -----------------------------------------------------------------------------------------


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A container whose user is not known to it; returns its folder for temporary files."""

    def find_no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", find_no_home)
    monkeypatch.setattr(paths.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path


def test_without_a_home_the_cache_is_a_private_folder(homeless: Path) -> None:
    folder = get_cache_folder()

    assert folder.parent == homeless
    assert folder.stat().st_mode & 0o077 == 0
    assert get_cache_folder() == folder
    assert DiskCache().path == folder


@pytest.mark.parametrize("trap", ["a link", "open to others", "a file"])
def test_a_folder_that_others_made_is_refused(homeless: Path, trap: str) -> None:
    """Whoever can write into the cache decides what is loaded from it."""
    place = homeless / f"int8run-{os.getuid()}"
    if trap == "a link":
        place.symlink_to(homeless)
    elif trap == "a file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o777)

    with pytest.raises(FileError, match="set HOME to a folder of yours"):
        get_cache_folder()


# -- what cannot be read -----------------------------------------------------------------------------


def make_pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


def make_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def make_dangling(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link"


def make_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file"


def get_device(folder: Path) -> Path:
    """The device that is no place on a disk."""
    device = Path(os.devnull)
    if not device.is_char_device():
        pytest.skip(f"{device} is no device here")
    return device


UNREADABLE = {
    "pipe": (make_pipe, "clip.path=.*/pipe is a pipe, and neither a file nor a folder$"),
    "device": (get_device, "is a device, and neither a file nor a folder$"),
    "loop of links": (make_loop, "/loop cannot be looked for: "),
    "dangling link": (make_dangling, r"/link: no such file \(looked for "),
    "below a file": (lambda folder: make_file(folder) / "a", r"/file/a: no such file \(looked for "),
    "long name": (lambda folder: folder / ("a" * 300), "cannot be looked for: File name too long$"),
}


@pytest.mark.skipif(os.name != "posix", reason="other systems have no pipes and devices among their files")
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_said_with_its_setting(kind: str, tmp_path: Path) -> None:
    make, words = UNREADABLE[kind]

    with pytest.raises(FileError, match=words):
        check_readable("clip.path", make(tmp_path))


def test_what_may_not_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's answer is put in its place: root, who runs many tests, may read everything."""
    asked = []

    def refuse(path: Path, rights: int) -> bool:
        asked.append(rights)
        return False

    monkeypatch.setattr(paths.os, "access", refuse)
    for place in (tmp_path, make_file(tmp_path)):
        with pytest.raises(FileError, match="cannot be read: permission denied; let your user read it"):
            check_readable("clip.path", place)
    assert asked == [os.R_OK | os.X_OK, os.R_OK]


def test_a_folder_is_readable_where_one_may_be(tmp_path: Path) -> None:
    check_readable("clip.path", tmp_path)
    with pytest.raises(FileError, match=r"is a folder; name a file in it$"):
        check_readable("prompts.path", tmp_path, takes_folder=False)


# -- what a new file may not replace -----------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="other systems have no pipes and devices among their files")
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (make_pipe, "it is a pipe, which a file would replace"),
        (get_device, "it is a device, which a file would replace"),
        (lambda folder: folder, "it is a folder"),
        (make_loop, "Too many levels"),
    ],
    ids=["pipe", "device", "folder", "loop of links"],
)
def test_only_a_file_is_replaced(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    path = make(tmp_path)
    with pytest.raises(OSError, match=words):
        check_replaceable(path)


def test_a_file_and_a_free_place_are_written_to(tmp_path: Path) -> None:
    check_replaceable(make_file(tmp_path))
    check_replaceable(tmp_path / "free")
    check_replaceable(make_dangling(tmp_path))
