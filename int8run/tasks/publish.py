"""`task=publish`: put a folder for the hub together from a checkpoint of int8run, and upload it if asked.

`options.Publish` calls `publish`. A dry run does all but the upload, so that everybody sees first what would
be public. What is uploaded is the list that was printed, and nothing else of the folder.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from int8run import __version__
from int8run.checkpoints.data_hash import check_data
from int8run.checkpoints.provenance import read_provenance
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.models.hub import describe_reason, list_hub_errors
from int8run.pipeline.store_layers import get_vae_folder
from int8run.report.console import print_lines
from int8run.report.markdown import escape_markdown
from int8run.tasks.base_license import README, UNKNOWN, BaseLicense, clean_license, find_base_license
from int8run.tasks.local_paths import LOCAL_PATH
from int8run.tasks.model_card import get_card_path
from int8run.tasks.publish_files import (
    HubFile,
    describe_file,
    link_checkpoint,
    name_on_hub,
    read_card,
    write_hashes,
    write_provenance,
    write_readme,
)
from int8run.utils.paths import SAFETENSORS, check_readable, expand_path
from int8run.utils.plurals import count_noun

log = logging.getLogger(__name__)
PROVENANCE_NAME = "int8run.json"
REFUSALS = (401, 403, 404)  # 404: also of a private repository of others
LOG_IN = "log in with `hf auth login` as somebody who may write there"


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
    weights = [*list_weights(source), *list_vae_weights(source)]
    notes = read_checked_notes(source, weights)
    provenance = next(iter(notes.values()))
    base = str(provenance.get("model", UNKNOWN))
    found = choose_license(publication, base, provenance.get("revision"))
    folder = choose_folder(publication, source)
    names = link_checkpoint(source, weights, folder)
    write_provenance(notes, folder / PROVENANCE_NAME)
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


def list_vae_weights(source: Path) -> list[Path]:
    """The files of the INT8 VAE that `save=` wrote beside a checkpoint; none where it wrote none."""
    folder = Path(get_vae_folder(str(source)))
    weights = sorted(folder.glob(f"*{SAFETENSORS}"))
    card = get_card_path(str(source))
    # a card without it was written later than the VAE, of a checkpoint that had this name before
    name = escape_markdown(f"{folder.name}/")
    if weights and card.is_file() and name not in card.read_text(encoding="utf-8"):
        log.warning("%s is not published: %s does not name it", folder, card)
        return []
    return weights


def read_checked_notes(source: Path, weights: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """How int8run made each file, by its name; its tensors are read and compared with the hash in the header.

    Args:
        source: the checkpoint.
        weights: its files of weights.

    Raises:
        FileError: another program wrote one, one is damaged, or they were made from different models.
    """
    notes: dict[str, dict[str, Any]] = {}
    for path in weights:
        with TensorFiles.open(path) as files:
            own = read_provenance(path, files.metadata)
            if not own or not check_data(files):
                raise FileError(
                    f"{path} was not written by int8run, so its card would have nothing to say; make it with "
                    "task=quantize or save="
                )
        notes[name_on_hub(path, source)] = own
        if LOCAL_PATH.search(json.dumps(own)):
            log.warning(
                "the header of %s names folders of this machine, and goes with the weights: see int8run "
                "task=inspect task.path=%s",
                path.name,
                path,
            )
    models = {str(note.get("model", UNKNOWN)) for note in notes.values()}
    if len(models) > 1:
        raise FileError(
            f"task.path={source}: its files were made from different models ({', '.join(sorted(models))}), "
            "which one license cannot cover; publish each from a folder of its own"
        )
    return notes


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


# -- say and upload ------------------------------------------------------------------------------------------


def print_files(
    files: Sequence[HubFile], publication: Publication, folder: Path, base_license: BaseLicense
) -> None:
    """Say what is in the folder, what else is there and is not uploaded, and what happens to it."""
    for file in files:
        print_lines(f"{file.sha256[:12]}  {file.nbytes:>15,} bytes  {file.name}")
    print_lines(f"license of the base: {base_license.name} ({base_license.origin})", f"folder:   {folder}")
    names = {file.name for file in files}
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    others = sorted(name for name in found if name not in names)
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
            f"task.repo={publication.repo} could not be uploaded to ({describe_reason(error)}); "
            f"{name_remedy(error)}; the folder stays as it is"
        ) from error
    print_lines(f"uploaded: {commit.commit_url}")


def name_remedy(error: Exception) -> str:
    """What to do after an upload that failed: a refusal needs a login, a network that is gone does not.

    Args:
        error: one of `list_hub_errors`.
    """
    if isinstance(error, LocalTokenNotFoundError):
        return LOG_IN
    if isinstance(error, HfHubHTTPError):
        return LOG_IN if error.response.status_code in REFUSALS else "the same command tries again"
    if isinstance(error, (ConnectionError, TimeoutError, *HfHubHTTPError.__bases__)):
        return "the hub cannot be reached: the same command tries again where there is a network"
    return "the same command tries again"
