"""Names the library that a pipeline needs and that is not installed or does not fit, from an error.

The loaders of pipelines ask when they read components, `generate.pipeline_call` when a pipeline is called.
diffusers and transformers import such a library where it is installed, and use it all the same.
"""

import ast
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import transformers

from int8run.errors import ConfigError
from int8run.utils.text import shorten_error

FOLDERS = (Path(diffusers.__file__).parent, Path(transformers.__file__).parent)
# how both say it themselves: `AutoVideoProcessor requires the Torchvision library but it was not found`
REQUIREMENT = re.compile(r"requires the (?P<library>.+?) library")
# the modules of the libraries that they name so; for others their own words say how they are installed
NAMED_LIBRARIES = {
    "accelerate": "accelerate",
    "Beautiful Soup": "bs4",
    "bitsandbytes": "bitsandbytes",
    "ftfy": "ftfy",
    "imageio": "imageio",
    "invisible-watermark": "imwatermark",
    "jinja": "jinja2",
    "librosa": "librosa",
    "mistral-common": "mistral_common",
    "NLTK": "nltk",
    "nltk": "nltk",
    "OpenCV": "cv2",
    "peft": "peft",
    "PIL": "PIL",
    "PyAv": "av",
    "PyTorch": "torch",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "SentencePiece": "sentencepiece",
    "sentencepiece": "sentencepiece",
    "soundfile": "soundfile",
    "timm": "timm",
    "torchaudio": "torchaudio",
    "TorchCodec": "torchcodec",
    "torchsde": "torchsde",
    "Torchvision": "torchvision",
    "transformers": "transformers",
}
# packages that are not called like the module that they hold
PACKAGES = {
    "PIL": "pillow",
    "bs4": "beautifulsoup4",
    "cv2": "opencv-python",
    "google": "protobuf",
    "imwatermark": "invisible-watermark",
    "mistral_common": "mistral-common",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
# what the source of a denoiser imports from a library that diffusers does without where it is missing
NEEDED_NAMES = {"CosmosTransformer3DModel": "transforms"}
# libraries that are built for one version of torch
BUILT_FOR_TORCH = ("torchvision", "torchaudio", "torchcodec")


def raise_if_library_is_missing(what: str, error: Exception) -> None:
    """Raise ConfigError for what cannot be imported; return for an error of another kind.

    Args:
        what: needs it, such as the name of a pipeline.
        error: that was raised by diffusers or transformers; where modules are read late, they raise an error
            of their own because of the one that counts.
    """
    cause = find_first_cause(error)
    if not isinstance(cause, ImportError | NameError):
        return
    frames = traceback.extract_tb(cause.__traceback__)
    if not frames or not is_in_library(Path(frames[-1].filename)):
        return
    library = find_missing_library(cause, Path(frames[-1].filename))
    if library is not None and not is_installed(library):
        raise_missing(what, library, error)
    if isinstance(cause, NameError):
        return
    reason = shorten_error(cause)
    if library is not None:
        raise ConfigError(
            f"{what} needs another version of the library {library} than the installed one: {reason}"
        ) from error
    raise ConfigError(f"{what} cannot import what it needs: {reason}") from error


def read_late_attribute(module: Any, name: str, what: str) -> Any:
    """Return an attribute of diffusers or transformers, which import it when it is asked for; None: none.

    Args:
        module: that has it.
        name: of the attribute.
        what: needs it.

    Raises:
        ConfigError: when a library that it needs is not installed or does not fit.
    """
    try:
        return getattr(module, name, None)
    except (ImportError, RuntimeError) as error:
        raise_if_library_is_missing(what, error)
        raise


def find_first_cause(error: BaseException) -> BaseException:
    """The error because of which another one was raised, or that one itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def is_installed(library: str) -> bool:
    """Whether a module can be imported from here; it is not."""
    return importlib.util.find_spec(library) is not None


def check_needed_library(denoiser: Any) -> None:
    """Check that the library of a denoiser is there, before weights are read.

    Args:
        denoiser: its class.

    Raises:
        ConfigError: with the library, when it is not installed.
    """
    name = NEEDED_NAMES.get(denoiser.__name__)
    module = sys.modules[denoiser.__module__]
    if name is None or hasattr(module, name):
        return
    library = find_imported_library(name, Path(str(module.__file__)))
    raise_missing(denoiser.__name__, library or name)


def raise_missing(what: str, library: str, error: Exception | None = None) -> NoReturn:
    """Raise ConfigError with the library and how it is installed."""
    package = PACKAGES.get(library, library)
    remedy = f"pip install {package}"
    if library in BUILT_FOR_TORCH:
        remedy += ", of the version and from the place that belong to your torch"
    raise ConfigError(f"{what} needs the library {library}, which is not installed; {remedy}") from error


def is_in_library(file: Path) -> bool:
    """Whether a source file is one of diffusers or transformers."""
    return any(folder in file.parents for folder in FOLDERS)


def find_missing_library(error: ImportError | NameError, file: Path) -> str | None:
    """The module of the library that an error is about; None where it does not show.

    Args:
        error: that was raised.
        file: the source file in which it was.
    """
    if isinstance(error, NameError):
        return find_imported_library(error.name or "", file)
    if error.name:
        return error.name.partition(".")[0]
    found = REQUIREMENT.search(str(error))
    return None if found is None else NAMED_LIBRARIES.get(found["library"])


def find_imported_library(name: str, file: Path) -> str | None:
    """The library from which a source file would have imported a name; None where it says nothing of it.

    Args:
        name: that is not defined there.
        file: the source.
    """
    for bound, module in iter_imports(ast.parse(file.read_text(encoding="utf-8"))):
        if bound == name:
            return module.partition(".")[0]
    return None


def iter_imports(source: ast.Module) -> Iterator[tuple[str, str]]:
    """What a source imports from other packages: the name that it gives it, and the module."""
    for node in ast.walk(source):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            for alias in node.names:
                yield alias.asname or alias.name, str(node.module)
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name
