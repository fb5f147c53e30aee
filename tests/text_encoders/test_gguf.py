"""Text encoders out of GGUF files: names by llama.cpp's own table, numbers as its converter leaves them."""

import copy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.compare import assert_close
from support.gguf_files import write_gguf
from text_encoders.tiny_encoders import TINY, run_model, tiny_model
from torch import Tensor, nn

from int8run.errors import ConfigError, FileError
from int8run.text_encoders.load import build_text_encoder, load_text_encoder
from int8run.text_encoders.weights import EncoderFile

pytestmark = pytest.mark.usefixtures("one_thread")

ARCH = gguf.MODEL_ARCH
CASES = {
    "T5EncoderModel": ARCH.T5ENCODER,
    "T5EncoderModel 1.0": ARCH.T5ENCODER,
    "UMT5EncoderModel": ARCH.T5,
    "Qwen2ForCausalLM": ARCH.QWEN2,
    "Qwen3ForCausalLM": ARCH.QWEN3,
    "Gemma2ForCausalLM": ARCH.GEMMA2,
    "Gemma3ForCausalLM": ARCH.GEMMA3,
    "LlamaForCausalLM": ARCH.LLAMA,
}
# llama.cpp rotates two numbers beside each other there
ROTATED = (ARCH.LLAMA,)
WITH_ONE_ADDED = (ARCH.GEMMA2, ARCH.GEMMA3)


def convert(model: nn.Module, arch: gguf.MODEL_ARCH) -> dict[str, np.ndarray]:
    """A model's tensors as llama.cpp's converter writes them."""
    config = model.config
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    converted = {}
    for key, tensor in model.state_dict().items():
        if key == "encoder.embed_tokens.weight" or (key == "lm_head.weight" and config.tie_word_embeddings):
            continue  # once more another one
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, key
        values = tensor.float().numpy()
        if arch in ROTATED and key.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
            half = len(values) // heads // 2
            values = values.reshape(heads, 2, half, -1).swapaxes(1, 2).reshape(values.shape)
        if arch in WITH_ONE_ADDED and key.endswith("norm.weight"):
            values = values + 1
        converted[name] = values
    return converted


def write_encoder(path: Path, name: str, kind: str) -> None:
    """Write one of TINY as its architecture's GGUF file."""
    model, arch = tiny_model(name), CASES[name]
    architecture = gguf.MODEL_ARCH_NAMES[arch]
    metadata = {"general.name": "tiny"}
    if arch in ROTATED:
        metadata[f"{architecture}.attention.head_count"] = model.config.num_attention_heads
        metadata[f"{architecture}.attention.head_count_kv"] = model.config.num_key_value_heads
    tensors = convert(model, arch)
    if arch == ARCH.LLAMA:
        tensors["rope_freqs.weight"] = np.ones(8, np.float32)
    if arch == ARCH.T5:
        tensors["dec.blk.0.attn_q.weight"] = np.ones((4, 4), np.float32)
    write_gguf(
        path,
        tensors,
        # norms and the tables of words and positions stay whole
        lambda key, tensor: kind if tensor.ndim == 2 and "blk" in key and "rel_b" not in key else "F32",
        architecture=architecture,
        metadata=metadata,
    )


def round_like_gguf(values: Tensor, kind: str) -> Tensor:
    """What a matrix is once it was written in a type. Rows do not know each other."""
    chosen = gguf.GGMLQuantizationType[kind]
    data = gguf.quants.quantize(values.float().numpy(), chosen)
    return torch.from_numpy(gguf.quants.dequantize(data, chosen).copy())


