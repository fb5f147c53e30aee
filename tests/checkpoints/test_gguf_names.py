"""Names and numbers of language models as llama.cpp's converter leaves them."""

from pathlib import Path

import numpy as np
import pytest
from support.gguf_files import write_gguf

from int8run.checkpoints.gguf_names import load_architectures
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import FileError


def make_rows(rows: int, columns: int = 32) -> np.ndarray:
    return np.arange(rows * columns, dtype=np.float32).reshape(rows, columns)


def test_a_denoiser_keeps_its_names(tmp_path: Path) -> None:
    tensors = {"double_blocks.0.img_attn.qkv.weight": make_rows(4), "blk_in.0.norm.scale": make_rows(2)}
    write_gguf(tmp_path / "x.gguf", tensors, architecture="flux")
    with TensorFiles.open(tmp_path / "x.gguf") as files:
        assert files.keys() == tensors.keys()


@pytest.mark.parametrize("architecture", ["llama", "mistral3"])
def test_rotated_rows_are_those_of_transformers(architecture: str, tmp_path: Path) -> None:
    """The converter: [heads, 2, half] becomes [heads, half, 2]."""
    heads = {f"{architecture}.attention.head_count": 4, f"{architecture}.attention.head_count_kv": 2}
    query, key = make_rows(64), make_rows(32)
    permuted = [
        rows.reshape(heads, 2, 8, 32).swapaxes(1, 2).reshape(rows.shape)
        for rows, heads in ((query, 4), (key, 2))
    ]
    tensors = {
        "blk.7.attn_q.weight": permuted[0],
        "blk.7.attn_k.weight": permuted[1],
        "blk.7.attn_k.bias": permuted[1][:, 0].copy(),
        "blk.7.attn_v.weight": key,
        "output.weight": key,
    }
    write_gguf(tmp_path / "x.gguf", tensors, "F16", architecture=architecture, metadata=heads)

    with TensorFiles.open(tmp_path / "x.gguf") as files:
        layer = "model.layers.7.self_attn"
        assert np.array_equal(files.read(f"{layer}.q_proj.weight").numpy(), query)
        assert np.array_equal(files.read(f"{layer}.k_proj.weight").numpy(), key)
        assert np.array_equal(files.read(f"{layer}.k_proj.weight", slice(5, 21)).numpy(), key[5:21])
        assert np.array_equal(files.read(f"{layer}.k_proj.bias").numpy(), key[:, 0])
        assert np.array_equal(files.read(f"{layer}.v_proj.weight").numpy(), key)
        assert files[f"{layer}.q_proj.weight"].dtype == "F16" and "lm_head.weight" in files


def test_norms_of_gemma_lose_the_one_that_was_added(tmp_path: Path) -> None:
    norm = np.array([0.25, -0.5, 0.0, 3.0], np.float32)
    names = {
        "output_norm.weight": "model.norm.weight",
        "blk.1.attn_norm.weight": "model.layers.1.input_layernorm.weight",
        "blk.1.attn_q_norm.weight": "model.layers.1.self_attn.q_norm.weight",
        "blk.1.attn_k_norm.weight": "model.layers.1.self_attn.k_norm.weight",
        "blk.1.post_attention_norm.weight": "model.layers.1.post_attention_layernorm.weight",
        "blk.1.ffn_norm.weight": "model.layers.1.pre_feedforward_layernorm.weight",
        "blk.1.post_ffw_norm.weight": "model.layers.1.post_feedforward_layernorm.weight",
    }
    write_gguf(tmp_path / "x.gguf", dict.fromkeys(names, norm + 1), architecture="gemma3")

    with TensorFiles.open(tmp_path / "x.gguf") as files:
        assert set(files) == set(names.values())
        for key in files:
            assert np.array_equal(files.read(key).numpy(), norm), key
            assert np.array_equal(files.read(key, slice(1, 3)).numpy(), norm[1:3]), key


def test_norms_of_other_models_stay(tmp_path: Path) -> None:
    write_gguf(tmp_path / "x.gguf", {"blk.0.attn_norm.weight": make_rows(2)}, architecture="qwen3")
    with TensorFiles.open(tmp_path / "x.gguf") as files:
        assert np.array_equal(files.read("model.layers.0.input_layernorm.weight").numpy(), make_rows(2))


@pytest.mark.parametrize("architecture", ["qwen35", "gpt-oss", "clip", "x"])
def test_a_language_model_that_is_not_known_is_refused_by_name(architecture: str, tmp_path: Path) -> None:
    name = "v.blk.0.attn_q.weight" if architecture == "clip" else "blk.0.attn_q.weight"
    write_gguf(tmp_path / "x.gguf", {name: make_rows(4)}, architecture=architecture)

    with pytest.raises(
        FileError, match=f"of the architecture '{architecture}' in llama.cpp's names"
    ) as caught:
        TensorFiles.open(tmp_path / "x.gguf")

    for known in load_architectures():
        assert known in str(caught.value)


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"llama.attention.head_count": 0},
        {"llama.attention.head_count": 3},
        {"llama.attention.head_count": 64},
    ],
)
def test_heads_that_cannot_be_are_said(metadata: dict[str, int], tmp_path: Path) -> None:
    write_gguf(
        tmp_path / "x.gguf", {"blk.0.attn_q.weight": make_rows(64)}, architecture="llama", metadata=metadata
    )
    with pytest.raises(
        FileError, match=r"blk\.0\.attn_q\.weight has 64 rows, and llama\.attention\.head_count"
    ):
        TensorFiles.open(tmp_path / "x.gguf")


def test_two_tensors_of_one_name_are_said(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": make_rows(4), "model.embed_tokens.weight": make_rows(4)}
    write_gguf(tmp_path / "x.gguf", tensors, architecture="qwen3")
    with pytest.raises(FileError, match=r"are both model\.embed_tokens\.weight"):
        TensorFiles.open(tmp_path / "x.gguf")
