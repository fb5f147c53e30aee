"""The tables of the README, from the CSVs that `measure.py` and `images.py` write.

python experiments/text_encoders/tables.py [--device cuda]
"""

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str]
Column = tuple[str, Callable[[Row], str]]  # the case whose row is read, and what is said of it
# heading, case, and which embeddings: `pooled_` those of whole texts
EMBEDDINGS = (
    ("tiny CLIP, text", "tiny_clip", "pooled_"),
    ("tiny T5", "tiny_t5", ""),
    ("MiniLM, sentence", "minilm", "pooled_"),
    ("MiniLM, tokens", "minilm", ""),
    ("CLIP-L, random", "clip_l", ""),
    ("T5-XXL layer, random", "t5_xxl", ""),
)
FULL_SIZE_FORMATS = ("int8_rowwise", "int8_convrot", "int8_block3d", "float8_e4m3fn", "mxfp8", "nvfp4")
CASES = {
    "tiny_clip": "tiny CLIP",
    "tiny_t5": "tiny T5",
    "minilm": "MiniLM",
    "clip_l": "CLIP-L",
    "t5_xxl": "T5-XXL layer",
}


def read_rows(results: Path, name: str, device: str | None = None) -> list[Row]:
    """Rows of a table; of one device where it has several. None where it was not measured."""
    path = results / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    if device is None:
        return rows
    return [row for row in rows if row["device"] == device]


def print_table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """One table in Markdown; nothing where it has no lines."""
    if not lines:
        return
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")


def group_rows(rows: Iterable[Row], outer: str, inner: str) -> dict[str, dict[str, Row]]:
    """Rows by the value of one column, then by that of another."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row[outer], {})[row[inner]] = row
    return groups


def group_variants(rows: Iterable[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Rows by format and kernels, then by case."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row["format"], row["kernels"]), {})[row["case"]] = row
    return groups


def format_cells(rows: Mapping[str, Row], columns: Iterable[Column]) -> list[str]:
    """What each column says of its case's row; empty where that was not measured."""
    cells = []
    for case, say in columns:
        cells.append(say(rows[case]) if case in rows else "")
    return cells


def format_variants(
    variants: Mapping[tuple[str, str], Mapping[str, Row]], columns: Sequence[Column]
) -> list[list[str]]:
    """A line for each format and kernels."""
    return [[*variant, *format_cells(rows, columns)] for variant, rows in variants.items()]


def format_groups(groups: Mapping[str, Mapping[str, Row]], columns: Sequence[Column]) -> list[list[str]]:
    """A line for each group."""
    return [[name, *format_cells(rows, columns)] for name, rows in groups.items()]


def format_cosine(prefix: str) -> Callable[[Row], str]:
    """`mean (least)`, as digits after the nines."""
    return lambda row: f"{float(row[f'{prefix}cosine']):.5f} ({float(row[f'{prefix}cosine_min']):.5f})"


def format_percent(name: str) -> Callable[[Row], str]:
    """A share in %."""
    return lambda row: f"{100 * float(row[name]):.2f}"


def format_ratio(name: str) -> Callable[[Row], str]:
    """A ratio, where there is one."""
    return lambda row: f"{float(row[name]):.3f}" if row[name] else ""


def format_speed(row: Row) -> str:
    """Times as fast as both float models."""
    return f"{float(row['vs_float32']):.2f} / {float(row['vs_bfloat16']):.2f}"


def format_loading(row: Row) -> str:
    """Seconds, and those of the float file."""
    return f"{float(row['load_s']):.2f} ({float(row['float_load_s']):.2f})"


def format_digits(row: Row, name: str, count: int) -> str:
    """A number, `equal` for infinite dB, or nothing."""
    if not row.get(name):
        return ""
    if row[name] == "inf":
        return "equal"
    return f"{float(row[name]):.{count}f}"


def print_quality(results: Path, device: str) -> None:
    """Cosines and errors of the embeddings."""
    variants = group_variants(read_rows(results, "quality", device))
    heads = ["format", "kernels", *(title for title, _, _ in EMBEDDINGS)]
    cosines = [(case, format_cosine(prefix)) for _, case, prefix in EMBEDDINGS]
    errors = [(case, format_percent(f"{prefix}rel_err")) for _, case, prefix in EMBEDDINGS]
    print_table(
        "Cosine to the float encoder's embeddings: mean, and of the worst prompt",
        heads,
        format_variants(variants, cosines),
    )
    print_table("Relative error, %", heads, format_variants(variants, errors))


