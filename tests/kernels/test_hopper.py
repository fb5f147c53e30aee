"""The Hopper kernel without a GPU: its source runs in Python, and its launch is mocked.

`support/gluon_simulator.py` says what that can find and what not. On a Hopper GPU the cases of
`test_triton_exact.py` run the kernel itself.
"""

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.compare import assert_close
from support.helpers import full_range, randn

pytest.importorskip("triton", reason="Triton is not installed")

from support import gluon_simulator
from support.gluon_simulator import OverwrittenBufferError, UnfilledBufferError, simulate
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from int8run.kernels.int8_linear import hopper
from int8run.kernels.int8_linear import kernel as portable
from int8run.kernels.int8_linear.reference import int8_linear as reference
from int8run.kernels.int8_linear.tile import HOPPER, Tile

SMALL = Tile(64, 64, 64, group_m=2, warps=4, stages=3, kernel=HOPPER)
WIDE = Tile(64, 128, 64, group_m=3, warps=4, stages=4, kernel=HOPPER)
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
ROUNDING = {FULL: 1e-6, HALF: 1e-3, BRAIN: 4e-3}


def make_inputs(m, n, k):
    """q, x_scale, qdata, w_scale."""
    x_scale, w_scale = randn(m, 1).abs() + 0.1, randn(n, seed=1).abs() + 0.1
    return full_range(m, k), x_scale / k, full_range(n, k, seed=1), w_scale / 100


