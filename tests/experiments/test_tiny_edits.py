"""What `experiments/tiny/edits.py` makes of a drawing, and how `evaluate_edit.py` judges images."""

import colorsys
from types import ModuleType

import pytest
import torch
from support.experiment_script import load_script
from torch import Tensor

WHITE, GRAY, ORANGE = (255, 255, 255), (90, 90, 90), (250, 150, 50)


@pytest.fixture(scope="module")
def edits() -> ModuleType:
    return load_script("tiny/edits.py")


@pytest.fixture
def drawings() -> dict[str, Tensor]:
    """Two drawings of noise in each style."""
    generator = torch.Generator().manual_seed(0)
    return {
        style: torch.randint(0, 256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
        for style in ("flat", "ink", "gloss")
    }


def test_a_color_changes_the_hue_alone(edits: ModuleType) -> None:
    pixels = torch.tensor([WHITE, GRAY, ORANGE], dtype=torch.uint8).T.reshape(1, 3, 1, 3)

    white, gray, orange = edits.recolor(pixels, (0.0, 0.0, 1.0))[0, :, 0].T.tolist()

    assert (tuple(white), tuple(gray)) == (WHITE, GRAY)
    before = colorsys.rgb_to_hsv(*(value / 255 for value in ORANGE))
    hue, saturation, value = colorsys.rgb_to_hsv(*(value / 255 for value in orange))
    assert hue == pytest.approx(2 / 3)  # blue
    assert (saturation, value) == pytest.approx(before[1:])


def test_gray_is_as_light_as_the_color(edits: ModuleType, drawings: dict[str, Tensor]) -> None:
    gray = edits.apply_edit("grayscale", drawings)

    assert torch.equal(gray[:, 0], gray[:, 1])
    assert torch.equal(gray[:, 0], gray[:, 2])
    weights = torch.tensor([299, 587, 114]).reshape(3, 1, 1)
    expected = (drawings["flat"].int() * weights).sum(dim=1) / 1000
    assert (gray[:, 0] - expected).abs().max() <= 0.5


def test_a_mirrored_drawing_begins_at_the_other_side(edits: ModuleType, drawings: dict[str, Tensor]) -> None:
    mirrored = edits.apply_edit("mirror", drawings)

    assert torch.equal(mirrored[..., 0], drawings["flat"][..., -1])
    assert torch.equal(edits.apply_edit("mirror", {"flat": mirrored}), drawings["flat"])


def test_a_style_is_another_drawing_of_the_same_name(edits: ModuleType, drawings: dict[str, Tensor]) -> None:
    assert torch.equal(edits.apply_edit("high_contrast", drawings), drawings["ink"])
    assert torch.equal(edits.apply_edit("3d", drawings), drawings["gloss"])


def test_shares_of_all_edits_are_whole(edits: ModuleType) -> None:
    shares = dict(zip(edits.PROMPTS, edits.list_shares(style_share=0.7).tolist(), strict=True))

    assert sum(shares.values()) == pytest.approx(1)
    assert shares["high_contrast"] + shares["3d"] == pytest.approx(0.7)
    assert min(shares.values()) > 0


@pytest.mark.parametrize(("count", "held_out"), [(1594, 100), (9, 3)])
def test_held_out_drawings_are_spread_over_all(edits: ModuleType, count: int, held_out: int) -> None:
    positions = edits.list_held_out(count)

    assert len(set(positions)) == held_out
    assert (positions[0], positions[-1]) == (0, count - 1)


def test_an_image_is_right_where_nothing_else_is_nearer(drawings: dict[str, Tensor]) -> None:
    look_up = load_script("tiny/evaluate_edit.py").look_up
    candidates = {"mirror": drawings["flat"], "blue": drawings["ink"]}
    swapped = drawings["flat"].flip(0)

    right = look_up(drawings["flat"], "mirror", [0, 1], candidates)
    wrong_drawing = look_up(swapped, "mirror", [0, 1], candidates)
    wrong_edit = look_up(drawings["ink"], "mirror", [0, 1], candidates)

    assert right.right.tolist() == right.right_edit.tolist() == [True, True]
    assert wrong_drawing.right.tolist() == [False, False]
    assert wrong_drawing.right_edit.tolist() == [True, True]
    assert wrong_edit.right_edit.tolist() == [False, False]


def test_of_two_equal_candidates_both_are_right(drawings: dict[str, Tensor]) -> None:
    look_up = load_script("tiny/evaluate_edit.py").look_up
    candidates = {"mirror": drawings["flat"], "grayscale": drawings["flat"]}

    found = look_up(drawings["flat"], "grayscale", [0, 1], candidates)

    assert found.right.tolist() == [True, True]
