"""`task=bench`: time every backend on the layer shapes of a model, and keep the answers where `backend=auto` looks for them."""

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
from int8run.generate.prompts import build_samples
from int8run.kernels.hadamard.reference import Rotation
from int8run.pipeline.load import load_model
from int8run.pipeline.quantize_denoiser import count_layer_rows
from int8run.ptq.quantize import check_backend
from int8run.quant.weight import QuantizedWeight
from int8run.report.console import Progress, print_lines
from int8run.report.run_files import write_json
from int8run.utils.hardware import get_device_name

log = logging.getLogger(__name__)
# row counts at which float and INT8 are compared for int8.small_batch_fallback
SMALL_ROW_COUNTS = (1, 2, 4, 8, 16, 32)
Shape = tuple[int, int, int]  # rows, in_features, out_features


@dataclass(frozen=True)
class FloatBackend:
    """The float layer in the place of a backend, so that it is timed by the same code."""

    dtype: torch.dtype
    name: ClassVar[str] = "float"
    limits: ClassVar[Limits] = Limits()

    def pack_weight(self, weight: QuantizedWeight) -> Tensor:
        """The dequantized weight, [N, K]."""
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
        """x as it is."""
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
        """x: [M, K] -> [M, N]."""
        return F.linear(x.q, packed, None if bias is None else bias.to(dtype))


def run_benchmark(spec: RunSpec, job: Job, rounds: int) -> None:
    """Measure, show a table, write `bench.json`, fill the table of choices.

    Raises:
        ConfigError: when the model has no layer to quantize.
    """
    progress = Progress(spec.progress)
    loaded = load_model(spec, progress)
    wanted = build_samples(spec.prompts.read(), spec.prompts.seeds_per_prompt, spec.seed)[
        : spec.sampler.batch
    ]
    calls = capture_step(loaded.pipe, loaded.component, loaded.denoiser, wanted, loaded.sampling)
    plans = [p for p in loaded.plan_layers() if p.skip_reason is None]
    if not plans:
        raise ConfigError(
            f"{type(loaded.denoiser).__name__}: no Linear would become INT8; choose another model_type="
        )
    rows = count_layer_rows(loaded.denoiser, plans, calls)
    shapes = Counter((rows[p.name], p.in_features, p.out_features) for p in plans)

    device, dtype = loaded.device, getattr(torch, spec.model.dtype)
    check_backend(spec.backend, device, plans)
    auto = (
        spec.backend
        if isinstance(spec.backend, AutoBackend)
        else AutoBackend({spec.backend.name: spec.backend})
    )
    chooser = auto.make_chooser(device, dtype)
    chooser.rounds = rounds
    float_layer = FloatBackend(dtype)
    times: dict[Shape, dict[str, float]] = {}
    unsteady = 0
    with progress.track_loop("bench", len(shapes)) as advance:
        for shape in sorted(shapes):
            times[shape] = measure_shape(chooser, float_layer, shape)
            unsteady += not chooser.is_steady
            advance(1)
    fallback = {
        (k, n): measure_fallback(chooser, float_layer, k, n)
        for k, n in sorted({shape[1:] for shape in shapes})
    }

    print_lines(
        "",
        build_result_table(
            f"{job.choices.get('model', 'model')} on {get_device_name(device)}; float is {spec.model.dtype}",
            shapes,
            times,
        ),
    )
    for b in auto.candidates.values():
        if reasons := b.limits.unsupported_reasons(device):
            print_lines(f"not here: {b.name} {'; '.join(reasons)}")
    if unsteady:
        log.warning(
            "%d of %d shapes scatter by more than twice: other work runs here; their choices are not kept",
            unsteady,
            len(shapes),
        )
    few = ", ".join(f"{k}x{n}: {limit}" for (k, n), limit in fallback.items())
    print_lines(f"float is faster up to this many rows (int8.small_batch_fallback): {few}")
    record = {
        "device": chooser.cache.environment,
        "milliseconds": {
            "x".join(map(str, shape)): {n: 1000 * t for n, t in found.items()}
            for shape, found in times.items()
        },
        "layers": {"x".join(map(str, shape)): count for shape, count in shapes.items()},
        "float_rows": {f"{k}x{n}": limit for (k, n), limit in fallback.items()},
    }
    write_json(record, job.output_dir / "bench.json")
    print_lines(f"numbers: {job.output_dir / 'bench.json'}", f"choices: {chooser.cache.path}")


def measure_shape(chooser: BackendChooser, float_layer: Backend, shape: Shape) -> dict[str, float]:
    """Seconds of the float layer and of every backend that can take this shape; the best backend is kept."""
    rows, k, n = shape
    able = chooser.supported_backends(k, n)
    for backend in able:
        if isinstance(backend, Tunable):
            backend.tune(chooser, rows, k, n)
    correct = chooser.select_correct(able, k)
    seconds = chooser.measure_seconds([float_layer, *correct], rows, k, n)
    best = min((b.name for b in correct), key=seconds.__getitem__, default=None)
    if best is not None and chooser.is_steady:
        chooser.save_choice((b.name for b in able), shape, best)
    return seconds


def measure_fallback(chooser: BackendChooser, float_layer: Backend, k: int, n: int) -> int:
    """The largest of FEW_ROWS up to which float is faster than every backend at each count; 0 when it never is."""
    limit, steady = 0, True
    correct = chooser.select_correct(chooser.supported_backends(k, n), k)
    for rows in SMALL_ROW_COUNTS:
        seconds = chooser.measure_seconds([float_layer, *correct], rows, k, n)
        steady &= chooser.is_steady
        if min(seconds, key=seconds.__getitem__) != float_layer.name:
            break
        limit = rows
    if steady:
        chooser.cache.put(f"float_rows | {k}x{n}", str(limit))
    return limit


def build_result_table(
    title: str, shapes: Mapping[Shape, int], times: Mapping[Shape, Mapping[str, float]]
) -> Table:
    """A row per shape: milliseconds of each backend, and how much faster the best is than float; all layers in the last row."""
    names = list(dict.fromkeys(name for found in times.values() for name in found))
    table = Table(title=title, title_justify="left")
    for column in ("rows × in → out", "layers", *(f"{name}, ms" for name in names), "best"):
        table.add_column(column, justify="left" if column.startswith("rows") else "right")
    total: Counter[str] = Counter()
    for shape, found in times.items():
        rows, k, n = shape
        int8 = {name: t for name, t in found.items() if name != "float"}
        best = min(int8, key=int8.__getitem__, default="float")
        table.add_row(
            f"{rows} × {k} → {n}",
            str(shapes[shape]),
            *(f"{1000 * found[name]:.3f}" if name in found else "–" for name in names),
            f"{best} {found['float'] / found[best]:.2f}×",
        )
        total.update({"float": found["float"] * shapes[shape], "best": found[best] * shapes[shape]})
    table.add_section()
    empty: Sequence[str] = [""] * (len(names) - 1)
    table.add_row(
        "all layers",
        str(sum(shapes.values())),
        f"{1000 * total['float']:.2f}",
        *empty,
        f"{total['float'] / total['best']:.2f}×",
    )
    return table
