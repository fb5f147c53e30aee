"""Whether the subject of a video stays itself, by VBench's formula, with the features that are at hand."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from int8run.metrics.base import MORE, Metric, Needs, SampleFunction, SamplePair, Scope
from int8run.metrics.images import image_to_tensor
from int8run.metrics.measures.effnet_distance import PACKAGES, compute_effnet_features, load_effnet
from int8run.metrics.weights import check_complete, check_location, check_revision, load_from_hub

PACKAGED = "effnet"
SIZE = "343 MB"


@dataclass(frozen=True)
class SubjectConsistency:
    """VBench's subject consistency (arXiv:2311.17982).

    The mean over all frames but the first of (s(x[t], x[0]) + s(x[t], x[t-1])) / 2, with s the cosine of the
    features, at least 0. VBench takes DINO ViT-B/16. `effnet` takes EfficientNet-Lite0, whose weights come in
    a package; its numbers compare with each other, not with VBench's.

    Args:
        weights: `effnet`; or a folder or an id on the hub of a DINO, such as facebook/dino-vitb16.
        revision: commit, branch or tag of an id on the hub; None: the pinned one, else the newest.
    """

    weights: str = PACKAGED
    revision: str | None = None
    name: ClassVar[str] = "subject_consistency"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/subject_consistency": Metric(
            MORE,
            "how much the subject of a video stays itself",
            label="subject consistency",
            lowest=0,
            highest=1,
        ),
        "float/subject_consistency": Metric(
            MORE, "the same of the float model's videos", lowest=0, highest=1
        ),
    }
    needs: ClassVar[Needs] = Needs(
        packages=PACKAGES, extra="perceptual", weights="none; with facebook/dino-vitb16 343 MB"
    )
    scope: ClassVar[Scope] = Scope.SAMPLE

    def __post_init__(self) -> None:
        check_location("metrics.measures.subject_consistency.weights", self.weights)
        check_revision("metrics.measures.subject_consistency.revision", self.revision)
        if self.weights != PACKAGED:  # then the packages of `effnet` are not needed; the class is frozen
            object.__setattr__(self, "needs", Needs(weights=self.weights))

    def load(self) -> SampleFunction:
        """Load the network, once."""
        describe = load_features(self.weights, self.revision)

        def measure(pair: SamplePair) -> dict[str, float]:
            if len(pair.frames) < 2:
                return {}
            return {
                "subject_consistency": rate_consistency(pair.frames, describe),
                "float/subject_consistency": rate_consistency(pair.float_frames, describe),
            }

        return measure


def load_features(weights: str, revision: str | None = None) -> Callable[[Image], Tensor]:
    """What turns an image into features [C].

    Args:
        weights: as the setting.
        revision: as the setting.

    Raises:
        UnavailableError: where the network cannot be loaded.
    """
    if weights == PACKAGED:
        network = load_effnet()
        return lambda image: compute_effnet_features(network, image_to_tensor(image))[0]
    from transformers import AutoImageProcessor, AutoModel

    def load(*, is_local: bool, revision: str) -> tuple[Any, Any]:
        model, loaded = AutoModel.from_pretrained(
            weights,
            local_files_only=is_local,
            revision=revision,
            trust_remote_code=False,
            dtype=torch.float32,
            output_loading_info=True,
        )
        check_complete(weights, loaded, ignored="pooler.")
        processor = AutoImageProcessor.from_pretrained(
            weights, local_files_only=is_local, revision=revision, trust_remote_code=False, use_fast=False
        )
        return model.eval(), processor

    model, processor = load_from_hub(weights, load, size=SIZE, revision=revision)

    def describe(image: Image) -> Tensor:
        inputs = processor(images=image.convert("RGB"), return_tensors="pt")
        features: Tensor = model(**inputs).last_hidden_state[0, 0]  # of the class token, as VBench
        return features

    return describe


def rate_consistency(frames: Sequence[Image], describe: Callable[[Image], Tensor]) -> float:
    """VBench's formula.

    Args:
        frames: of a video, at least two.
        describe: turns an image into features [C].
    """
    features = torch.stack([F.normalize(describe(frame).double(), dim=0) for frame in frames])  # [F, C]
    to_first = (features[1:] @ features[0]).clamp(min=0)
    to_previous = (features[1:] * features[:-1]).sum(dim=1).clamp(min=0)
    return ((to_first + to_previous) / 2).mean().item()
