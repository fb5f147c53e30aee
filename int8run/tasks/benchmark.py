"""`task=bench`: time every backend, and float in every dtype, on the layers and attentions of a model.

The fastest backend of each shape is kept where `backend=auto` looks for it, with its ratio to float. Also
finds the number of rows up to which float layers are faster, for `int8.small_batch_fallback`.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from int8run.backends.auto import AutoBackend, BackendChooser, compare_with_float
from int8run.backends.base import (
    Backend,
    LayerTimes,
    Shape,
    Tunable,
    TunesGroupedWeights,
    find_instruction_set,
)
from int8run.backends.float import Float, TimedFloat
from int8run.backends.registry import make_backend
from int8run.config.job import Job
from int8run.config.run_spec import RunSpec
from int8run.errors import ConfigError, check_range
from int8run.generate.input_files import read_samples
from int8run.layers.plan import CONV, INT8, LayerPlan, plan_layers
from int8run.layers.plan_summary import select_int8_plans
from int8run.models.config_source import resolve_configs
from int8run.models.dual_denoisers import DualDenoiser
from int8run.models.loader import pick_device
from int8run.pipeline.denoiser_variants import choose_classes_of_configs
from int8run.pipeline.load import build_skeletons, load_model, resolve_family
from int8run.pipeline.loaded_model import make_skip_rule
from int8run.pipeline.step_settings import select_load_settings
from int8run.ptq.quantize import check_backend
from int8run.report.console import Progress, print_lines
from int8run.report.run_files import write_json
from int8run.tasks.benchmark_parts import PartTimer
from int8run.tasks.benchmark_shapes import StepShapes, trace_shapes
from int8run.tasks.benchmark_table import (
    BenchmarkResult,
    build_result_table,
    describe_float_rows,
    list_instructions,
    make_record,
)
from int8run.utils.dtypes import FLOAT_DTYPES
from int8run.utils.hardware import describe_instructions, get_device_name

log = logging.getLogger(__name__)
# row counts at which float and INT8 are compared for int8.small_batch_fallback
SMALL_ROW_COUNTS = (1, 2, 4, 8, 16, 32)


def run_benchmark(spec: RunSpec, job: Job, *, rounds: int, rows: int | None) -> None:
    """Measure, print a table, write `bench.json`, keep the choices for `backend=auto`.

    Args:
        spec: the settings.
        job: where they came from, and where to write.
        rounds: timings of each backend, interleaved; the median counts.
        rows: that every layer sees; None: those of one step of the model.

    Raises:
        ConfigError: when the model has no layer to quantize, or for a number of rounds out of range.
    """
    check_range("task.rounds", rounds, 1, 1000, whole=True)
    progress = Progress(enabled=spec.progress)
    device = pick_device(spec.device)
    shapes = find_shapes(spec, job, progress, rows)
    auto = replace(make_auto_backend(spec.backend), rounds=rounds)
    chooser = auto.make_chooser(device, getattr(torch, spec.model.dtype), times_float=True)
    parts = PartTimer(spec.backend, chooser.timer, chooser.cache, spec.attention)

    result = measure_layers(chooser, shapes.linears, progress)
    tune_grouped_weights(
        chooser, shapes.linears, [layout.bits for layout in spec.int8.list_layouts()], progress
    )
    result = replace(
        result,
        parts=parts.measure(shapes, progress),
        instructions={backend.name: find_instruction_set(backend) for backend in chooser.candidates},
    )

    model = job.choices.get("model", "model")
    machine = f"{get_device_name(device)} ({describe_instructions(device)})"
    print_lines("", build_result_table(f"{model} on {machine}; the model is {spec.model.dtype}", result))
    print_unsupported(auto, device)
    left_out = {**chooser.left_out, **parts.left_out}
    for name, reason in left_out.items():
        print_lines(f"cannot run: {name}: {reason}")
    if rows is not None:
        print_lines("not timed: convolutions and attention, whose sizes a step shows; leave out task.rows")
    warn_unsteady(result)
    for title, instructions in list_instructions(result).items():
        built = ", ".join(f"{name} {text}" for name, text in instructions.items())
        print_lines(f"kernels of {title}:  {built}")
    print_lines(describe_float_rows(result.float_rows))
    file = job.output_dir / "bench.json"
    write_json(make_record(result, chooser.cache.environment, left_out), file)
    print_lines(f"numbers:  {file}", f"choices:  {chooser.cache.path}")


def find_shapes(spec: RunSpec, job: Job, progress: Progress, rows: int | None) -> StepShapes:
    """The shapes to time.

    Args:
        spec: the settings.
        job: inputs of the samples are found beside it.
        progress: of the loading.
        rows: that every Linear sees; None: a step of the model shows what everything sees.
    """
    if rows is None:
        return trace_model_shapes(spec, job, progress)
    plans = plan_from_configs(spec)
    return StepShapes(Counter((rows, plan.in_features, plan.out_features) for plan in plans))


def warn_unsteady(result: BenchmarkResult) -> None:
    """Warn of shapes whose times say more about other work on the machine."""
    num_unsteady = sum(len(group.unsteady) for group in result.groups)
    if num_unsteady:
        log.warning(
            "%d of %d shapes scatter by more than twice: other work runs here; none is compared or kept",
            num_unsteady,
            len(result.layers) + sum(len(part.seconds) for part in result.parts),
        )


def select_plans(spec: RunSpec, denoiser: nn.Module, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers that become INT8, which the backend must be able to take.

    Args:
        spec: the settings.
        denoiser: of the model.
        plans: of all its Linears.

    Raises:
        ConfigError: when there are none.
        BackendError: when the backend cannot run here or cannot take a layer.
    """
    chosen = [plan for plan in plans if plan.skip_reason is None]
    if not chosen:
        name = type(denoiser).__name__
        raise ConfigError(f"{name}: no Linear would become INT8; choose another model_type=")
    check_backend(spec.backend, pick_device(spec.device), chosen)
    return chosen


