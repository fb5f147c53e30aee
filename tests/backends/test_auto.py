"""`backend=auto`: which candidates take part, which one wins, what is remembered.

Times are faked, so nothing depends on the machine.
"""

import itertools
import json
import os
import re
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from filelock import FileLock
from support.compare import assert_close
from support.helpers import CPU, randn, shipped, usable

from int8run.backends import autotune_cache, float_comparison, layer_timer
from int8run.backends.auto import AutoBackend, LayerChoice, parse_choice
from int8run.backends.autotune_cache import AutotuneCache, read_entries
from int8run.backends.base import Limits, run_plain_layer
from int8run.backends.float import Float, TimedFloat
from int8run.backends.float_comparison import FloatComparison
from int8run.backends.layer_timer import LayerTimer
from int8run.backends.reference import Reference
from int8run.errors import BackendError, ConfigError, FileError
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.base import OutlierTransform
from int8run.quant.weight import quantize_weight
from int8run.utils import timing

LATE = 12  # rows: the check of the numbers has 8, the layer 16


@dataclass(frozen=True)
class Exact(Reference):
    """A second correct backend."""

    name: ClassVar[str] = "exact"


@dataclass(frozen=True)
class Saturating(Reference):
    """Sums in 16 bits, as byte products without VNNI do."""

    name: ClassVar[str] = "saturating"

    def linear(self, x, packed, w_scale, *, dtype, bias=None, branch=None, strengths=None):
        y = (x.q.double() @ packed.double().T).clamp(-(2**15), 2**15 - 1).float() * w_scale * x.scale
        return (y if bias is None else y + bias).to(dtype)


@dataclass(frozen=True)
class Transposed(Reference):
    """Reads a weight of [N, K] as one of [K, N]; right where all numbers are alike."""

    name: ClassVar[str] = "transposed"

    def linear(self, x, packed, w_scale, *, dtype, bias=None, branch=None, strengths=None):
        packed = packed.flatten().reshape(packed.shape[::-1]).T
        return super().linear(x, packed, w_scale, dtype=dtype, bias=bias)


@dataclass(frozen=True)
class WrongInHalf(Reference):
    """A backend whose code for the model's dtype has a fault."""

    name: ClassVar[str] = "wrong_in_half"

    def linear(self, x, packed, w_scale, *, dtype, bias=None, branch=None, strengths=None):
        y = super().linear(x, packed, w_scale, dtype=dtype, bias=bias)
        return y if dtype == torch.float32 else 2 * y


@dataclass(frozen=True)
class WithSettings(Reference):
    """A backend with a setting, and a file of what it measured."""

    steps: int = 3
    table: str | None = None
    name: ClassVar[str] = "with_settings"


@dataclass(frozen=True)
class GpuOnly(Reference):
    name: ClassVar[str] = "gpu_only"
    limits: ClassVar[Limits] = Limits(devices=("cuda",))


@dataclass(frozen=True)
class Failing(Reference):
    """Raises what it is given, in each call or in those with many rows alone."""

    error: Exception
    from_rows: int = 0
    name: ClassVar[str] = "failing"

    def linear(self, x, packed, w_scale, *, dtype, bias=None, branch=None, strengths=None):
        if len(x.q) >= self.from_rows:
            raise self.error
        return super().linear(x, packed, w_scale, dtype=dtype, bias=bias)


@pytest.fixture
def seconds(monkeypatch):
    """Seconds of each call by backend name; the last value repeats."""
    table: dict[str, list[float]] = {}
    calls: dict[str, itertools.count] = {}

    def timed(attempt):
        name = attempt.run.args[0].name
        index = next(calls.setdefault(name, itertools.count()))
        return table[name][min(index, len(table[name]) - 1)]

    def in_turns(runs, device, rounds):
        return list(zip(*([timed(call) for call in runs] for _ in range(rounds + 1)), strict=True))

    monkeypatch.setattr(layer_timer, "time_in_turns", lambda *args: [times[1:] for times in in_turns(*args)])
    return table


