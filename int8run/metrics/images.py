"""Images as the tensors that metrics compare."""

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor


def image_to_tensor(image: Image) -> Tensor:
    """An image as float [1, 3, H, W] in 0..1."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255  # [H, W, 3]
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
