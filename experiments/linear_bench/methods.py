"""Every method of the CPU table: one small function each, from a case to the call that is timed."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import ours
import torch
import torch.nn.functional as F
from case import Case
from toolkit import GROUP, ToolkitLinear
from torch import Tensor, nn

from int8run.kernels.cpu.instructions import INSTRUCTION_SETS

Forward = Callable[[Tensor], Tensor]
# Gaussian data: 0.0107-0.0125 with a scale per token, double that with one scale for all of x
PER_TOKEN, PER_TENSOR = 0.02, 0.04


@dataclass(frozen=True)
class Method:
    """How a layer is made.

    Args:
        build: from the case to the call.
        env: environment of its process.
        limit: relative error above which it is refused.
        rank: of the LoRA that its case has.
        against: a second base, to read a difference directly.
    """

    build: Callable[[Case], Forward]
    env: Mapping[str, str] = field(default_factory=dict)
    limit: float = PER_TOKEN
    rank: int = 0
    against: str | None = None


def make_fp32(case: Case) -> Forward:
    """The base of all ratios."""
    return lambda x: F.linear(x, case.weight, case.bias)


def make_half_precision(case: Case, dtype: torch.dtype) -> Forward:
    """The float layer of a model in half precision: its input has that dtype already."""
    x, weight, bias = case.x.to(dtype), case.weight.to(dtype), case.bias.to(dtype)
    return lambda _: F.linear(x, weight, bias)


def torchao_eager(case: Case) -> nn.Module:
    """torchao's W8A8, a scale per token."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = case.linear()
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


def torchao_compile(case: Case) -> Forward:
    """The same through Inductor."""
    return torch.compile(torchao_eager(case), dynamic=False)


def torchao_freezing(case: Case) -> Forward:
    """The same with weights as constants of the graph."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    return torchao_compile(case)


def make_sdnq(case: Case, hadamard: int = 0) -> nn.Module:
    """sdnq's INT8 matmul.

    Environment variables decide whether it compiles its functions and uses OpenVINO.
    """
    from sdnq import sdnq_post_load_quant

    rotation = dict(use_hadamard=True, hadamard_group_size=hadamard) if hadamard else {}
    model = sdnq_post_load_quant(
        case.linear(),
        weights_dtype="int8",
        group_size=-1,
        use_quantized_matmul=True,
        minimum_allowed_numel=0,
        quantization_device=case.x.device,
        return_device=case.x.device,
        modules_to_not_convert=[],
        add_skip_keys=False,
        **rotation,
    )
    if not hasattr(model[0], "sdnq_dequantizer"):
        raise RuntimeError(f"sdnq left the layer a {type(model[0]).__name__}")
    return model


def quantize_dynamic(case: Case, engine: str) -> nn.Module:
    """torch.ao's dynamic quantization: one scale for all of x."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    torch.backends.quantized.engine = engine
    return quantize_dynamic(case.linear(), {nn.Linear: per_channel_dynamic_qconfig})


def onnxruntime_dynamic(case: Case) -> Forward:
    """onnxruntime's dynamic quantization of MatMul + Add: one asymmetric scale for all of x."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    (m, k), n = case.x.shape, len(case.bias)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["xw"]), helper.make_node("Add", ["xw", "b"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [m, n])],
        [
            numpy_helper.from_array(case.weight.T.contiguous().numpy(), "w"),
            numpy_helper.from_array(case.bias.numpy(), "b"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        plain, quantized = Path(folder, "plain.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, plain)
        quantize_dynamic(plain, quantized, per_channel=True, weight_type=QuantType.QInt8)
        session = onnxruntime.InferenceSession(quantized, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def openvino_dynamic(case: Case) -> Forward:
    """OpenVINO's dynamic quantization with one group per token: group size K."""
    import openvino
    from openvino import opset13 as op

    m, (n, k) = case.x.shape[0], case.weight.shape
    scale = case.weight.abs().amax(1, keepdim=True) / 127
    qdata = (case.weight / scale).round().to(torch.int8)
    x = op.parameter([m, k], openvino.Type.f32, name="x")
    weight = op.multiply(
        op.convert(op.constant(qdata.numpy()), openvino.Type.f32), op.constant(scale.numpy())
    )
    y = op.add(op.matmul(x, weight, False, True), op.constant(case.bias.numpy()))
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": str(torch.get_num_threads()),
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(k),
    }
    request = (
        openvino.Core()
        .compile_model(openvino.Model([y], [x], "linear"), "CPU", settings)
        .create_infer_request()
    )

    def forward(x: Tensor) -> Tensor:
        y = torch.empty(m, n)
        request.set_input_tensor(openvino.Tensor(x.numpy(), shared_memory=True))
        request.set_output_tensor(openvino.Tensor(y.numpy(), shared_memory=True))
        request.infer()
        return y

    return forward


