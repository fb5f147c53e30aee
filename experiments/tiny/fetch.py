"""Fetch the Fluent Emoji drawings (MIT, Microsoft Corporation) as SVG bodies.

Needs `npm` on the path; writes `<work>/<style>.json` and the licence notes that come with the packages.

    python experiments/tiny/fetch.py --work work
"""

import argparse
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

# style name used everywhere in this folder -> npm package, pinned: other versions hold other drawings
PACKAGES = {
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "ink": "@iconify-json/fluent-emoji-high-contrast@1.2.6",
    "gloss": "@iconify-json/fluent-emoji@1.2.7",
}


def read_json(archive: tarfile.TarFile, name: str) -> Any:
    """One JSON file of an npm package."""
    file = archive.extractfile(f"package/{name}.json")
    assert file is not None, f"{name}.json is no file"
    return json.load(file)


def fetch_icons(package: str, style: str, work: Path) -> None:
    """Unpack the icons of one npm package to `<work>/<style>.json`."""
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=work, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(work / packed) as archive:
        icons = read_json(archive, "icons")
        info = read_json(archive, "info")
        metadata = read_json(archive, "metadata")
    assert info["license"]["spdx"] == "MIT", f"{package}: the licence changed to {info['license']}"
    drawings = {
        "package": package,
        "author": info["author"],
        "license": info["license"],
        "categories": metadata.get("categories", {}),
        "bodies": {name: icon["body"] for name, icon in icons["icons"].items()},
    }
    (work / f"{style}.json").write_text(json.dumps(drawings))
    print(f"{style}: {len(drawings['bodies'])} drawings from {package}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for everything that is made on the way"
    )
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    for style, package in PACKAGES.items():
        fetch_icons(package, style, work)