@pytest.mark.parametrize("programs", [1, 3, 50])
@pytest.mark.parametrize("tile", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("shape", [(1, 1, 16), (130, 200, 208), (64, 64, 64), (257, 65, 400)], ids=str)
def test_every_tile_is_computed_once_for_any_number_of_programs(shape, tile, programs):
    m, n, k = shape
    arguments, bias = make_inputs(m, n, k), randn(n, seed=2)
    y = simulate(*arguments, bias, None, FULL, tile, programs)

    assert_close("y", y, reference(*arguments, bias), ROUNDING[FULL])


@pytest.mark.parametrize("stages", [2, 3, 8])
def test_buffers_are_filled_in_turn_for_any_number_of_stages(stages):
    # fewer steps in a tile than stages: loads run ahead over the borders of several tiles
    tile = Tile(64, 64, 64, group_m=8, warps=4, stages=stages, kernel=HOPPER)
    arguments = make_inputs(300, 300, 128)
    y = simulate(*arguments, None, None, FULL, tile, programs=4)

    assert_close("y", y, reference(*arguments, None), ROUNDING[FULL])


def test_sums_at_large_k_are_exact():
    k = 15360
    q, qdata = torch.full((3, k), -127, dtype=torch.int8), torch.full((2, k), -128, dtype=torch.int8)
    q[0, :3] = 5
    y = simulate(q, torch.ones(3, 1), qdata, torch.ones(2), None, None, FULL, SMALL, programs=1)

    assert torch.equal(y, (q.long() @ qdata.long().T).float())


@pytest.mark.parametrize("rank", [16, 20, 64])
@pytest.mark.parametrize("dtype", [BRAIN, HALF], ids=str)
def test_the_branch_is_added_in_every_piece(dtype, rank):
    m, n = 70, 200
    arguments, bias = make_inputs(m, n, 80), randn(n, seed=2, dtype=dtype)
    h, up, strengths = randn(m, rank, seed=3), randn(n, rank, seed=4, dtype=dtype), randn(rank, seed=5)
    y = simulate(*arguments, bias, (h, up, strengths), dtype, WIDE, programs=2)

    expected = reference(*arguments, bias) + (h * strengths) @ up.float().T
    assert y.dtype == dtype
    assert_close("y", y, expected, 2 * ROUNDING[dtype])


def test_the_simulator_finds_a_load_into_a_buffer_that_is_read(monkeypatch):
    # as if the kernel let two products run: the second last one's buffer is not free then
    replace_part(monkeypatch, "warpgroup_mma_wait", lambda machine, _, deps: (machine.finish(2), deps[0])[1])
    with pytest.raises(OverwrittenBufferError, match="that a product still reads"):
        simulate(*make_inputs(64, 64, 512), None, None, FULL, SMALL, programs=1)


def test_the_simulator_finds_a_load_that_is_missing(monkeypatch):
    replace_part(monkeypatch, "async_load", lambda machine, *order: None)
    with pytest.raises(UnfilledBufferError, match="that was never ordered"):
        simulate(*make_inputs(64, 64, 512), None, None, FULL, SMALL, programs=1)


def replace_part(monkeypatch, name, part):
    """Replace one of the simulator's functions by one that takes the machine first."""
    make_stand_ins = gluon_simulator.make_stand_ins

    def make_others(machine):
        return {**make_stand_ins(machine), name: partial(part, machine)}

    monkeypatch.setattr(gluon_simulator, "make_stand_ins", make_others)


class LaunchRecorder:
    """Takes the place of the kernel and notes what it is launched with."""

    def __getitem__(self, grid):
        self.grid = grid
        return self.launch

    def launch(self, *arguments, **options):
        self.arguments, self.options = arguments, options


@pytest.fixture
def launched(monkeypatch):
    recorder = LaunchRecorder()
    monkeypatch.setattr(hopper, "_hopper_kernel", recorder)
    gpu = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    hopper.count_multiprocessors.cache_clear()
    yield recorder
    hopper.count_multiprocessors.cache_clear()


@pytest.mark.parametrize(
    ("tile", "rows", "programs"),
    [
        (Tile(128, 256, 128, 8, 8, 4, HOPPER), 4608, 132),
        (Tile(128, 128, 128, 8, 4, 3, HOPPER), 4608, 264),  # two on each multiprocessor
        (Tile(128, 128, 128, 8, 4, 3, HOPPER), 129, 6),  # as many as there are tiles
    ],
    ids=str,
)
def test_launch_describes_the_operands_and_fills_the_gpu(launched, tile, rows, programs):
    q, x_scale, qdata, w_scale = (
        torch.zeros(rows, 272, dtype=torch.int8),
        torch.ones(rows, 1),
        torch.zeros(3072, 272, dtype=torch.int8),
        torch.ones(3072),
    )
    n = 3072 if rows > 129 else 384
    y = torch.empty(rows, n, dtype=BRAIN)
    hopper.launch_hopper(q, x_scale, qdata[:n], w_scale[:n], None, None, None, None, y, tile)

    q_desc, qdata_desc, *rest = launched.arguments
    assert launched.grid == (programs,)
    assert list(q_desc.shape) == [rows, 272] and list(q_desc.strides) == [272, 1]
    assert q_desc.block_shape == [tile.block_m, tile.block_k]
    assert qdata_desc.block_shape == [tile.block_n, tile.block_k]
    assert q_desc.layout.swizzle_byte_width == 128
    assert rest[-5:] == [rows, n, 272, 0, 0]
    assert launched.options["num_warps"] == tile.warps and launched.options["STAGES"] == tile.stages


class HopperDriver:
    """Takes the place of CUDA's driver as far as Triton asks it before a launch."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


class Compiler:
    """Takes the place of the kernel: does all that a launch does but the launch."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return partial(self.compile, grid)

    def compile(self, grid, *arguments, **options):
        self.compiled = self.kernel.warmup(*arguments, grid=grid, **options)


@pytest.mark.slow  # a compiler
@pytest.mark.parametrize("dtype", [BRAIN, HALF, FULL], ids=str)
@pytest.mark.parametrize("rows", [1, 300])
def test_triton_compiles_what_the_launch_gives_it(rows, dtype, monkeypatch):
    monkeypatch.setattr(driver, "_active", HopperDriver())
    compiler = Compiler(hopper._hopper_kernel)
    monkeypatch.setattr(hopper, "_hopper_kernel", compiler)
    monkeypatch.setattr(hopper, "count_multiprocessors", lambda device: 132)
    tile = Tile(64, 128, 128, 8, 4, 4, HOPPER)
    arguments, n = make_inputs(rows, 520, 272), 520
    y = torch.empty(rows, n, dtype=dtype)
    h, up, bias = torch.ones(rows, 20), torch.ones(n, 20, dtype=BRAIN), torch.ones(n, dtype=dtype)
    hopper.launch_hopper(*arguments, None, None, None, None, y, tile)
    plain = compiler.compiled
    hopper.launch_hopper(*arguments, bias, h, up, torch.ones(20), y, tile)

    assert "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8" in plain.asm["ptx"]
    assert "bf16.bf16" in compiler.compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"group": 32}, "scales per row"),
        ({"q": torch.zeros(4, 40, dtype=torch.int8)}, "K is 40, not a multiple of 16"),
        ({"qdata": torch.zeros(40 * 16 + 1, dtype=torch.int8)[1:].view(40, 16)}, "does not begin at"),
        ({"up": torch.zeros(40, 4)}, "bfloat16 or float16, not in float32"),
    ],
    ids=["group", "width", "address", "branch"],
)
def test_what_the_hopper_kernel_cannot_take_is_named(changes, reason):
    fits = {
        "q": torch.zeros(4, 16, dtype=torch.int8),
        "qdata": torch.zeros(40, 16, dtype=torch.int8),
        "group": 0,
        "up": torch.zeros(40, 4, dtype=BRAIN),
    }
    assert hopper.find_unsupported(**fits) is None
    assert reason in hopper.find_unsupported(**{**fits, **changes})


def test_the_portable_kernel_takes_its_place_and_says_so_once(caplog):
    tile = Tile(128, 256, 128, 8, 8, 4, HOPPER)
    q, qdata = torch.zeros(4, 40, dtype=torch.int8), torch.zeros(8, 40, dtype=torch.int8)
    portable._report_portable.cache_clear()
    with caplog.at_level(logging.WARNING):
        chosen = [portable._choose_kernel(tile, q, qdata, 0, None) for _ in range(2)]

    assert chosen == [Tile(128, 256, 128, 8, 8, 3)] * 2
    assert [record.message for record in caplog.records] == [
        "the Hopper kernel is left out for some layers: K is 40, not a multiple of 16"
    ]
