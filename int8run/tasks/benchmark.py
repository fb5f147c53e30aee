"""`task=bench`: time every backend on the layer shapes of a model.

The fastest backend of each shape is kept where `backend=auto` looks for it. Also finds the number of rows
up to which float layers are faster, for `int8.small_batch_fallback`.
"""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from int8run.backends.auto import AutoBackend, BackendChooser
from int8run.backends.base import Backend, FusedBranch, Limits, QuantizedInput, Tunable
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError
from int8run.generate.capture import capture_step
from int8run.generate.input_files import read_samples
from int8run.generate.prompts import Sample, split_batches
from int8run.kernels.hadamard.reference import Rotation
from int8run.layers.plan import LayerPlan
from int8run.pipeline.load import load_model
from int8run.pipeline.loaded_model import LoadedModel
from int8run.pipeline.quantize_denoiser import count_layer_rows
from int8run.pipeline.step_settings import select_load_settings
from int8run.ptq.quantize import check_backend
from int8run.quant.weight import QuantizedWeight
from int8run.report.console import Progress, print_lines
from int8run.report.run_files import write_json
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)
# row counts at which float and INT8 are compared for int8.small_batch_fallback
SMALL_ROW_COUNTS = (1, 2, 4, 8, 16, 32)
MILLISECONDS = 1000
Shape = tuple[int, int, int]  # rows, in_features, out_features
LayerSize = tuple[int, int]  # in_features, out_features


@dataclass(frozen=True)
class FloatBackend:
    """The float layer in the place of a backend, so that it is timed by the same code."""

    dtype: torch.dtype
    name: ClassVar[str] = "float"
    limits: ClassVar[Limits] = Limits()

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """Return the dequantized weight, [N, K]."""
        return weight.dequantize(self.dtype)

    def quantize(
        self,
        x: Tensor,
        *,
        factor: Tensor | None = None,
        rotation: Rotation | None = None,
        gelu_from: int | None = None,
        down: Tensor | None = None,
    ) -> QuantizedInput:
        """Return x as it is."""
        return QuantizedInput(x, x)

    def linear(
        self,
        x: QuantizedInput,
        packed: Tensor,
        w_scale: Tensor,
        *,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        branch: FusedBranch | None = None,
        strengths: Tensor | None = None,
    ) -> Tensor:
        """[M, K] -> [M, N]."""
        return F.linear(x.q, packed, None if bias is None else bias.to(dtype))


@dataclass(frozen=True)
class BenchmarkResult:
    """What was measured.

    Args:
        seconds: of one call, by shape and backend, `float` included.
        layers: number of layers of each shape.
        float_rows: the largest number of rows at which the float layer is faster, by layer size.
        num_unsteady: shapes whose times scatter too much to be kept.
    """

    seconds: Mapping[Shape, Mapping[str, float]]
    layers: Mapping[Shape, int]
    float_rows: Mapping[LayerSize, int]
    num_unsteady: int


def run_benchmark(spec: RunSpec, job: Job, rounds: int) -> None:
    """Measure, print a table, write `bench.json`, keep the choices for `backend=auto`.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        rounds: timings of each backend, interleaved; the median counts.

    Raises:
        ConfigError: when the model has no layer to quantize.
    """
    progress = Progress(enabled=spec.progress)
    samples = read_samples(spec.prompts, spec.seed, job.output_dir, spec.sampling.input_size)
    loaded = load_model(select_load_settings(spec, needs_float_denoiser=True), progress)
    plans = [plan for plan in loaded.plan_layers() if plan.skip_reason is None]
    if not plans:
        raise ConfigError(
            f"{type(loaded.denoiser).__name__}: no Linear would become INT8; choose another model_type="
        )
    layers = count_layer_shapes(samples, loaded, plans)
    check_backend(spec.backend, loaded.device, plans)
    auto = AutoBackend({spec.backend.name: spec.backend})
    if isinstance(spec.backend, AutoBackend):
        auto = spec.backend
    dtype = getattr(torch, spec.model.dtype)
    chooser = auto.make_chooser(loaded.device, dtype)
    chooser.rounds = rounds

    result = measure_layers(chooser, FloatBackend(dtype), layers, progress)

    model = job.choices.get("model", "model")
    title = f"{model} on {get_device_name(loaded.device)}; float is {spec.model.dtype}"
    print_lines("", build_result_table(title, result))
    print_unsupported(auto, loaded.device)
    if result.num_unsteady:
        log.warning(
            "%d of %d shapes scatter by more than twice: other work runs here; their choices are not kept",
            result.num_unsteady,
            len(layers),
        )
    float_rows = ", ".join(f"{format_shape(size)}: {rows}" for size, rows in result.float_rows.items())
    print_lines(f"float is faster up to this many rows (int8.small_batch_fallback): {float_rows}")
    file = job.output_dir / "bench.json"
    write_json(make_record(result, chooser.cache.environment), file)
    print_lines(f"numbers:  {file}", f"choices:  {chooser.cache.path}")


def print_unsupported(auto: AutoBackend, device: torch.device) -> None:
    """Print which candidates cannot run here, and why."""
    for candidate in auto.candidates.values():
        reasons = candidate.limits.unsupported_reasons(device)
        if reasons:
            print_lines(f"not here: {candidate.name} {'; '.join(reasons)}")


