"""`task=publish`: put a folder for the hub together from a checkpoint of int8run, and upload it if asked.

`options.Publish` calls `publish`. A dry run does all but the upload, so that everybody sees first what would
be public. What is uploaded is the list that was printed, and nothing else of the folder.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from int8run import __version__
from int8run.checkpoints.data_hash import check_data
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.models.hub import describe_reason, list_hub_errors
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.report.console import print_lines
from int8run.report.model_card import CardFacts, CardFile, render_card, replace_license
from int8run.tasks.base_license import README, UNKNOWN, BaseLicense, clean_license, find_base_license
from int8run.tasks.model_card import CARD_NAME, GRID_NAME, get_card_path, name_base
from int8run.utils.paths import SAFETENSORS, check_readable, expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
HASHES_NAME = "SHA256SUMS"
PROVENANCE_NAME = "int8run.json"
# identifiers that the hub knows; any other license is `other` with its name
HUB_LICENSES = frozenset(
    {
        "apache-2.0",
        "mit",
        "openrail",
        "openrail++",
        "creativeml-openrail-m",
        "bigscience-openrail-m",
        "cc0-1.0",
        "cc-by-4.0",
        "cc-by-sa-4.0",
        "cc-by-nc-4.0",
        "cc-by-nc-sa-4.0",
        "gpl-3.0",
        "agpl-3.0",
        "bsd-3-clause",
    }
)
# a path of this machine with at least one folder before its name; backslashes of Windows are doubled in JSON
LOCAL_PATH = re.compile(
    r"(?<![\w/:.~-])(?:~?/|[A-Za-z]:[/\\]+)(?:[^/\s,\]}'\"`|\\]+[/\\]+)+(?P<name>[^/\s,\]}'\"`|\\]+)"
)


@dataclass(frozen=True)
class Publication:
    """What the user wants to publish.

    Args:
        path: a `.safetensors` file or a folder that `save=` wrote.
        repo: `owner/name`.
        folder: where the files are put together; None: `publish/<name>`.
        license: of the base; None: what the base says.
        upload: whether anything leaves this machine.
        private: whether a new repository is private.
    """

    path: str
    repo: str
    folder: str | None = None
    license: str | None = None
    upload: bool = False
    private: bool = True


@dataclass(frozen=True)
class HubFile:
    """A file of the hub folder.

    Args:
        name: in the repository.
        path: on this machine.
        nbytes: its size.
        sha256: of its content.
    """

    name: str
    path: Path
    nbytes: int
    sha256: str


def publish(publication: Publication) -> list[HubFile]:
    """Put the hub folder together, say what is in it, and upload it if asked.

    Returns:
        The files of the folder, all of which are uploaded or would be.

    Raises:
        ConfigError: for a name that no repository can have, or a license that nobody knows.
        FileError: the checkpoint cannot be read, is not what int8run wrote, or the hub refuses it.
    """
    check_repository_name(publication.repo)
    source = expand_path(publication.path)
    check_readable("task.path", source)
    weights = list_weights(source)
    provenance = read_checked_provenance(weights)
    base = str(provenance.get("model", UNKNOWN))
    found = choose_license(publication, base, provenance.get("revision"))
    folder = choose_folder(publication, source)
    names = link_checkpoint(source, weights, folder)
    write_provenance(provenance, folder / PROVENANCE_NAME)
    card = read_card(source, weights, provenance, found)
    write_readme(card, base, found, folder / README)
    files = [describe_file(folder, name) for name in [*names, PROVENANCE_NAME, README]]
    files.append(write_hashes(files, folder))
    print_files(files, publication, folder, found)
    if publication.upload:
        upload_files(files, publication)
    return files


# -- checks --------------------------------------------------------------------------------------------------


def check_repository_name(repo: str) -> None:
    """Raise ConfigError for a name that no repository of a user can have."""
    try:
        validate_repo_id(repo)
        is_named = repo.count("/") == 1
    except HFValidationError:
        is_named = False
    if not is_named:
        raise ConfigError(
            f"task.repo={repo} is no name of a repository; it is owner/name, of letters, digits, -, _ and ."
        )


def list_weights(source: Path) -> list[Path]:
    """The files of weights of a checkpoint.

    Raises:
        FileError: there is none.
    """
    weights = sorted(source.glob(f"*{SAFETENSORS}")) if source.is_dir() else [source]
    if not weights or any(path.suffix != SAFETENSORS for path in weights):
        raise FileError(
            f"task.path={source} holds no {SAFETENSORS} file; name the file or the folder that save= wrote"
        )
    return weights


def read_checked_provenance(weights: Sequence[Path]) -> dict[str, Any]:
    """How int8run made the checkpoint; its tensors are read and compared with the hash in the header.

    Raises:
        FileError: another program wrote it, or it is damaged.
    """
    provenance: dict[str, Any] = {}
    for path in weights:
        with TensorFiles.open(path) as files:
            own = read_provenance(path, files.metadata)
            if not own or not check_data(files):
                raise FileError(
                    f"{path} was not written by int8run, so its card would have nothing to say; make it with "
                    "task=quantize or save="
                )
        provenance = provenance or own
        if LOCAL_PATH.search(json.dumps(own)):
            log.warning(
                "the header of %s names folders of this machine, and goes with the weights: see int8run "
                "task=inspect task.path=%s",
                path.name,
                path,
            )
    return provenance


def choose_license(publication: Publication, base: str, revision: str | None) -> BaseLicense:
    """The license of the base, as the user or the base says it.

    Raises:
        ConfigError: for an upload, where nobody says it.
    """
    stated = None if publication.license is None else clean_license(str(publication.license))
    if stated is not None:
        found = BaseLicense(stated, "as task.license says")
    else:
        found = find_base_license(base, revision)
    if publication.upload and not found.is_known:
        raise ConfigError(
            f"the license of the base {base} is not known ({found.origin}); look it up and say it, such as "
            "task.license=apache-2.0: what is made from it may not be shared under any license"
        )
    return found


def choose_folder(publication: Publication, source: Path) -> Path:
    """The folder that the files are put together in; it is made where it is missing.

    Raises:
        ConfigError: it is the folder of the checkpoint.
    """
    folder = expand_path(publication.folder or f"publish/{publication.repo.rpartition('/')[2]}").absolute()
    own = source if source.is_dir() else source.parent
    if folder.resolve() == own.resolve():
        raise ConfigError(
            f"task.folder={folder} is where the checkpoint is; name another one, for the files of the hub"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# -- the files -----------------------------------------------------------------------------------------------


def link_checkpoint(source: Path, weights: Sequence[Path], folder: Path) -> list[str]:
    """Bring the weights, a config and the grid of the card into the folder.

    Args:
        source: the checkpoint.
        weights: its files of weights.
        folder: for the hub.

    Returns:
        Their names.
    """
    card = get_card_path(str(source))
    grid = card.with_name(f"{card.name.removesuffix(CARD_NAME)}{GRID_NAME}")
    wanted = list(weights)
    # a card without it was written later than the grid, of a checkpoint that had this name before
    if card.is_file() and grid.name in card.read_text(encoding="utf-8"):
        wanted.append(grid)
    names = []
    config = source / CONFIG_NAME
    if config.is_file():
        copy_config(config, folder / CONFIG_NAME)
        names.append(CONFIG_NAME)
    for path in wanted:
        if path.is_file():
            link_file(path, folder / path.name)
            names.append(path.name)
    return names


def copy_config(path: Path, target: Path) -> None:
    """Bring a config to a place without this machine's folders, which diffusers notes as `_name_or_path`."""
    target.unlink(missing_ok=True)  # it may be a link to the one that is copied
    target.write_text(hide_local_paths(path.read_text(encoding="utf-8")), encoding="utf-8")


