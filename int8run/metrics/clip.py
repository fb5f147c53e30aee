"""CLIP as several metrics need it: features of images and texts, each of length 1, by transformers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from int8run.metrics.weights import check_complete, choose_revision, load_from_hub


class ClipFeatures:
    """A CLIP and what prepares its inputs.

    Args:
        model: transformers' CLIPModel.
        processor: its CLIPProcessor.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor

    @property
    def scale(self) -> float:
        """What a cosine is multiplied by, as trained."""
        scale: float = self.model.logit_scale.exp().item()
        return scale

    def embed_image(self, image: Tensor, **settings: Any) -> Tensor:
        """The features of an image, of length 1: [1, 3, H, W] in 0..1 -> [C].

        Args:
            image: one.
            settings: of the processor, in the place of its own.
        """
        inputs = self.processor.image_processor(images=to_pixels(image), return_tensors="pt", **settings)
        features = unwrap_features(self.model.get_image_features(pixel_values=inputs["pixel_values"]))
        return F.normalize(features[0], dim=0)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """The features of texts, each of length 1: [N, C]. What is longer than CLIP reads is cut."""
        inputs = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        features = unwrap_features(self.model.get_text_features(**inputs))
        return F.normalize(features, dim=1)


def load_clip(
    location: str, size: str, processor_location: str | None = None, *, revision: str | None = None
) -> ClipFeatures:
    """A CLIP, from the hub's cache where it is there, without asking the network.

    Args:
        location: a folder, or an id on the hub.
        size: of the download.
        processor_location: where its processor is; None: there, too.
        revision: of an id on the hub; None: the pinned one, else the newest.

    Raises:
        UnavailableError: where it cannot be loaded, and where that is no CLIP.
    """
    from transformers import CLIPModel, CLIPProcessor

    def load(*, is_local: bool, revision: str) -> tuple[Any, Any]:
        model, loaded = CLIPModel.from_pretrained(
            location,
            local_files_only=is_local,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
        check_complete(location, loaded)
        processor_revision = revision
        if processor_location not in (None, location):
            processor_revision = choose_revision(str(processor_location), None)
        processor = CLIPProcessor.from_pretrained(
            processor_location or location, local_files_only=is_local, revision=processor_revision
        )
        return model.eval(), processor

    return ClipFeatures(*load_from_hub(location, load, size=size, revision=revision))


def unwrap_features(features: Any) -> Tensor:
    """The tensor itself, or the one inside transformers' wrapper: version 5 wraps features."""
    return features if isinstance(features, Tensor) else features.pooler_output


def to_pixels(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[1, 3, H, W] in 0..1 -> [H, W, 3] in 0..255, as it was saved."""
    return (255 * image[0]).round().byte().permute(1, 2, 0).numpy()