def count_layer_shapes(
    samples: Sequence[Sample], loaded: LoadedModel, plans: list[LayerPlan]
) -> dict[Shape, int]:
    """Count the layers of each shape in one step of the denoiser.

    Args:
        samples: what a run would generate; its first batch decides the number of rows.
        loaded: the float model.
        plans: of the layers that become INT8.
    """
    batch = split_batches(samples, loaded.sampling.batch)[0]
    calls = capture_step(loaded.pipe, loaded.component, loaded.denoiser, batch, loaded.sampling)
    rows = count_layer_rows(loaded.denoiser, plans, calls)
    return Counter((rows[plan.name], plan.in_features, plan.out_features) for plan in plans)


def measure_layers(
    chooser: BackendChooser, float_backend: Backend, layers: Mapping[Shape, int], progress: Progress
) -> BenchmarkResult:
    """Time all backends on all shapes.

    Args:
        chooser: measures, and keeps the choices.
        float_backend: timed beside the others.
        layers: number of layers of each shape.
        progress: shows the shapes.
    """
    seconds = {}
    num_unsteady = 0
    with progress.track_loop("Timing layer shapes", len(layers)) as advance:
        for shape in sorted(layers):
            seconds[shape] = measure_shape(chooser, float_backend, shape)
            if not chooser.is_steady:
                num_unsteady += 1
            advance(1)
    float_rows = {}
    for in_features, out_features in sorted({shape[1:] for shape in layers}):
        rows = measure_float_rows(chooser, float_backend, in_features, out_features)
        float_rows[in_features, out_features] = rows
    return BenchmarkResult(seconds, layers, float_rows, num_unsteady)


def measure_shape(chooser: BackendChooser, float_backend: Backend, shape: Shape) -> dict[str, float]:
    """Time the float layer and every backend that supports a shape; keep the choice of the fastest.

    Returns:
        Seconds by backend; one whose results are wrong on this machine is left out.
    """
    rows, in_features, out_features = shape
    supported = chooser.supported_backends(in_features, out_features)
    for backend in supported:
        if isinstance(backend, Tunable):
            backend.tune(chooser, rows, in_features, out_features)
    correct = chooser.select_correct(supported, in_features)
    seconds = chooser.measure_seconds([float_backend, *correct], rows, in_features, out_features)
    if correct and chooser.is_steady:
        best = min((backend.name for backend in correct), key=seconds.__getitem__)
        chooser.save_choice((backend.name for backend in supported), shape, best)
    return seconds


def measure_float_rows(
    chooser: BackendChooser, float_backend: Backend, in_features: int, out_features: int
) -> int:
    """Find the number of rows up to which the float layer is faster than every backend.

    Returns:
        The largest of SMALL_ROW_COUNTS for which this is so, and for all smaller ones; 0 when it never is.
    """
    supported = chooser.supported_backends(in_features, out_features)
    correct = chooser.select_correct(supported, in_features)
    largest = 0
    is_steady = True
    for rows in SMALL_ROW_COUNTS:
        seconds = chooser.measure_seconds([float_backend, *correct], rows, in_features, out_features)
        is_steady = is_steady and chooser.is_steady
        fastest = min(seconds, key=seconds.__getitem__)
        if fastest != float_backend.name:
            break
        largest = rows
    if is_steady:
        chooser.cache.put(f"float_rows | {in_features}x{out_features}", str(largest))
    return largest


def build_result_table(title: str, result: BenchmarkResult) -> Table:
    """Build a table with a row for each shape and one for all layers.

    A row has the milliseconds of each backend, and how many times faster than float the best one is.
    """
    names = list(dict.fromkeys(name for seconds in result.seconds.values() for name in seconds))
    table = Table(title=title, title_justify="left")
    table.add_column("rows × in → out")
    for column in ("layers", *(f"{name}, ms" for name in names), "best"):
        table.add_column(column, justify="right")
    float_total = best_total = 0.0
    for shape, seconds in result.seconds.items():
        rows, in_features, out_features = shape
        count = result.layers[shape]
        int8 = {name: time for name, time in seconds.items() if name != FloatBackend.name}
        best = min(int8, key=int8.__getitem__, default=FloatBackend.name)
        times = [f"{MILLISECONDS * seconds[name]:.3f}" if name in seconds else "–" for name in names]
        table.add_row(
            f"{rows} × {in_features} → {out_features}",
            str(count),
            *times,
            f"{best} {seconds['float'] / seconds[best]:.2f}×",
        )
        float_total += count * seconds["float"]
        best_total += count * seconds[best]
    table.add_section()
    table.add_row(
        "all layers",
        str(sum(result.layers.values())),
        f"{MILLISECONDS * float_total:.2f}",
        *[""] * (len(names) - 1),
        f"{float_total / best_total:.2f}×",
    )
    return table


def make_record(result: BenchmarkResult, environment: object) -> dict[str, object]:
    """Make the content of `bench.json`.

    Args:
        result: what was measured.
        environment: what the choices hold for: machine, versions, dtype.
    """
    milliseconds = {}
    for shape, seconds in result.seconds.items():
        milliseconds[format_shape(shape)] = {name: MILLISECONDS * time for name, time in seconds.items()}
    return {
        "device": environment,
        "milliseconds": milliseconds,
        "layers": {format_shape(shape): count for shape, count in result.layers.items()},
        "float_rows": {format_shape(size): rows for size, rows in result.float_rows.items()},
    }


def format_shape(numbers: tuple[int, ...]) -> str:
    """`4096x3072x9216`: rows, in_features and out_features, or the last two."""
    return "x".join(str(number) for number in numbers)
