"""A Generation as one file, so that the float model need not draw the same again."""

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

METADATA_KEY = "int8run_generation"  # the key of what is no tensor, in the header's metadata


def save_generation(made: Generation, path: Path, note: Mapping[str, object]) -> None:
    """Write frames, latents and times.

    Args:
        note: what drew it, for people who look into the file.
    """
    tensors = {f"latents.{i}": t.contiguous() for i, t in enumerate(made.trajectories)}
    for i, frames in enumerate(made.frames):
        tensors[f"frames.{i}"] = torch.stack(
            [torch.from_numpy(np.array(frame.convert("RGB"))) for frame in frames]
        )
    facts = {
        "pictures": len(made.frames),
        "latents": len(made.trajectories),
        "step_seconds": made.step_seconds,
        "image_seconds": made.image_seconds,
        "sound": made.has_sound,
    }
    save_file(tensors, path, {METADATA_KEY: json.dumps(facts), "int8run": json.dumps(note)})


def load_generation(path: Path) -> Generation:
    """Read what `save_generation` wrote.

    Raises:
        FileError: when it is damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})[METADATA_KEY])
            frames = [
                [Image.fromarray(frame.numpy()) for frame in file.get_tensor(f"frames.{i}")]
                for i in range(facts["pictures"])
            ]
            latents = [file.get_tensor(f"latents.{i}") for i in range(facts["latents"])]
            return Generation(frames, latents, facts["step_seconds"], facts["image_seconds"], facts["sound"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise FileError(
            f"{path} is damaged: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
