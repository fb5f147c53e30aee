"""Files of MiniMax-H3 as they are published: pruned, of few steps, and LoRAs of the full model on them."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families.cases import (
    Case,
    Tensors,
    assert_same_tensors,
    collect_contents,
    find_int8_layers,
    make_case,
    make_lora,
    make_original_state,
    read_file,
    round_rows,
    write_file,
)
from families.instances_modular import minimax_h3_transformer
from support.rotation import rotate_groups

from int8run.errors import LoraError
from int8run.lora.config import Adapter

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
INT8_LAYERS = ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2")
MARKER = '{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 16}'
GATE = "attn.to_gate_compress"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with pytest.MonkeyPatch.context() as patch:
        yield make_case("minimax_h3_pruned", tmp_path_factory.mktemp("pruned"), patch)


@pytest.fixture(scope="module")
def full_base(case: Case) -> Path:
    """The repository of the full model, without its weights: what `model.base` names for a pruned file."""
    folder = case.base
    index = json.loads((folder / "modular_model_index.json").read_text())
    full = minimax_h3_transformer()
    full.save_config(folder / "transformer")
    index["transformer"] = ["diffusers", type(full).__name__, *index["transformer"][2:]]
    (folder / "modular_model_index.json").write_text(json.dumps(index))
    return folder


def make_official(case: Case, blocks: int = 3) -> Tensors:
    """The published file, tiny: four INT8 layers of each block, rotated, with a marker."""
    tensors = make_original_state(case.denoiser, "")
    for name in [f"blocks.{i}.{layer}" for i in range(blocks) for layer in INT8_LAYERS]:
        add_int8_layer(tensors, name, tensors[f"{name}.weight"])
    return tensors


def add_int8_layer(tensors: Tensors, name: str, weight: torch.Tensor) -> None:
    codes, scale = round_rows(rotate_groups(weight))
    tensors[f"{name}.weight"] = codes
    tensors[f"{name}.weight_scale"] = scale
    tensors[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(MARKER.encode()), dtype=torch.uint8)


def test_a_pruned_file_runs_with_the_repository_of_the_full_model(case: Case, full_base: Path) -> None:
    tensors = make_official(case)
    file = write_file(tensors, case.home / "official.safetensors")

    built = case.build(file, base=full_base)

    assert built.family.name == "minimax_h3_pruned"
    assert len(find_int8_layers(built)) == 3 * (3 + 1 + 1 + 1)
    contents = collect_contents(built)
    assert torch.equal(contents["time_embedder.table"], tensors["adaln_t_table"])
    assert torch.equal(contents["transformer_blocks.1.ff.net.2.q"], tensors["blocks.1.mlp.fc2.weight"])
    assert case.generate_latents(built).isfinite().all()


def test_gates_of_sparse_attention_change_nothing_and_stay_in_the_file(case: Case, full_base: Path) -> None:
    plain, fast = make_official(case), make_official(case)
    for i in range(3):
        add_int8_layer(fast, f"blocks.{i}.{GATE}", torch.randn(64, 64))
    files = [
        write_file(tensors, case.home / f"{name}.safetensors")
        for name, tensors in (("plain", plain), ("fast", fast))
    ]

    without, with_gates = (case.build(file, base=full_base) for file in files)

    assert_same_tensors(collect_contents(with_gates), collect_contents(without))
    assert torch.equal(case.generate_latents(with_gates), case.generate_latents(without))


def test_gates_of_sparse_attention_are_kept_by_the_quantize_task(case: Case) -> None:
    floats = make_original_state(case.denoiser, "")
    gates = {f"blocks.{i}.{GATE}.weight": torch.randn(64, 64) for i in range(3)}
    source = write_file(floats | gates, case.home / "float_fast.safetensors")

    case.quantize(source, case.home / "int8_fast.safetensors")

    written = read_file(case.home / "int8_fast.safetensors")
    assert_same_tensors({key: written[key] for key in gates}, gates)
    assert written["blocks.0.mlp.fc1.weight"].dtype == torch.int8


def test_a_lora_of_the_full_model_changes_all_but_the_modulation(case: Case) -> None:
    lora = make_lora(minimax_h3_transformer(), "minimax_h3")
    path = lora.save_with_original_names(case.home / "full.safetensors")
    adapters = [Adapter("a", str(path))]

    with pytest.raises(LoraError, match=r"4 × it reads the full time embedding.*lora\.strict=false"):
        case.build(loras=adapters)
    built = case.build(loras=adapters, strict=False)

    assert built.loras.layers_by_mode == {"dynamic": len(find_int8_layers(built))}
    assert case.generate_latents(built).isfinite().all()
