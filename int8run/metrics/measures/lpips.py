"""LPIPS by torchmetrics, with torchvision's AlexNet."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from int8run.metrics.base import LESS, FrameFunction, Metric, Needs, Scope, UnavailableError
from int8run.metrics.weights import LOADING_ERRORS, check_reachable, format_error

LPIPS_SIDE = 31  # the least that leaves something for AlexNet's second pooling


@dataclass(frozen=True)
class Lpips:
    """LPIPS of Zhang et al. 2018 (arXiv:1801.03924), AlexNet, version 0.1.

    torchmetrics ships the weights of its layers, torchvision downloads those of AlexNet.
    """

    name: ClassVar[str] = "lpips"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "quality/lpips": Metric(LESS, "LPIPS to the float model's images", lowest=0)
    }
    needs: ClassVar[Needs] = Needs(
        packages=("torchvision",), min_side=LPIPS_SIDE, weights="AlexNet, 233 MB, downloaded once"
    )
    scope: ClassVar[Scope] = Scope.FRAME

    def load(self) -> FrameFunction:
        """Load AlexNet, once."""
        try:
            from torchvision.models import AlexNet_Weights
        except ImportError as error:
            # With an unsuitable torchvision, torchmetrics and diffusers cannot be imported.
            remedy = f"install the version for torch {torch.__version__} from the same package index"
            raise UnavailableError(
                f"torchvision cannot be imported ({format_error(error)}); {remedy}"
            ) from error
        # One object keeps the network; the functional form would read its weights again for each image.
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        url = AlexNet_Weights.DEFAULT.url
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        try:
            if not file.is_file():
                check_reachable(url)
            lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
        except LOADING_ERRORS as error:
            if file.is_file():
                problem, remedy = "could not be read", f"delete {file} and run with a network connection"
            else:
                problem = "could not be downloaded"
                remedy = f"run once with a network connection, or put {url} at {file}"
            raise UnavailableError(
                f"AlexNet's weights {problem} ({format_error(error)}); {remedy}"
            ) from error
        return lambda a, b, prompt: {"lpips": lpips(a, b).item()}
