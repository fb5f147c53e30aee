"""CLIPScore by torchmetrics, with CLIP from a folder or the hub."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope
from int8run.metrics.clip import load_clip, unwrap_features
from int8run.metrics.weights import check_location, check_revision

CLIP = "openai/clip-vit-large-patch14"
SIZE = "1.7 GB"


@dataclass(frozen=True)
class ClipScore:
    """CLIPScore of Hessel et al. 2021 (arXiv:2104.08718): 100 · cosine of image and prompt, at least 0.

    It is computed for the candidate and for the float image. CLIP reads 77 tokens of a prompt; the rest is
    ignored. A video keeps its subject: three frames say as much as all.

    Args:
        weights: a folder, or an id on the hub.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = CLIP
    revision: str | None = None
    name: ClassVar[str] = "clip_score"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/clip_score": Metric(MORE, "how well the images match their prompts", lowest=0),
        "float/clip_score": Metric(MORE, "how well the float model's images do", lowest=0),
    }
    needs: ClassVar[Needs] = Needs(weights="CLIP ViT-L/14, 1.7 GB, downloaded once", prompts=True)
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.clip_score.weights", self.weights)
        check_revision("metrics.measures.clip_score.revision", self.revision)

    def load(self) -> FrameFunction:
        """Load CLIP, once."""
        from torchmetrics.functional.multimodal import clip_score

        clip = load_clip(self.weights, SIZE, revision=self.revision)
        model, processor = clip.model, clip.processor

        def process(**inputs: Any) -> Any:
            # A text that is cut by the tokenizer keeps its end token, whose features are the text's.
            if "text" in inputs:
                return processor(**inputs, truncation=True)
            return processor(**inputs)

        def score(image: Tensor, prompt: str) -> float:
            pixels = (255 * image[0]).round().byte()
            result: Tensor = clip_score(pixels, prompt, lambda: (BareFeatures(model), process))
            return result.item()

        return lambda a, b, prompt: {"clip_score": score(a, prompt), "float/clip_score": score(b, prompt)}


class BareFeatures(nn.Module):
    """CLIP as torchmetrics calls it.

    transformers 5 wraps the features; torchmetrics up to 1.9 takes bare tensors only.
    """

    def __init__(self, clip: Any):
        super().__init__()
        self.clip: Any = clip
        self.config = clip.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of images, [N, C]."""
        return unwrap_features(self.clip.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of texts, [N, C]."""
        return unwrap_features(self.clip.get_text_features(*inputs))
