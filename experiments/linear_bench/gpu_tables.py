"""The tables that `gpu.py` prints of its measurements."""

from collections.abc import Mapping, Sequence

from shapes import LayerShape
from sidebyside import Quartiles, Reply, format_table

Size = tuple[int, int, int]  # M, K, N
SIZE_COLUMNS = [
    "method",
    "µs",
    "cuBLAS time / time",
    "TOPS",
    "of the measured limit",
    "launch µs",
    "rel. error",
    "over int8run triton",
]
STEP_TITLE = "ms of all Linears with more than one row, one step"
MOST_TILES = 5


def format_size(shapes: Sequence[LayerShape], report: Reply) -> str:
    """The table of one size: every method that was timed, why others were not, and the best tiles.

    Args:
        shapes: the layers of this size.
        report: of `measure_size`.
    """
    rows, notes = [], []
    for name, record in report["methods"].items():
        if "us" in record:
            rows.append([name, *format_record(record)])
        if "refused" in record:
            notes.append(f"refused, not timed: {name} – {record['refused']}")
        if "failed" in record:
            notes.append(f"cannot run: {name} – {record['failed']}")

    size = "x".join(str(length) for length in shapes[0].size)
    layers = "; ".join(f"{shape.model} {shape.name} x{shape.calls}" for shape in shapes)
    lines = [f"## {size}: {layers}", "", format_table(SIZE_COLUMNS, rows), "", *notes]
    timed_tiles = [record for record in report.get("tiles", []) if "us" in record]
    for record in timed_tiles[:MOST_TILES]:
        lines.append(f"tile: {record['tile']} {record['us']:.1f} µs, {record['tops']:.0f} TOPS")
    return "\n".join(lines)


def format_record(record: Reply) -> list[str]:
    """The cells of a method that was timed."""
    extra = ""
    if "extra" in record:
        extra = f"{100 * record['extra']['median']:+.1f} %"
    return [
        f"{record['us']:.1f}",
        str(Quartiles(**record["ratio"])),
        f"{record['tops']:.0f}",
        f"{100 * record['limit_share']:.0f} % of {record['limited_by']}",
        f"{record['launch_us']:.0f}",
        f"{record['error']:.4f}",
        extra,
    ]


def format_steps(models: Mapping[str, Sequence[LayerShape]], reports: Mapping[Size, Reply], base: str) -> str:
    """The table of whole steps: milliseconds of all Linears with more than one row.

    A method that misses one layer has no sum.

    Args:
        models: the layers of each model.
        reports: of `measure_size`, by size.
        base: the method that the others are compared with.
    """
    names = dict.fromkeys(name for report in reports.values() for name in report["methods"])
    rows = []
    for name in names:
        cells = [format_step(shapes, reports, name, base) for shapes in models.values()]
        rows.append([name, *cells])
    return format_table([STEP_TITLE, *models], rows)


def format_step(shapes: Sequence[LayerShape], reports: Mapping[Size, Reply], name: str, base: str) -> str:
    """One cell of that: a method's sum over a model's layers."""
    own_us = base_us = 0.0
    for shape in shapes:
        if shape.m == 1:
            continue
        methods = reports[shape.size]["methods"]
        if "us" not in methods.get(name, {}):
            return "–"
        own_us += shape.calls * methods[name]["us"]
        base_us += shape.calls * methods[base]["us"]
    return f"{own_us / 1000:.1f} ({base_us / own_us:.2f}x)"
