"""Quantizing from file to file: what is written beside what the same steps give in memory, and by a reader of
its own.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.helpers import randn, shipped

from int8run.checkpoints.comfy_int8 import build_marker
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.export import stream_blocks
from int8run.export.stream_plan import QuantizationRecipe, keep_own_names, plan_targets
from int8run.export.stream_quantizer import write_targets
from int8run.models.tensor_part import TensorPart
from int8run.outlier.convrot import ConvRot
from int8run.outlier.hadanorm import HadaNorm
from int8run.outlier.none import NoOutlier
from int8run.outlier.quarot import QuaRot
from int8run.quant.rounding import AbsMax, Mse
from int8run.quant.weight import quantize_weight, sqnr_db

pytestmark = pytest.mark.usefixtures("one_thread")
PLAIN = QuantizationRecipe(NoOutlier(), AbsMax())


def run(source, target, recipe=PLAIN, names=None, keep=(), on_bytes=lambda count: None):
    """Stream a file; layers whose key is in `keep` stay float.

    Returns the plans by name and the new file's tensors.
    """
    with TensorFiles.open(source) as files:
        stored = read_layers(files)
        names = names or keep_own_names(files, stored)
        planned = plan_targets(
            files, stored, names, lambda key, parts: "kept" if key in keep else None, recipe
        )
        write_targets(files, stored, planned, target, {}, recipe, on_bytes)
    return {t.plan.name: t.plan for t in planned if t.plan is not None}, load_file(target)


@pytest.fixture
def weights():
    """Widths that groups of 256, of 64, of 4 and none divide; float32, bfloat16 and float16; what is no
    matrix.
    """
    return {
        "wide.weight": (randn(70, 512) * 0.02).bfloat16(),
        "wide.bias": randn(70).bfloat16(),
        "narrow.weight": randn(33, 64, seed=1),
        "odd.weight": randn(9, 37, seed=2).half(),
        "four.weight": randn(5, 12, seed=3),
        "norm.weight": randn(70).bfloat16(),
        "conv.weight": randn(3, 4, 2, 2),
        "table": randn(2, 6),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def source(weights, tmp_path):
    path = tmp_path / "source.safetensors"
    save_file(weights, path)
    return path


LAYERS = ["wide", "narrow", "odd", "four"]


@pytest.fixture(params=[None, 1500], ids=["large blocks", "small blocks"])
def blocks(request, monkeypatch):
    """With small ones, each weight is cut into many, some rows are larger than a buffer."""
    if request.param:
        monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", request.param)


METHODS = [NoOutlier(), ConvRot(), ConvRot(16), QuaRot(), QuaRot(8), HadaNorm(64), HadaNorm(4, alpha=0.3)]


@pytest.mark.parametrize("rounding", [AbsMax(), Mse(candidates=8)], ids=lambda r: r.name)
@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name} {getattr(m, 'group_size', '')}")
def test_the_integers_are_those_of_a_build_in_memory(source, weights, tmp_path, blocks, method, rounding):
    plans, found = run(source, tmp_path / "x.safetensors", QuantizationRecipe(method, rounding))
    for name in LAYERS:
        weight = weights[f"{name}.weight"]
        refused = method.unsupported_reason(weight.shape[1])
        transform = (NoOutlier() if refused else method).fit(weight)
        transformed = transform.transform_weight(weight.float())
        wanted = rounding.round_weight(transformed, None)
        q, scale = found[f"{name}.weight"], found[f"{name}.weight_scale"]
        assert q.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (weight.shape[0], 1)
        if transform.matrix is None:
            assert torch.equal(q, wanted.qdata) and torch.equal(scale, wanted.scale)
        else:  # a sum in another order: ties
            differ = (q.short() - wanted.qdata).abs()
            assert differ.max() <= 1 and (differ > 0).sum() <= 2
            torch.testing.assert_close(scale, wanted.scale, rtol=1e-5, atol=0)
        if transform.factor is not None:
            assert torch.equal(found[f"{name}.pre_quant_scale"], transform.factor)
        else:
            assert f"{name}.pre_quant_scale" not in found
        assert json.loads(bytes(found[f"{name}.comfy_quant"].tolist())) == build_marker(transform)
        plan = plans[name]
        assert (plan.outlier, plan.rounding, plan.outlier_skip_reason) == (
            transform.label,
            rounding.name,
            refused or "",
        )
        assert plan.measured["weight_sqnr_db"] == pytest.approx(
            sqnr_db(transformed, wanted.dequantize()), abs=0.01
        )
        assert plan.measured["saturated_share"] == pytest.approx(wanted.saturated_share, abs=1e-3)


def test_what_is_no_layer_or_stays_float_is_copied(source, weights, tmp_path, blocks):
    plans, found = run(source, tmp_path / "x.safetensors", keep=("narrow.weight", "odd.weight"))
    for key, t in weights.items():
        if key.removesuffix(".weight") in ("wide", "four"):
            continue
        assert found[key].dtype == t.dtype and torch.equal(found[key], t), key
    assert {name: plan.skip_reason for name, plan in plans.items()} == {
        "narrow": "kept",
        "odd": "kept",
        "wide": None,
        "four": None,
    }
    assert set(found) == set(weights) | {
        f"{n}.{part}" for n in ("wide", "four") for part in ("weight_scale", "comfy_quant")
    }


def test_blocks_of_any_size_give_the_same_file(source, tmp_path, monkeypatch):
    files = []
    for size in (1, 700, 4096, 2**20):
        monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", size)
        run(source, tmp_path / f"{size}.safetensors", QuantizationRecipe(HadaNorm(4), AbsMax()))
        files.append((tmp_path / f"{size}.safetensors").read_bytes())
    assert files.count(files[0]) == 4


def test_every_byte_of_the_source_is_counted_once(source, tmp_path, blocks):
    counts = []
    run(source, tmp_path / "x.safetensors", on_bytes=counts.append)
    with TensorFiles.open(source) as files:
        assert sum(counts) == sum(info.nbytes for info in files.values())


# --- names: fused, swapped, reshaped


def test_parts_become_one_tensor(tmp_path, blocks):
    q, k, v = ((randn(n, 64, seed=n) * 0.1).bfloat16() for n in (30, 31, 32))
    save_file(
        {
            "q.weight": q,
            "k.weight": k,
            "v.weight": v,
            "q.bias": randn(30).bfloat16(),
            "k.bias": randn(31).half(),
        },
        tmp_path / "s.safetensors",
    )
    names = {
        "qkv.weight": (TensorPart("q.weight"), TensorPart("k.weight"), TensorPart("v.weight")),
        "qk.bias": (TensorPart("q.bias"), TensorPart("k.bias")),
    }
    for method in (NoOutlier(), HadaNorm(16)):
        plans, found = run(
            tmp_path / "s.safetensors",
            tmp_path / "x.safetensors",
            QuantizationRecipe(method, AbsMax()),
            names,
        )
        whole = torch.cat([q, k, v])
        transform = method.fit(whole)  # of the whole layer: its columns' maxima are those of all parts
        wanted = quantize_weight(transform.transform_weight(whole.float()))
        assert (found["qkv.weight"].short() - wanted.qdata).abs().sum() <= (0 if method.name == "none" else 2)
        torch.testing.assert_close(found["qkv.weight_scale"], wanted.scale, rtol=1e-5, atol=0)
        assert list(plans) == ["qkv"]
    bias = load_file(tmp_path / "s.safetensors")
    assert torch.equal(found["qk.bias"], torch.cat([bias["q.bias"].float(), bias["k.bias"].float()])), (
        "other dtypes become float32"
    )


@pytest.mark.parametrize("rows", [8, 9])
def test_halves_change_places(tmp_path, blocks, rows):
    weight, bias = randn(rows, 6), randn(rows)
    save_file({"a.weight": weight, "a.bias": bias}, tmp_path / "s.safetensors")
    names = {key: (TensorPart(key, swap_halves=True),) for key in ("a.weight", "a.bias")}
    for keep in ((), ("a.weight",)):
        _, found = run(tmp_path / "s.safetensors", tmp_path / "x.safetensors", names=names, keep=keep)
        swapped = TensorPart("a.weight", swap_halves=True).extract(weight)
        assert torch.equal(found["a.bias"], TensorPart("a.bias", swap_halves=True).extract(bias))
        if keep:
            assert torch.equal(found["a.weight"], swapped)
        else:
            assert torch.equal(found["a.weight"], quantize_weight(swapped).qdata)
            assert torch.equal(found["a.weight_scale"], quantize_weight(swapped).scale)


def test_a_matrix_that_is_none_in_the_new_names_stays_float(tmp_path):
    save_file(
        {"a.weight": randn(4, 6), "b.weight": randn(0, 6), "c": randn(4, 6)}, tmp_path / "s.safetensors"
    )
    names = {
        "a.weight": (TensorPart("a.weight", shape=(4, 6, 1, 1)),),
        "b.weight": (TensorPart("b.weight"),),
        "c": (TensorPart("c", shape=(24,)),),
        "d": (TensorPart("a.weight"),),
    }
    plans, found = run(tmp_path / "s.safetensors", tmp_path / "x.safetensors", names=names)
    assert {name: plan.skip_reason for name, plan in plans.items()} == {
        "a": "no matrix in this naming",
        "b": "empty",
        "d": "no matrix in this naming",
    }
    assert found["a.weight"].shape == (4, 6, 1, 1) and found["c"].shape == (24,)


def test_parts_that_do_not_go_together(tmp_path):
    save_file({"a.weight": randn(4, 6), "b.weight": randn(4, 5)}, tmp_path / "s.safetensors")
    names = {"ab.weight": (TensorPart("a.weight"), TensorPart("b.weight"))}
    words = (
        r"a\.weight \[4, 6\], b\.weight \[4, 5\] are to be one tensor, "
        r"ab\.weight, and their shapes do not go together; the file is da"
    )
    with pytest.raises(FileError, match=words):
        run(tmp_path / "s.safetensors", tmp_path / "x.safetensors", names=names)


# --- sources that are quantized already


def native_marker(**fields):
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


def tensor_scaled_layer(name, codes):
    """ComfyUI's, with one scale."""
    return {
        f"{name}.weight": codes,
        f"{name}.weight_scale": torch.tensor(0.5),
        f"{name}.comfy_quant": native_marker(format="int8_tensorwise"),
    }


