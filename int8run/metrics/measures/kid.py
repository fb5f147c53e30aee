"""KID by torchmetrics: the distance of two sets of images by a kernel; unlike FID it is unbiased."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from int8run.errors import check_range
from int8run.metrics.base import LESS, Metric, Needs, Scope, SetFunction
from int8run.metrics.image_sets import check_reference, make_set_function, open_reference
from int8run.metrics.inception import EXTRA, PACKAGES, share_inception
from int8run.metrics.measures.fid import add_images
from int8run.metrics.networks import Networks
from int8run.metrics.weights import check_location


@dataclass(frozen=True)
class Kid:
    """Kernel Inception distance of Bińkowski et al. 2018 (arXiv:1801.01401), the mean over random subsets.

    The polynomial kernel of degree 3 on 2048 features; unbiased, and so below 0 for sets that are alike.

    Args:
        reference: a folder of images; None: there is none.
        weights: a file of Inception's; None: torch-fidelity's, downloaded once.
        subsets: how many.
        subset_size: images of each; with fewer all that there are.
    """

    reference: str | None = None
    weights: str | None = None
    subsets: int = 100
    subset_size: int = 1000
    name: ClassVar[str] = "kid"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/kid": Metric(LESS, "kernel distance of all images to the float model's", label="KID"),
        "quality/kid_reference": Metric(
            LESS, "kernel distance of all images to those of a folder", label="KID to reference"
        ),
        "float/kid_reference": Metric(LESS, "the same of the float model's images"),
    }
    needs: ClassVar[Needs] = Needs(
        packages=PACKAGES, extra=EXTRA, weights="Inception v3, 96 MB, downloaded once"
    )
    scope: ClassVar[Scope] = Scope.SET

    def __post_init__(self) -> None:
        check_reference("metrics.measures.kid.reference", self.reference)
        if self.weights is not None:
            check_location("metrics.measures.kid.weights", self.weights)
        check_range("metrics.measures.kid.subsets", self.subsets, 1, 10_000, whole=True)
        check_range("metrics.measures.kid.subset_size", self.subset_size, 2, 100_000, whole=True)

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
        from torchmetrics.image.kid import KernelInceptionDistance

        kid = KernelInceptionDistance(feature=inception, subsets=self.subsets)

        def measure_distance(images: Sequence[Tensor], others: Sequence[Tensor]) -> float:
            kid.reset()
            kid.subset_size = min(self.subset_size, len(images), len(others))
            add_images(kid, images, others)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # which images are in which subset
                mean, _ = kid.compute()
            return mean.item()  # type: ignore[no-any-return]

        return make_set_function("kid", reference, measure_distance)
