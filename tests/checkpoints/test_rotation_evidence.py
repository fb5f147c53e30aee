"""A rotation that a file does not mention is seen in the numbers, and one that it mentions and does not have.

Weights have tails as those of trained layers: heavier than a normal distribution's, or lighter.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints.drafts.draft import CheckpointDraft
from checkpoints.drafts.numbers import make_regular, make_sylvester, rotate_groups
from numpy.typing import NDArray

from int8run.checkpoints.detect import read_layers
from int8run.checkpoints.reader import TensorFiles

Array = NDArray[np.float64]
LOST = "nothing says that 4 INT8 layers are rotated, and by the numbers this is so, in groups of"
WRONG = "4 INT8 layers are said to be rotated in groups of 64 columns, and by the numbers this is not so"
DRAW: dict[str, Callable[[np.random.Generator, tuple[int, int]], Array]] = {
    "heavy tails": lambda generator, shape: generator.standard_t(8, shape),
    "light tails": lambda generator, shape: generator.uniform(-1, 1, shape),
    # of columns that differ in size, a rotation of the others makes no tails
    "outlier columns": lambda generator, shape: (
        generator.standard_t(10, shape) * np.where(np.arange(shape[1]) % 64 == 3, 8.0, 1.0)
    ),
}


def draft_layers(weights: list[Array], matrix: Array | None, marker: object = None) -> CheckpointDraft:
    draft = CheckpointDraft()
    for index, weight in enumerate(weights):
        stored = weight if matrix is None else rotate_groups(weight, matrix)
        scale = np.abs(stored).max(1, keepdims=True) / 127
        draft.put(f"blocks.{index}.weight", "I8", np.rint(stored / scale))
        draft.put(f"blocks.{index}.weight_scale", "F32", scale)
        if marker is not None:
            draft.put_marker(f"blocks.{index}.comfy_quant", marker)
    return draft


def draw_weights(kind: str) -> list[Array]:
    generator = np.random.default_rng(5)
    return [DRAW[kind](generator, (64, 512)) for _ in range(4)]


def read_and_listen(draft: CheckpointDraft, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    files = TensorFiles.open(draft.write(folder / "m.safetensors"))
    with files, caplog.at_level(logging.WARNING):
        read_layers(files)
    return caplog.text


@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize(
    ("matrix", "size"),
    [(make_regular(256), 256), (make_regular(64), 64), (make_regular(16), 16), (make_sylvester(128), 128)],
    ids=["convrot 256", "convrot 64", "convrot 16", "quarot 128"],
)
def test_a_rotation_that_nothing_mentions_is_said(
    matrix: Array, size: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = read_and_listen(draft_layers(draw_weights(kind), matrix), tmp_path, caplog)
    assert f"{LOST} {size} columns" in said
    assert ("model.quant_format=int8_convrot reads them" in said) == (size != 128)


@pytest.mark.parametrize("kind", [*DRAW])
def test_weights_that_are_not_rotated_are_read_in_silence(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"format": "int8_tensorwise", "per_row": True}
    for marker in (None, plain):
        assert read_and_listen(draft_layers(draw_weights(kind), None, marker), tmp_path, caplog) == ""


def test_normal_numbers_show_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As layers have them that were never trained: rotated and not rotated are the same."""
    generator = np.random.default_rng(6)
    weights = [generator.normal(size=(64, 512)) for _ in range(4)]
    for matrix in (None, make_regular(64)):
        assert read_and_listen(draft_layers(weights, matrix), tmp_path, caplog) == ""


@pytest.mark.parametrize("kind", ["heavy tails", "light tails"])
def test_a_label_that_the_numbers_deny_is_said(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    marker = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    right = draft_layers(draw_weights(kind), make_regular(64), marker)
    assert read_and_listen(right, tmp_path, caplog) == ""

    wrong = draft_layers(draw_weights(kind), None, marker)
    assert WRONG in read_and_listen(wrong, tmp_path, caplog)
