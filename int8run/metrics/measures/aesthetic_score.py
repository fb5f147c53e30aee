"""LAION's aesthetic score: five linear layers on CLIP's features of an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.clip import load_clip
from int8run.metrics.rating_head import build_head
from int8run.metrics.weights import READING_ERRORS, check_location, check_revision, find_file, format_error

CLIP, SIZE = "openai/clip-vit-large-patch14", "1.7 GB"
HEAD, HEAD_FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"


@dataclass(frozen=True)
class AestheticScore:
    """LAION's improved aesthetic predictor (sac+logos+ava1): 1 to 10, as people rated images.

    Args:
        weights: of CLIP ViT-L/14, a folder or an id on the hub.
        head: of the layers on it, a file; or an id on the hub whose file is `aesthetic-model.pth`.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = CLIP
    head: str = HEAD
    revision: str | None = None
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
        check_revision("metrics.measures.aesthetic_score.revision", self.revision)
        check_location("metrics.measures.aesthetic_score.head", self.head)

    def load(self) -> FrameFunction:
        """Load both networks, once."""
        clip = load_clip(self.weights, SIZE, revision=self.revision)
        head = load_head(self.head, clip.model.config.projection_dim)

        def rate(image: Tensor) -> float:
            rating: Tensor = head(clip.embed_image(image))
            return rating.item()

        return lambda a, b, prompt: {"aesthetic_score": rate(a), "float/aesthetic_score": rate(b)}


def load_head(location: str, width: int) -> nn.Module:
    """The layers on CLIP's features.

    Args:
        location: a file, or an id on the hub.
        width: of the features.

    Raises:
        UnavailableError: where they cannot be loaded.
    """
    file = find_file(location, HEAD_FILE, size="4 MB")
    try:
        return build_head(torch.load(file, map_location="cpu", weights_only=True), "layers.", width)
    except READING_ERRORS as error:
        raise UnavailableError(
            f"{file} is no aesthetic predictor ({format_error(error)}); name LAION's file with "
            "metrics.measures.aesthetic_score.head"
        ) from error