def plan_from_configs(spec: RunSpec) -> list[LayerPlan]:
    """The layers that become INT8, by the configs of the model alone."""
    source = choose_classes_of_configs(resolve_configs(spec.model))
    skeletons = build_skeletons(source, getattr(torch, spec.model.dtype))
    first = next(iter(skeletons.values()))
    family = resolve_family(spec.model_type, first, source.pipeline_class)
    denoiser = first if len(skeletons) == 1 else DualDenoiser(skeletons)
    return select_plans(spec, denoiser, plan_layers(denoiser, make_skip_rule(family, denoiser)))


def trace_model_shapes(spec: RunSpec, job: Job, progress: Progress) -> StepShapes:
    """Count the shapes in one step of the model.

    Args:
        spec: the settings.
        job: inputs of the samples are found beside it.
        progress: of the loading.
    """
    samples = read_samples(spec.prompts, spec.seed, job.output_dir, spec.sampling.input_size)
    # the shapes of the layers are enough: of the denoiser only what never becomes INT8 is read
    loaded = load_model(select_load_settings(spec, needs_float_denoiser=False), progress)
    plans = loaded.plan_layers(convolutions=INT8)
    linears = select_plans(spec, loaded.denoiser, [plan for plan in plans if plan.is_linear])
    convolutions = [plan for plan in select_int8_plans(plans) if plan.kind == CONV]
    return trace_shapes(samples, loaded, [*linears, *convolutions])


def make_auto_backend(backend: Backend) -> AutoBackend:
    """`backend=auto` as it is; of another backend one that has it as its only candidate.

    The float layer is timed anyway, so that `backend=float` adds nothing to the shipped candidates.
    """
    if isinstance(backend, Float):
        backend = make_backend(AutoBackend.name)
    if isinstance(backend, AutoBackend):
        return backend
    return AutoBackend({backend.name: backend})


