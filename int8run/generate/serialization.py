"""A Generation as one safetensors file, so that the float model need not generate the same images again.

Used by the cache of float baselines.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from int8run.errors import FileError
from int8run.generate.generate import Generation
from int8run.utils.text import shorten_error

METADATA_KEY = "int8run_generation"  # of what is not a tensor, in the header's metadata
NUM_IMAGES = "images"
EARLIER_NUM_IMAGES = "pictures"  # in files of 0.1.0, which are read: their images took as long to make


def save_generation(made: Generation, path: Path, provenance: Mapping[str, object]) -> None:
    """Write frames, latents and times.

    Args:
        made: what to write.
        path: of the file.
        provenance: which model generated it and how, for people who look into the file.
    """
    tensors = {f"latents.{i}": latents.contiguous() for i, latents in enumerate(made.trajectories)}
    for i, frames in enumerate(made.frames):
        arrays = [np.array(frame.convert("RGB")) for frame in frames]
        tensors[f"frames.{i}"] = torch.stack([torch.from_numpy(array) for array in arrays])  # [F, H, W, 3]
    facts = {
        NUM_IMAGES: len(made.frames),
        "latents": len(made.trajectories),
        "step_seconds": made.step_seconds,
        "image_seconds": made.image_seconds,
        "sound": made.has_sound,
    }
    save_file(tensors, path, {METADATA_KEY: json.dumps(facts), "int8run": json.dumps(provenance)})


def load_generation(path: Path) -> Generation:
    """Read what `save_generation` wrote.

    Raises:
        FileError: when it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA_KEY])
            num_images = facts.get(NUM_IMAGES, facts.get(EARLIER_NUM_IMAGES))
            videos = [file.get_tensor(f"frames.{i}") for i in range(num_images)]
            return Generation(
                frames=[[Image.fromarray(frame.numpy()) for frame in video] for video in videos],
                trajectories=[file.get_tensor(f"latents.{i}") for i in range(facts["latents"])],
                step_seconds=facts["step_seconds"],
                image_seconds=facts["image_seconds"],
                has_sound=facts["sound"],
            )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = shorten_error(error, 200)
        raise FileError(f"{path} is damaged: {type(error).__name__}: {reason}") from error