def pre_native_layer(name, codes):
    """With names and a marker from before ComfyUI's, and rotated."""
    return {
        f"{name}.weight": codes,
        f"{name}.scale_weight": torch.full((3,), 2.0).bfloat16(),
        f"{name}.comfy_quant": native_marker(convrot=True, convrot_groupsize=4),
    }


def test_int8_layers_are_taken_as_they_are(tmp_path, blocks):
    weight = randn(40, 64)
    codes = torch.full((3, 8), -128, dtype=torch.int8)
    run(
        save(tmp_path, "f", {"r.weight": weight, "h.weight": weight}),
        tmp_path / "s.safetensors",
        QuantizationRecipe(HadaNorm(16), AbsMax()),
    )
    made = load_file(tmp_path / "s.safetensors")
    made |= tensor_scaled_layer("t", codes) | pre_native_layer("n", codes)

    plans, found = run(
        save(tmp_path, "t", made),
        tmp_path / "x.safetensors",
        QuantizationRecipe(ConvRot(), AbsMax()),
        keep=("t.weight",),
    )

    for name in ("r", "h"):
        for part in ("weight", "weight_scale", "pre_quant_scale", "comfy_quant"):
            assert torch.equal(found[f"{name}.{part}"], made[f"{name}.{part}"])

    assert torch.equal(found["t.weight"], codes)
    assert torch.equal(found["t.weight_scale"], torch.full((3, 1), 0.5))
    assert plans["t"].skip_reason is None

    assert torch.equal(found["n.weight"], codes)
    assert torch.equal(found["n.weight_scale"], torch.full((3, 1), 2.0))
    assert "n.scale_weight" not in found
    assert plans["n"].outlier == "convrot group_size=4"
    assert json.loads(bytes(found["n.comfy_quant"].tolist())) == {
        "format": "int8_tensorwise",
        "convrot": True,
        "convrot_groupsize": 4,
        "per_row": True,
    }

    assert {plan.rounding for plan in plans.values()} == {"as in the source"}
    assert not any(plan.measured for plan in plans.values())


