"""Under which license a base model is, for cards of what is made from it.

Asked in this order: the files of the model or the hub's copy on this machine, what int8run knows of
repositories, the hub. Where none says it, it is `unknown`, with the reason; nothing is guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelInfo, metadata_load, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from int8run.checkpoints.checkpoint_files import read_file_content
from int8run.errors import FileError
from int8run.models.hub import TIMEOUT_S, describe_reason, list_hub_errors, read_known_repositories
from int8run.models.resolve_weights import is_local, split_hub_path
from int8run.utils.paths import GGUF, SAFETENSORS, to_local_path
from int8run.utils.text import make_visible

UNKNOWN = "unknown"
README = "README.md"
MAX_LICENSE_LENGTH = 200
# by the suffix of a file: the entry of its metadata that says it
LICENSE_ENTRIES = {SAFETENSORS: "modelspec.license", GGUF: "general.license"}


@dataclass(frozen=True)
class BaseLicense:
    """The license of a base model.

    Args:
        name: as whoever published it calls it, or `unknown`.
        origin: where that is said, or why it is not known.
    """

    name: str
    origin: str

    @property
    def is_known(self) -> bool:
        """Whether anybody says it."""
        return self.name != UNKNOWN


def find_base_license(location: str, revision: str | None) -> BaseLicense:
    """Find the license of a model.

    Args:
        location: as `model.location` names it.
        revision: on the hub.
    """
    path = to_local_path(location)
    if path.exists():
        return find_local_license(path)
    repository, inner = split_hub_path(location)
    if is_local(location) or not is_hub_id(repository):
        return BaseLicense(UNKNOWN, f"{location} is neither here nor a name of the hub")
    return find_hub_license(repository, inner, revision)


def find_local_license(path: Path) -> BaseLicense:
    """The license of files on this machine: from the header of a checkpoint, else from the README beside."""
    if path.suffix.lower() in LICENSE_ENTRIES:
        try:
            metadata = read_file_content(path).metadata
            stated = clean_license(metadata.get(LICENSE_ENTRIES[path.suffix.lower()]))
        except FileError:
            stated = None  # whoever reads its tensors says what is wrong with it
        if stated is not None:
            return BaseLicense(stated, f"header of {path.name}")
    readme = (path if path.is_dir() else path.parent) / README
    stated = read_readme_license(readme)
    if stated is not None:
        return BaseLicense(stated, f"{README} of {path.name}")
    return BaseLicense(UNKNOWN, f"{path.name} does not say it")


def is_hub_id(text: str) -> bool:
    """Whether a text can be `organization/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return text.count("/") == 1


def find_hub_license(repository: str, inner: str, revision: str | None) -> BaseLicense:
    """The license of a repository of the hub.

    A path here that is gone looks like a file on the hub: a repository that is not known counts only where it
    has that file.

    Args:
        repository: `organization/name`.
        inner: file or folder inside it; empty: the repository itself.
        revision: of it.
    """
    try:
        cached = try_to_load_from_cache(repository, README, revision=revision)
        stated = read_readme_license(Path(cached)) if isinstance(cached, str) else None
        known = read_known_repositories().get(repository)
        if stated is None and known is not None and known.license is not None:
            return BaseLicense(known.license, f"of {repository}, as int8run knows it")
        if stated is None:
            found = HfApi().model_info(repository, revision=revision, timeout=TIMEOUT_S)
            if inner and not has_on_hub(found, inner):
                return BaseLicense(UNKNOWN, f"{repository}/{inner} is neither here nor on the hub")
            card = found.card_data
            stated = select_license({} if card is None else card.to_dict())
    except list_hub_errors() as error:
        return BaseLicense(UNKNOWN, f"the hub did not say it: {describe_reason(error)}")
    if stated is None:
        return BaseLicense(UNKNOWN, f"{repository} does not say it")
    return BaseLicense(stated, f"of {repository} on the hub")


def has_on_hub(found: ModelInfo, inner: str) -> bool:
    """Whether a repository has a file or a folder.

    Args:
        found: what the hub says of it.
        inner: path inside it.
    """
    names = [file.rfilename for file in found.siblings or []]
    folder = f"{inner.rstrip('/')}/"
    return any(name == inner or name.startswith(folder) for name in names)


def read_readme_license(path: Path) -> str | None:
    """The license in the front matter of a README; None where there is none."""
    if not path.is_file():
        return None
    try:
        return select_license(metadata_load(path) or {})
    except (ValueError, OSError, yaml.YAMLError):  # no front matter that YAML reads
        return None


def select_license(metadata: Mapping[str, Any]) -> str | None:
    """The license that a front matter names; `other` is a placeholder for `license_name`."""
    stated = metadata.get("license")
    if stated in (None, "other"):
        stated = metadata.get("license_name") or stated
    return clean_license(stated)


def clean_license(stated: object) -> str | None:
    """What a file says, as one line; None where it says nothing."""
    if isinstance(stated, list):
        stated = ", ".join(map(str, stated))
    if not isinstance(stated, str) or not stated.strip():
        return None
    return make_visible(stated.strip())[:MAX_LICENSE_LENGTH]
