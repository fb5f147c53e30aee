"""`compile=`: what torch is asked for, and that a LoRA strength moves without a new graph, in the tensors
that a recorded graph reads. The compiler of these tests counts, and runs the graphs as they are.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.helpers import randn
from support.small_model import build_small_model, generate_latents
from torch import Tensor, nn

from int8run.pipeline import compile as module
from int8run.pipeline.built_model import BuiltModel
from int8run.pipeline.compile import compile_denoisers, report_uncompiled

INT8_TARGET, FLOAT_TARGET = "transformer_blocks.0.attn.to_q", "proj_out"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The mode of each graph that is compiled."""
    seen: list[str] = []
    compile_as_asked = torch.compile

    def count(graph: torch.fx.GraphModule, inputs: object, *, mode: str) -> Callable[..., object]:
        seen.append(mode)
        return graph.forward

    monkeypatch.setattr(
        torch, "compile", lambda call, **options: compile_as_asked(call, backend=count, **options)
    )
    return seen


@pytest.fixture(scope="module")
def lora(folder: Path) -> str:
    return f"lora.adapters=[{{path: '{save_lora(folder)}', strength: 0.5}}]"


def save_lora(folder: Path) -> Path:
    tensors = {}
    for number, (target, rows) in enumerate(((INT8_TARGET, 32), (FLOAT_TARGET, 8))):
        tensors[f"transformer.{target}.lora_A.weight"] = randn(4, 32, seed=number)
        tensors[f"transformer.{target}.lora_B.weight"] = randn(rows, 4, seed=number + 2)
    save_file(tensors, folder / "lora.safetensors")
    return folder / "lora.safetensors"


def generate_with_strength(built: BuiltModel, strength: float) -> Tensor:
    built.set_strengths([strength], [0.0])
    return generate_latents(built)


def list_addresses(model: nn.Module) -> dict[str, int]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


@pytest.mark.slow
@pytest.mark.parametrize("lora_mode", ["dynamic", "stochastic"])
@pytest.mark.usefixtures("one_thread")
def test_a_strength_moves_in_the_tensors_of_one_graph(
    folder: Path, lora: str, lora_mode: str, compilations: list[str]
) -> None:
    strengths = (0.5, 2.0, 0.0)
    eager = build_small_model(folder, lora, f"lora.mode={lora_mode}")
    expected = [generate_with_strength(eager, strength) for strength in strengths]
    built = build_small_model(folder, lora, f"lora.mode={lora_mode}", "compile=reduce-overhead")

    first = generate_with_strength(built, strengths[0])
    n_graphs, addresses = len(compilations), list_addresses(built.denoisers["int8"])
    made = [first, *(generate_with_strength(built, strength) for strength in strengths[1:])]

    assert set(compilations) == {"reduce-overhead"}
    assert len(compilations) == n_graphs, "a strength compiled the model anew"
    assert list_addresses(built.denoisers["int8"]) == addresses
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
    for one, other in zip(made, expected, strict=True):
        torch.testing.assert_close(one, other)


class Doubled(nn.Module):
    """Writes its result where it wrote the one before, as a CUDA graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("out", torch.zeros(2))

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"sample": torch.add(x, x, out=self.out), "size": 2}


def test_what_a_graph_gave_is_kept_when_it_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    marks: list[int] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: asked.append(options) or call)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(len(marks)))
    model = Doubled()

    compile_denoisers({"int8": model, "float": model}, "reduce-overhead", has_hooks=False)
    first, second = model(torch.ones(2)), model(torch.full((2,), 5.0))

    assert asked == [{"fullgraph": True, "mode": "reduce-overhead"}], "one model is compiled once"
    assert first["sample"].tolist() == [2.0, 2.0] and second["sample"].tolist() == [10.0, 10.0]
    assert first["size"] == 2 and marks == [0, 1]
    assert module.copy_tensor("text") == "text"


@pytest.mark.parametrize("has_hooks", [False, True])
def test_a_whole_graph_is_asked_for_where_no_hooks_part_it(has_hooks: bool) -> None:
    asked: list[tuple[str, bool]] = []

    class Model(nn.Module):
        def compile(self, *, fullgraph: bool) -> None:
            asked.append(("full", fullgraph))

        def compile_repeated_blocks(self, *, fullgraph: bool) -> None:
            asked.append(("blocks", fullgraph))

    for mode in ("none", "blocks", "full"):
        compile_denoisers({"int8": Model()}, mode, has_hooks=has_hooks)

    assert asked == [("blocks", not has_hooks), ("full", not has_hooks)]


@pytest.mark.parametrize(("mode", "count"), [("none", 0), ("blocks", 1)])
def test_a_controlnet_that_runs_uncompiled_is_said(
    mode: str, count: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        report_uncompiled(["controlnet"], mode)
    assert caplog.text.count("compiles the denoiser alone; controlnet runs uncompiled") == count