def chooser(tmp_path, *backends, dtype=torch.float32, rounds=3, **options):
    return AutoBackend(
        {b.name: b for b in backends}, rounds, str(tmp_path / "choices" / "table.json")
    ).make_chooser(CPU, dtype, **options)


@pytest.mark.parametrize(
    ("reference", "exact", "winner"),
    [
        ([2.0], [1.0], "exact"),
        ([1.0], [2.0], "reference"),
        ([0.0, 5.0], [9.0, 1.0], "exact"),
        ([3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 90.0, 1.0], "exact"),
    ],
    ids=[
        "exact is faster",
        "reference is faster",
        "the warm-up does not count",
        "one slow round does not count",
    ],
)
def test_the_least_median_wins(tmp_path, seconds, reference, exact, winner):
    seconds.update(reference=reference, exact=exact)
    assert chooser(tmp_path, Reference(), Exact()).choose_backend(4, 16, 8).name == winner


def test_a_saturating_backend_is_left_out_even_if_faster(tmp_path, seconds, caplog):
    seconds.update(saturating=[0.001], reference=[9.0], exact=[8.0])
    assert chooser(tmp_path, Saturating(), Reference(), Exact()).choose_backend(4, 64, 8).name == "exact"
    assert "backend=auto leaves out saturating: its sums saturate on this machine" in caplog.text


@pytest.mark.parametrize("wrong", [Transposed(), WrongInHalf()], ids=lambda backend: backend.name)
def test_a_backend_that_is_wrong_for_random_numbers_is_left_out(tmp_path, seconds, wrong):
    seconds.update({wrong.name: [0.1]}, reference=[2.0], exact=[1.0])
    ours = chooser(tmp_path, wrong, Reference(), Exact(), dtype=torch.bfloat16)

    assert ours.choose_backend(4, 64, 8).name == "exact"
    assert ours.left_out == {wrong.name: "its products of random numbers are wrong on this machine"}


@pytest.mark.parametrize("from_rows", [0, LATE], ids=["at once", "in the measured layer"])
@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: an illegal memory access was encountered",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "HIP error: unspecified launch failure",
        "CUDA error: device-side assert triggered",
    ],
)
def test_a_fault_after_which_the_gpu_is_lost_ends_the_run(tmp_path, message, from_rows):
    """What comes next would fail with it and be called the reason."""
    with pytest.raises(RuntimeError, match=re.escape(message)):
        chooser(tmp_path, Failing(RuntimeError(message), from_rows), Reference()).choose_backend(16, 16, 8)


@pytest.mark.parametrize("table", ["a\0b", "a\ud800b", "~nobody_of_this_name/table.json"])
def test_a_table_that_can_be_no_path_is_an_error_before_anything_is_measured(table):
    with pytest.raises(FileError):
        AutoBackend({}, table=table)


def test_of_two_processes_that_measure_at_once_the_first_counts(tmp_path, seconds):
    """Jobs that run side by side give the same config the same layers."""
    first, second = (chooser(tmp_path, Reference(), Exact(), times_float=True) for _ in range(2))
    seconds.update(reference=[2.0], exact=[1.0], float=[3.0])
    assert first.choose_layer((4, 16, 8)) == LayerChoice(Exact(), FloatComparison(3.0))

    seconds.update(reference=[1.0], exact=[2.0])
    assert second.choose_layer((4, 16, 8)) == LayerChoice(Exact(), FloatComparison(3.0))
    assert second.timer.n_measured == 1
    assert list(read_entries(first.cache.path).values()) == ["exact 3.0"]
    # what was there when the file was read is measured on purpose, as by task=bench
    again = AutotuneCache(first.cache.path, CPU, torch.float32)
    (key,) = (key.removeprefix(f"{again.environment} | ") for key in again.entries)
    assert again.put(key, "reference 2.0") == "reference 2.0"
    assert list(read_entries(first.cache.path).values()) == ["reference 2.0"]


