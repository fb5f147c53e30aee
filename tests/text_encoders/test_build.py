"""Built encoders: the modules in the place of Linears and embeddings, dtypes, memory, devices, kernels."""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from support.clip_files import answer
from support.compare import assert_close
from support.helpers import without_vnni
from text_encoders.files import ENCODERS, make_encoder_file
from text_encoders.files import FORMATS as FILES
from torch import nn

from int8run.errors import BackendError
from int8run.layers.block_int8_linear import BlockInt8Linear
from int8run.layers.int8_linear import Int8Linear
from int8run.layers.plan import LayerPlan
from int8run.layers.weight_only import WeightOnlyEmbedding, WeightOnlyLinear
from int8run.metrics.layers import count_module_bytes
from int8run.quant.formats import FORMATS
from int8run.text_encoders.build import build_encoder
from int8run.text_encoders.kernels import Kernels, check_kernels
from int8run.text_encoders.load import build_text_encoder, load_text_encoder
from int8run.text_encoders.model_config import build_config
from int8run.text_encoders.plan_layers import plan_encoder
from int8run.text_encoders.skeleton import build_skeleton
from int8run.text_encoders.weights import EncoderFile

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
MIXED = ("int8_rowwise", "int8_blockwise", "float8_e4m3fn", "nvfp4", "mxfp8", "int8_convrot")
LAYERS = {"int8_rowwise": Int8Linear, "int8_convrot": Int8Linear, "int8_blockwise": BlockInt8Linear}


def view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten().view(torch.uint8)


