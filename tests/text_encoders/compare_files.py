"""Small quantized files, whole and damaged, and the comparison of what int8run reads with the oracle.

`test_fuzz.py` beside this and `tests/fuzzing` damage them at random.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from text_encoders import oracle
from text_encoders.files import ENCODERS, FORMATS, File, make_encoder_file, to_legacy
from text_encoders.mutations import Draft
from text_encoders.oracle_file import FLOATS, FP8, Unreadable, numbers, tensors_of
from text_encoders.oracle_numbers import Reading
from text_encoders.probes import probe_weights, strip_root

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.layer import CheckpointLayer
from int8run.checkpoints.reader import TensorFiles
from int8run.errors import ConfigError, FileError
from int8run.text_encoders.load import build_text_encoder, load_text_encoder

T5_PART = ("SelfAttention.q.", "wi_0.", ".wo.", "layer_norm")
CLIP_PART = ("q_proj.", "fc1.", "fc2.", "layer_norm1")


def choose_part(word: str, carrier: str = "tensor", name: str = "t5", **options: Any) -> Callable[[], File]:
    """A few layers of an encoder."""
    return partial(
        make_encoder_file,
        name,
        word,
        carrier=carrier,
        only=CLIP_PART if name == "clip_l" else T5_PART,
        **options,
    )


BASES: dict[str, Callable[[], File]] = {
    **{
        f"{word}, {carrier}": choose_part(word, carrier)
        for word in FORMATS
        for carrier in ("tensor", "header")
    },
    **{
        f"{word}, both": choose_part(word, "both")
        for word in ("int8_convrot", "int8_rowwise", "nvfp4", "mxfp8", "w4a8", "w6a8")
    },
    # a rotation without a marker is invisible: such a file is one with unrotated rows, and codes need theirs
    **{
        f"{word}, none": choose_part(word, "none", "clip_l")
        for word in FORMATS
        if word not in ("int8_convrot", "w4a8", "w6a8")
    },
    **{
        f"legacy {x}": partial(lambda x: to_legacy(choose_part(x)(), 2), x)
        for x in ("float8_e4m3fn", "float8_e5m2", "int8_tensorwise")
    },
    "mixed": choose_part("", words=("int8_rowwise", "float8_e4m3fn", "nvfp4", "mxfp8", "int8_convrot")),
    "mixed, header": choose_part(
        "", "header", words=("int8_convrot", "float8_e4m3fn_cast", "int8_blockwise")
    ),
    "floats": choose_part(""),
}
base = cache(lambda name: BASES[name]())


PREFIXED = (
    ("text_encoders.t5xxl.transformer.", "t5", "float8_e4m3fn"),
    ("cond_stage_model.transformer.", "clip_l", "int8_convrot"),
    ("conditioner.embedders.0.transformer.", "clip_l", "mxfp8"),
    ("text_encoders.qwen3_4b.transformer.", "qwen3", "nvfp4"),
)
WHOLE: dict[str, Callable[[], File]] = {
    **{
        f"{name}, {word}": partial(make_encoder_file, name, word)
        for name, word in zip([*ENCODERS] * 4, [*FORMATS] * 3, strict=False)
    },
    **{
        f"{prefix}{name}": partial(
            lambda p, *x: make_encoder_file(*x, carrier="both").prefixed(p), prefix, name, word
        )
        for prefix, name, word in PREFIXED
    },
    "tables": lambda: make_encoder_file("t5", "int8_rowwise", quantized=["shared.weight"]),
    "legacy": lambda: to_legacy(make_encoder_file("t5", "float8_e4m3fn", quantized=["shared.weight"])),
    "mixed": lambda: make_encoder_file(
        "clip_g", words=("int8_rowwise", "float8_e4m3fn", "nvfp4", "mxfp8", "int8_convrot")
    ),
}
whole = cache(lambda name: WHOLE[name]())


def make_mutated_file(
    file: File, changes: list[tuple[Callable[[Draft, Random], None], int]], path: Path
) -> Path:
    """A file with some things done to it."""
    draft = Draft(file.copy())
    for change, seed in changes:
        change(draft, Random(seed))
    return draft.write(path)


def assert_same_outcome(name: str, found: np.ndarray, expected: Reading) -> None:
    """Compare a weight, to the last bit where only one product is rounded; what the file pads may be cut."""
    wanted = expected.weight[tuple(slice(size) for size in found.shape)]
    assert found.shape == wanted.shape, f"{name}: {found.shape} of {expected.weight.shape}"
    with np.errstate(over="ignore", invalid="ignore"):
        single = wanted.astype(np.float32)
        if expected.products == 1:
            assert np.array_equal(found, single, equal_nan=True), name
            return
        largest = np.nanmax(abs(wanted), initial=0)
        if largest < 1e36:  # rotations of larger ones overflow
            allowed = 1e-5 * largest if expected.products > 9 else 1e-6 * abs(wanted)
            assert np.allclose(found, single, rtol=0, atol=np.maximum(allowed, 1e-44), equal_nan=True), name


def to_logical(layer: CheckpointLayer) -> tuple[int, int] | None:
    """The shape to ask for, of a weight that the file pads."""
    return (layer.rows, layer.columns) if layer.is_padded else None


def read_by_int8run(path: Path) -> dict[str, tuple[np.ndarray, str]]:
    """Every matrix of a file, and the format's word; also as it stays in memory, where it can."""
    with TensorFiles.open(path) as files:
        found = {}
        for name, layer in read_layers(files).items():
            weight = layer.read_weight(files, shape=to_logical(layer)).numpy()
            found[name] = weight, layer.format_name
            if layer.is_packable:
                coded, transform = layer.read_packed_weight(files)
                again = transform.restore_weight(coded.dequantize()).numpy()
                assert is_same_tensor(again, weight), f"{name}: the codes give other numbers"
            if len(layer.shape) == 2 and len(weight) > 2:
                assert is_same_tensor(
                    layer.read_weight(files, slice(1, -1 + len(weight)), to_logical(layer)).numpy(),
                    weight[1:-1],
                ), f"{name}: some rows"
        return found


