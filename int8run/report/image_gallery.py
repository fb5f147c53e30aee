"""The image wall: which picture stands where, and every different picture once as a data URI."""

import base64
import hashlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from int8run.report.run_files import difference
from int8run.report.runs import Run, count

LARGEST_SIDE = 512  # px; a picture with a longer side is embedded as a thumbnail
THUMBNAIL_QUALITY = 90  # of WebP
MOST_BYTES = 30_000_000  # of pictures on one page, as base64
MOST_CELLS = 2000  # more make a browser slow


@dataclass
class Pictures:
    """Data URIs by id; equal pictures are one."""

    uris: dict[str, str] = field(default_factory=dict)
    thumbnails: bool = False
    _ids: dict[bytes, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Length of all data URIs."""
        return sum(map(len, self.uris.values()))

    def add(self, image: Image.Image) -> str:
        """The id of a picture."""
        image = image.convert("RGB")
        content = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        if content not in self._ids:
            self._ids[content] = f"p{len(self._ids)}"
            self.uris[self._ids[content]] = self.encode(image)
        return self._ids[content]

    def encode(self, image: Image.Image) -> str:
        """Exact where it is small, else a thumbnail."""
        buffer = io.BytesIO()
        if max(image.size) <= LARGEST_SIDE:
            image.save(buffer, "PNG", optimize=True)
            return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        self.thumbnails = True
        image = image.copy()
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=THUMBNAIL_QUALITY, method=2)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True)
class Source:
    """The files of one cell."""

    ours: Path
    base: Path | None  # the float model's
    values: dict[str, Any]  # the sample's quality


@dataclass(frozen=True)
class Cell:
    """One place of the wall.

    Args:
        ours: id of the INT8 picture; None where there is none.
        base: id of the float model's.
        difference: id of their difference.
        same: tag of an earlier run in the row with the very same INT8 picture.
        first: whether no earlier cell of the page shows this INT8 picture.
        note: why there is no picture.
    """

    run: Run
    ours: str | None = None
    base: str | None = None
    difference: str | None = None
    psnr: float | None = None
    same: str = ""
    first: bool = False
    note: str = ""


@dataclass(frozen=True)
class Wall:
    """Rows of one caption and a cell per run; what was left out is said in words."""

    runs: list[Run]
    rows: list[tuple[str, list[Cell]]]
    uris: dict[str, str]
    notes: list[str]

    @property
    def compared(self) -> bool:
        """Whether a float picture is there."""
        return any(cell.base for _, cells in self.rows for cell in cells)


def sources(run: Run) -> dict[tuple[str, int, int, str], Source]:
    """Pictures of a run by prompt, seed, which of several with that prompt and seed, and frame (empty for pictures)."""
    found: dict[tuple[str, int, int, str], Source] = {}
    seen: Counter[tuple[str, int]] = Counter()
    for image in run.record.images:
        prompt, seed = str(image.get("prompt", "")), int(image.get("seed", 0))
        seen[prompt, seed] += 1
        ours = image.get("stills") or [image["file"]]
        floats = image.get("float_stills") or [image.get("float")]
        floats += [None] * (len(ours) - len(floats))
        stem = Path(image["file"]).stem
        for file, base in zip(ours, floats, strict=False):
            frame = Path(file).stem.removeprefix(f"{stem}_") if image.get("stills") else ""
            folder = run.record.folder
            found[prompt, seed, seen[prompt, seed], frame] = Source(
                folder / file, folder / base if base else None, image
            )
    return found


def build_wall(runs: Sequence[Run], most_bytes: int = MOST_BYTES, most_cells: int = MOST_CELLS) -> Wall:
    """A row per prompt, seed and frame, a column per run that has pictures."""
    found = {run.tag: sources(run) for run in runs}
    shown = [run for run in runs if found[run.tag]]
    keys = list(dict.fromkeys(key for run in shown for key in found[run.tag]))
    pictures = Pictures()
    rows: list[tuple[str, list[Cell]]] = []
    notes: list[str] = []
    used: set[str] = set()
    for number, key in enumerate(keys):
        kept, before = dict(pictures.uris), pictures.bytes
        cells = row_of(shown, [found[run.tag].get(key) for run in shown], pictures, used, most_bytes)
        if rows and (
            pictures.bytes > most_bytes or (len(rows) + 1) * len(shown) > most_cells or before >= most_bytes
        ):
            pictures.uris = kept
            left = sum(key in found[run.tag] for key in keys[number:] for run in shown)
            limit = f"{most_bytes / 1e6:g} MB of pictures and {most_cells} places"
            notes.append(
                f"{count(left, 'picture')} left out: a page holds at most {limit}. The runs' images/ folders have them."
            )
            break
        rows.append((caption(*key), cells))
    missing = sum(bool(cell.note) for _, cells in rows for cell in cells)
    if missing:
        notes.append(
            f"{count(missing, 'place')} without a picture: not drawn, no file that can be read, or the page was full."
        )
    if any(key[3] for key in keys):
        notes.append("Of a video its stills are shown; the PSNR is that of all its frames.")
    if pictures.thumbnails:
        notes.append(
            f"Pictures with a side longer than {LARGEST_SIDE} pixels are shown as thumbnails of that size (lossy WebP); "
            "differences and PSNR are of the full pictures."
        )
    return Wall(shown, rows, pictures.uris, notes)


def row_of(
    runs: Sequence[Run], files: Sequence[Source | None], pictures: Pictures, used: set[str], most_bytes: int
) -> list[Cell]:
    """The cells of one row; `used` are ids of INT8 pictures that stand on the page already."""
    cells = []
    first_with: dict[str, str] = {}
    for run, source in zip(runs, files, strict=True):
        if source is None:
            cells.append(Cell(run, note="not drawn"))
            continue
        ours = open_picture(source.ours, run.record.folder)
        if ours is None or pictures.bytes >= most_bytes:
            cells.append(Cell(run, note="no readable file" if ours is None else "left out"))
            continue
        base = open_picture(source.base, run.record.folder) if source.base else None
        ours_id = pictures.add(ours)
        psnr = source.values.get("psnr_db")
        cells.append(
            Cell(
                run,
                ours_id,
                pictures.add(base) if base else None,
                pictures.add(difference(base, ours)) if base else None,
                psnr,
                first_with.get(ours_id, ""),
                ours_id not in used,
            )
        )
        used.add(ours_id)
        first_with.setdefault(ours_id, run.tag)
    return cells


def open_picture(path: Path, folder: Path) -> Image.Image | None:
    """A picture of the folder; None when it is not there, lies outside or cannot be read."""
    if not path.resolve().is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError):  # SyntaxError is Pillow's word for a broken PNG
        return None


def caption(prompt: str, seed: int, nth: int, frame: str) -> str:
    """What stands over a row."""
    again = f" · drawing {nth}" if nth > 1 else ""
    return f"{prompt} · seed {seed}{again}" + (f" · {frame} frame" if frame else "")
