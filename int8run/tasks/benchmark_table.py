"""The table and the file of `task=bench`: who is how fast on which layer shape.

`benchmark.py` measures. Nothing here knows a backend but by its name.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from int8run.backends.base import LayerTimes, Shape
from int8run.utils.dtypes import FLOAT_DTYPES

MILLISECONDS = 1000
SCATTERED = "?"  # in the place of a ratio of times that scatter
SHORT_DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
LayerSize = tuple[int, int]  # in_features, out_features
Seconds = Mapping[str, float]  # by dtype or backend


class Group(NamedTuple):
    """Times of what is summed in one row.

    Args:
        seconds: of one call, by shape.
        counts: how often each shape is called in a step.
        unsteady: shapes whose times scatter too much to be compared.
    """

    seconds: Mapping[Any, Seconds]
    counts: Mapping[Any, int]
    unsteady: Collection[Any] = ()

    def sum_fastest(self, shapes: Collection[Any]) -> float:
        """Seconds of all calls of some shapes, each in its fastest dtype or on its fastest backend."""
        return sum(self.counts[shape] * min(self.seconds[shape].values(), default=0.0) for shape in shapes)


@dataclass(frozen=True)
class TimedParts:
    """Times of the convolutions or of the attentions of a step.

    Args:
        title: what they are.
        seconds: of one call, by shape; in float by dtype, in INT8 by backend.
        counts: calls of each shape.
        instructions: what the kernels of each INT8 backend are built for; empty where for nothing.
        unsteady: shapes whose times scatter too much to be kept.
    """

    title: str
    seconds: dict[str, Seconds] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    instructions: dict[str, str] = field(default_factory=dict)
    unsteady: list[str] = field(default_factory=list)

    def add(self, shape: str, count: int, times: LayerTimes) -> None:
        """Add the times of a shape; those of shapes that look alike count as one."""
        self.seconds.setdefault(shape, times.seconds)
        self.counts[shape] = self.counts.get(shape, 0) + count
        if not times.is_steady:
            self.unsteady.append(shape)


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured.

    Args:
        seconds: of one call, by shape; the float layer's by dtype, the others' by backend.
        layers: number of layers of each shape.
        float_rows: the largest number of rows at which the float layer is faster, by layer size; None where
            times scatter.
        unsteady: shapes of Linears whose times scatter too much to be compared or kept.
        parts: what was timed beside Linears.
        instructions: what the kernels of each backend are built for; empty where for nothing.
    """

    seconds: Mapping[Shape, Seconds]
    layers: Mapping[Shape, int]
    float_rows: Mapping[LayerSize, int | None]
    unsteady: Collection[Shape] = ()
    parts: Sequence[TimedParts] = ()
    instructions: Mapping[str, str] = field(default_factory=dict)

    def sum_seconds(self) -> dict[str, float]:
        """Seconds of all Linears of one step; see `sum_step`."""
        return sum_step(self.groups[:1])

    @property
    def groups(self) -> list[Group]:
        """Times and counts of the Linears, and of each other part."""
        linears = Group(self.seconds, self.layers, self.unsteady)
        return [linears, *(Group(part.seconds, part.counts, part.unsteady) for part in self.parts)]

    @property
    def names(self) -> list[str]:
        """Every dtype and backend, the fastest with Linears first; those that cannot run all come last.

        Where the times of the Linears scatter, none is called the fastest: they come in the order in which
        they were timed.
        """
        timed = list_timed(self.groups)
        if not is_steady(self.groups[:1]):
            return timed
        totals = self.sum_seconds()
        return [*totals, *sorted(name for name in timed if name not in totals)]


def list_timed(groups: Sequence[Group]) -> list[str]:
    """Every dtype and backend that was timed, in order."""
    names: dict[str, None] = {}
    for group in groups:
        for times in group.seconds.values():
            names |= dict.fromkeys(times)
    return list(names)


def is_steady(groups: Sequence[Group]) -> bool:
    """Whether these times can be compared: what does not scatter takes the larger part of a step."""
    steady = unsteady = 0.0
    for group in groups:
        scattered = [shape for shape in group.seconds if shape in group.unsteady]
        unsteady += group.sum_fastest(scattered)
        steady += group.sum_fastest([shape for shape in group.seconds if shape not in group.unsteady])
    return unsteady == 0 or steady > unsteady


