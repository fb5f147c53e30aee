"""`backend=triton`: layers interpreted on the CPU and compiled on a GPU, its tiles, and their config."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.helpers import CPU
from support.triton_process import needs_gpu, needs_interpreter, run_cases

from int8run.backends import grouped_tuning
from int8run.backends.autotune_cache import AutotuneCache
from int8run.backends.base import FusedBranch, LayerTimes, QuantizedInput
from int8run.backends.grouped_tuning import draw_grouped_weight
from int8run.backends.row_decoder import RowDecoder, choose_multiplier
from int8run.backends.tile_check import find_wrong_tile
from int8run.backends.triton import Triton, parse_tile
from int8run.backends.triton_tiles import check_tile, tile_key
from int8run.errors import BackendError, ConfigError
from int8run.kernels.grouped_weight.tile import choose_grouped_tile, shrink_tile
from int8run.kernels.int8_linear import reference
from int8run.kernels.int8_linear.layouts import MAX_K, check_product
from int8run.kernels.int8_linear.tile import ARCHITECTURES, BUCKETS, Tile, choose_tile, list_candidates
from int8run.kernels.triton_calls import describe_layout
from int8run.quant.weight import quantize_weight

CASES = Path(__file__).with_name("cases_triton_backend.py")
HOPPER = (9, 0)


@pytest.mark.slow
@needs_interpreter
def test_interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    run_cases(CASES, interpret=True)


@pytest.mark.gpu
@needs_gpu
def test_on_the_gpu():
    run_cases(CASES, interpret=False)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)


def test_tiles_come_from_the_table_and_else_from_the_defaults(tmp_path, hopper):
    table, best = tmp_path / "choices.json", Tile(64, 128, 128, 4, 4, 3)
    AutotuneCache(table, CPU).put(tile_key(4096, 48, 24), ",".join(map(str, best.as_list())))
    backend = Triton(table=str(table))
    backend.pack_weight(quantize_weight(torch.ones(24, 48)))

    assert backend.tiles[48, 24] == (*(choose_tile("sm_90", rows) for rows in BUCKETS[:-1]), best)


class FakeTimer:
    """Finds one tile faster than the others."""

    device = CPU

    def __init__(self, best, broken=()):
        self.best, self.broken, self.tried = best, broken, []

    def measure(self, backends, shape):
        self.tried += [backend.tile for backend in backends.values()]
        seconds = {}
        for name, backend in backends.items():
            if backend.tile not in self.broken:
                seconds[name] = 1.0 if backend.tile == self.best else 2.0
        return LayerTimes(seconds, {}, is_steady=True)


def test_tuning_keeps_the_fastest_tile(tmp_path, hopper):
    backend, timer = Triton(table=str(tmp_path / "choices.json")), FakeTimer(Tile(128, 128, 128, 8, 8, 4))
    backend.pack_weight(quantize_weight(torch.ones(24, 48)))
    backend.tune(timer, (4096, 48, 24))
    backend.pack_weight(quantize_weight(torch.ones(24, 48)))

    assert timer.best in timer.tried and len(timer.tried) > 5
    assert backend.tiles[48, 24][-1] == timer.best


def test_tiles_that_cannot_run_are_passed_over(tmp_path, hopper):
    table = tmp_path / "choices.json"
    backend, candidates = Triton(table=str(table)), list_candidates("sm_90", 4096)
    backend.tune(FakeTimer(candidates[0], broken=candidates[:2]), (4096, 48, 24))
    backend.pack_weight(quantize_weight(torch.ones(24, 48)))

    assert backend.tiles[48, 24][-1] == candidates[2]

    (tmp_path / "other").mkdir()
    nothing_runs = Triton(table=str(tmp_path / "other" / "choices.json"))
    nothing_runs.tune(FakeTimer(None, broken=candidates), (4096, 48, 24))
    assert list((tmp_path / "other").iterdir()) == []


def replace_product(monkeypatch, product):
    kernel = pytest.importorskip("int8run.kernels.int8_linear.kernel", reason="Triton is not installed")
    monkeypatch.setattr(kernel, "int8_linear", product)


def multiply_by_definition(q, x_scale, qdata, w_scale, *, bias, h, up, strengths, **_):
    y = reference.int8_linear(q, x_scale, qdata, w_scale, bias)
    return y if h is None else y + (h * strengths) @ up.float().T


def test_a_fast_tile_whose_sums_are_wrong_is_not_kept(tmp_path, hopper, monkeypatch, caplog):
    def multiply(*args, tile, **others):
        return multiply_by_definition(*args, **others) + (tile == wrong)

    replace_product(monkeypatch, multiply)
    wrong = next(tile for tile in list_candidates("sm_90", 4096) if tile.kernel == "hopper")
    backend = Triton(table=str(tmp_path / "choices.json"))
    backend.tune(FakeTimer(wrong), (4096, 48, 24))
    backend.pack_weight(quantize_weight(torch.ones(24, 48)))

    assert backend.tiles[48, 24][-1] == list_candidates("sm_90", 4096)[0]
    assert "is left out: its sums differ from the definition's" in caplog.text
    # a right one is kept
    assert find_wrong_tile(replace(wrong, group_m=1), (4, 48, 24), CPU) is None


def pack_few_bits(backend, bits):
    backend.pack_grouped_weight(draw_grouped_weight(24, 48, bits, CPU))
    return backend.grouped_tiles[48, 24, bits, False]


class FakeGroupedTimer(FakeTimer):
    """Finds one tile of weights of few bits, or decoding first, faster than the others."""

    def measure(self, backends, shape):
        self.tried += [probe.choice for probe in backends.values()]
        seconds = {name: 1.0 if probe.choice == self.best else 2.0 for name, probe in backends.items()}
        return LayerTimes(seconds, {}, is_steady=True)


@pytest.mark.parametrize("best", [Tile(256, 64, 128, 8, 8, 3), None], ids=["tile", "ahead"])
def test_tuning_keeps_what_decodes_few_bits_fastest(tmp_path, hopper, monkeypatch, best):
    monkeypatch.setattr(grouped_tuning, "find_wrong_choice", lambda probe, shape, device: None)
    backend, timer = Triton(table=str(tmp_path / "choices.json")), FakeGroupedTimer(best)
    defaults = tuple(choose_grouped_tile("sm_90", rows, 4) for rows in BUCKETS)
    assert pack_few_bits(backend, 4) == defaults
    backend.tune_grouped(timer, (4096, 48, 24), 4)

    assert best in timer.tried and len(timer.tried) > 5
    assert pack_few_bits(backend, 4) == (*defaults[:-1], best)
    assert pack_few_bits(backend, 6)[-1] == choose_grouped_tile("sm_90", 4096, 6)
    # scales of float32 take less of a tile
    assert backend.load_grouped_tiles(CPU, 48, 24, 4, is_float=True)[-1] == (best and shrink_tile(best, 4))


def test_a_choice_for_few_bits_that_computes_something_else_is_not_kept(
    tmp_path, hopper, monkeypatch, caplog
):
    wrong = Tile(256, 64, 128, 8, 8, 3)

    def find_wrong(probe, shape, device):
        return "its sums differ from the definition's" if probe.choice == wrong else None

    monkeypatch.setattr(grouped_tuning, "find_wrong_choice", find_wrong)
    backend = Triton(table=str(tmp_path / "choices.json"))
    backend.tune_grouped(FakeGroupedTimer(wrong), (4096, 48, 24), 4)

    assert "for 4 bits is left out: its sums differ from the definition's" in caplog.text
    assert pack_few_bits(backend, 4)[-1] != wrong


def test_a_tile_that_was_asked_for_decodes_few_bits_in_whole_spans():
    backend = Triton(tile=Tile(64, 64, 64, 8, 4, 4))

    assert pack_few_bits(backend, 4) == (Tile(64, 64, 64, 8, 4, 4),) * len(BUCKETS)
    assert pack_few_bits(backend, 6) == (Tile(64, 64, 128, 8, 4, 3),) * len(BUCKETS)
    timer = FakeGroupedTimer(None)
    backend.tune_grouped(timer, (4096, 48, 24), 4)
    assert timer.tried == []


def test_groups_that_pieces_do_not_divide_into_are_left_to_the_row_decoder():
    weight = draw_grouped_weight(24, 48, 4, CPU)
    odd = replace(weight, group_scale=torch.ones(24, 2))

    assert Triton().unsupported_group_reasons(weight) == []
    assert Triton().unsupported_group_reasons(odd) == [
        "groups of 24 columns are neither a divisor nor a multiple of 16"
    ]
    assert isinstance(choose_multiplier(Triton(), odd), RowDecoder)


HOPPER_TILE = Tile(128, 128, 128, 8, 4, 3, "hopper")


@pytest.mark.parametrize("left_out", ["bias", "h", "strengths", "x_scale"])
def test_a_tile_that_leaves_out_a_part_is_wrong(left_out, hopper, monkeypatch):
    def multiply(q, x_scale, qdata, w_scale, *, tile, **others):
        parts = {**others, "x_scale": x_scale}
        if tile == HOPPER_TILE:
            parts[left_out] = None if left_out == "h" else torch.zeros_like(parts[left_out])
        return multiply_by_definition(q, parts.pop("x_scale"), qdata, w_scale, **parts)

    replace_product(monkeypatch, multiply)
    assert find_wrong_tile(HOPPER_TILE, (4, 48, 24), CPU) == "its sums differ from the definition's"


def test_a_portable_kernel_that_is_wrong_itself_is_no_yardstick(hopper, monkeypatch):
    def multiply(*args, tile, **others):
        return multiply_by_definition(*args, **others) + (tile.kernel == "portable")

    replace_product(monkeypatch, multiply)
    reason = find_wrong_tile(HOPPER_TILE, (4, 48, 24), CPU)
    assert reason == "the portable kernel's sums differ from the definition's"


def test_elements_that_the_cpu_does_not_compute_are_compared_with_the_portable_kernels(hopper, monkeypatch):
    def multiply(*args, tile, **others):
        y = multiply_by_definition(*args, **others)
        y[70] += tile == HOPPER_TILE  # 200 rows, every third is sampled
        return y

    replace_product(monkeypatch, multiply)
    reason = find_wrong_tile(HOPPER_TILE, (200, 48, 24), CPU)
    assert reason == "its sums differ from the portable kernel's"


def test_checking_a_tile_draws_nothing_from_the_programs_own_random_numbers(hopper, monkeypatch):
    replace_product(monkeypatch, lambda *args, tile, **others: multiply_by_definition(*args, **others))
    before = torch.get_rng_state()
    find_wrong_tile(HOPPER_TILE, (4, 48, 24), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fast_tile_that_cannot_run_is_not_kept(hopper, monkeypatch):
    def multiply(*_, tile, **__):
        raise torch.OutOfMemoryError("no room")

    replace_product(monkeypatch, multiply)
    reason = find_wrong_tile(HOPPER_TILE, (4, 48, 24), CPU)
    assert "no room" in reason


def test_a_tile_that_was_asked_for_is_not_tuned(tmp_path, hopper):
    timer = FakeTimer(None)
    Triton(tile=Tile(64, 64, 64), table=str(tmp_path / "choices.json")).tune(timer, (4096, 48, 24))
    assert timer.tried == []


def test_a_hopper_tile_runs_on_hopper_alone(monkeypatch):
    tile = Tile(128, 128, 128, 8, 4, 3, "hopper")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: HOPPER)
    check_tile(tile, torch.device("cuda"))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    with pytest.raises(BackendError, match=r"needs compute capability 9\.0, this GPU is sm_89; use "):
        check_tile(tile, torch.device("cuda"))


class RocmGpu:
    gcnArchName = "gfx1030:sramecc+:xnack-"


def test_an_amd_gpu_without_tiles_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: RocmGpu)

    reasons = Triton.limits.unsupported_reasons(torch.device("cuda"))

    assert "runs on AMD GPUs of gfx90a, gfx942" in reasons[0]
    assert "this one is gfx1030; backend=auto finds another" in reasons[0]


def test_an_amd_gpu_of_the_table_gets_its_tiles(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(RocmGpu, "gcnArchName", "gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: RocmGpu)

    reasons = Triton.limits.unsupported_reasons(torch.device("cuda"))
    tiles = Triton(table=str(tmp_path / "choices.json")).load_tiles(CPU, 48, 24)

    assert not [reason for reason in reasons if "AMD" in reason]
    assert tiles == ARCHITECTURES["gfx942"].defaults


def test_a_branch_without_its_first_product_is_not_dropped():
    x = QuantizedInput(torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1))
    branch = FusedBranch(down=torch.ones(16, 32), up=torch.ones(8, 16), needs_input=True, max_rank=256)
    packed = torch.zeros(8, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"^a branch needs down_product, which quantize\(down=branch.down\)"):
        Triton(tile=Tile(64, 64, 64)).linear(x, packed, torch.ones(8), dtype=torch.float32, branch=branch)


def test_a_layer_wider_than_the_kernel_takes_is_refused_by_the_backend():
    assert Triton.limits.max_in_features == MAX_K
    with pytest.raises(ValueError, match=f"int32 sums hold at most {MAX_K}"):
        check_wide_product(MAX_K + 32)
    check_wide_product(MAX_K)


def check_wide_product(k):
    q, x_scale, w_scale = torch.empty(1, k, dtype=torch.int8), torch.ones(1, 1), torch.ones(1)
    layouts = [describe_layout(tensor) for tensor in (q, x_scale, q, w_scale)]
    check_product(*layouts, None, group=0, out_dtype=torch.float32)


def test_a_config_names_all_fields_of_a_tile_or_none():
    assert parse_tile(None, None, None, None, None, None) is None
    assert parse_tile(128, 64, 64, 8, 4, 3) == Tile(128, 64, 64, 8, 4, 3)
    assert parse_tile(128, 64, 64, 8, 4, 3, "hopper") == Tile(128, 64, 64, 8, 4, 3, "hopper")

    with pytest.raises(
        ConfigError,
        match=re.escape("backend.tile needs all of its fields or none; missing: backend.tile.block_n, "),
    ):
        parse_tile(128, None, 64, 8, 4, None)
    with pytest.raises(ConfigError, match=re.escape("missing: backend.tile.block_m, backend.tile.block_n")):
        parse_tile(None, None, None, None, None, None, "hopper")
    with pytest.raises(
        ConfigError, match=re.escape("backend.tile.block_m is 100; it must be one of 16, 32, 64, 128, 256")
    ):
        parse_tile(100, 64, 64, 8, 4, 3)