def round_layers(model: nn.Module, kind: str) -> nn.Module:
    """A copy whose layers have the numbers of a type, where their rows are whole blocks."""
    copied = copy.deepcopy(model)
    for name, module in copied.named_modules():
        is_layer = isinstance(module, nn.Linear) and "lm_head" not in name
        if is_layer and (kind == "F16" or module.in_features % 32 == 0):
            module.weight.data = round_like_gguf(module.weight.data, kind)
    return copied


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", CASES)
def test_an_encoder_answers_as_the_one_that_was_converted(name: str, kind: str, tmp_path: Path) -> None:
    write_encoder(tmp_path / "x.gguf", name, kind)
    class_name = TINY[name].cls
    config = {**TINY[name].config, "architectures": [class_name]}

    state, metadata = load_text_encoder(tmp_path / "x.gguf", config=config)
    built = build_text_encoder(state, metadata, class_name=class_name, config=config, dtype=torch.float32)

    assert metadata["encoder"] == TINY[name].encoder
    if kind in ("Q8_0", "Q4_0"):
        assert metadata["quant_format"]["found"] == kind
        assert set(metadata["read_as_float"].values()) == {kind}
    expected = round_layers(tiny_model(name), kind)
    for found, wanted in zip(run_model(built), run_model(expected), strict=True):
        # a norm that comes back from 1 + x has lost some digits
        assert_close(name, found, wanted, 1e-5 if CASES[name] in WITH_ONE_ADDED else 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_each_name_of_the_converter_is_known(name: str, tmp_path: Path) -> None:
    write_encoder(tmp_path / "x.gguf", name, "Q8_0")
    weights = EncoderFile(tmp_path / "x.gguf")
    with weights.files:
        unknown = [key for key in weights.shapes if key.startswith(("blk.", "enc.", "token", "output"))]
    assert not unknown


def test_words_that_the_converter_cut_off_are_zero(tmp_path: Path) -> None:
    """Gemma 3 has a few rows more than its tokenizer has words."""
    name = "Gemma3ForCausalLM"
    model = tiny_model(name)
    tensors = convert(model, CASES[name])
    tensors["token_embd.weight"] = tensors["token_embd.weight"][:36]
    write_gguf(tmp_path / "x.gguf", tensors, "Q8_0", architecture="gemma3")
    config = {**TINY[name].config, "architectures": [name]}
    weights = EncoderFile(tmp_path / "x.gguf")

    with weights.files:
        weights.resolve_padded_shapes(model)
        found = weights.read_tensor("model.embed_tokens.weight")

    assert found.shape == (40, 32) and not found[36:].any()
    assert torch.equal(found[:36], round_like_gguf(model.model.embed_tokens.weight.data[:36], "Q8_0"))
    state, metadata = load_text_encoder(tmp_path / "x.gguf", config=config)
    assert build_text_encoder(state, metadata, class_name=name, config=config) is not None


def test_a_table_of_another_width_is_still_another_size(tmp_path: Path) -> None:
    name = "Gemma3ForCausalLM"
    tensors = convert(tiny_model(name), CASES[name])
    tensors["token_embd.weight"] = np.ones((36, 64), np.float32)
    write_gguf(tmp_path / "x.gguf", tensors, architecture="gemma3")
    config = {**TINY[name].config, "architectures": [name]}
    with pytest.raises(FileError, match=r"has the shape \[36, 64\]"):
        load_text_encoder(tmp_path / "x.gguf", config=config)


def test_qwen3_vl_is_told_from_qwen3_by_its_architecture(tmp_path: Path) -> None:
    tensors = convert(tiny_model("Qwen3ForCausalLM"), ARCH.QWEN3VL)
    found = {}
    for architecture in ("qwen3", "qwen3vl"):
        write_gguf(tmp_path / "x.gguf", tensors, "Q8_0", architecture=architecture)
        weights = EncoderFile(tmp_path / "x.gguf")
        found[architecture] = weights.encoder.name
        weights.files.close()
    assert found == {"qwen3": "qwen3", "qwen3vl": "qwen3_vl"}


def test_a_format_that_was_asked_for_is_not_in_a_gguf_file(tmp_path: Path) -> None:
    write_encoder(tmp_path / "x.gguf", "T5EncoderModel", "Q8_0")
    with pytest.raises(
        ConfigError, match=r"holds GGUF's \d+ layers Q8_0, which are read as floats, and int8"
    ):
        EncoderFile(tmp_path / "x.gguf", "int8_convrot")


def test_a_vision_tower_alone_is_refused_by_name(tmp_path: Path) -> None:
    """`mmproj-*.gguf`, which stands beside a language model."""
    tensors = {"v.blk.0.attn_q.weight": np.ones((4, 32), np.float32)}
    write_gguf(tmp_path / "mmproj.gguf", tensors, architecture="clip")
    with pytest.raises(FileError, match="a language model of the architecture 'clip'"):
        EncoderFile(tmp_path / "mmproj.gguf")