def link_file(path: Path, target: Path) -> None:
    """Bring a file to a place without taking its room on the disk again, where the disk allows it."""
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(path, target)


def write_provenance(provenance: Mapping[str, Any], path: Path) -> None:
    """Write how the checkpoint was made, as its header has it; of paths of this machine the names."""
    text = json.dumps(provenance, indent=2, ensure_ascii=False)
    path.write_text(hide_local_paths(text) + "\n", encoding="utf-8")


def read_card(
    source: Path, weights: Sequence[Path], provenance: Mapping[str, Any], found: BaseLicense
) -> str:
    """The card beside the checkpoint, with the license as it is known now; without one what the header says.

    Args:
        source: the checkpoint.
        weights: its files of weights.
        provenance: of its header.
        found: the license of the base.
    """
    card = get_card_path(str(source))
    if card.is_file():
        return replace_license(card.read_text(encoding="utf-8"), found.name, found.origin)
    log.warning("%s is missing: the README says what the header says, without numbers", card)
    made = [(name, str(provenance[name])) for name in ("outlier", "rounding") if provenance.get(name)]
    facts = CardFacts(
        title=f"{source.stem}, INT8",
        version=str(provenance.get("int8run", __version__)),
        base=name_base(str(provenance.get("model", UNKNOWN))),
        license_name=found.name,
        license_origin=found.origin,
        files=[CardFile(path.name, path.stat().st_size) for path in weights],
        made=made,
        command=f"int8run task=inspect task.path={weights[0].name}",
        metrics={},
        num_samples=0,
        machine="",
        grid=None,
        usage=[f"int8run model=NAME model.location={weights[0].name}"],
    )
    return render_card(facts)


