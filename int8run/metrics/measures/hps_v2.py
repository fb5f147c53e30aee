"""HPS v2.1: which image people would prefer for a prompt, by open_clip's ViT-H-14."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from int8run.metrics.base import MORE, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.clip import to_pixels
from int8run.metrics.weights import (
    READING_ERRORS,
    check_location,
    check_revision,
    find_file,
    format_error,
    needs_packages,
)

PACKAGE, ARCHITECTURE = "open-clip-torch", "ViT-H-14"
WEIGHTS, WEIGHTS_FILE = "xswu/HPSv2", "HPS_v2.1_compressed.pt"


@dataclass(frozen=True)
class HpsV2:
    """Human Preference Score v2.1 of Wu et al. 2023 (arXiv:2306.09341): cosine of image and prompt.

    Args:
        weights: a file; or an id on the hub whose file is `HPS_v2.1_compressed.pt`.
        architecture: as open_clip calls it.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = WEIGHTS
    architecture: str = ARCHITECTURE
    revision: str | None = None
    name: ClassVar[str] = "hps_v2"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/hps_v2": Metric(
            MORE, "how much people would prefer the images for their prompts", label="HPS v2.1"
        ),
        "float/hps_v2": Metric(MORE, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(
        packages=(PACKAGE, "torchvision"),
        extra="preference",
        weights="HPS v2.1, 2.0 GB, downloaded once",
        prompts=True,
    )
    scope: ClassVar[Scope] = Scope.KEY_FRAMES

    def __post_init__(self) -> None:
        check_location("metrics.measures.hps_v2.weights", self.weights)
        check_revision("metrics.measures.hps_v2.revision", self.revision)

    def load(self) -> FrameFunction:
        """Load its CLIP, once."""
        with needs_packages(PACKAGE, "preference"):
            import open_clip
        # open_clip would take an id on the hub, too, and whatever settings and weights stand there
        if self.architecture not in open_clip.list_models():
            raise UnavailableError(
                f"metrics.measures.hps_v2.architecture={self.architecture} is none of open_clip's; "
                f"HPS v2.1 has {ARCHITECTURE}"
            )
        file = find_file(self.weights, WEIGHTS_FILE, size="2.0 GB", revision=self.revision)
        model, _, prepare = open_clip.create_model_and_transforms(
            self.architecture, pretrained=None, precision="fp32"
        )
        load_weights(model, file)
        tokenize = open_clip.get_tokenizer(self.architecture)

        def rate(image: Tensor, text: Tensor) -> float:
            pixels = prepare(Image.fromarray(to_pixels(image)))[None]
            return (F.normalize(model.encode_image(pixels)[0], dim=0) @ text).item()

        def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
            text = F.normalize(model.encode_text(tokenize([prompt]))[0], dim=0)
            return {"hps_v2": rate(a, text), "float/hps_v2": rate(b, text)}

        return measure


def load_weights(model: Any, file: Path) -> None:
    """Give a network the weights of a published file.

    Args:
        model: of open_clip.
        file: with its state dict under `state_dict`.

    Raises:
        UnavailableError: for a damaged file, and one of another network.
    """
    try:
        model.load_state_dict(torch.load(file, map_location="cpu", weights_only=True)["state_dict"])
    except READING_ERRORS as error:
        raise UnavailableError(
            f"{file} has no weights of this network ({format_error(error)}); name HPS v2.1's file with "
            "metrics.measures.hps_v2.weights"
        ) from error
    model.eval()
