"""RMSNorms of an INT8 model: which are computed by the backend, and that they stay what they were."""

import copy
import pickle

import pytest
import torch
from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
from support.compare import assert_close
from support.helpers import CPU, randn
from torch import nn

from int8run.backends.base import Backend
from int8run.backends.cpu import Cpu
from int8run.backends.reference import Reference
from int8run.layers.fused_norm import install_norms
from int8run.layers.int8_linear import Int8Linear, QuantizedLayer
from int8run.outlier.none import NoOutlier
from int8run.quant.weight import quantize_weight

REFUSED = Cpu().limits.unsupported_reasons(CPU)
pytestmark = pytest.mark.skipif(bool(REFUSED), reason=f"the CPU kernels: {'; '.join(REFUSED)}")
WIDTH = 16


class OwnRMSNorm(nn.RMSNorm):
    """A family's own class may have another formula."""


def make_model(backend: Backend, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    weight = randn(WIDTH, WIDTH)
    layer = QuantizedLayer(quantize_weight(weight), NoOutlier().fit(weight), None)
    norms = {
        "torch": nn.RMSNorm(WIDTH, eps=1e-6),
        "diffusers": DiffusersRMSNorm(WIDTH, eps=1e-6),
        "without weight": nn.RMSNorm(WIDTH, eps=1e-6, elementwise_affine=False),
        "own": OwnRMSNorm(WIDTH, eps=1e-6),
        "of two dimensions": nn.RMSNorm((2, WIDTH), eps=1e-6),
        "with bias": DiffusersRMSNorm(WIDTH, eps=1e-6, bias=True),
        "without eps": nn.RMSNorm(WIDTH),
    }
    for norm in norms.values():
        if norm.weight is not None:
            norm.weight.data = randn(*norm.weight.shape, seed=1)
    return nn.ModuleDict({"int8": Int8Linear(layer, backend, dtype), **norms}).to(dtype).requires_grad_(False)


def list_fused(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_children() if hasattr(module, "norm_backend")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_a_known_formula_are_the_backends(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(Cpu(), dtype)
    plain, state = copy.deepcopy(model), set(model.state_dict())
    calls: list[torch.Size] = []
    normalize = Cpu.normalize
    monkeypatch.setattr(
        Cpu, "normalize", lambda self, x, *rest: calls.append(x.shape) or normalize(self, x, *rest)
    )

    assert install_norms(model) == 3
    assert list_fused(model) == {"torch", "diffusers", "without weight"}
    assert set(model.state_dict()) == state
    x = randn(2, 3, WIDTH, dtype=dtype)
    for name in list_fused(model):
        assert isinstance(model[name], type(plain[name]))
        assert_close(name, model[name](x), plain[name](x).double(), 6e-3 if dtype == torch.bfloat16 else 3e-7)
    assert len(calls) == 3
    assert torch.equal(model["torch"](x.transpose(0, 1)), plain["torch"](x.transpose(0, 1)))
    assert len(calls) == 3, "an input that is not contiguous stays torch's"

    loaded = pickle.loads(pickle.dumps(model))
    assert list_fused(loaded) == list_fused(model)
    assert all(torch.equal(loaded[name](x), model[name](x)) for name in list_fused(model))


def test_other_backends_leave_norms_alone() -> None:
    model = make_model(Reference())

    assert install_norms(model) == 0
    assert list_fused(model) == set()


def test_compiled_code_computes_the_norm_itself_in_one_graph() -> None:
    model = make_model(Cpu())
    install_norms(model)
    operators: list[str] = []

    def list_operators(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(model["torch"], fullgraph=True, backend=list_operators)
    x = randn(3, WIDTH)

    assert_close("compiled", compiled(x), model["torch"](x).double(), 3e-7)
    assert operators and not any("cpu_rms_norm" in name for name in operators)
