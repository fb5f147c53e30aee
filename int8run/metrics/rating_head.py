"""Five linear layers on the features of a network, which rate an image: the aesthetic score and ImageReward.

Both publishers trained the same layers, with dropout between them.
"""

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn

WIDTHS = (1024, 128, 64, 16, 1)
LAYER_NUMBERS = (0, 2, 4, 6, 7)  # in the published files; dropout, which has no weights, has the others


def build_head(state: Mapping[str, Tensor], prefix: str, width: int) -> nn.Module:
    """The layers with their weights, without the dropout.

    Args:
        state: of a published file.
        prefix: of the names of these layers.
        width: of the features.

    Raises:
        LookupError, RuntimeError: where the file has no such layers.
    """
    layers = [nn.Linear(*sizes) for sizes in pairwise([width, *WIDTHS])]
    for number, layer in zip(LAYER_NUMBERS, layers, strict=True):
        weights = {part: state[f"{prefix}{number}.{part}"] for part in ("weight", "bias")}
        layer.load_state_dict(weights)
    return nn.Sequential(*layers).eval()