def sum_step(groups: Sequence[Group]) -> dict[str, float]:
    """Seconds of everything in these groups, by dtype and backend, the fastest first.

    One that cannot run every shape has no sum.

    Args:
        groups: times of each shape, and how often it is called.
    """
    totals: dict[str, float] = {}
    for name in list_timed(groups):
        total = 0.0
        for seconds, counts, _ in groups:
            if not all(name in times for times in seconds.values()):
                break
            total += sum(count * seconds[shape][name] for shape, count in counts.items())
        else:
            totals[name] = total
    return dict(sorted(totals.items(), key=lambda item: item[1]))


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
    if any(group.unsteady for group in result.groups):
        caption += f"; {SCATTERED}: times scatter"
    table = Table(
        title=title,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    labels = {shape: format_label(shape) for shape in result.seconds}
    other_labels = [shape for part in result.parts for shape in part.seconds]
    longest_label = max(map(len, [*labels.values(), *other_labels]), default=0)
    table.add_column("rows×in→out", no_wrap=True, min_width=longest_label)
    for heading in (Text("layers"), *map(make_heading, names), Text("ratio")):
        widest_line = max(map(len, heading.plain.splitlines()))
        table.add_column(heading, justify="right", no_wrap=True, min_width=widest_line)
    for shape, seconds in result.seconds.items():
        times = format_times(seconds, names)
        ratio = compare_fastest(seconds, is_steady=shape not in result.unsteady)
        table.add_row(labels[shape], str(result.layers[shape]), *times, ratio)
    table.add_section()
    add_sum(table, "all layers", result.groups[:1], names)
    for part, group in zip(result.parts, result.groups[1:], strict=True):
        table.add_section()
        for label, seconds in part.seconds.items():
            times = format_times(seconds, names)
            ratio = compare_fastest(seconds, is_steady=label not in part.unsteady)
            table.add_row(label, str(part.counts[label]), *times, ratio)
        add_sum(table, f"all {part.title}", [group], names)
    if result.parts:
        table.add_section()
        add_sum(table, "all of these", result.groups, names)
    return table


def add_sum(table: Table, label: str, groups: Sequence[Group], names: Sequence[str]) -> None:
    """Add a row for all calls of a step.

    Args:
        table: gets the row.
        label: of the row.
        groups: that are summed.
        names: of the columns.
    """
    count = sum(sum(group.counts.values()) for group in groups)
    table.add_row(label, str(count), *format_times(sum_step(groups), names), compare_all(groups))


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


def compare_fastest(seconds: Seconds, *, is_steady: bool = True) -> str:
    """`1.84×`: how many times as fast as the fastest float dtype the fastest backend is.

    Args:
        seconds: of one call.
        is_steady: whether these times can be compared.
    """
    if not is_steady:
        return SCATTERED
    int8, best_float = find_fastest_int8(seconds), find_fastest_float(seconds)
    if int8 is None or best_float is None:
        return "–"
    return f"{seconds[best_float] / seconds[int8]:.2f}×"


def compare_all(groups: Sequence[Group]) -> str:
    """`1.84×`: all calls, each on its fastest backend, against the one fastest float dtype."""
    if not is_steady(groups):
        return SCATTERED
    totals = sum_step(groups)
    best_float = find_fastest_float(totals)
    int8_total = sum_fastest_int8(groups)
    if best_float is None or int8_total is None:
        return "–"
    return f"{totals[best_float] / int8_total:.2f}×"


def sum_fastest_int8(groups: Sequence[Group]) -> float | None:
    """Seconds of all calls, each on its fastest INT8 backend; None where one has none."""
    total = 0.0
    for seconds, counts, _ in groups:
        for shape, count in counts.items():
            int8 = find_fastest_int8(seconds[shape])
            if int8 is None:
                return None
            total += count * seconds[shape][int8]
    return total


def list_instructions(result: BenchmarkResult) -> dict[str, dict[str, str]]:
    """What the kernels of each backend are built for, by what they compute; without those for nothing."""
    by_title = {"Linears": result.instructions, **{part.title: part.instructions for part in result.parts}}
    listed = {}
    for title, instructions in by_title.items():
        built = {name: text for name, text in instructions.items() if text}
        if built:
            listed[title] = built
    return listed


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
    whole_step = {name: MILLISECONDS * time for name, time in sum_step(result.groups).items()}
    fastest_int8 = sum_fastest_int8(result.groups)
    if fastest_int8 is not None:
        whole_step["int8"] = MILLISECONDS * fastest_int8
    return {
        "device": environment,
        "milliseconds": milliseconds,
        "layers": {format_shape(shape): count for shape, count in result.layers.items()},
        "step_milliseconds": {name: MILLISECONDS * time for name, time in totals.items()},
        "float_rows": {format_shape(size): rows for size, rows in result.float_rows.items()},
        "cannot_run": dict(left_out),
        "instructions": list_instructions(result),
        **{part.title: make_part_record(part) for part in result.parts},
        # Linears and these; INT8 on the fastest backend of each shape
        "all_milliseconds": whole_step,
        # of all of these, shapes whose times scatter
        "unsteady": list_unsteady(result),
    }


def list_unsteady(result: BenchmarkResult) -> list[str]:
    """The names of all shapes whose times scatter, as the other parts of `bench.json` have them."""
    names = [format_shape(shape) for shape in sorted(result.unsteady)]
    for part in result.parts:
        names += part.unsteady
    return names


def describe_float_rows(float_rows: Mapping[LayerSize, int | None]) -> str:
    """Up to how many rows float is faster, by layer size; `?` where times scatter."""
    texts = []
    for size, rows in float_rows.items():
        shown = SCATTERED if rows is None else str(rows)
        texts.append(f"{format_shape(size)}: {shown}")
    return f"float is faster up to this many rows (int8.small_batch_fallback): {', '.join(texts)}"


def make_part_record(part: TimedParts) -> dict[str, object]:
    """Times and number of calls of each shape, by its name in the table."""
    record: dict[str, object] = {}
    for shape, seconds in part.seconds.items():
        milliseconds = {name: MILLISECONDS * time for name, time in seconds.items()}
        record[shape] = {"calls": part.counts[shape], "milliseconds": milliseconds}
    return record


def format_shape(numbers: tuple[int, ...]) -> str:
    """`4096x3072x9216`: rows, in_features and out_features, or the last two."""
    return "x".join(str(number) for number in numbers)