def is_same_tensor(found: np.ndarray, wanted: np.ndarray, allowed: float = 2e-6) -> bool:
    """Whether two weights are the same but for the order of sums; where one is NaN the other is too."""
    largest = np.nanmax(abs(wanted), initial=0)
    if found.shape != wanted.shape or largest > 1e36:  # sums of larger ones overflow
        return found.shape == wanted.shape
    with np.errstate(invalid="ignore"):
        near = abs(found - wanted) <= allowed * (abs(wanted) + largest) + 1e-36
    return bool((near | np.isnan(found) & np.isnan(wanted)).all())


def compare_file(path: Path) -> str:
    """Read a file, or several with an index, both ways. Returns what came of it."""
    named = path.parent if path.suffix == ".json" else path
    try:
        expected = oracle.read(path)
    except Unreadable as error:
        expected, why = None, error
    try:
        found = read_by_int8run(path)
    except (FileError, ConfigError) as error:
        assert "\n" not in str(error) and str(named) in str(error), str(error)
        return "refused, rightly" if expected is None else "refused"
    assert expected is not None, f"loaded, and there is no reading: {why}"
    assert set(found) == set(expected)
    for name, (weight, word) in found.items():
        assert_same_outcome(name, weight, expected[name])
        assert word == expected[name].word, name
    return "read"


def compare_encoder(path: Path) -> str:
    """Load a file as a text encoder, build it, and read every layer and parameter; return the outcome."""
    try:
        state, metadata = load_text_encoder(path, kernel_backend="dequantize")
        model = build_text_encoder(state, metadata, dtype=torch.float32)
    except (FileError, ConfigError) as error:
        assert "\n" not in str(error) and str(path) in str(error), str(error)
        return "refused"
    prefix = metadata["prefix"]
    try:
        expected = {
            strip_root(name.removeprefix(prefix)): reading
            for name, reading in oracle.read(path, prefix).items()
        }
    except Unreadable as error:
        raise AssertionError(f"loaded, and there is no reading: {error}") from error
    found = probe_weights(model)
    found.pop("lm_head", None)  # the table of tokens, or not there
    assert found.keys() <= expected.keys(), found.keys() - expected.keys()
    for name, weight in found.items():
        assert is_same_tensor(
            weight, expected[name].weight[tuple(slice(size) for size in weight.shape)], 1e-5
        ), name
    stored = {strip_root(key.removeprefix(prefix)): tensor for key, tensor in tensors_of(path)[0].items()}
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases
            tensor = stored[strip_root(name)]
            assert tensor.dtype in (*FLOATS, *FP8), f"{name} is {tensor.dtype}"
            layer = expected.get(strip_root(name.removesuffix(".weight")))
            wanted = numbers(tensor) if layer is None else layer.weight
            assert np.allclose(parameter.numpy(), wanted, rtol=1e-6), name
    return "read"