def make_toolkit(case: Case, group: int = 0) -> nn.Module:
    """ComfyUI-INT8-Toolkit's torch_int_mm path, restated."""
    return ToolkitLinear(case.linear()[0], group)


def make_int8run(
    case: Case,
    backend: str,
    outlier: str = "none",
    branch: Callable[[Case, nn.Module], Forward] | None = None,
    **settings: str,
) -> Forward:
    """Ours, as the runner builds it; `branch` puts the case's LoRA beside it."""
    made = ours.make_backend(backend, ours.CPU_BACKENDS[backend], **settings)
    layer = ours.int8_layer(case, made, outlier)
    return layer if branch is None else branch(case, layer)


def make_int8run_in_bf16(case: Case) -> Forward:
    """Ours in a model of bfloat16, whose input and output have that dtype."""
    half = Case(case.x.bfloat16(), case.weight.bfloat16(), case.bias.bfloat16())
    layer = make_int8run(half, "cpu")
    return lambda _: layer(half.x)


def make_naive_lora(case: Case, layer: nn.Module) -> Forward:
    """The LoRA as two float products."""
    assert case.lora_A is not None and case.lora_B is not None
    return ours.NaiveBranch(layer, case.lora_A, case.lora_B)


def make_sdnq_environment(switch: str, openvino: str = "0") -> dict[str, str]:
    """sdnq's settings."""
    return {"SDNQ_USE_TORCH_COMPILE": switch, "SDNQ_USE_OPENVINO_MM": openvino}


FLOATS = {
    "fp32": Method(make_fp32),
    "bf16": Method(partial(make_half_precision, dtype=torch.bfloat16)),
    "fp16": Method(partial(make_half_precision, dtype=torch.float16)),
}
PEERS = {
    "torchao eager": Method(torchao_eager),
    "torchao compile": Method(torchao_compile),
    "torchao compile + freezing": Method(torchao_freezing),
    "sdnq eager": Method(make_sdnq, make_sdnq_environment("0")),
    "sdnq compile": Method(make_sdnq, make_sdnq_environment("1")),
    "sdnq compile, OpenVINO": Method(make_sdnq, make_sdnq_environment("1", openvino="1")),
    "sdnq compile, hadamard 256": Method(partial(make_sdnq, hadamard=256), make_sdnq_environment("1")),
    "quantize_dynamic x86 (per tensor)": Method(partial(quantize_dynamic, engine="x86"), limit=PER_TENSOR),
    "quantize_dynamic onednn (per tensor)": Method(
        partial(quantize_dynamic, engine="onednn"), limit=PER_TENSOR
    ),
    "onnxruntime dynamic (per tensor)": Method(onnxruntime_dynamic),
    "OpenVINO dynamic": Method(openvino_dynamic),
    "Toolkit torch_int_mm": Method(make_toolkit),
    "Toolkit torch_int_mm, hadamard 128": Method(
        partial(make_toolkit, group=GROUP), against="Toolkit torch_int_mm"
    ),
}
# by instruction set; those that this CPU has not are listed with the reason
SETS = {name: f"int8run cpu, {name}" for name in INSTRUCTION_SETS}


def list_own_methods() -> dict[str, Method]:
    """Our backends without and with rotation, our kernels on each instruction set, and LoRAs beside them."""
    found = {}
    for name in ours.CPU_BACKENDS:
        found[f"int8run {name}"] = Method(partial(make_int8run, backend=name))
        found[f"int8run {name}, convrot"] = Method(
            partial(make_int8run, backend=name, outlier="convrot"), against=f"int8run {name}"
        )
    for instructions, name in SETS.items():
        found[name] = Method(partial(make_int8run, backend="cpu", instructions=instructions))
    found["int8run cpu, bf16 in and out"] = Method(make_int8run_in_bf16)
    for rank in (16, 64):
        for kind, branch in {"LoRA": ours.with_branch, "naive LoRA": make_naive_lora}.items():
            build = partial(make_int8run, backend="cpu", branch=branch)
            found[f"int8run cpu, {kind} r{rank}"] = Method(build, rank=rank, against="int8run cpu")
    return found


METHODS = {**FLOATS, **PEERS, **list_own_methods()}
# what `bench.py --table` measures
TABLES = {
    "all": list(METHODS),
    "instructions": [*FLOATS, *SETS.values(), "int8run cpu, bf16 in and out"],
    "peers": [*FLOATS, *PEERS, "int8run cpu", "int8run cpu, convrot"],
}
