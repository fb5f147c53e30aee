"""The Inception network that FID and KID are defined with: torch-fidelity's, with TensorFlow's weights."""

from pathlib import Path
from typing import Any

import torch

from int8run.metrics.base import UnavailableError
from int8run.metrics.networks import Networks, RememberedFeatures
from int8run.metrics.weights import LOADING_ERRORS, check_reachable, format_error, needs_packages

PACKAGES = ("torch-fidelity", "torchvision")
EXTRA = "sets"
SIZE = "96 MB"
HASH_PREFIX = "6726825d"  # torch-fidelity has it in the name of the file
URL_NAME = "weights-inception-2015-12-05-6726825d.pth"
NUM_FEATURES = 2048


def share_inception(weights: str | None, networks: Networks) -> RememberedFeatures:
    """The network of a run, loaded once, which computes the features of each image once.

    Args:
        weights: a file; None: torch-fidelity's own.
        networks: of the run.

    Raises:
        UnavailableError: as `load_inception`.
    """
    found: RememberedFeatures = networks.get(
        ("inception", weights), lambda: RememberedFeatures(load_inception(weights))
    )
    return found


def load_inception(weights: str | None) -> Any:
    """The network as torchmetrics calls it: uint8 [N, 3, H, W] -> features [N, 2048].

    Args:
        weights: a file; None: torch-fidelity's own.

    Raises:
        UnavailableError: without the library, and for weights that are missing or damaged.
    """
    file = find_inception_weights(weights)
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        return NoTrainInceptionV3(
            name="inception-v3-compat",
            features_list=[str(NUM_FEATURES)],
            feature_extractor_weights_path=file,
        )
    except LOADING_ERRORS as error:
        raise UnavailableError(
            f"{file} has no weights of Inception ({format_error(error)}); it is {URL_NAME} that is needed"
        ) from error


def find_inception_weights(weights: str | None) -> str:
    """A file with the network's weights, downloaded where it is not here.

    The library would unpickle whatever the file holds, so it is read here first as torch reads what may be
    foreign: numbers alone.

    Args:
        weights: a file; None: torch-fidelity's own.

    Raises:
        UnavailableError: without the library, and for weights that are missing or damaged.
    """
    with needs_packages(PACKAGES[0], EXTRA):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    file = Path(torch.hub.get_dir(), "checkpoints", Path(URL_INCEPTION_V3).name)
    if weights is not None:
        file = Path(weights).expanduser()
    try:
        if weights is None and not file.is_file():
            check_reachable(URL_INCEPTION_V3)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(
                URL_INCEPTION_V3, str(file), hash_prefix=HASH_PREFIX, progress=False
            )
        torch.load(file, map_location="cpu", weights_only=True)
    except LOADING_ERRORS as error:
        remedy = f"run once with a network connection ({SIZE}), or put {URL_INCEPTION_V3} at {file}"
        raise UnavailableError(
            f"Inception's weights could not be loaded ({format_error(error)}); {remedy}"
        ) from error
    return str(file)