def save(folder, name, tensors):
    path = folder / f"{name}.safetensors"
    save_file({key: t.clone() for key, t in tensors.items()}, path)  # it refuses tensors that share memory
    return path


def int8_parts(group, seed):
    weight = randn(6, 64, seed=seed)
    rotated = ConvRot(group).fit(weight).transform_weight(weight) if group else weight
    made = quantize_weight(rotated)
    told = {"convrot": True, "convrot_groupsize": group} if group else {}
    return weight, {
        "weight": made.qdata,
        "weight_scale": made.scale,
        "comfy_quant": native_marker(format="int8_tensorwise", **told),
    }


def test_int8_parts_of_one_layer(tmp_path):
    """Copied where they were treated alike; else read as float and quantized again."""
    names = {"ab.weight": (TensorPart("a.weight"), TensorPart("b.weight"))}
    for groups, copied in (((16, 16), True), ((16, 4), False), ((0, 16), False)):
        (wa, a), (wb, b) = int8_parts(groups[0], 1), int8_parts(groups[1], 2)
        tensors = {f"{layer}.{part}": t for layer, parts in (("a", a), ("b", b)) for part, t in parts.items()}
        plans, found = run(save(tmp_path, "s", tensors), tmp_path / "x.safetensors", PLAIN, names)
        assert ("weight_sqnr_db" not in plans["ab"].measured) == copied
        assert set(found) == {"ab.weight", "ab.weight_scale", "ab.comfy_quant"}
        if copied:
            assert torch.equal(found["ab.weight"], torch.cat([a["weight"], b["weight"]]))
            assert json.loads(bytes(found["ab.comfy_quant"].tolist()))["convrot_groupsize"] == 16
        else:
            assert sqnr_db(torch.cat([wa, wb]), found["ab.weight"].float() * found["ab.weight_scale"]) > 35


