"""LAION's aesthetic score: five linear layers on CLIP's features of an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.clip import load_clip
from int8run.metrics.weights import LOADING_ERRORS, check_location, download_file, format_error

CLIP, SIZE = "openai/clip-vit-large-patch14", "1.7 GB"
HEAD, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


@dataclass(frozen=True)
class AestheticScore:
    """LAION's improved aesthetic predictor (sac+logos+ava1): 1 to 10, as people rated images.

    Args:
        weights: of CLIP ViT-L/14, a folder or an id on the hub.
        head: of the layers on it, a file; or an id on the hub whose file is `aesthetic-model.pth`.
    """

    weights: str = CLIP
    head: str = HEAD
    name: ClassVar[str] = "aesthetic_score"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/aesthetic_score": Metric(
            MORE, "how beautiful people would find the images, 1 to 10", label="aesthetic score"
        ),
        "float/aesthetic_score": Metric(MORE, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(weights="CLIP ViT-L/14, 1.7 GB, and 4 MB, downloaded once")
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.aesthetic_score.weights", self.weights)
        check_location("metrics.measures.aesthetic_score.head", self.head)

    def load(self) -> FrameFunction:
        """Load both networks, once."""
        clip = load_clip(self.weights, SIZE)
        head = load_head(self.head, clip.model.config.projection_dim)

        def rate(image: Tensor) -> float:
            rating: Tensor = head(clip.embed_image(image))
            return rating.item()

        return lambda a, b, prompt: {"aesthetic_score": rate(a), "float/aesthetic_score": rate(b)}


def load_head(location: str, width: int) -> nn.Module:
    """The layers on CLIP's features, without the dropout between them.

    Args:
        location: a file, or an id on the hub.
        width: of the features.

    Raises:
        UnavailableError: where they cannot be loaded.
    """
    file = Path(location)
    if not file.is_file():
        file = download_file(location, HEAD_FILE, size="4 MB")
    widths = [width, 1024, 128, 64, 16, 1]
    # the published file has dropout between them, which has no weights: these are the numbers of its layers
    numbers = (0, 2, 4, 6, 7)
    layers = [nn.Linear(*sizes) for sizes in pairwise(widths)]
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        for number, layer in zip(numbers, layers, strict=True):
            layer.load_state_dict({part: state[f"layers.{number}.{part}"] for part in ("weight", "bias")})
    except LOADING_ERRORS as error:
        raise UnavailableError(
            f"{file} is no aesthetic predictor ({format_error(error)}); name LAION's file with "
            "metrics.measures.aesthetic_score.head"
        ) from error
    return nn.Sequential(*layers).eval()
