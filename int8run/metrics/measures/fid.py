"""FID by torchmetrics: the distance of two sets of images, as if their features were normally distributed."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from int8run.metrics.base import LESS, Metric, Needs, Scope, SetFunction
from int8run.metrics.image_sets import check_reference, make_set_function, open_reference
from int8run.metrics.inception import EXTRA, NUM_FEATURES, PACKAGES, share_inception
from int8run.metrics.networks import Networks
from int8run.metrics.weights import check_location

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fid:
    """Fréchet Inception distance of Heusel et al. 2017 (arXiv:1706.08500), 2048 features.

    To the float model's images of this run, and of both models to a folder of real images. It shrinks with
    the number of images, so that only numbers over equally many compare; papers take 5,000 and more.

    Args:
        reference: a folder of images; None: there is none.
        weights: a file of Inception's; None: torch-fidelity's, downloaded once.
    """

    reference: str | None = None
    weights: str | None = None
    name: ClassVar[str] = "fid"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/fid": Metric(LESS, "Fréchet distance of all images to the float model's", label="FID"),
        "quality/fid_reference": Metric(
            LESS, "Fréchet distance of all images to those of a folder", label="FID to reference"
        ),
        "float/fid_reference": Metric(LESS, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(
        packages=PACKAGES, extra=EXTRA, weights="Inception v3, 96 MB, downloaded once"
    )
    scope: ClassVar[Scope] = Scope.SET

    def __post_init__(self) -> None:
        check_reference("metrics.measures.fid.reference", self.reference)
        if self.weights is not None:
            check_location("metrics.measures.fid.weights", self.weights)

    def load(self) -> SetFunction:
        """Load Inception, once."""
        return self.load_with(Networks())

    def load_with(self, networks: Networks) -> SetFunction:
        """The same with the network that another metric of the run may have loaded.

        Args:
            networks: of this run.
        """
        reference = open_reference(self.reference)
        inception = share_inception(self.weights, networks)
        from torchmetrics.image.fid import FrechetInceptionDistance

        fid = FrechetInceptionDistance(feature=inception)

        def measure_distance(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
            if min(len(images), len(others)) < NUM_FEATURES:
                log.info("FID of %d images is larger than that of many; compare equal numbers", len(images))
            fid.reset()
            add_images(fid, images, others)
            return fid.compute().item()  # type: ignore[no-any-return]

        return make_set_function("fid", reference, measure_distance)


def add_images(metric: Any, images: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Hand two sets to a metric of torchmetrics.

    Args:
        metric: FID or KID.
        images: uint8 [3, H, W].
        others: those that they are compared with.
    """
    for image in images:
        metric.update(image[None], real=False)
    for image in others:
        metric.update(image[None], real=True)