def test_blocks_of_int8_are_read_as_float_and_quantized(tmp_path, blocks):
    grid = torch.randint(-127, 128, (64, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = randn(2, 4).abs() + 0.1
    tensors = {
        "g.weight": grid,
        "g.weight_scale": scales,
        "g.comfy_quant": native_marker(format="int8_blockwise", group_size=32),
    }
    _, found = run(save(tmp_path, "s", tensors), tmp_path / "x.safetensors")
    real = grid.float() * scales.repeat_interleave(32, 0).repeat_interleave(32, 1)
    assert torch.equal(found["g.weight"], quantize_weight(real).qdata)
    assert torch.equal(found["g.weight_scale"], quantize_weight(real).scale)


@pytest.mark.parametrize("shape", [(64, 128), (128, 64)], ids=str)
def test_int8_weights_that_are_stored_as_in_and_out(tmp_path, blocks, shape):
    codes = torch.randint(-127, 128, shape[::-1], generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales, counts = torch.rand(1, shape[0]) + 1, []
    path = save(tmp_path, "s", {"q.weight": codes, "q.weight_scale": scales})
    _, found = run(path, tmp_path / "x.safetensors", on_bytes=counts.append)
    wanted = quantize_weight((codes.float() * scales).T.contiguous())
    assert torch.equal(found["q.weight"], wanted.qdata) and torch.equal(found["q.weight_scale"], wanted.scale)
    assert counts == [codes.numel()]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weights_are_quantized_with_their_scales_applied(tmp_path, blocks, dtype):
    weight, scale = (randn(40, 64) * 3).to(dtype), torch.tensor(0.01)
    rows = randn(40, 1).abs() + 0.1
    tensors = {
        "a.weight": weight,
        "a.weight_scale": scale,
        "a.input_scale": torch.tensor(1.0),
        "b.weight": weight,
        "c.weight": weight,
        "c.weight_scale": rows,
        "kept.weight": weight,
        "kept.weight_scale": scale,
        "cast.weight": weight,
        "cast.bias": randn(40).to(dtype),
        "conv.weight": weight.view(40, 4, 4, 4),
        "conv.weight_scale": scale,
        "norm.weight": randn(8).to(dtype),
        "scaled_fp8": torch.zeros(2, dtype=dtype),
    }
    recipe = replace(PLAIN, dtype=torch.float16)
    plans, found = run(
        save(tmp_path, "s", tensors), tmp_path / "x.safetensors", recipe, keep=("kept.weight", "cast.weight")
    )
    for name, factor in (("a", scale), ("b", 1.0), ("c", rows)):
        wanted = quantize_weight(weight.float() * factor)
        assert torch.equal(found[f"{name}.weight"], wanted.qdata) and torch.equal(
            found[f"{name}.weight_scale"], wanted.scale
        )
    assert found["kept.weight"].dtype == torch.float16 and torch.equal(
        found["kept.weight"], (weight.float() * scale).half()
    )
    assert torch.equal(found["conv.weight"], (weight.float() * scale).half().view(40, 4, 4, 4))
    for key in ("cast.weight", "cast.bias", "norm.weight"):
        assert found[key].dtype == dtype and torch.equal(
            found[key].view(torch.uint8), tensors[key].view(torch.uint8)
        ), "no scale: as it is"
    assert not {"a.input_scale", "scaled_fp8", "kept.weight_scale", "conv.weight_scale"} & set(found)
    assert plans["kept"].skip_reason == "kept"


# --- what can go wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_weight_that_is_not_finite(tmp_path, blocks, bad):
    others = threading.active_count()  # of libraries that earlier tests used
    weight = randn(100, 30)
    weight[77, 3] = bad
    path = save(tmp_path, "s", {"fine.weight": randn(100, 30), "layer.weight": weight})
    with pytest.raises(
        ConfigError,
        match=r"^layer: the weight holds NaN or infinity and cannot be quantized; check the checkpoint$",
    ):
        run(path, tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
    assert threading.active_count() == others


def test_a_sum_that_is_too_large(tmp_path):
    path = save(tmp_path, "s", {"layer.weight": torch.full((2, 16), 3e38)})
    with pytest.raises(
        ConfigError,
        match=r"^layer: the weight holds numbers too large for float32 arithmetic; check the checkpoint$",
    ):
        run(path, tmp_path / "x.safetensors", QuantizationRecipe(QuaRot(16), AbsMax()))
    with pytest.raises(ConfigError, match=r"^layer: the weight holds numbers too large"):
        run(path, tmp_path / "x.safetensors", QuantizationRecipe(QuaRot(16), Mse()))


def test_a_source_that_is_cut_off_meanwhile(tmp_path, monkeypatch):
    others = threading.active_count()  # of libraries that earlier tests used
    path = save(tmp_path, "s", {"layer.weight": randn(1000, 30)})
    monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", 1200)
    counts = []

    def cut(count):
        counts.append(count)
        if len(counts) == 5:
            os.truncate(path, 50_000)

    with pytest.raises(FileError, match=r"s\.safetensors was cut off or replaced while it was read"):
        run(path, tmp_path / "x.safetensors", on_bytes=cut)
    assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"] and threading.active_count() == others


@pytest.mark.parametrize("left", [20, -1], ids=["on the way", "at the last piece"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, left):
    others = threading.active_count()  # of libraries that earlier tests used
    path = save(tmp_path, "s", {"layer.weight": randn(1000, 30), "b": randn(4)})
    monkeypatch.setattr(stream_blocks, "BLOCK_BYTES", 1200)
    whole, calls = os.write, []

    def count(descriptor, data):
        calls.append(len(data))
        return whole(descriptor, data)

    def full(descriptor, data):
        if len(calls) == limit:
            raise OSError(28, "No space left on device")
        return count(descriptor, data)

    monkeypatch.setattr(os, "write", count)
    run(path, tmp_path / "x.safetensors")
    limit = left % len(calls)
    calls.clear()
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(
        FileError, match=r"y\.safetensors cannot be written: No space left on device; make room"
    ):
        run(path, tmp_path / "y.safetensors")
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["s.safetensors", "x.safetensors"]
        and threading.active_count() == others
    )


SLOW = """
import sys, time
from pathlib import Path
from int8run.export import stream_blocks, stream_plan, stream_quantizer as module
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.outlier.none import NoOutlier
from int8run.quant.rounding import AbsMax

stream_blocks.BLOCK_BYTES = 4096
recipe = stream_plan.QuantizationRecipe(NoOutlier(), AbsMax())
files = TensorFiles.open(Path(sys.argv[1]))
stored = read_layers(files)
names = stream_plan.keep_own_names(files, stored)
targets = stream_plan.plan_targets(files, stored, names, lambda key, parts: None, recipe)
done = []

def slow(count):
    done.append(count)
    if len(done) == 20:
        print("half", flush=True)
        time.sleep(3600)

module.write_targets(files, stored, targets, Path(sys.argv[2]), {}, recipe, slow)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL and file locks")
def test_a_killed_process_leaves_no_file_and_the_next_run_cleans_up(tmp_path):
    path, target = save(tmp_path, "s", {"layer.weight": randn(2000, 32)}), tmp_path / "out" / "x.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(path), str(target)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "half\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (left,) = target.parent.iterdir()
    assert re.fullmatch(rf"\.int8run-{process.pid}-\d+\.part", left.name)
    run(path, target)
    assert [p.name for p in target.parent.iterdir()] == ["x.safetensors"]


MEMORY = """
import sys
from pathlib import Path
import torch
from int8run.export import stream_blocks, stream_plan, stream_quantizer as module
from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles
from int8run.outlier.convrot import ConvRot
from int8run.quant.rounding import AbsMax

torch.set_num_threads(1)

def peak():
    high_water = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(high_water.split()[1]) / 1024

recipe = stream_plan.QuantizationRecipe(ConvRot(), AbsMax())

def convert(source, target):
    files = TensorFiles.open(Path(source))
    stored = read_layers(files)
    names = stream_plan.keep_own_names(files, stored)
    targets = stream_plan.plan_targets(files, stored, names, lambda key, parts: None, recipe)
    module.write_targets(files, stored, targets, Path(target), {}, recipe)

convert(sys.argv[1], sys.argv[3])
before = peak()
convert(sys.argv[2], sys.argv[3])
print(peak() - before, "diffusers" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_a_few_blocks_however_large_the_file_is(tmp_path):
    small = save(tmp_path, "small", {"a.weight": torch.zeros(8, 256)})
    large = tmp_path / "large.safetensors"
    shape, count = [4096, 4096], 8
    size = 2 * 4096 * 4096
    entries = {
        f"layers.{i}.weight": {"dtype": "BF16", "shape": shape, "data_offsets": [i * size, (i + 1) * size]}
        for i in range(count)
    }
    text = json.dumps(entries).encode()
    with large.open("wb") as file:  # 268 MB of zeros that take no room
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + count * size)
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path / "x.safetensors")]
    megabytes, diffusers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert float(megabytes) < 60 and diffusers == "False"


# --- an independent reader: safetensors and the formulas of the format, nothing of int8run


def regular(size):
    """The matrix of ConvRot by its definition: a Kronecker power of the 4x4 block over the square root of its
    size.
    """
    block = torch.ones(4, 4) - 2 * torch.eye(4).flip(0)
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, block.double())
    assert len(matrix) == size
    return matrix / math.sqrt(size)


def read_independently(path):
    """Every weight of an INT8 file as float64, by the formulas alone; and the step of each row."""
    weights, steps = {}, {}
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
        for key in keys:
            tensor, layer = file.get_tensor(key), key.removesuffix(".weight")
            if tensor.dtype == torch.int8:
                told = json.loads(bytes(file.get_tensor(f"{layer}.comfy_quant").tolist()).decode())
                assert told["format"] == "int8_tensorwise" and next(iter(told)) == "format"
                scale = file.get_tensor(f"{layer}.weight_scale")
                assert (
                    scale.dtype == torch.float32
                    and scale.shape == (tensor.shape[0], 1)
                    and tensor.min() >= -127
                )
                real = tensor.double() * scale.double()
                if told.get("convrot"):
                    group = told["convrot_groupsize"]
                    real = (real.view(len(real), -1, group) @ regular(group)).flatten(1)
                weights[key], steps[key] = real, scale.double()
            elif not key.endswith((".comfy_quant", ".weight_scale")):
                weights[key] = tensor
        assert "_quantization_metadata" not in (file.metadata() or {})
    return weights, steps


@pytest.mark.parametrize("group", [0, 4, 64, 256])
def test_files_say_what_they_hold(source, weights, tmp_path, group):
    recipe = QuantizationRecipe(ConvRot(group), AbsMax()) if group else PLAIN
    run(source, tmp_path / "x.safetensors", recipe)
    found, steps = read_independently(tmp_path / "x.safetensors")
    assert set(found) == set(weights) and set(steps) == {f"{name}.weight" for name in LAYERS}
    for key, real in found.items():
        if key in steps:
            error = real - weights[key].double()
            # half a step in the basis that was rounded: a rotation keeps the length of a row's error
            assert (error.norm(dim=1) <= 0.5001 * steps[key][:, 0] * math.sqrt(error.shape[1])).all()
            assert group or (error.abs() <= 0.5001 * steps[key]).all()
        else:
            assert torch.equal(real, weights[key])


def test_the_vectors_of_the_format(tmp_path):
    """`[[1, -2, 0.5, 0]]` -> 2/127 and [64, -127, 32, 0]; the regular matrix of 4 on a unit row; a row that
    is an eigenvector.
    """
    row, unit = torch.tensor([[1.0, -2.0, 0.5, 0.0]]), torch.tensor([[1.0, 0, 0, 0], [1, 2, 3, 4]])
    path = save(tmp_path, "s", {"a.weight": row, "b.weight": unit})
    _, found = run(path, tmp_path / "x.safetensors")
    assert (
        found["a.weight"].tolist() == [[64, -127, 32, 0]]
        and found["a.weight_scale"].item() == torch.tensor(2 / 127).item()
    )
    _, found = run(path, tmp_path / "x.safetensors", QuantizationRecipe(ConvRot(4), AbsMax()))
    assert found["b.weight"].tolist() == [[127, 127, 127, -127], [32, 64, 95, 127]]
    assert torch.equal(found["b.weight_scale"], torch.tensor([[0.5 / 127], [4 / 127]]))
    assert (
        bytes(found["b.comfy_quant"].tolist())
        == b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 4, "per_row": true}'
    )


