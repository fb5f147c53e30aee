"""The edits that the tiny model learns: what a prompt asks for, and what becomes of a drawing.

For `train_edit.py` and `evaluate_edit.py`; no model is known here.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

# edit -> prompts that ask for it; the first is the one that is measured
PROMPTS = {
    "high_contrast": ("make it high contrast", "high contrast", "turn it into an ink drawing"),
    "3d": ("make it 3d", "make it 3D", "make it glossy"),
    "mirror": ("mirror it", "flip it"),
    "grayscale": ("make it grayscale", "make it gray"),
    "red": ("make it red", "color it red"),
    "yellow": ("make it yellow", "color it yellow"),
    "green": ("make it green", "color it green"),
    "blue": ("make it blue", "color it blue"),
    "purple": ("make it purple", "color it purple"),
}
# the edits that are other drawings of the same name
STYLES = {"high_contrast": "ink", "3d": "gloss"}
# how often an edit is trained, among the styles and among the others: a new line drawing is harder than a hue
WEIGHTS = {"high_contrast": 0.6, "3d": 0.4, "mirror": 0.4}
OTHER_WEIGHT = 0.1
# what the most saturated pixel becomes, red, green and blue in 0..1
HUES = {
    "red": (1.0, 0.1, 0.0),
    "yellow": (1.0, 0.8, 0.0),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.0, 0.35, 1.0),
    "purple": (0.65, 0.0, 1.0),
}
LUMA = (0.299, 0.587, 0.114)  # Rec. 601
HELD_OUT = 100


def list_shares(style_share: float) -> Tensor:
    """How often each edit is trained, in the order of PROMPTS.

    Args:
        style_share: of the edits that are styles, together, 0 to 1.
    """
    shares = []
    for edit in PROMPTS:
        of_group = style_share if edit in STYLES else 1 - style_share
        shares.append(of_group * WEIGHTS.get(edit, OTHER_WEIGHT))
    return torch.tensor(shares)


def list_held_out(count: int) -> list[int]:
    """Positions of the drawings that are never trained on: at most a hundred, a third of few drawings.

    They are spread evenly over all.
    """
    held_out = min(HELD_OUT, count // 3)
    return [int(position) for position in torch.linspace(0, count - 1, held_out)]


def recolor(images: Tensor, hue: tuple[float, float, float]) -> Tensor:
    """Give every pixel one hue and keep its saturation: white, gray and black stay.

    uint8 [N, 3, H, W], as the result.
    """
    darkest = images.amin(dim=1, keepdim=True).float()
    chroma = images.amax(dim=1, keepdim=True).float() - darkest
    colored = darkest + chroma * torch.tensor(hue)[:, None, None]
    return colored.round().to(torch.uint8)


def make_gray(images: Tensor) -> Tensor:
    """The luma of each pixel in all three channels, uint8 [N, 3, H, W]."""
    luma = (images.float() * torch.tensor(LUMA)[:, None, None]).sum(dim=1, keepdim=True)
    return luma.round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def apply_edit(edit: str, images: Mapping[str, Tensor]) -> Tensor:
    """What an edit should make of the flat drawings.

    Args:
        edit: a key of PROMPTS.
        images: the same drawings by style, uint8 [N, 3, H, W].
    """
    if edit in STYLES:
        return images[STYLES[edit]]
    flat = images["flat"]
    if edit in HUES:
        return recolor(flat, HUES[edit])
    if edit == "mirror":
        return flat.flip(-1)
    return make_gray(flat)


def mirror_all(images: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every style mirrored: as good as twice the drawings."""
    return {style: drawings.flip(-1) for style, drawings in images.items()}
