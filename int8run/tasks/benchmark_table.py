"""The table and the file of `task=bench`: who is how fast on which layer shape.

`benchmark.py` measures. Nothing here knows a backend but by its name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.table import Table

from int8run.backends.base import Shape
from int8run.backends.float import FLOAT_DTYPES

MILLISECONDS = 1000
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
    """A table with a row for each shape and one for all layers of a step.

    The columns are sorted by the time of all layers. The last one compares the fastest backend of each shape
    with the fastest float dtype.

    Args:
        title: of the table.
        result: what was measured.
    """
    names = result.names
    table = Table(title=title, title_justify="left")
    table.add_column("rows × in → out")
    for column in ("layers", *(f"{name}, ms" for name in names), "best INT8 against best float"):
        table.add_column(column, justify="right")
    for shape, seconds in result.seconds.items():
        rows, in_features, out_features = shape
        times = [f"{MILLISECONDS * seconds[name]:.3f}" if name in seconds else "–" for name in names]
        label, count = f"{rows} × {in_features} → {out_features}", str(result.layers[shape])
        table.add_row(label, count, *times, compare_fastest(seconds))
    totals = result.sum_seconds()
    times = [f"{MILLISECONDS * totals[name]:.2f}" if name in totals else "–" for name in names]
    table.add_section()
    table.add_row("all layers", str(sum(result.layers.values())), *times, compare_all(result))
    return table


def compare_fastest(seconds: Seconds) -> str:
    """`cpu 1.84× bfloat16`: the fastest backend, and how many times as fast as the fastest float it is."""
    int8, best_float = find_fastest_int8(seconds), find_fastest_float(seconds)
    if int8 is None or best_float is None:
        return best_float or int8 or ""
    return f"{int8} {seconds[best_float] / seconds[int8]:.2f}× {best_float}"


def compare_all(result: BenchmarkResult) -> str:
    """`1.84× bfloat16`: all layers, each on its fastest backend, against the one fastest float dtype."""
    totals = result.sum_seconds()
    best_float = find_fastest_float(totals)
    int8_total = 0.0
    for shape, count in result.layers.items():
        int8 = find_fastest_int8(result.seconds[shape])
        if int8 is None:
            return ""
        int8_total += count * result.seconds[shape][int8]
    if best_float is None:
        return ""
    return f"{totals[best_float] / int8_total:.2f}× {best_float}"


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
