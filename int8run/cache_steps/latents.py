"""The latents that a denoiser is given, as images and videos [C, T, H, W]: they come in many forms."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# names that denoisers have for their latents, the first of their arguments
LATENTS = ("hidden_states", "x", "sample", "visual_embed")
# of positions of tokens [S, axes] or [B, S, axes], whose last axes are time, row and column
POSITIONS = ("img_ids",)
# of sizes of images in tokens: a list of (frames, rows, columns) for each image of the batch
SHAPES = ("img_shapes",)


def find_latents(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The latents of a call, one [C, T, H, W] for each image; what else a call has with them is left out.

    Args:
        module: the denoiser.
        args: of the call.
        kwargs: of the call.

    Raises:
        ValueError: for latents whose rows and columns are not known; diffusers' hooks then compute the step.
    """
    parameters = inspect.signature(type(module).forward).parameters
    given = dict(zip(list(parameters)[1:], args, strict=False)) | dict(kwargs)
    latents = next((given[name] for name in LATENTS if name in given), None)
    if isinstance(latents, list):
        return [as_video(item) for item in latents]
    if not isinstance(latents, Tensor):
        raise ValueError(f"{type(module).__name__} is given no latents that are known")
    if latents.ndim != 3:
        return [as_video(item) for item in latents.unbind(0)]
    return unpack_tokens(latents, given)


def as_video(latents: Tensor) -> Tensor:
    """[C, H, W] or [C, T, H, W] -> [C, T, H, W]."""
    if latents.ndim == 3:
        return latents.unsqueeze(1)
    if latents.ndim != 4:
        raise ValueError(f"latents of {latents.ndim} dimensions are neither an image nor a video")
    return latents


def unpack_tokens(tokens: Tensor, given: Mapping[str, Any]) -> list[Tensor]:
    """Tokens [B, S, C] -> a grid [C, T, H, W] for each image, by their positions or by their sizes.

    Args:
        tokens: of the call; those of reference images may follow.
        given: all arguments, by name.
    """
    size = find_token_size(given)
    if size is None:
        raise ValueError("the rows and columns of the tokens are not known")
    frames, rows, columns = size
    own = tokens[:, : frames * rows * columns]
    return [image.T.reshape(-1, frames, rows, columns) for image in own.unbind(0)]


def find_token_size(given: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Frames, rows and columns of the image that is generated; None: the call does not say."""
    for name in POSITIONS:
        positions = given.get(name)
        if isinstance(positions, Tensor):
            return measure_grid(positions)
    for name in SHAPES:
        shapes = given.get(name)
        if shapes:
            first = shapes[0]
            size = first[0] if isinstance(first[0], Sequence) else first
            return int(size[0]), int(size[1]), int(size[2])
    if all(isinstance(given.get(name), int) for name in ("num_frames", "height", "width")):
        return given["num_frames"], given["height"], given["width"]
    return None


def measure_grid(positions: Tensor) -> tuple[int, int, int]:
    """The size of the first image by the positions of tokens: they begin anew, or in another frame, with the
    next one.

    Args:
        positions: [S, axes] or [B, S, axes]; the axes are (image, row, column), more may follow.
    """
    rows = positions[0] if positions.ndim == 3 else positions
    is_first = torch.all(rows[:, :1] == rows[0, :1], dim=1)
    own = rows[is_first]
    return 1, int(own[:, 1].max() - own[:, 1].min()) + 1, int(own[:, 2].max() - own[:, 2].min()) + 1
