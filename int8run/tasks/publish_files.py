"""The files of a folder for the hub: weights, configs, card, note and hashes, without this machine's folders.

`tasks.publish` calls it once the checkpoint is known to be int8run's. Nothing is printed or uploaded here.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from int8run import __version__
from int8run.models.resolve_weights import CONFIG_NAME
from int8run.pipeline.store_layers import get_vae_folder
from int8run.report.model_card import CardFacts, CardFile, render_card, replace_license
from int8run.tasks.base_license import UNKNOWN, BaseLicense
from int8run.tasks.local_paths import hide_local_paths
from int8run.tasks.model_card import CARD_NAME, GRID_NAME, get_card_path, name_base

log = logging.getLogger(__name__)
HASHES_NAME = "SHA256SUMS"
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


def name_on_hub(path: Path, source: Path) -> str:
    """A file of a checkpoint as the repository has it, with the folder of its VAE.

    Args:
        path: of the file.
        source: the checkpoint.
    """
    root = source if source.is_dir() else source.parent
    return path.absolute().relative_to(root.absolute()).as_posix()


def link_checkpoint(source: Path, weights: Sequence[Path], folder: Path) -> list[str]:
    """Bring the weights, their configs and the grid of the card into the folder.

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
    configs = [source / CONFIG_NAME]
    configs += [path.with_name(CONFIG_NAME) for path in weights if path.parent.name == get_vae_name(source)]
    names = []
    for config in dict.fromkeys(configs):
        if config.is_file():
            names.append(name_on_hub(config, source))
            copy_config(config, make_place(folder, names[-1]))
    for path in wanted:
        if path.is_file():
            names.append(name_on_hub(path, source))
            link_file(path, make_place(folder, names[-1]))
    return names


def get_vae_name(source: Path) -> str:
    """The name of the folder of the VAE of a checkpoint."""
    return Path(get_vae_folder(str(source))).name


def make_place(folder: Path, name: str) -> Path:
    """Where a file goes in the hub folder; folders of its name are made."""
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    return place


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


def write_provenance(notes: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write how the checkpoint was made, as its headers have it; of paths of this machine the names.

    Args:
        notes: by the names of the files; the note of a single file is written without its name.
        path: of the file that is written.
    """
    content = dict(notes) if len(notes) > 1 else next(iter(notes.values()))
    text = json.dumps(content, indent=2, ensure_ascii=False)
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
        files=[CardFile(name_on_hub(path, source), path.stat().st_size) for path in weights],
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