@pytest.mark.parametrize("name", [n for n, m in shipped("outlier").items() if not m.needs_calibration])
def test_methods_without_a_calibration_look_at_the_largest_number_of_each_column_alone(name):
    """What the streamer relies on when it fits a method without the whole weight in memory."""
    method, weight = shipped("outlier")[name], randn(40, 256)
    by_weight, by_columns = method.fit(weight), method.fit(weight.abs().amax(0)[None])
    assert by_weight.has_same_input_transform(by_columns) and by_weight.label == by_columns.label


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_float_tensor_that_is_not_finite_is_not_passed_on(tmp_path, bad):
    odd = randn(3, 5)
    odd[2, 4] = bad
    path = save(tmp_path, "s", {"layer.weight": randn(8, 32), "table": odd})
    with pytest.raises(FileError, match=r"s\.safetensors: table holds NaN or infinity; the file is damaged"):
        run(path, tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()


def test_large_numbers_are_no_infinity(tmp_path):
    # their sum leaves the range of float32
    path = save(tmp_path, "s", {"layer.weight": randn(8, 32), "table": torch.full((4, 4), 3e38)})
    run(path, tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint16, torch.uint8])
def test_integers_that_are_to_be_one_tensor_with_floats_are_refused(tmp_path, dtype):
    tensors = {"q.weight": randn(8, 64), "a.bias": randn(4), "b.bias": torch.ones(4).to(dtype)}
    save_file(tensors, tmp_path / "s.safetensors")
    names = {"q.weight": (TensorPart("q.weight"),), "bias": (TensorPart("a.bias"), TensorPart("b.bias"))}
    with pytest.raises(FileError, match=r"s.safetensors: b.bias is .*; allowed are F32, F16, BF16, F64"):
        run(tmp_path / "s.safetensors", tmp_path / "x.safetensors", names=names)


def test_numbers_of_less_than_a_byte_are_refused(tmp_path):
    header = {"b": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "s.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(FileError, match=r"s.safetensors: b is F4, which int8run cannot write"):
        run(tmp_path / "s.safetensors", tmp_path / "x.safetensors")


def test_product_that_the_dtype_of_its_neighbours_cannot_hold_is_refused(tmp_path):
    tensors = {
        "q.weight": randn(8, 64),
        "kept.weight": torch.full((8, 64), 448.0).to(torch.float8_e4m3fn),
        "kept.weight_scale": torch.tensor(1000.0),
    }
    save_file(tensors, tmp_path / "s.safetensors")
    recipe = replace(PLAIN, dtype=torch.float16)
    with pytest.raises(FileError, match=r"kept.weight holds numbers that are too large for F16; set"):
        run(tmp_path / "s.safetensors", tmp_path / "x.safetensors", recipe, keep=("kept.weight",))