def write_readme(card: str, base: str, found: BaseLicense, path: Path) -> None:
    """Write the card below the front matter that the hub reads.

    Args:
        card: as Markdown.
        base: as the header names it.
        found: its license.
        path: of the README.
    """
    front: dict[str, object] = {}
    if found.name in HUB_LICENSES:
        front["license"] = found.name
    elif found.is_known:
        front |= {"license": "other", "license_name": found.name}
    name = name_base(base)
    if "/" in name:  # a name of the hub
        front |= {"base_model": name, "base_model_relation": "quantized"}
    front |= {"library_name": "diffusers", "tags": ["int8", "w8a8", "int8run"]}
    text = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    path.write_text(f"---\n{text}---\n\n{hide_local_paths(card)}", encoding="utf-8")


def hide_local_paths(text: str) -> str:
    """A text in which paths of this machine are their last part: nobody's folders become public."""
    shown, count = LOCAL_PATH.subn(lambda match: match["name"], text)
    if count:
        log.info("%s of this machine shortened to the name", count_noun(count, "path"))
    return shown


def write_hashes(files: Sequence[HubFile], folder: Path) -> HubFile:
    """Write the hashes of the files as `sha256sum -c` reads them."""
    path = folder / HASHES_NAME
    path.write_text("".join(f"{file.sha256}  {file.name}\n" for file in files), encoding="utf-8")
    return describe_file(folder, HASHES_NAME)


def describe_file(folder: Path, name: str) -> HubFile:
    """The size and the hash of a file of the folder."""
    path = folder / name
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return HubFile(name, path, path.stat().st_size, digest)


# -- say and upload ------------------------------------------------------------------------------------------


def print_files(files: Sequence[HubFile], publication: Publication, folder: Path, found: BaseLicense) -> None:
    """Say what is in the folder, what else is there and is not uploaded, and what happens to it."""
    for file in files:
        print_lines(f"{file.sha256[:12]}  {file.nbytes:>15,} bytes  {file.name}")
    print_lines(f"license of the base: {found.name} ({found.origin})", f"folder:   {folder}")
    names = {file.name for file in files}
    others = sorted(path.name for path in folder.iterdir() if path.name not in names)
    if others:
        log.warning("not uploaded, because this command did not put it there: %s", ", ".join(others))
    if not publication.upload:
        visibility = "private" if publication.private else "public"
        print_lines(
            f"dry run: nothing was uploaded. task.upload=true uploads {count_noun(len(files), 'file')} to "
            f"{publication.repo} ({visibility} where it is new)"
        )


def upload_files(files: Sequence[HubFile], publication: Publication) -> None:
    """Upload these files in one commit; the repository is made where it is missing.

    Raises:
        FileError: the hub refuses it, or cannot be reached.
    """
    hub = HfApi()
    operations = [CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=file.path) for file in files]
    try:
        hub.create_repo(publication.repo, private=publication.private, exist_ok=True)
        commit = hub.create_commit(
            publication.repo, operations=operations, commit_message=f"INT8 weights by int8run {__version__}"
        )
    except list_hub_errors() as error:
        raise FileError(
            f"task.repo={publication.repo} could not be uploaded to ({describe_reason(error)}); log in with "
            "`hf auth login` as somebody who may write there; the folder stays as it is"
        ) from error
    print_lines(f"uploaded: {commit.commit_url}")
