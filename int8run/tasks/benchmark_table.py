"""The table and the file of `task=bench`: who is how fast on which layer shape.

`benchmark.py` measures. Nothing here knows a backend but by its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from int8run.backends.base import Shape
from int8run.utils.dtypes import FLOAT_DTYPES

MILLISECONDS = 1000
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LayerSize = tuple[int, int]  # in_features, out_features
Seconds = Mapping[str, float]  # by dtype or backend


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured.

    Args:
        seconds: of one call, by shape; the float layer's by dtype, the others' by backend.
        layers: number of layers of each shape.
        float_rows: the largest number of rows at which the float layer is faster, by layer size.
        num_unsteady: shapes whose times scatter too much to be kept.
    """

    seconds: Mapping[Shape, Seconds]
    layers: Mapping[Shape, int]
    float_rows: Mapping[LayerSize, int]
    num_unsteady: int

    def sum_seconds(self) -> dict[str, float]:
        """Seconds of all layers of one step, by dtype and backend, the fastest first.

        One that cannot run every shape has no sum.
        """
        totals: dict[str, float] = {}
        names = dict.fromkeys(name for seconds in self.seconds.values() for name in seconds)
        for name in names:
            if all(name in seconds for seconds in self.seconds.values()):
                totals[name] = sum(count * self.seconds[shape][name] for shape, count in self.layers.items())
        return dict(sorted(totals.items(), key=lambda item: item[1]))

    @property
    def names(self) -> list[str]:
        """Every dtype and backend, the fastest first; those that cannot run every shape come last."""
        totals = self.sum_seconds()
        others = {name for seconds in self.seconds.values() for name in seconds} - totals.keys()
        return [*totals, *sorted(others)]


def find_fastest_float(seconds: Seconds) -> str | None:
    """The fastest dtype of the float layer; None where none was timed."""
    return min(FLOAT_DTYPES & seconds.keys(), key=seconds.__getitem__, default=None)


def find_fastest_int8(seconds: Seconds) -> str | None:
    """The fastest backend; None where none could run."""
    return min(seconds.keys() - FLOAT_DTYPES, key=seconds.__getitem__, default=None)


def build_result_table(title: str, result: BenchmarkResult) -> Table:
    """A table of milliseconds, with a row for each shape and one for all layers of a step.

    The columns are sorted by the time of all layers. The last one compares the fastest backend of each shape
    with the fastest float dtype.

    Args:
        title: of the table.
        result: what was measured.
    """
    names = result.names
    caption = "ms of a call; ratio: time of the fastest float dtype over that of the fastest INT8 backend"
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    labels = {shape: format_label(shape) for shape in result.seconds}
    longest_label = max(map(len, labels.values()), default=0)
    table.add_column("rows×in→out", no_wrap=True, min_width=longest_label)
    for heading in (Text("layers"), *map(make_heading, names), Text("ratio")):
        widest_line = max(map(len, heading.plain.splitlines()))
        table.add_column(heading, justify="right", no_wrap=True, min_width=widest_line)
    for shape, seconds in result.seconds.items():
        times = format_times(seconds, names)
        table.add_row(labels[shape], str(result.layers[shape]), *times, compare_fastest(seconds))
    times = format_times(result.sum_seconds(), names)
    table.add_section()
    table.add_row("all layers", str(sum(result.layers.values())), *times, compare_all(result))
    return table


def format_label(shape: Shape) -> str:
    """`4096×3072→9216`: rows, in_features and out_features, as the table has them."""
    rows, in_features, out_features = shape
    return f"{rows}×{in_features}→{out_features}"


def make_heading(name: str) -> Text:
    """The heading of a dtype or backend: `bf16`; long names on several lines."""
    return Text(SHORT_DTYPES.get(name, name.replace("_", "_\n")))


def format_times(seconds: Seconds, names: Sequence[str]) -> list[str]:
    """Milliseconds by name, in this order; what was not measured is a dash."""
    return [format_milliseconds(seconds[name]) if name in seconds else "–" for name in names]


def format_milliseconds(seconds: float) -> str:
    """Three digits, such as `0.055`, `1.55` or `1234`, so that a table of them is narrow."""
    milliseconds = MILLISECONDS * seconds
    if milliseconds < 1:
        return f"{milliseconds:.3f}"
    if milliseconds < 10:
        return f"{milliseconds:.2f}"
    if milliseconds < 100:
        return f"{milliseconds:.1f}"
    return f"{milliseconds:.0f}"


def compare_fastest(seconds: Seconds) -> str:
    """`1.84×`: how many times as fast as the fastest float dtype the fastest backend is."""
    int8, best_float = find_fastest_int8(seconds), find_fastest_float(seconds)
    if int8 is None or best_float is None:
        return "–"
    return f"{seconds[best_float] / seconds[int8]:.2f}×"


def compare_all(result: BenchmarkResult) -> str:
    """`1.84×`: all layers, each on its fastest backend, against the one fastest float dtype."""
    totals = result.sum_seconds()
    best_float = find_fastest_float(totals)
    if best_float is None:
        return "–"
    int8_total = 0.0
    for shape, count in result.layers.items():
        int8 = find_fastest_int8(result.seconds[shape])
        if int8 is None:
            return "–"
        int8_total += count * result.seconds[shape][int8]
    return f"{totals[best_float] / int8_total:.2f}×"


def make_record(
    result: BenchmarkResult, environment: object, left_out: Mapping[str, str]
) -> dict[str, object]:
    """Make the content of `bench.json`.

    Args:
        result: what was measured.
        environment: what the choices hold for: machine, versions, dtype.
        left_out: why backends could not run, by name.
    """
    milliseconds = {}
    for shape, seconds in result.seconds.items():
        milliseconds[format_shape(shape)] = {name: MILLISECONDS * time for name, time in seconds.items()}
    totals = result.sum_seconds()
    return {
        "device": environment,
        "milliseconds": milliseconds,
        "layers": {format_shape(shape): count for shape, count in result.layers.items()},
        "step_milliseconds": {name: MILLISECONDS * time for name, time in totals.items()},
        "float_rows": {format_shape(size): rows for size, rows in result.float_rows.items()},
        "cannot_run": dict(left_out),
    }


def format_shape(numbers: tuple[int, ...]) -> str:
    """`4096x3072x9216`: rows, in_features and out_features, or the last two."""
    return "x".join(str(number) for number in numbers)
