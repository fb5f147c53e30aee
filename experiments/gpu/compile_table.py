"""What Triton makes of the kernels for each GPU, compiled without one: registers, memory, instructions.

    python experiments/gpu/compile_table.py                      # the installed Triton, all architectures
    python experiments/gpu/compile_table.py --only sm_90 gfx942  # builds with one of these words
    python experiments/gpu/compile_table.py --markdown           # the tables of all versions

For another Triton, `pip install --target FOLDER` and PYTHONPATH=FOLDER.

Each run writes `results/compiled_triton_<version>.csv`. Nothing runs on a GPU, so nothing is timed.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]  # this working tree, and the gate of its tests
COLUMNS = (
    "architecture",
    "build",
    "registers",
    "shared_bytes",
    "spills",
    "instruction",
    "permutes",
    "asynchronous",
    "wrong",
)
# what README shows of each architecture: the largest tiles, plain and with a branch
SHOWN = (
    "linear 128x",
    "attention 128 128x",
    "attention 128 64x32 w8",
    "conv 3x3 128x",
    "hopper 128x256x128 w8 s4",
    "hopper 128x128x128 w4",
)
NOT_SHOWN = ("group", "tails", "rank 16", "fp16", "mask")


@dataclass(frozen=True)
class Row:
    """One build of one architecture, as text."""

    architecture: str
    build: str
    registers: str
    shared_bytes: str
    spills: str
    instruction: str
    permutes: str
    asynchronous: str
    wrong: str


def compile_rows(words: Sequence[str]) -> list[Row]:
    """Compile the builds whose name has one of the words; none: all."""
    from support.static_builds import AMD, NVIDIA, builds
    from support.static_gate import count, failures, unsupported

    rows = []
    for architecture in (*NVIDIA, *AMD):
        wanted = [build for build in builds(architecture) if is_wanted(str(build), words)]
        reason = unsupported(architecture) if wanted else None
        if reason:
            print(reason, file=sys.stderr)
            continue
        for build in wanted:
            counts = count(build)
            row = Row(
                architecture,
                build.name,
                str(counts.registers),
                str(counts.shared),
                str(counts.spills),
                counts.instruction,
                str(counts.loop_permutes),
                describe_waits(counts.instruction, is_asynchronous=counts.is_asynchronous),
                "; ".join(failures(build, counts)),
            )
            print(*vars(row).values(), sep="  ", flush=True)
            rows.append(row)
    return rows


def is_wanted(name: str, words: Sequence[str]) -> bool:
    """Whether a name has one of the words; without words every name does."""
    return not words or any(word in name for word in words)


def is_shown(build: str) -> bool:
    """Whether the table has a row for a build."""
    return is_wanted(build, SHOWN) and not is_wanted(build, NOT_SHOWN)


def describe_waits(instruction: str, *, is_asynchronous: bool) -> str:
    """Whether products overlap: a question for the instructions that run beside the warps."""
    if instruction.startswith("tcgen05"):
        return "yes"
    if not instruction.startswith("wgmma"):
        return "-"
    return "yes" if is_asynchronous else "no"


def write_rows(rows: Sequence[Row], file: Path) -> None:
    """A CSV with a row for each build."""
    file.parent.mkdir(exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(vars(row).values() for row in rows)


def read_rows(file: Path) -> list[Row]:
    """What `write_rows` wrote."""
    with file.open(newline="") as stream:
        return [Row(**row) for row in csv.DictReader(stream)]


def format_table(files: Sequence[Path]) -> str:
    """The builds that README shows, versions of Triton below each other, as Markdown."""
    lines = [
        "| architecture | Triton | build | registers | shared bytes | spills | instruction | asynchronous |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown: list[tuple[Row, str]] = []
    for file in files:
        version = file.stem.removeprefix("compiled_triton_")
        shown += [(row, version) for row in read_rows(file) if is_shown(row.build)]
    order = list(dict.fromkeys(row.architecture for row, _ in shown))
    for row, version in sorted(shown, key=lambda entry: order.index(entry[0].architecture)):
        cells = (
            row.architecture,
            version,
            row.build,
            row.registers,
            row.shared_bytes,
            row.spills,
            row.instruction or "none",
            row.asynchronous,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", default=[])
    parser.add_argument("--markdown", action="store_true", help="print the table, compile nothing")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="of the CSV files")
    arguments = parser.parse_args()
    if arguments.markdown:
        print(format_table(sorted(arguments.folder.glob("compiled_triton_*.csv"))))
        return
    warnings.simplefilter("ignore")  # Triton's, of a default that the kernels do not use
    import triton

    rows = compile_rows(arguments.only)
    file = arguments.folder / f"compiled_triton_{triton.__version__}.csv"
    write_rows(rows, file)
    print(f"written to {file}")


if __name__ == "__main__":
    main()
