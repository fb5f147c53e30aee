"""Weights of networks that metrics need: from a folder, the hub's cache or the hub, and what went wrong.

Called by the files in `metrics.measures`. Weights that cannot be had are an UnavailableError with one line.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar
from urllib.request import Request, urlopen

from int8run.errors import ConfigError
from int8run.metrics.base import UnavailableError

log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 10  # a server that takes longer counts as unreachable
# What downloading or reading weights raises: no network, a broken transfer, a wrong checksum, a damaged file.
LOADING_ERRORS = (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError, LookupError)
# And what a file raises in which something else is found than the weights that are looked for.
READING_ERRORS = (*LOADING_ERRORS, AttributeError, TypeError, ValueError)
Loaded = TypeVar("Loaded")
# The commits that metrics read by default, so that numbers stay what they are. CLIP at 336 px has none,
# as it is read as safetensors: where a repository has none, transformers converts its newest commit alone.
PINNED_REVISIONS: Mapping[str, str] = {
    "THUDM/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
    "facebook/dino-vitb16": "f205d5d8e640a89a2b8ef0369670dfc37cc07fc2",
    "google-bert/bert-base-uncased": "86b5e0934494bd15c9632b12f734a8a67f723594",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "1c2b8495b28150b8a4922ee1c8edee224c284c0c",
    "openai/clip-vit-large-patch14": "32bd64288804d66eefd0ccbe215aa642df71cc41",
    "trl-lib/ddpo-aesthetic-predictor": "cf4bd10345610935a80a5d3be9a3133c50f121e4",
    "xswu/HPSv2": "697403c78157020a1ae59d23f111aa58ced35b0a",
    "yuvalkirstain/PickScore_v1": "a4e4367c6dfa7288a00c550414478f865b875800",
    "zai-org/ImageReward": "5736be03b2652728fb87788c9797b0570450ab72",
}
NEWEST = "main"


def check_location(setting: str, value: object) -> None:
    """Raise ConfigError for a setting that names no weights, before anything is generated."""
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{setting} is {value!r}; it takes a file, a folder or an id on the hub, as text")


def check_revision(setting: str, value: object) -> None:
    """Raise ConfigError for a setting that is neither a commit, branch or tag nor null."""
    if value is not None and (not isinstance(value, str) or not value):
        raise ConfigError(f"{setting} is {value!r}; it takes a commit, a branch or a tag, as text, or null")


def choose_revision(location: str, revision: str | None) -> str:
    """The commit, branch or tag of an id on the hub to read.

    Args:
        location: the id; a folder or a file has no revision, and what is chosen for it is not used.
        revision: of the settings; None: the pinned one of the metrics' own ids, else the newest.
    """
    return revision or PINNED_REVISIONS.get(location, NEWEST)


def check_complete(location: str, loaded: Mapping[str, Any], ignored: str | None = None) -> None:
    """Check that a network has all its weights from a file: transformers draws missing ones at random.

    Args:
        location: a folder, or an id on the hub.
        loaded: what transformers says beside the network, with `output_loading_info`.
        ignored: how the names of weights begin that nothing here uses; None: all are used.

    Raises:
        UnavailableError: with the first name that is missing.
    """
    missing = sorted(loaded["missing_keys"])
    if ignored is not None:
        missing = [name for name in missing if not name.startswith(ignored)]
    if missing:
        raise UnavailableError(
            f"{location} has other weights than this metric needs (no {missing[0]}); name the right ones in "
            "its settings, or leave them at their defaults"
        )


def check_reachable(url: str) -> None:
    """Raise the error of a download soon: torch.hub and the hub's client wait long or try many times."""
    request = Request(url, method="HEAD", headers={"User-Agent": "int8run"})
    urlopen(request, timeout=CONNECT_TIMEOUT_S).close()


def format_error(error: BaseException) -> str:
    """The type of an error and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


@contextmanager
def needs_packages(packages: str, extra: str = "") -> Iterator[None]:
    """Turn an import that fails into an UnavailableError that says what to install.

    Args:
        packages: as pip takes them, separated by spaces.
        extra: int8run's extra that brings them; empty where none does.
    """
    try:
        yield
    except ImportError as error:
        remedy = describe_installation(packages, extra)
        raise UnavailableError(f"a package cannot be imported ({format_error(error)}); {remedy}") from error


def describe_installation(packages: str, extra: str) -> str:
    """What to type: `pip install flip-evaluator (int8run's extra 'perceptual')`.

    Args:
        packages: as pip takes them, separated by spaces.
        extra: int8run's extra that brings them; empty where none does.
    """
    command = f"pip install {packages}"
    return f"{command} (int8run's extra {extra!r})" if extra else command


def load_from_hub(
    location: str,
    load: Callable[..., Loaded],
    *,
    size: str,
    probe: str = "config.json",
    revision: str | None = None,
) -> Loaded:
    """Load what a library takes from a folder or from the hub.

    The hub's cache is asked first, without the network; then whether the hub can be reached, because its
    client tries for minutes before it gives up.

    Args:
        location: a folder, or an id on the hub.
        load: the library's function; called with `is_local`, whether only local files may be used, and with
            the `revision` to read.
        size: of the download, such as `1.7 GB`.
        probe: a file of the repository, whose address is tried.
        revision: of the settings; None: see `choose_revision`.

    Raises:
        UnavailableError: where nothing can be loaded, with the reason.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined,unused-ignore]
    from safetensors import SafetensorError

    chosen = choose_revision(location, revision)
    try:
        try:
            loaded = load(is_local=True, revision=chosen)
        except OSError:
            if constants.HF_HUB_OFFLINE:
                raise
            check_reachable(hf_hub_url(location, probe, revision=chosen))
            log.info("Downloading %s (%s)", location, size)
            loaded = load(is_local=False, revision=chosen)
        log_commit(location, probe, chosen)
        return loaded
    # a ValueError is what transformers raises for a network that it does not know, and for one with own code
    except (*LOADING_ERRORS, ValueError, HTTPError, HFValidationError, SafetensorError) as error:
        wanted = location if chosen == NEWEST else f"{location}@{chosen}"
        remedy = f"run once with a network connection ({size}), or put {wanted} into the hub's cache"
        raise UnavailableError(f"{location} could not be loaded ({format_error(error)}); {remedy}") from error


def log_commit(location: str, probe: str, revision: str) -> None:
    """Log which commit was read where the revision is none, such as a branch; a folder has no commit.

    Args:
        location: a folder, or an id on the hub.
        probe: a file of the repository.
        revision: that was asked for.
    """
    from huggingface_hub import try_to_load_from_cache

    if Path(location).expanduser().exists():
        return
    file = try_to_load_from_cache(location, probe, revision=revision)
    if not isinstance(file, str):
        return
    commit = Path(file).parent.name
    if commit != revision:
        log.info("%s: read at commit %s, the %s of now; revision= pins it", location, commit, revision)


def find_file(location: str, name: str, *, size: str, revision: str | None = None) -> Path:
    """A file of weights, or that of a model on the hub, from the hub's cache where it is there.

    Args:
        location: the file, or `organization/name` on the hub.
        name: of the file there.
        size: of the download.
        revision: of the settings; None: see `choose_revision`.

    Raises:
        UnavailableError: where it is not here and cannot be downloaded.
    """
    file = Path(location).expanduser()
    if file.is_file():
        return file
    from huggingface_hub import hf_hub_download

    def load(*, is_local: bool, revision: str) -> Path:
        return Path(hf_hub_download(location, name, local_files_only=is_local, revision=revision))

    return load_from_hub(location, load, size=size, probe=name, revision=revision)
