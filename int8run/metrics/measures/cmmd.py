"""CMMD: the distance of two sets of images by CLIP's features and a Gaussian kernel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.metrics.base import LESS, Metric, Needs, Scope, SetFunction
from int8run.metrics.clip import ClipFeatures, load_clip
from int8run.metrics.image_sets import check_reference, make_set_function, open_reference
from int8run.metrics.networks import RememberedFeatures
from int8run.metrics.weights import check_location, check_revision

CLIP, SIZE = "openai/clip-vit-large-patch14-336", "1.7 GB"
SIGMA, SCALE = 10.0, 1000.0


@dataclass(frozen=True)
class Cmmd:
    """CMMD of Jayasumana et al. 2024 (arXiv:2401.09603), which needs fewer images than FID.

    1000 times the squared maximum mean discrepancy of CLIP's features, of length 1, with the kernel
    exp(−|x − y|² / (2 · 10²)). Images are resized to CLIP's size and not cut.

    Args:
        reference: a folder of images; None: there is none.
        weights: of CLIP ViT-L/14 at 336 px, a folder or an id on the hub.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    reference: str | None = None
    weights: str = CLIP
    revision: str | None = None
    name: ClassVar[str] = "cmmd"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/cmmd": Metric(LESS, "CLIP's distance of all images to the float model's", label="CMMD"),
        "quality/cmmd_reference": Metric(
            LESS, "CLIP's distance of all images to those of a folder", label="CMMD to reference"
        ),
        "float/cmmd_reference": Metric(LESS, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(weights="CLIP ViT-L/14 at 336 px, 1.7 GB, downloaded once")
    scope: ClassVar[Scope] = Scope.SET

    def __post_init__(self) -> None:
        check_reference("metrics.measures.cmmd.reference", self.reference)
        check_location("metrics.measures.cmmd.weights", self.weights)
        check_revision("metrics.measures.cmmd.revision", self.revision)

    def load(self) -> SetFunction:
        """Load CLIP, once."""
        reference = open_reference(self.reference)
        clip = load_clip(self.weights, SIZE, revision=self.revision)
        describe = RememberedFeatures(lambda images: embed_set(clip, images))

        def describe_set(images: Sequence[Tensor]) -> Tensor:
            return torch.cat([describe(image[None]) for image in images])

        def measure_distance(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
            return compute_mmd(describe_set(images), describe_set(others))

        return make_set_function("cmmd", reference, measure_distance)


def embed_set(clip: ClipFeatures, images: Tensor) -> Tensor:
    """CLIP's features of images, [N, C].

    Args:
        clip: the network.
        images: uint8 [N, 3, H, W].
    """
    side = clip.model.config.vision_config.image_size
    size = {"height": side, "width": side}
    features = [clip.embed_image(image[None] / 255, size=size, do_center_crop=False) for image in images]
    return torch.stack(features)


def compute_mmd(x: Tensor, y: Tensor) -> float:
    """1000 · the squared maximum mean discrepancy of two sets of vectors, [N, C] and [M, C]."""

    def average_kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = torch.cdist(a.double(), b.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.exp(-squared / (2 * SIGMA**2)).mean()

    return SCALE * (average_kernel(x, x) + average_kernel(y, y) - 2 * average_kernel(x, y)).item()