def print_memory(results: Path, device: str) -> None:
    """Bytes in memory and in the file; they do not depend on the kernels."""
    rows = [row for row in read_rows(results, "quality", device) if row["kernels"] == "auto"]
    by_format = group_rows(rows, "format", "case")
    layers = [(case, format_ratio("layers_vs_bf16")) for case in CASES]
    whole = [(case, format_ratio("module_vs_bf16")) for case in CASES]
    files = [(case, format_ratio("file_vs_float")) for case in CASES]
    titles = list(CASES.values())
    heads = ["format", *(f"{title}, layers" for title in titles), *(f"{title}, whole" for title in titles)]
    print_table(
        "Memory, of bfloat16's: quantized layers alone, and the whole encoder",
        heads,
        format_groups(by_format, [*layers, *whole]),
    )
    print_table("File, of the float file's bytes", ["format", *titles], format_groups(by_format, files))


def print_sizes(results: Path) -> None:
    """Full-size encoders."""
    share = format_percent("quantized_share")
    ratio = format_ratio("whole_vs_bf16")
    lines = []
    for case, rows in group_rows(read_rows(results, "sizes"), "case", "format").items():
        gigabytes = f"{float(rows['int8_rowwise']['bf16_gb']):.2f}"
        shares = [f"{share(rows[name])} %" for name in ("int8_rowwise", "int8_convrot")]
        lines.append([case, gigabytes, *shares, *(ratio(rows[name]) for name in FULL_SIZE_FORMATS)])
    heads = ["encoder", "bfloat16, GB", "quantized as int8_rowwise", "as int8_convrot", *FULL_SIZE_FORMATS]
    print_table("Whole encoders at full size, of bfloat16's bytes (by shapes)", heads, lines)


def print_wo(results: Path, device: str) -> None:
    """T5's `wo` in float and quantized."""
    by_format = group_rows(read_rows(results, "wo", device), "format", "wo")
    columns = []
    for say in (format_percent("rel_err"), format_cosine("")):
        columns += [("float", say), ("quantized", say)]
    heads = ["format", "error, %: `wo` float", "quantized", "cosine: `wo` float", "quantized"]
    print_table("Tiny T5 with `wo` in float and quantized", heads, format_groups(by_format, columns))


def print_times(results: Path, device: str) -> None:
    """Calls and loading, of the cases that were timed."""
    rows = read_rows(results, "time", device)
    timed = {row["case"] for row in rows}
    cases = {case: title for case, title in CASES.items() if case in timed}
    heads = ["format", "kernels", *cases.values()]
    speeds = [(case, format_speed) for case in cases]
    loads = [(case, format_loading) for case in cases]
    for dtype in ("float32", "bfloat16"):
        variants = group_variants(row for row in rows if row["dtype"] == dtype)
        print_table(
            f"Times as fast as float32 / bfloat16; between the layers {dtype}",
            heads,
            format_variants(variants, speeds),
        )
    # loads are measured once for both dtypes
    print_table(
        "Seconds from file to model (the float file at the same time)",
        heads,
        format_variants(group_variants(rows), loads),
    )


def print_images(results: Path) -> None:
    """The tiny model."""
    lines = []
    for name, rows in group_rows(read_rows(results, "images"), "format", "denoiser").items():
        line = [name]
        for denoiser in ("float", "int8"):
            line += format_image_cells(rows.get(denoiser, {}))
        lines.append(line)
    numbers = ["PSNR, dB", "worst", "latent error, %", "top-1"]
    heads = ["format", *numbers, f"INT8 denoiser: {numbers[0]}", *numbers[1:]]
    print_table("Images of the tiny model", heads, lines)


def format_image_cells(row: Row) -> list[str]:
    """PSNR, that of the worst image, latent error and top-1; empty where it was not measured."""
    latent_error = format_percent("latent_rel_err")(row) if row else ""
    return [
        format_digits(row, "psnr_db", 2),
        format_digits(row, "worst_psnr_db", 1),
        latent_error,
        format_digits(row, "top1", 2),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    arguments = parser.parse_args()
    print_quality(arguments.results, arguments.device)
    print_memory(arguments.results, arguments.device)
    print_sizes(arguments.results)
    print_wo(arguments.results, arguments.device)
    print_times(arguments.results, arguments.device)
    print_images(arguments.results)


if __name__ == "__main__":
    main()