def build(path: Path, kernel_backend: str = "dequantize", **options: object) -> nn.Module:
    return build_text_encoder(*load_text_encoder(path, kernel_backend=kernel_backend), **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 in six formats, its table in another, and the rest in bfloat16."""
    return make_encoder_file("t5", words=MIXED, quantized=["shared.weight"]).write(
        tmp_path_factory.mktemp("mixed") / "t5.safetensors"
    )


def test_every_layer_has_the_class_of_its_format(mixed_file: Path) -> None:
    model, metadata = build(mixed_file, "reference"), load_text_encoder(mixed_file)[1]

    for name, about in metadata["layers"].items():
        layer = model.get_submodule(name)
        expected = WeightOnlyEmbedding if name == "shared" else LAYERS.get(about["format"], WeightOnlyLinear)
        assert type(layer) is expected, (name, about["format"])
        assert layer.weight is None, "for transformers, which asks for its dtype"

    floats = {name for name, part in model.named_modules() if type(part) in (nn.Linear, nn.Embedding)}

    assert floats == {"encoder.block.0.layer.0.SelfAttention.relative_attention_bias"}
    assert {type(part) for name, part in build(mixed_file).named_modules() if name in metadata["layers"]} == {
        WeightOnlyEmbedding,
        WeightOnlyLinear,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float_parts_have_the_dtype(dtype: torch.dtype, mixed_file: Path) -> None:
    model = build(mixed_file, dtype=dtype)

    assert {p.dtype for name, p in model.named_parameters() if ".wo" not in name} == {dtype}
    with torch.inference_mode():
        assert model(torch.tensor([[1, 2]])).last_hidden_state.dtype == dtype
    assert_close(
        "dtype",
        answer(model).float(),
        answer(build(mixed_file, dtype=torch.float32)),
        {2: 0.03, 4: 1e-9}[dtype.itemsize],
    )


def test_default_dtype_is_bfloat16(mixed_file: Path) -> None:
    assert build(mixed_file).dtype == torch.bfloat16


@pytest.mark.slow
def test_memory_is_that_of_the_file(tmp_path: Path) -> None:
    for name in ENCODERS:
        for word in ("int8_rowwise", "float8_e4m3fn", "nvfp4"):
            path = make_encoder_file(name, word, inner=256).write(tmp_path / "x.safetensors")
            state, metadata = load_text_encoder(path, kernel_backend="reference")
            model = build_text_encoder(
                state, metadata, config=metadata["config"] | {"tie_word_embeddings": True}
            )
            held = sum(
                tensor.nbytes for key, tensor in state.items() if key != "text_projection.weight"
            )  # not in every class
            biases = sum(
                2 * t.numel() for key, t in state.items() if key.endswith("bias")
            )  # of layers in float32
            buffers = sum(
                b.nbytes
                for n, b in model.named_buffers()
                if "inv_freq" in n or "position" in n or "embed_scale" in n
            )
            padding = sum(
                t.nbytes for key, t in state.items() if key.endswith("weight_scale") and word == "nvfp4"
            )
            assert held - padding - 64 <= count_module_bytes(model) <= held + biases + buffers + 64, (
                name,
                word,
            )


def test_tied_embeddings_are_one_module(tmp_path: Path) -> None:
    model = build(make_encoder_file("t5", "int8_rowwise").write(tmp_path / "x.safetensors"))

    assert model.shared.weight is model.encoder.embed_tokens.weight

    model = build(
        make_encoder_file("t5", "int8_rowwise", quantized=["shared.weight"]).write(tmp_path / "x.safetensors")
    )

    assert model.shared.qdata.data_ptr() == model.encoder.embed_tokens.qdata.data_ptr()


def test_moving_to_a_dtype_keeps_quantized_data_and_scales(mixed_file: Path) -> None:
    model = build(mixed_file, "reference", dtype=torch.float32)
    before = {name: t.clone() for name, t in model.named_buffers()}
    model.to(torch.bfloat16)

    kept = {
        n
        for n, m in model.named_modules()
        if type(m) in (Int8Linear, BlockInt8Linear, WeightOnlyLinear, WeightOnlyEmbedding)
    }

    for name, tensor in model.named_buffers():
        if name.rpartition(".")[0] in kept:
            assert tensor.dtype == before[name].dtype and torch.equal(
                view_bytes(tensor), view_bytes(before[name])
            ), name


def test_moving_to_a_device_moves_everything(mixed_file: Path) -> None:
    model = build(mixed_file, "dequantize").to("meta")
    assert all(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_deep_copy_gives_the_same_output(mixed_file: Path) -> None:
    model = build(mixed_file, "reference", dtype=torch.float32)
    assert torch.equal(answer(copy.deepcopy(model)), answer(model))


def test_built_model_is_in_eval_mode_without_gradients(mixed_file: Path) -> None:
    model = build(mixed_file)

    assert not model.training
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())


def test_built_model_does_not_need_the_state_dict(mixed_file: Path) -> None:
    """And not changed."""
    state, metadata = load_text_encoder(mixed_file, kernel_backend="dequantize")
    copies = {key: tensor.clone() for key, tensor in state.items()}
    model = build_text_encoder(state, metadata, dtype=torch.float32)
    answer(model)

    assert state.keys() == copies.keys()
    assert all(torch.equal(view_bytes(state[k]), view_bytes(copies[k])) for k in state)


@pytest.mark.parametrize("name", ["auto", "reference", "torch_int_mm", "onednn", "cpu"])
def test_kernels_give_the_same_output(name: str, mixed_file: Path) -> None:
    if name not in ("auto", "reference") and without_vnni():
        pytest.skip("needs a CPU with VNNI")
    model = build(mixed_file, name, dtype=torch.float32, rows=4)

    used = {type(m) for m in model.modules()}

    assert {Int8Linear, BlockInt8Linear, WeightOnlyLinear} <= used
    assert_close(name, answer(model), answer(build(mixed_file, "reference", dtype=torch.float32)), 1e-4)
    assert_close(name, answer(model), answer(build(mixed_file, dtype=torch.float32)), 0.05)


def test_scaled_mm_runs_only_fp8_layers(mixed_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(mixed_file, "scaled_mm", dtype=torch.float32)

    assert [m.kernels for m in model.modules() if type(m) is WeightOnlyLinear].count("scaled_mm") == 1
    assert "clip.kernel_backend=scaled_mm dequantizes 6 layers of" in caplog.text
    assert "× scaled_mm takes fp8 weights" in caplog.text
    assert_close("scaled_mm", answer(model), answer(build(mixed_file, dtype=torch.float32)), 0.2)


def test_kernels_without_a_layer_are_an_error(tmp_path: Path) -> None:
    path = make_encoder_file("t5", "nvfp4").write(tmp_path / "x.safetensors")

    with pytest.raises(
        BackendError,
        match=rf"scaled_mm can run none of the layers of {path}: 7 × scaled_mm takes fp8 weights .* this "
        rf"one is nvfp4",
    ):
        build(path, "scaled_mm")
    with pytest.raises(
        BackendError,
        match=r"clip.kernel_backend=triton: backend 'triton' cannot run here: runs on cuda, not on cpu; "
        r".*; dequantize runs everywhere",
    ):
        build(path, "triton")
    if not without_vnni():
        with pytest.raises(
            BackendError,
            match=rf"cpu runs INT8 layers, and {path} gives 7 × nvfp4; choose auto or dequantize",
        ):
            build(path, "cpu")


@pytest.mark.parametrize(
    ("word", "device", "reader"),
    [
        ("auto", "cpu", "eager"),
        ("auto", "cuda", "triton"),
        ("dequantize", "cuda", "triton"),
        ("triton", "cuda", "triton"),
        ("reference", "cuda", "reference"),
        ("reference", "cpu", "reference"),
        ("cpu", "cpu", "eager"),
        ("scaled_mm", "cuda", "eager"),
    ],
)
def test_dequantizer_depends_on_backend_and_device(
    word: str, device: str, reader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    kernels = Kernels(word, torch.device(device), 8)

    assert kernels.dequantizer == reader
    assert (kernels.backend is None) == (word in ("dequantize", "scaled_mm"))
    assert kernels.backend is None or kernels.backend.name == word
    assert kernels.backend is kernels.backend, "made once"


def test_fp8_weights_are_refused_where_torch_has_no_fp8() -> None:
    plans = [LayerPlan(name, 16, 16, None) for name in "ab"]
    for plan, rounding in zip(plans, ("int8_rowwise", "nvfp4"), strict=True):
        plan.rounding = rounding
    kernels = Kernels("dequantize", torch.device("mps"), 8)
    check_kernels(kernels, plans[:1], "file")
    message = r"^file gives 1 × nvfp4, and torch has no fp8 on mps; choose an int8 format, or device=cpu$"
    with pytest.raises(BackendError, match=message):
        check_kernels(kernels, plans, "file")


@pytest.mark.parametrize("missing", ["package", "capability"])
def test_without_triton_a_gpu_dequantizes_by_torch(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (7, 5) if missing == "capability" else (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if missing == "package":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for word in ("auto", "dequantize"):
        assert Kernels(word, torch.device("cuda:1"), 8).dequantizer == "eager"


# what becomes of each layer


def open_encoder(name: str, word: str, folder: Path, **options: object) -> tuple[EncoderFile, nn.Module]:
    weights = EncoderFile(make_encoder_file(name, word, **options).write(folder / "x.safetensors"))  # type: ignore[arg-type]
    return weights, build_skeleton(
        weights.encoder.classes[0], build_config(weights.encoder, weights.shapes), torch.float32
    )


def test_ignored_layers_stay_float(tmp_path: Path) -> None:
    weights, model = open_encoder("t5", "", tmp_path, dtype="F32")
    made = build_encoder(model, weights, FORMATS["int8_rowwise"], Kernels("reference", CPU, 8))
    kept = {plan.name: plan.skip_reason for plan in made.plans if plan.skip_reason is not None}

    assert set(kept) == {
        "shared",
        "encoder.embed_tokens",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.block.0.layer.1.DenseReluDense.wo",
    }
    assert all(kept.values())
    assert len(made.plans) == 10
    assert all(
        plan.measured["weight_sqnr_db"] > 30 and plan.rounding == "int8_rowwise"
        for plan in made.plans
        if plan.skip_reason is None
    )


def test_other_formats_are_converted_and_the_target_format_is_kept(tmp_path: Path) -> None:
    weights, model = open_encoder("clip_l", "", tmp_path, words=["nvfp4", "mxfp8"])
    made = build_encoder(model, weights, FORMATS["mxfp8"], Kernels("dequantize", CPU, 8))
    chosen = [plan for plan in made.plans if plan.skip_reason is None]

    assert [plan.rounding for plan in chosen] == ["mxfp8"] * 6
    assert sorted(bool(plan.measured) for plan in chosen) == [False] * 3 + [True] * 3, (
        "three are rounded here"
    )
    for plan in chosen:
        stored = weights.read_packed(f"text_model.{plan.name}")
        assert stored is not None
        codes = made.module.get_submodule(plan.name).qdata
        assert (
            stored.weight.storage_dtype == "mxfp8"
            and torch.equal(view_bytes(codes), view_bytes(stored.weight.qdata))
        ) or plan.measured


def test_quantized_table_that_the_model_reads_itself_is_float_in_memory(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    file = make_encoder_file("t5", "int8_rowwise")
    file.real[table], marker = FILES["int8_rowwise"](file, table, np.linspace(-1, 1, 32)[:, None])
    file.text(f"{table}.comfy_quant", marker)

    model = build(file.write(tmp_path / "x.safetensors"), dtype=torch.float32)

    assert torch.allclose(model.get_submodule(table).weight.double(), torch.from_numpy(file.real[table]))
    assert (
        "1 quantized layer is in memory as floats: 1 × int8_rowwise, read as float: the model reads the "
        "table itself" in caplog.text
    )


def test_float_parts_are_shared_with_the_skeleton(tmp_path: Path) -> None:
    weights, model = open_encoder("t5", "", tmp_path, dtype="F32")
    made = build_encoder(model, weights, FORMATS["nvfp4"], Kernels("dequantize", CPU, 8))

    assert sum(plan.skip_reason is None for plan in made.plans) == 7

    left = {name for name, part in made.skeleton.named_parameters() if part.is_meta}

    assert left == {f"{plan.name}.weight" for plan in made.plans if plan.skip_reason is None}
    assert not any(part.is_meta for part in [*made.module.parameters(), *made.module.buffers()])

    floats = dict(made.module.named_parameters())
    shared = dict(made.skeleton.named_parameters())

    assert all(floats[name] is shared[name] for name in floats)


def test_refresh_without_a_change_gives_the_same_layers(tmp_path: Path) -> None:
    weights, model = open_encoder("clip_l", "", tmp_path, dtype="F32")
    made = build_encoder(model, weights, FORMATS["int8_convrot"], Kernels("reference", CPU, 8))
    before, modules = answer(made.module), dict(made.module.named_modules())
    names = [plan.name for plan in made.plans]
    made.refresh([*names[:3], "no such layer"])

    assert torch.equal(answer(made.module), before)

    changed = {
        name
        for name, module in made.module.named_modules()
        if module is not modules[name] and isinstance(module, Int8Linear)
    }

    assert changed == {plan.name for plan in made.plans[:3] if plan.skip_reason is None}


def test_plans_are_made_before_anything_is_read(tmp_path: Path) -> None:
    from int8run.text_encoders.build import fit_weights

    weights, model = open_encoder("clip_l", "", tmp_path, dtype="F32")
    plans = plan_encoder(model, weights, fit_weights(weights, model), None)

    assert {plan.skip_reason for plan in plans} == {"float in the file"}
    assert all(part.is_meta for part in model.parameters())
