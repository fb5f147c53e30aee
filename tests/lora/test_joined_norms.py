"""Files whose numbers need more than one module's weight, and parameters that belong to no module.

Column norms of a DoRA run over q, k and v together where the file has them in one matrix (OneTrainer). Wan's
modulation is a parameter of its block.
"""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file
from support.compare import assert_close
from support.helpers import randn
from support.tiny_pipeline import random_pipeline
from torch import Tensor, nn

from int8run import LoraStack, quantize_
from int8run.errors import LoraError

Q, K, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qkv")
WIDTH, RANK = 32, 4


def read_weights(model: nn.Module) -> Tensor:
    """q, k and v of the model in one matrix."""
    return torch.cat([model.get_submodule(name).weight.detach().clone() for name in (Q, K, V)])


def write_fused_dora(path: Path, weight: Tensor, name: str) -> Tensor:
    """A file as OneTrainer writes it, and what it does at strength 1: [3 * WIDTH, WIDTH]."""
    down, up = randn(RANK, WIDTH, seed=1), randn(3 * WIDTH, RANK, seed=2)
    norms = weight.norm(dim=0, keepdim=True) * 1.2  # [1, in]
    tensors = {
        f"{name}.lora_down.weight": down,
        f"{name}.lora_up.weight": up,
        f"{name}.alpha": torch.tensor(2.0),
        f"{name}.dora_scale": norms,
    }
    save_file(tensors, path)
    changed = weight.double() + 2.0 / RANK * (up.double() @ down.double())
    return (norms.double() * changed / changed.pow(2).sum(0).sqrt() - weight.double()).float()


@pytest.mark.parametrize(
    "name",
    [
        "diffusion_model.double_blocks.0.img_attn.qkv",
        "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer.transformer_blocks.0.attn.to_qkv",
    ],
)
@pytest.mark.parametrize("fuse", [False, True], ids=["split model", "fused model"])
def test_column_norms_over_fused_q_k_and_v(tmp_path: Path, name: str, fuse: bool) -> None:
    model = random_pipeline().transformer
    weight = read_weights(model)
    expected = write_fused_dora(tmp_path / "dora.safetensors", weight, name)
    if fuse:
        model.fuse_qkv_projections()
    stack = LoraStack(model).add(tmp_path / "dora.safetensors", 0.5)

    def read() -> Tensor:
        fused = model.transformer_blocks[0].attn.to_qkv.weight.detach() if fuse else None
        return read_weights(model) if fused is None else fused.clone()

    assert_close("strength 0.5", read() - weight, 0.5 * expected, 1e-5)
    stack.set_strength("dora", -1.0)
    assert_close("strength -1", read() - weight, -expected, 1e-5)
    stack.clear()
    assert torch.equal(read(), weight)


@pytest.mark.parametrize("first", ["dora", "other"])
def test_column_norms_are_those_of_the_untouched_model(tmp_path: Path, first: str) -> None:
    model = random_pipeline().transformer
    weight = read_weights(model)
    expected = write_fused_dora(tmp_path / "dora.safetensors", weight, "double_blocks.0.img_attn.qkv")
    save_file(
        {f"{K}.lora_A.weight": randn(2, WIDTH), f"{K}.lora_B.weight": randn(WIDTH, 2)},
        tmp_path / "other.safetensors",
    )
    stack = LoraStack(model)
    for name in sorted(["dora", "other"], key=lambda name: name != first):
        stack.add(tmp_path / f"{name}.safetensors", 0.0 if name == "dora" else 1.0)
    stack.set_strength("dora", 1.0)
    stack.set_strength("other", 0.0)

    assert_close("DoRA alone", read_weights(model) - weight, expected, 1e-5)


@pytest.mark.parametrize("mode", ["auto", "stochastic"])
def test_column_norms_are_read_back_from_int8_layers(tmp_path: Path, mode: str) -> None:
    model = random_pipeline().transformer
    quantize_(model, backend="reference", outlier="none")
    layers = [model.get_submodule(name) for name in (Q, K, V)]

    def read() -> Tensor:
        return torch.cat([layer.read_quantized_weight().dequantize() for layer in layers])

    weight = read()
    expected = write_fused_dora(tmp_path / "dora.safetensors", weight, "double_blocks.0.img_attn.qkv")
    stack = LoraStack(model, mode=mode).add(tmp_path / "dora.safetensors")

    # the change of each part over what is rounded away
    made = (read() - weight).flatten()
    assert torch.dot(made, expected.flatten()) / expected.square().sum() == pytest.approx(1, abs=0.02)
    stack.clear()
    assert torch.equal(read(), weight)


def test_column_norms_have_no_branch(tmp_path: Path) -> None:
    model = random_pipeline().transformer
    write_fused_dora(tmp_path / "dora.safetensors", read_weights(model), "double_blocks.0.img_attn.qkv")
    quantize_(model, backend="reference")

    with pytest.raises(
        LoraError, match=r"lora\.mode=dynamic is not possible: a DoRA that has no low-rank form"
    ):
        LoraStack(model, mode="dynamic").add(tmp_path / "dora.safetensors")


# -- parameters of blocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantized", [False, True], ids=["float", "INT8"])
@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
def test_modulation_of_wan_is_changed(tmp_path: Path, prefix: str, quantized: bool) -> None:
    model = WanTransformer3DModel(
        in_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, ffn_dim=64, text_dim=8
    )
    block, head, norm = randn(1, 6, 32, seed=1), randn(1, 2, 32, seed=2), randn(32, seed=3)
    names = {"blocks.1.diff_m": block, "head.diff_m": head, "blocks.0.self_attn.norm_q.diff": norm}
    flatten = prefix.startswith("lora")
    tensors = {}
    for name, tensor in names.items():
        module, _, part = name.rpartition(".")
        tensors[f"{prefix}{module.replace('.', '_') if flatten else module}.{part}"] = tensor
    save_file(tensors, tmp_path / "motion.safetensors")
    if quantized:
        quantize_(model, backend="reference")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stack = LoraStack(model).add(tmp_path / "motion.safetensors", 0.5)
    changes = {
        "blocks.1.scale_shift_table": block,
        "scale_shift_table": head,
        "blocks.0.attn1.norm_q.weight": norm,
    }

    for name, value in model.state_dict().items():
        if name in changes:
            assert_close(name, value - before[name], 0.5 * changes[name], 1e-5)
        else:
            assert torch.equal(value, before[name]), name
    stack.clear()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modulation_of_another_width_is_refused(tmp_path: Path) -> None:
    model = WanTransformer3DModel(
        in_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=2, ffn_dim=64, text_dim=8
    )
    save_file({"blocks.0.diff_m": torch.ones(1, 6, 48)}, tmp_path / "motion.safetensors")

    with pytest.raises(
        LoraError,
        match=r"blocks\.0\.scale_shift_table changes a 1x6x48 weight, the model's is 1x6x32; the LoRA",
    ):
        LoraStack(model).add(tmp_path / "motion.safetensors")
