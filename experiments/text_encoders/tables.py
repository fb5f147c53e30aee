"""The tables of the README, from the CSVs: python experiments/text_encoders/tables.py [--device cuda]"""

import argparse
import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
Row = Mapping[str, str]
# heading, case, and which embeddings: `pooled_` those of whole texts
EMBEDDINGS = (
    ("tiny CLIP, text", "tiny_clip", "pooled_"),
    ("tiny T5", "tiny_t5", ""),
    ("MiniLM, sentence", "minilm", "pooled_"),
    ("MiniLM, tokens", "minilm", ""),
    ("CLIP-L, random", "clip_l", ""),
    ("T5-XXL layer, random", "t5_xxl", ""),
)
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
        return [row for row in csv.DictReader(file) if device is None or row["device"] == device]


def print_table(title: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """One table in Markdown; nothing where it has no lines."""
    lines = list(lines)
    if lines:
        print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")


def by_variant(rows: Sequence[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """By format and kernels, then by case."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["format"], row["kernels"]), {})[row["case"]] = row
    return found


def format_cells(rows: Mapping[str, Row], columns: Iterable[tuple[str, Callable[[Row], str]]]) -> list[str]:
    """What a function of each column says of its case's row; empty where that was not measured."""
    return [say(rows[case]) if case in rows else "" for case, say in columns]


def format_cosine(prefix: str) -> Callable[[Row], str]:
    """`mean (least)`, as digits after the nines."""
    return lambda row: f"{float(row[f'{prefix}cosine']):.5f} ({float(row[f'{prefix}cosine_min']):.5f})"


def format_percent(name: str) -> Callable[[Row], str]:
    """A share in %."""
    return lambda row: f"{100 * float(row[name]):.2f}"


def format_ratio(name: str) -> Callable[[Row], str]:
    """A ratio, where there is one."""
    return lambda row: f"{float(row[name]):.3f}" if row[name] else ""


def format_digits(row: Row, name: str, count: int) -> str:
    """A number, `equal` for infinite dB, or nothing."""
    if not row.get(name):
        return ""
    return "equal" if row[name] == "inf" else f"{float(row[name]):.{count}f}"


def print_quality(results: Path, device: str) -> None:
    """Cosines, errors, bytes."""
    rows = read_rows(results, "quality", device)
    variants = by_variant(rows)
    heads = ["format", "kernels", *(head for head, _, _ in EMBEDDINGS)]
    cosines = [(case, format_cosine(prefix)) for _, case, prefix in EMBEDDINGS]
    errors = [(case, format_percent(f"{prefix}rel_err")) for _, case, prefix in EMBEDDINGS]
    print_table(
        "Cosine to the float encoder's embeddings: mean, and of the worst prompt",
        heads,
        [[*v, *format_cells(r, cosines)] for v, r in variants.items()],
    )
    print_table("Relative error, %", heads, [[*v, *format_cells(r, errors)] for v, r in variants.items()])
    autos = {name: r for (name, kernels), r in variants.items() if kernels == "auto"}
    columns = [(case, format_ratio(name)) for name in ("layers_vs_bf16", "module_vs_bf16") for case in CASES]
    heads = ["format", *(f"{title}, {what}" for what in ("layers", "whole") for title in CASES.values())]
    print_table(
        "Memory, of bfloat16's: quantized layers alone, and the whole encoder",
        heads,
        [[n, *format_cells(r, columns)] for n, r in autos.items()],
    )
    columns = [(case, format_ratio("file_vs_float")) for case in CASES]
    print_table(
        "File, of the float file's bytes",
        ["format", *CASES.values()],
        [[n, *format_cells(r, columns)] for n, r in autos.items()],
    )


def print_sizes(results: Path) -> None:
    """Full-size encoders."""
    by_case: dict[str, dict[str, Row]] = {}
    for row in read_rows(results, "sizes"):
        by_case.setdefault(row["case"], {})[row["format"]] = row
    named = ("int8_rowwise", "int8_convrot", "int8_block3d", "float8_e4m3fn", "mxfp8", "nvfp4")
    lines = [
        [
            case,
            f"{float(r[named[0]]['bf16_gb']):.2f}",
            *(f"{format_percent('quantized_share')(r[n])} %" for n in named[:2]),
            *(format_ratio("whole_vs_bf16")(r[n]) for n in named),
        ]
        for case, r in by_case.items()
    ]
    heads = ["encoder", "bfloat16, GB", "quantized as int8_rowwise", "as int8_convrot", *named]
    print_table("Whole encoders at full size, of bfloat16's bytes (by shapes)", heads, lines)


def print_wo(results: Path, device: str) -> None:
    """T5's `wo` in float and quantized."""
    found: dict[str, dict[str, Row]] = {}
    for row in read_rows(results, "wo", device):
        found.setdefault(row["format"], {})[row["wo"]] = row
    columns = [
        (word, say)
        for say in (format_percent("rel_err"), format_cosine(""))
        for word in ("float", "quantized")
    ]
    heads = ["format", "error, %: `wo` float", "quantized", "cosine: `wo` float", "quantized"]
    print_table(
        "Tiny T5 with `wo` in float and quantized",
        heads,
        [[name, *format_cells(r, columns)] for name, r in found.items()],
    )


def print_times(results: Path, device: str) -> None:
    """Calls and loading, of the cases that were timed."""
    rows = read_rows(results, "time", device)
    timed = {row["case"] for row in rows}
    cases = {case: title for case, title in CASES.items() if case in timed}
    for dtype in ("float32", "bfloat16"):
        variants = by_variant([row for row in rows if row["dtype"] == dtype])
        speeds = [
            (case, lambda row: f"{float(row['vs_float32']):.2f} / {float(row['vs_bfloat16']):.2f}")
            for case in cases
        ]
        lines = [[*v, *format_cells(r, speeds)] for v, r in variants.items()]
        print_table(
            f"Times as fast as float32 / bfloat16; between the layers {dtype}",
            ["format", "kernels", *cases.values()],
            lines,
        )
    # loads are measured once for both dtypes
    loads = [
        (case, lambda row: f"{float(row['load_s']):.2f} ({float(row['float_load_s']):.2f})") for case in cases
    ]
    lines = [[*v, *format_cells(r, loads)] for v, r in variants.items()]
    print_table(
        "Seconds from file to model (the float file at the same time)",
        ["format", "kernels", *cases.values()],
        lines,
    )


def print_images(results: Path) -> None:
    """The tiny model."""
    found: dict[str, dict[str, Row]] = {}
    for row in read_rows(results, "pictures"):
        found.setdefault(row["format"], {})[row["denoiser"]] = row
    lines = []
    for name, r in found.items():
        line = [name]
        for which in ("float", "int8"):
            row = r.get(which, {})
            line += [
                format_digits(row, "psnr_db", 2),
                format_digits(row, "worst_psnr_db", 1),
                format_percent("latent_rel_err")(row) if row else "",
                format_digits(row, "top1", 2),
            ]
        lines.append(line)
    heads = [
        "format",
        "PSNR, dB",
        "worst",
        "latent error, %",
        "top-1",
        "INT8 denoiser: PSNR, dB",
        "worst",
        "latent error, %",
        "top-1",
    ]
    print_table("Images of the tiny model", heads, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    arguments = parser.parse_args()
    print_quality(arguments.results, arguments.device)
    print_sizes(arguments.results)
    print_wo(arguments.results, arguments.device)
    print_times(arguments.results, arguments.device)
    print_images(arguments.results)
