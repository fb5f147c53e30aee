"""From the rows of a prompt set to samples: their input files are checked, hashed and copied.

`tasks.run` calls `read_samples` before a model is loaded. What a file shows is read by `media`, and which of
the inputs a pipeline takes is not known here.
"""

import logging
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from int8run.errors import FileError
from int8run.generate.media import MediaFacts, check_image, check_video
from int8run.generate.prompt_row import GivenFile, PromptRow
from int8run.generate.prompts import PromptSet, Sample, build_row_samples, slugify
from int8run.generate.sample_inputs import (
    IMAGE,
    NO_INPUTS,
    InputFile,
    SampleInputs,
    is_mask_column,
    is_video_column,
    read_input_file,
)
from int8run.utils.paths import check_readable

log = logging.getLogger(__name__)
INPUTS = "inputs"  # folder of the copies, in that of the run
# Images whose pixels are read before a model is loaded; of further ones their headers.
MAX_DECODED = 64
MAX_SHOWN = 3  # names in one line of the log
SUFFIX = re.compile(r"\.[a-z0-9]{1,8}")

# path, and whether it is read as a video
Source = tuple[Path, bool]


def read_samples(
    prompts: PromptSet, seed: int, folder: Path, size: tuple[int, int] | None = None
) -> list[Sample]:
    """What a set of prompts asks for, with its input files checked and copied.

    Args:
        prompts: the set.
        seed: of the first sample of each prompt.
        folder: of the run; copies go into `inputs` below it.
        size: width and height that input images are brought to when they are opened; None: they stay.

    Raises:
        FileError: for a prompt file or an input that cannot be used; it names the row.
    """
    rows = prompts.read_rows()
    check_inputs(rows)
    inputs = copy_inputs(rows, folder / INPUTS, size)
    return build_row_samples(rows, inputs, prompts.seeds_per_prompt, seed)


def iter_files(rows: Sequence[PromptRow]) -> Iterator[tuple[str, GivenFile]]:
    """Every file of every row, with its column."""
    for row in rows:
        for column, files in row.files.items():
            for file in files:
                yield column, file


# -- check -------------------------------------------------------------------------------------------


def check_inputs(rows: Sequence[PromptRow]) -> dict[Source, MediaFacts]:
    """Check every input file, and what several of a row have to do with each other.

    All are looked for before the first one is opened.

    Raises:
        FileError: for the first one that cannot be used.
    """
    for _, file in iter_files(rows):
        check_readable(file.place, file.path, takes_folder=False)
    facts: dict[Source, MediaFacts] = {}
    for column, file in iter_files(rows):
        source = (file.path, is_video_column(column))
        if source not in facts:
            facts[source] = check_file(column, file, decodes=len(facts) < MAX_DECODED)
    if len(facts) > MAX_DECODED:
        log.info("%d input files were checked, all but %d by header alone", len(facts), MAX_DECODED)
    for row in rows:
        check_mask_size(row, facts)
    log_conversions(facts)
    return facts


def check_file(column: str, file: GivenFile, *, decodes: bool) -> MediaFacts:
    """Check one input file.

    Args:
        column: that it stands in.
        file: to open.
        decodes: whether the pixels of an image are read.

    Raises:
        FileError: when it cannot be used.
    """
    label = f"{file.place}={file.path.name}"
    if is_video_column(column):
        return check_video(file.path, label)
    return check_image(file.path, label, decodes=decodes)


def check_mask_size(row: PromptRow, facts: Mapping[Source, MediaFacts]) -> None:
    """Raise FileError where a mask of a row has another size than its image."""
    if IMAGE not in row.files:
        return
    image = row.files[IMAGE][0]
    image_facts = facts[image.path, False]
    for column in filter(is_mask_column, row.files):
        for mask in row.files[column]:
            mask_facts = facts[mask.path, False]
            if mask_facts.size != image_facts.size:
                raise FileError(
                    f"{mask.place}={mask.path.name} has {mask_facts.size} pixels, and its image "
                    f"{image.path.name} {image_facts.size}; a mask has the size of its image"
                )


def log_conversions(facts: Mapping[Source, MediaFacts]) -> None:
    """Log what of the input files changes when they are opened, one line for each change."""
    names: dict[str, list[str]] = {}
    for (path, _), media in facts.items():
        for conversion in media.conversions:
            names.setdefault(conversion, []).append(path.name)
    for conversion, files in names.items():
        shown = files[:MAX_SHOWN]
        if len(files) > MAX_SHOWN:
            shown.append(f"and {len(files) - MAX_SHOWN} more")
        log.info("%s: %s", conversion, ", ".join(shown))


# -- hash and copy -----------------------------------------------------------------------------------


class InputCopies:
    """Copies of input files in one folder, each content once.

    Args:
        folder: for the copies; made where there is anything to copy.
        size: that the inputs are brought to when they are opened; None: they stay as they are.
    """

    def __init__(self, folder: Path, size: tuple[int, int] | None = None):
        self.folder = folder
        self.size = size
        self.by_path: dict[Path, InputFile] = {}
        self.by_content: dict[str, Path] = {}  # by hash
        self.names: Counter[str] = Counter()

    def add(self, file: GivenFile) -> InputFile:
        """Copy a file, unless its content is there; the path of what is returned is that of the copy.

        Raises:
            FileError: when it cannot be read, or changes meanwhile.
            OSError: when the copy cannot be written; it names the copy.
        """
        if file.path in self.by_path:
            return self.by_path[file.path]
        try:
            original = read_input_file(file.path, file.place)
        except OSError as error:
            reason = error.strerror or error
            raise FileError(f"{file.place}={file.path} cannot be read: {reason}") from error
        copy = self.by_content.get(original.sha256)
        if copy is None:
            copy = self.folder / self.choose_name(file.path)
            copy_file(file.path, copy)
            if read_input_file(copy).sha256 != original.sha256:
                raise FileError(f"{original.label} changes while it is read; start again when it is complete")
            self.by_content[original.sha256] = copy
        self.by_path[file.path] = replace(original, path=copy, size=self.size)
        return self.by_path[file.path]

    def choose_name(self, path: Path) -> str:
        """A name that no copy has yet: `My Cat.PNG` -> `my-cat.png`, a second one `my-cat-2.png`."""
        stem, suffix = slugify(path.stem), path.suffix.lower()
        if not SUFFIX.fullmatch(suffix):
            suffix = ""
        self.names[stem + suffix] += 1
        number = self.names[stem + suffix]
        if number == 1:
            return stem + suffix
        numbered = f"{stem}-{number}{suffix}"
        # somebody may call files like that
        return numbered if numbered not in self.names else self.choose_name(path)


def copy_inputs(
    rows: Sequence[PromptRow], folder: Path, size: tuple[int, int] | None = None
) -> list[SampleInputs]:
    """Copy every input file, and return the inputs of each row.

    Args:
        rows: of the prompt set.
        folder: for the copies.
        size: that the inputs are brought to when they are opened; None: they stay as they are.
    """
    copies = InputCopies(folder, size)
    inputs = []
    for row in rows:
        files = {column: tuple(map(copies.add, given)) for column, given in row.files.items()}
        row_inputs = SampleInputs(files, row.strength, row.arguments, row.place)
        if row_inputs.is_empty:
            row_inputs = NO_INPUTS
        inputs.append(row_inputs)
    return inputs


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file.

    Raises:
        OSError: when the copy cannot be written; it names the copy, where Python would name the source.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
