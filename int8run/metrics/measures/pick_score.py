"""PickScore: which image people would pick for a prompt, by a CLIP that was trained on their choices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope
from int8run.metrics.clip import load_clip
from int8run.metrics.weights import check_location, check_revision

WEIGHTS, PROCESSOR, SIZE = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "3.9 GB"


@dataclass(frozen=True)
class PickScore:
    """PickScore of Kirstain et al. 2023 (arXiv:2305.01569): logit scale · cosine of image and prompt.

    Args:
        weights: a folder, or an id on the hub.
        processor: the same, of what prepares its inputs.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = WEIGHTS
    processor: str = PROCESSOR
    revision: str | None = None
    name: ClassVar[str] = "pick_score"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/pick_score": Metric(
            MORE, "how much people would pick the images for their prompts", label="PickScore"
        ),
        "float/pick_score": Metric(MORE, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(weights="PickScore v1, 3.9 GB, downloaded once", prompts=True)
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.pick_score.weights", self.weights)
        check_revision("metrics.measures.pick_score.revision", self.revision)
        check_location("metrics.measures.pick_score.processor", self.processor)

    def load(self) -> FrameFunction:
        """Load its CLIP, once."""
        clip = load_clip(self.weights, SIZE, self.processor, revision=self.revision)

        def rate(image: Tensor, text: Tensor) -> float:
            return clip.scale * (text @ clip.embed_image(image)).item()

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            text = clip.embed_texts([prompt])[0]
            return {"pick_score": rate(a, text), "float/pick_score": rate(b, text)}

        return measure
