"""Networks that several metrics of one run share, and the features that they gave.

`metrics.loading` makes one object for each run and hands it to the metrics that ask for it. Knows no metric.
"""

import hashlib
from collections.abc import Callable, Hashable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


class Networks:
    """The networks of one run, each loaded once."""

    def __init__(self) -> None:
        self.loaded: dict[Hashable, Any] = {}

    def get(self, key: Hashable, load: Callable[[], Any]) -> Any:
        """A network, loaded where no metric of this run has asked for it before.

        Args:
            key: what network it is, and where its weights are.
            load: loads it; an error is raised each time.
        """
        if key not in self.loaded:
            self.loaded[key] = load()
        return self.loaded[key]


@runtime_checkable
class SharesNetworks(Protocol):
    """A metric whose network others of the run may have as well."""

    name: ClassVar[str]
    metrics: ClassVar[Mapping[str, Any]]

    def load_with(self, networks: Networks) -> Callable[..., dict[str, float]]:
        """Load it with the networks of a run, and return what compares.

        Args:
            networks: of this run.
        """
        ...


class RememberedFeatures(nn.Module):
    """A network of features that computes those of each image once, whatever set it is in.

    Args:
        network: uint8 [N, 3, H, W] -> features [N, C].
    """

    def __init__(self, network: Callable[[Tensor], Tensor]):
        super().__init__()
        self.network = network
        self.features: dict[tuple[bytes, tuple[int, ...]], Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        """The features of images, uint8 [N, 3, H, W] -> [N, C]."""
        return torch.cat([self.describe(image[None]) for image in images])

    def describe(self, image: Tensor) -> Tensor:
        """The features of one image, uint8 [1, 3, H, W] -> [1, C]."""
        content = image.detach().cpu().contiguous().numpy().tobytes()
        key = (hashlib.sha256(content).digest(), tuple(image.shape))
        if key not in self.features:
            self.features[key] = self.network(image).detach()
        return self.features[key]
