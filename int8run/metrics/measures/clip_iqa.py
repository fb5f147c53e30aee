"""CLIP-IQA: whether CLIP takes an image for a good photo rather than a bad one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope
from int8run.metrics.clip import load_clip
from int8run.metrics.weights import check_location, check_revision

CLIP, SIZE = "openai/clip-vit-large-patch14", "1.7 GB"
ANCHORS = ("Good photo.", "Bad photo.")  # the paper's pair for quality
TEMPERATURE = 100


@dataclass(frozen=True)
class ClipIqa:
    """CLIP-IQA of Wang et al. 2023 (arXiv:2207.12396) with a CLIP as it is published.

    The softmax over 100 · cosine of the image with "Good photo." and "Bad photo.", of the first: 0 to 1. The
    paper takes a ResNet-50 without position embeddings, so its numbers differ from these.

    Args:
        weights: a folder, or an id on the hub.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = CLIP
    revision: str | None = None
    name: ClassVar[str] = "clip_iqa"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/clip_iqa": Metric(
            MORE,
            "whether CLIP takes the images for good photos, 0 to 1",
            label="CLIP-IQA",
            lowest=0,
            highest=1,
        ),
        "float/clip_iqa": Metric(MORE, "the same of the float model's images", lowest=0, highest=1),
    }
    needs: ClassVar[Needs] = Needs(weights="CLIP ViT-L/14, 1.7 GB, downloaded once; clip_score has the same")
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.clip_iqa.weights", self.weights)
        check_revision("metrics.measures.clip_iqa.revision", self.revision)

    def load(self) -> FrameFunction:
        """Load CLIP, once."""
        clip = load_clip(self.weights, SIZE, revision=self.revision)
        anchors = clip.embed_texts(ANCHORS).detach()  # [2, C]

        def rate(image: Tensor) -> float:
            chances = (TEMPERATURE * anchors @ clip.embed_image(image)).softmax(dim=0)
            return chances[0].item()

        return lambda a, b, prompt: {"clip_iqa": rate(a), "float/clip_iqa": rate(b)}
