"""Find the file of a LoRA: a path, a folder that PEFT wrote, a name in a folder, a shipped LoRA, or the hub.

`header_info` asks for the files of a stack, `LoraStack.add` for a single one. Nothing is opened here.
"""

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

from int8run.errors import FileError, LoraError
from int8run.lora.written_settings import ADAPTER_CONFIG, PEFT_FILE
from int8run.utils.paths import expand_path

SHIPPED_LORAS = Path(__file__).parents[1] / "assets" / "lora"
SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".pt", ".bin", ".ckpt", ".pth")
MAX_SOURCE_CHARS = 100
MAX_SHOWN_FILES = 3  # of a folder in which a name was not found
# what PEFT and diffusers call the one file of a folder
FOLDER_FILES = (PEFT_FILE, "pytorch_lora_weights.safetensors")


def find_lora(
    source: str,
    weight_name: str | None,
    folder: Path | None = None,
    *,
    folder_setting: str = "lora_dir=FOLDER",
) -> Path:
    """Find the file of a source. Names in a folder may leave `.safetensors` out.

    Args:
        source: a file, a folder with one LoRA (as PEFT and diffusers save them), a name in `folder`, the name
            of a shipped LoRA, or with `weight_name` a hub id.
        weight_name: the name of a file in a hub repository.
        folder: where names are looked up, before the shipped LoRAs.
        folder_setting: how the user sets `folder`, for messages.

    Raises:
        LoraError: when it is not found; the message has the path tried, the folders searched and the nearest
            names in them.
    """
    name = Path(weight_name or source)
    if name.suffix.lower() in PICKLE_SUFFIXES:
        raise LoraError(
            f"{name} is a pickled file, which can run code when opened; convert it to .safetensors first"
        )
    if weight_name is not None:
        return download_lora(source, weight_name)
    try:
        return find_local_lora(expand_path(source), folder, folder_setting)
    except LoraError:
        raise
    except (OSError, FileError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LoraError(f"LoRA {source[:MAX_SOURCE_CHARS]!r} cannot be looked for: {reason}") from error


def find_local_lora(path: Path, folder: Path | None, folder_setting: str) -> Path:
    """Find a LoRA on this machine, see `find_lora`.

    Raises:
        LoraError: when it is not found.
    """
    file_name = path if has_suffix(path) else Path(f"{path}{SUFFIX}")
    files_in_folders = [expand_path(home) / file_name for home in list_home_folders(path, folder)]
    for candidate in (path, *files_in_folders):
        if candidate.is_file():
            return candidate
    lora_folders = [path]
    if folder is not None and path.name and not path.is_absolute():
        lora_folders.append(expand_path(folder) / path)
    for place in lora_folders:
        found = find_in_lora_folder(place)
        if found is not None:
            return found

    message = describe_failed_search(path, [file.parent for file in files_in_folders])
    if is_bare_name(path) and folder is None:
        message += f"; {folder_setting} adds a folder of yours"
    if looks_like_hub_id(path):
        message += "; a repository on the hub needs weight_name as well"
    raise LoraError(message)


def find_lora_of_folder(folder: Path) -> Path | None:
    """The LoRA in a folder that PEFT or diffusers wrote; None: it has no file of such a name."""
    for name in FOLDER_FILES:
        file = folder / name
        if file.is_file():
            return file
    return None


def find_in_lora_folder(folder: Path) -> Path | None:
    """The LoRA in a folder that holds one, itself or in a folder of it; None: no such folder, or no LoRA.

    PEFT saves an adapter that is not called `default` into a folder of that name.

    Raises:
        LoraError: when it holds several, or a pickled one.
    """
    if not folder.is_dir():
        return None
    named = find_lora_of_folder(folder)
    if named is not None:
        return named
    files = [file for file in folder.glob(f"*{SUFFIX}") if file.is_file()]
    if not files:
        files = find_loras_of_subfolders(folder)
    if len(files) == 1:
        return files[0]
    if files:
        names = sorted(str(file.relative_to(folder)) for file in files)
        raise LoraError(
            f"{folder} is a folder with {len(files)} LoRAs; name one of them: {', '.join(names[:5])}"
        )
    if (folder / ADAPTER_CONFIG).is_file():
        raise LoraError(
            f"{folder} has {ADAPTER_CONFIG} and no {PEFT_FILE}; a pickled adapter_model.bin is not opened, "
            "as it can run code: save it with safe_serialization=True"
        )
    return None


def find_loras_of_subfolders(folder: Path) -> list[Path]:
    """The LoRAs that PEFT or diffusers wrote into the folders of a folder."""
    files = []
    for subfolder in folder.glob("*"):
        file = find_lora_of_folder(subfolder)
        if file is not None:
            files.append(file)
    return files


def get_default_name(source: str, weight_name: str | None = None) -> str:
    """What a LoRA is called that nobody named: like its file, or like its folder where that was given.

    A file whose name says only which program wrote it lends its folder's.

    Args:
        source: as `find_lora` takes it; it need not be there.
        weight_name: the name of a file in a hub repository.
    """
    path = Path(source)
    if weight_name is not None and Path(weight_name).name not in FOLDER_FILES:
        path = Path(weight_name)
    if path.name in FOLDER_FILES:
        path = path.parent
    if path.name in ("", ".."):
        path = Path(os.path.abspath(path))
    return (path.stem if has_suffix(path) else path.name) or source


def get_file_title(path: Path) -> str:
    """What messages call the file of a LoRA: with its folder, where all files of a program have one name."""
    if path.name in FOLDER_FILES and path.parent.name:
        return f"{path.parent.name}/{path.name}"
    return path.name


def download_lora(repository: str, weight_name: str) -> Path:
    """Download a file from the hub, or find it in the hub's cache; with PEFT's settings beside it.

    Raises:
        LoraError: with the first line of the hub's own message.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
    )

    try:
        path = Path(hf_hub_download(repository, weight_name))
        if path.name == PEFT_FILE:
            # they lie side by side in the hub's cache, too
            with suppress(RemoteEntryNotFoundError):
                hf_hub_download(repository, str(PurePosixPath(weight_name).with_name(ADAPTER_CONFIG)))
        return path
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise LoraError(
            f"LoRA {weight_name!r} of {repository!r} could not be downloaded from the hub: {reason}"
        ) from error


def has_suffix(path: Path) -> bool:
    """Whether a path ends in `.safetensors`."""
    return path.suffix.lower() == SUFFIX


def is_bare_name(path: Path) -> bool:
    """Whether a path is a name without a folder, as that of a shipped LoRA."""
    return path.parent == Path()


def list_home_folders(path: Path, folder: Path | None) -> list[Path]:
    """The folders that a relative path may be meant for, besides the working folder."""
    if path.is_absolute():
        return []
    homes = [] if folder is None else [folder]
    if is_bare_name(path):
        homes.append(SHIPPED_LORAS)
    return homes


def looks_like_hub_id(path: Path) -> bool:
    """Whether a path may be meant as `owner/repository`."""
    return not has_suffix(path) and not path.is_absolute() and len(path.parts) == 2


def describe_failed_search(path: Path, searched_homes: Sequence[Path]) -> str:
    """The message for a file that was not found: what was searched, and what is similar there."""
    searched = list(searched_homes)
    if has_suffix(path) or not is_bare_name(path):
        searched.insert(0, path.parent)
    # not Path.resolve, which raises for links that lead to themselves
    places = ", ".join(os.path.realpath(place) for place in searched)
    message = f"LoRA file not found: {path}; searched {places}"

    present: list[Path] = []
    for place in searched:
        if place.is_dir():
            present += place.glob(f"*{SUFFIX}")
    names = {file.name if has_suffix(path) else file.stem for file in present}
    if not names:
        return f"{message}; no .safetensors file there"
    nearest = difflib.get_close_matches(path.name, sorted(names), n=MAX_SHOWN_FILES)
    if nearest:
        return f"{message}; nearest there: {', '.join(nearest)}"
    shown = sorted(names)[:MAX_SHOWN_FILES]
    if len(shown) < len(names):
        shown.append("…")
    return f"{message}; there are {', '.join(shown)}"