def test_a_candidate_with_other_settings_is_measured_on_its_own(tmp_path, seconds):
    seconds.update(reference=[2.0], with_settings=[1.0])
    backends = [WithSettings(), WithSettings(steps=4), WithSettings(table="elsewhere"), WithSettings(steps=4)]
    measured = []
    for backend in backends:
        ours = chooser(tmp_path, Reference(), backend)
        assert ours.choose_backend(4, 16, 8) == backend
        measured.append(ours.timer.n_measured)

    assert measured == [1, 1, 0, 0]


def test_float_is_no_candidate():
    with pytest.raises(ConfigError, match=r"backend\.candidates holds float, .*int8\.only_if_faster=true"):
        AutoBackend({"float": Float()})


def test_a_table_that_another_process_keeps_is_not_waited_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(autotune_cache, "LOCK_TIMEOUT_S", 0.01)
    cache = AutotuneCache(tmp_path / "table.json", CPU)
    with FileLock(tmp_path / "table.json.lock"):
        cache.put("a", "b")

    assert cache.get("a") == "b"
    assert "measured choices cannot be kept" in caplog.text
    assert not (tmp_path / "table.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="other systems have no pipes among their files")
def test_a_table_that_is_a_pipe_holds_nothing(tmp_path):
    """Reading from it would wait for ever."""
    os.mkfifo(tmp_path / "pipe")

    assert AutotuneCache(tmp_path / "pipe", CPU).entries == {}


def find_triton_errors():
    """What Triton raises, where it is installed."""
    errors = pytest.importorskip("triton.runtime.errors")
    compiler_errors = pytest.importorskip("triton.compiler.errors")
    return {
        "resources": errors.OutOfResources(98304, 65536, "shared memory"),
        "compilation": compiler_errors.CompilationError("x = 1", SimpleNamespace(lineno=1, col_offset=0)),
        "ptxas": errors.PTXASError("no such architecture"),
    }


FAILURES = {
    "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
    "compiler fails": subprocess.CalledProcessError(1, ["gcc"]),
    "compiler not there": FileNotFoundError("nowhere/gcc"),
    "no driver library": AssertionError("libcuda.so cannot found!\n"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB"),
    "_int_mm": RuntimeError("self.size(0) needs to be greater than 16, but got 8"),
    "kernels": BackendError("backend failing: no kernels"),
    "import": ImportError("undefined symbol: _ZN3c10"),
}


@pytest.mark.parametrize("from_rows", [0, LATE], ids=["at once", "in the measured layer"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_candidate_that_fails_is_left_out_with_its_reason(tmp_path, seconds, caplog, case, from_rows):
    seconds.update(reference=[2.0], exact=[1.0])
    ours = chooser(tmp_path, Failing(FAILURES[case], from_rows), Reference(), Exact())

    assert ours.choose_backend(16, 16, 8).name == "exact"
    words = str(FAILURES[case]).split()[0]
    assert words in ours.left_out["failing"] and "\n" not in ours.left_out["failing"]
    assert caplog.text.count("backend=auto leaves out failing: ") == 1


@pytest.mark.parametrize("case", ["resources", "compilation", "ptxas"])
def test_what_triton_raises_leaves_a_candidate_out(tmp_path, seconds, case):
    error = find_triton_errors()[case]
    seconds.update(reference=[2.0], exact=[1.0])
    ours = chooser(tmp_path, Failing(error, LATE), Reference(), Exact())

    assert ours.choose_backend(16, 16, 8).name == "exact"
    assert ours.left_out["failing"].startswith(f"{type(error).__name__}: ")


def test_a_fault_of_ours_is_not_taken_for_a_missing_compiler(tmp_path):
    for error in (TypeError("quantize() takes no x"), AssertionError("the float factors were dropped")):
        with pytest.raises(type(error)):
            chooser(tmp_path, Failing(error), Reference()).choose_backend(4, 16, 8)


def test_a_candidate_that_fails_between_two_rounds_is_left_out(tmp_path):
    @dataclass(frozen=True)
    class Exhausted(Reference):
        calls: itertools.count
        name: ClassVar[str] = "exhausted"

        def linear(self, *args, **options):
            if next(self.calls) == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().linear(*args, **options)

    ours = chooser(tmp_path, Exhausted(itertools.count()), Reference())

    assert ours.choose_backend(4, 16, 8).name == "reference"
    assert ours.left_out == {"exhausted": "OutOfMemoryError: CUDA out of memory"}


def test_a_layer_of_a_shape_that_a_candidate_cannot_run_is_measured_once(tmp_path, seconds):
    seconds.update(reference=[2.0], exact=[1.0], failing=[0.5])
    ours = chooser(tmp_path, Failing(FAILURES["memory"], LATE), Reference(), Exact())

    assert ours.choose_layer((16, 16, 8)) is ours.choose_layer((16, 16, 8)) and ours.timer.n_measured == 1


def test_a_choice_names_what_failed_at_its_own_shape(tmp_path, seconds):
    seconds.update(reference=[2.0], exact=[1.0], failing=[0.5])
    ours = chooser(tmp_path, Failing(FAILURES["memory"], LATE), Saturating(), Reference(), Exact())
    large, small = ours.choose_layer((16, 64, 8)), ours.choose_layer((4, 64, 8))

    assert large.backend == Exact() and set(large.failures) == {"failing", "saturating"}
    assert small.backend.name == "failing" and set(small.failures) == {"saturating"}


def test_what_failed_is_tried_again_by_the_next_run(tmp_path, seconds):
    """The compiler may be there by then."""
    seconds.update(reference=[2.0], exact=[3.0], failing=[1.0])
    error = RuntimeError("Failed to find C compiler")

    first = chooser(tmp_path, Failing(error, LATE), Reference(), Exact())
    assert first.choose_backend(16, 16, 8).name == "reference"
    mended = chooser(tmp_path, Failing(error, from_rows=99), Reference(), Exact())
    assert mended.choose_backend(16, 16, 8).name == "failing" and not mended.left_out


def test_all_candidates_get_one_input_and_one_weight(monkeypatch):
    seen = []
    monkeypatch.setattr(layer_timer, "run_plain_layer", lambda backend, *tensors: seen.append(tensors))
    tiles = {str(index): Reference() for index in range(30)}
    LayerTimer(CPU, torch.bfloat16, rounds=1).measure(tiles, (4, 16, 8))

    assert len({x.data_ptr() for x, *_ in seen}) == len({packed.data_ptr() for _, packed, *_ in seen}) == 1
    assert seen[0][0].dtype == torch.bfloat16


def test_what_takes_much_too_long_is_called_once(monkeypatch):
    clock = itertools.count()
    slow, quick = TimedFloat(torch.float64), TimedFloat(torch.float32)
    calls = []

    def run(backend, x, packed, scale, bias):
        calls.append(backend)
        for _ in range(99 if backend is slow else 1):
            next(clock)

    monkeypatch.setattr(layer_timer, "run_plain_layer", run)
    monkeypatch.setattr(layer_timer, "read_clock", lambda device: next(clock))
    monkeypatch.setattr(timing, "read_clock", lambda device: next(clock))
    times = LayerTimer(CPU, torch.float32, rounds=5).measure({"slow": slow, "quick": quick}, (4, 16, 8))

    assert times.seconds["slow"] == 100 and times.seconds["quick"] == 2
    # packed and called, called once more; then one round that warms up and five
    assert (calls.count(slow), calls.count(quick)) == (2, 8)


# -- the float layer takes part -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("int8_seconds", "speedup", "is_float_faster"),
    [(0.5, 2.0, False), (1.0, 1.0, False), (1.04, 0.962, False), (1.06, 0.943, True), (4.0, 0.25, True)],
)
def test_float_has_to_be_clearly_faster(
    tmp_path, seconds, monkeypatch, int8_seconds, speedup, is_float_faster
):
    """As fast as INT8 it only takes more memory."""
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    seconds.update(reference=[9.0], exact=[int8_seconds], float=[1.0])
    choice = chooser(tmp_path, Reference(), Exact(), times_float=True).choose_layer((4, 16, 8))

    assert (choice.backend.name, choice.comparison.speedup, choice.comparison.is_float_faster) == (
        "exact",
        speedup,
        is_float_faster,
    )


def test_times_that_scatter_take_no_layer_out_of_int8(tmp_path, seconds):
    seconds.update(reference=[4.0], float=[1.0, 1.0, 3.0, 3.0])
    choice = chooser(tmp_path, Reference(), times_float=True).choose_layer((4, 16, 8))

    assert choice == LayerChoice(Reference()) and not choice.comparison.is_float_faster


@pytest.mark.parametrize(
    ("int8_seconds", "is_float_faster"), [([1.2, 1.1, 1.2, 1.2], True), ([1.2, 1.0, 1.2, 1.2], False)]
)
def test_float_has_to_be_faster_than_the_quickest_int8_call(
    tmp_path, seconds, monkeypatch, int8_seconds, is_float_faster
):
    """Medians of steady times differ by a fifth without a reason."""
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    seconds.update(reference=int8_seconds, float=[1.0])

    for n_measured in (1, 0):  # the second chooser reads what the first has kept
        ours = chooser(tmp_path, Reference(), times_float=True)
        choice = ours.choose_layer((4, 16, 8))
        assert (choice.comparison.speedup, choice.comparison.is_float_faster) == (0.833, is_float_faster)
        assert ours.timer.n_measured == n_measured


def test_the_ratio_is_remembered(tmp_path, seconds):
    seconds.update(reference=[2.0], float=[5.0])
    chooser(tmp_path, Reference(), times_float=True).choose_layer((4, 16, 8))
    again = chooser(tmp_path, Reference(), times_float=True)

    assert again.choose_layer((4, 16, 8)) == LayerChoice(Reference(), FloatComparison(2.5))
    assert again.timer.n_measured == 0 and read_entries(again.cache.path).popitem()[1] == "reference 2.5"


def test_a_choice_without_a_ratio_is_measured_again_where_float_takes_part(tmp_path, seconds):
    seconds.update(reference=[2.0], exact=[3.0], float=[4.0])

    def find_speedup(**settings):
        choice = chooser(tmp_path, Reference(), Exact(), **settings).choose_layer((4, 16, 8))
        return choice.comparison.speedup

    assert find_speedup() is None
    assert find_speedup(times_float=True) == 2
    # and is there for those who do not ask for it
    assert find_speedup() == 2


@pytest.mark.parametrize("ratio", ["nan", "inf", "-1", "0", "much"])
def test_a_damaged_ratio_counts_as_none(ratio):
    assert parse_choice(f"reference {ratio}", {"reference": Reference()}) == LayerChoice(Reference())
    assert parse_choice(f"gone {ratio}", {"reference": Reference()}) is None


def test_the_slow_definition_is_compared_with_float_as_well(tmp_path, seconds, monkeypatch):
    monkeypatch.setattr(float_comparison, "MIN_FLOAT_GAIN", 1.05)
    seconds.update(reference=[2.0], float=[1.0])
    backend = AutoBackend({"gpu": GpuOnly()}, 1, str(tmp_path / "table.json"), last_resort=Reference())

    choice = backend.make_chooser(CPU, torch.float32, times_float=True).choose_layer((4, 16, 8))

    assert choice.backend == Reference() and choice.comparison.is_float_faster
    assert backend.make_chooser(CPU, torch.float32).choose_layer((4, 32, 8)) == LayerChoice(Reference())


def test_float_that_cannot_run_leaves_int8_alone(tmp_path, seconds, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TimedFloat, "pack_weight", fail)
    seconds.update(reference=[2.0])
    ours = chooser(tmp_path, Reference(), times_float=True)
    choice = ours.choose_layer((4, 16, 8))

    failures = {"float": "OutOfMemoryError: CUDA out of memory"}
    assert choice == LayerChoice(Reference(), failures=failures) and not choice.comparison.is_float_faster
    assert ours.choose_layer((4, 16, 8)) is choice and ours.timer.n_measured == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_timed_float_layer_is_a_float_layer(dtype):
    x, weight, bias = randn(4, 16, dtype=dtype), quantize_weight(randn(8, 16, seed=1)), randn(8, seed=2)
    layer = TimedFloat(dtype)

    y = run_plain_layer(layer, x, layer.pack_weight(weight), weight.scale[:, 0], bias)

    assert torch.equal(y, F.linear(x, weight.dequantize(dtype), bias.to(dtype)))


def test_the_float_backend_keeps_the_integers_for_files():
    weight = quantize_weight(randn(8, 16, seed=1))
    layer = Int8Linear(QuantizedLayer(weight, OutlierTransform(), bias=None), Float(), torch.float32)

    assert torch.equal(layer.read_qdata(), weight.qdata)
    assert_close("float", layer(randn(4, 16)), F.linear(randn(4, 16), weight.dequantize()), 1e-6)


def test_no_correct_backend_is_an_error(tmp_path):
    other = type("Other", (Saturating,), {"name": "other"})()
    with pytest.raises(BackendError, match=r"no INT8 backend computes the right numbers on .*\| float32"):
        chooser(tmp_path, Saturating(), other).choose_backend(4, 64, 8)


def test_a_sole_candidate_is_checked_too(tmp_path):
    with pytest.raises(BackendError, match="no INT8 backend computes the right numbers"):
        chooser(tmp_path, Saturating()).choose_backend(4, 64, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("in_features", [7, 1024])
def test_correct_backends_agree_in_every_dtype(tmp_path, seconds, dtype, in_features):
    # in float16 the full-range product passes 65504 from 516 features on
    seconds.update(reference=[2.0], exact=[1.0])
    assert (
        chooser(tmp_path, Reference(), Exact(), dtype=dtype).choose_backend(4, in_features, 8).name == "exact"
    )


def test_a_candidate_that_cannot_run_here_takes_no_part(tmp_path, seconds):
    seconds.update(gpu_only=[0.0], reference=[2.0], exact=[1.0])
    assert chooser(tmp_path, GpuOnly(), Reference(), Exact()).choose_backend(4, 16, 8).name == "exact"


def test_no_candidate_for_the_device(tmp_path):
    with pytest.raises(
        BackendError, match=r"backend=auto has no candidate for cpu: gpu_only: runs on cuda, not on cpu$"
    ):
        chooser(tmp_path, GpuOnly())


def test_a_second_chooser_reads_the_table_and_measures_nothing(tmp_path, seconds):
    seconds.update(reference=[2.0], exact=[1.0])
    first = chooser(tmp_path, Reference(), Exact())

    assert first.choose_backend(4, 16, 8) is first.choose_backend(4, 16, 8) and first.timer.n_measured == 1

    # were it measured again, the other would win
    seconds.update(reference=[1.0], exact=[2.0])
    second = chooser(tmp_path, Reference(), Exact())

    assert second.choose_backend(4, 16, 8).name == "exact" and second.timer.n_measured == 0


@pytest.mark.parametrize(
    "rows", [(5, 16, 8), (4, 17, 8), (4, 16, 9)], ids=["rows", "in_features", "out_features"]
)
def test_another_shape_is_measured_on_its_own(tmp_path, seconds, rows):
    seconds.update(reference=[2.0], exact=[1.0])
    ours = chooser(tmp_path, Reference(), Exact())
    ours.choose_backend(4, 16, 8)
    ours.choose_backend(*rows)

    assert ours.timer.n_measured == 2


def test_other_candidates_or_another_dtype_are_measured_anew(tmp_path, seconds):
    seconds.update(reference=[2.0], exact=[1.0], third=[3.0])
    chooser(tmp_path, Reference(), Exact()).choose_backend(4, 16, 8)
    for again in (
        chooser(tmp_path, Reference(), Exact(), type("Third", (Exact,), {"name": "third"})()),
        chooser(tmp_path, Reference(), Exact(), dtype=torch.bfloat16),
    ):
        again.choose_backend(4, 16, 8)
        assert again.timer.n_measured == 1

    assert len(read_entries(tmp_path / "choices" / "table.json")) == 3


@pytest.mark.parametrize(
    "damage",
    [b"", b'{"a": "ref', b"null", b"[1, 2]", b'"words"', b"\xff\xfe\x00"],
    ids=["empty", "cut", "null", "list", "string", "binary"],
)
def test_a_damaged_table_counts_as_empty_and_is_written_anew(tmp_path, seconds, damage):
    seconds.update(reference=[2.0], exact=[1.0])
    table = tmp_path / "choices" / "table.json"
    table.parent.mkdir()
    table.write_bytes(damage)

    assert chooser(tmp_path, Reference(), Exact()).choose_backend(4, 16, 8).name == "exact"
    assert list(read_entries(table).values()) == ["exact"]


@pytest.mark.parametrize("choice", ["gone", ["exact"], None], ids=["unknown name", "list", "null"])
def test_a_damaged_choice_is_measured_again(tmp_path, seconds, choice):
    seconds.update(reference=[2.0], exact=[1.0])
    chooser(tmp_path, Reference(), Exact()).choose_backend(4, 16, 8)
    table = tmp_path / "choices" / "table.json"
    table.write_text(json.dumps(dict.fromkeys(json.loads(table.read_text()), choice)))
    again = chooser(tmp_path, Reference(), Exact())

    assert again.choose_backend(4, 16, 8).name == "exact" and again.timer.n_measured == 1


def test_the_shipped_candidates_with_real_times(tmp_path):
    able = [b for b in shipped("backend").values() if usable(b, CPU)]
    assert chooser(tmp_path, *able, rounds=1).choose_backend(4, 16, 8) in able


def test_a_measurement_that_scatters_is_used_but_not_kept(tmp_path, seconds):
    # medians three times the shortest time: other work ran here
    seconds.update(reference=[1.0, 1.0, 3.0, 3.0], exact=[1.0, 1.0, 2.5, 2.5])
    ours = chooser(tmp_path, Reference(), Exact())

    assert ours.choose_backend(4, 16, 8).name == "exact"
    assert not (tmp_path / "choices" / "table.json").exists()

    seconds.update(reference=[1.0], exact=[2.0])

    assert ours.choose_backend(4, 16, 8).name == "exact", "equal layers of one model have one backend"
    assert chooser(tmp_path, Reference(), Exact()).choose_backend(4, 16, 8).name == "reference"


def test_a_slow_backend_may_scatter(tmp_path, seconds):
    seconds.update(reference=[5.0, 4.0, 9.0, 9.0], exact=[1.0])
    ours = chooser(tmp_path, Reference(), Exact())

    assert ours.choose_backend(4, 16, 8).name == "exact"
    assert (tmp_path / "choices" / "table.json").exists()


def test_a_table_that_cannot_be_written_is_said_once_and_costs_no_run(tmp_path, seconds, caplog):
    seconds.update(reference=[2.0], exact=[1.0])
    (tmp_path / "choices").write_text("a file where the folder should be")
    ours = chooser(tmp_path, Reference(), Exact())

    assert ours.choose_backend(4, 16, 8).name == "exact" and ours.choose_backend(4, 32, 8).name == "exact"
    assert ours.choose_backend(4, 16, 8).name == "exact" and ours.timer.n_measured == 2, (
        "remembered for this run"
    )
    assert caplog.text.count("measured choices cannot be kept in") == 1


@pytest.mark.skipif(os.name != "posix", reason="other systems have no pipes among their files")
def test_a_table_takes_no_pipe_from_its_place(tmp_path, caplog):
    """Root once moved a table over /dev/null, and every program of the machine wrote into it."""
    place = tmp_path / "pipe"
    os.mkfifo(place)
    cache = AutotuneCache(place, CPU)

    cache.put("a", "b")
    cache.put("c", "d")

    assert cache.get("a") == "b" and cache.get("c") == "d"
    assert place.is_fifo() and [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert caplog.text.count("it is a pipe, which a file would replace") == 1