def print_unsupported(auto: AutoBackend, device: torch.device) -> None:
    """Print which candidates cannot run here, and why."""
    for candidate in auto.candidates.values():
        reasons = candidate.limits.unsupported_reasons(device)
        if reasons:
            print_lines(f"not here: {candidate.name} {'; '.join(reasons)}")


def measure_layers(
    chooser: BackendChooser, layers: Mapping[Shape, int], progress: Progress
) -> BenchmarkResult:
    """Time all backends and the float layer in all dtypes on all shapes.

    Args:
        chooser: measures, and keeps the choices.
        layers: number of layers of each shape.
        progress: shows the shapes.
    """
    seconds = {}
    unsteady = set()
    with progress.track_loop("Timing layer shapes", len(layers)) as advance:
        for shape in sorted(layers):
            times = measure_shape(chooser, shape)
            seconds[shape] = times.seconds
            if not times.is_steady:
                unsteady.add(shape)
            advance(1)
    float_rows = {}
    for in_features, out_features in sorted({shape[1:] for shape in layers}):
        float_rows[in_features, out_features] = measure_float_rows(chooser, in_features, out_features)
    return BenchmarkResult(seconds, layers, float_rows, unsteady)


def tune_grouped_weights(
    chooser: BackendChooser, shapes: Iterable[Shape], bits: Sequence[int], progress: Progress
) -> None:
    """Let backends find out how they decode weights of 4 and 6 bits fastest.

    Args:
        chooser: has the backends and the timer.
        shapes: of the layers.
        bits: of `int8.bits`; empty: 8.
        progress: shows the shapes.
    """
    tasks = [(shape, number) for shape in sorted(shapes) for number in bits]
    if not tasks:
        return
    with progress.track_loop("Timing weights of few bits", len(tasks)) as advance:
        for shape, number in tasks:
            for backend in chooser.supported_backends(*shape[1:]):
                if isinstance(backend, TunesGroupedWeights):
                    backend.tune_grouped(chooser.timer, shape, number)
            advance(1)


def measure_shape(chooser: BackendChooser, shape: Shape) -> LayerTimes:
    """Time a shape in every float dtype and on every backend that supports it; keep the fastest backend.

    Returns:
        Seconds by dtype and by backend; one whose results are wrong on this machine is left out.
    """
    _, in_features, out_features = shape
    correct = chooser.select_correct(chooser.supported_backends(in_features, out_features), in_features)
    for backend in correct:
        if isinstance(backend, Tunable):
            backend.tune(chooser.timer, shape)
    contestants: dict[str, Backend] = {name: TimedFloat(getattr(torch, name)) for name in FLOAT_DTYPES}
    contestants |= {backend.name: backend for backend in correct}
    times = chooser.timer.measure(contestants, shape)
    chooser.note_failures(times.failures)
    able = {backend.name: backend for backend in correct if backend.name in times.seconds}
    if able and times.is_steady:
        fastest = min(able, key=times.seconds.__getitem__)
        choice = compare_with_float(times, able[fastest], chooser.float_layer.dtype_name)
        chooser.save_choice(list(able.values()), shape, choice)
    return times


def measure_float_rows(chooser: BackendChooser, in_features: int, out_features: int) -> int | None:
    """Find the number of rows up to which the float layer is faster than every backend.

    Returns:
        The largest of SMALL_ROW_COUNTS for which this is so, and for all smaller ones; 0 when it never is.
        None where times scatter.
    """
    supported = chooser.supported_backends(in_features, out_features)
    contestants: dict[str, Backend] = {Float.name: chooser.float_layer}
    contestants |= {backend.name: backend for backend in chooser.select_correct(supported, in_features)}
    largest = 0
    is_steady = True
    for rows in SMALL_ROW_COUNTS:
        times = chooser.timer.measure(contestants, (rows, in_features, out_features))
        is_steady = is_steady and times.is_steady
        fastest = min(times.seconds, key=times.seconds.__getitem__, default="")
        if fastest != Float.name:
            break
        largest = rows
    if not is_steady:
        return None
    chooser.cache.put(f"float_rows | {in_features}x{out_features}", str(largest))
    return largest
