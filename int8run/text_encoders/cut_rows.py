"""Tables of words whose last rows a converter cut off, because the tokenizer has no words for them.

llama.cpp does so to Gemma 3. Nobody looks these rows up; a model has them all the same, and here they are 0.
"""

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from int8run.checkpoints.checkpoint_files import TensorInfo
from int8run.models.tensor_part import Shape

log = logging.getLogger(__name__)


def may_lack_rows(info: TensorInfo) -> bool:
    """Whether the last rows of a tensor may have been cut off."""
    return info.form is not None and info.form.may_lack_rows


def find_cut_shapes(
    infos: Iterable[tuple[str, TensorInfo]], model_shapes: Mapping[str, Shape]
) -> dict[str, Shape]:
    """The shapes that tables have in the model, of those that lack rows.

    Args:
        infos: canonical name of each tensor of a file, and where it is.
        model_shapes: of the model's parameters, by canonical names.

    Returns:
        By the key of the tensor in its file.
    """
    found: dict[str, Shape] = {}
    for name, info in infos:
        shape = model_shapes.get(name)
        if shape is None or not may_lack_rows(info):
            continue
        num_missing = shape[0] - info.shape[0]
        if num_missing > 0 and shape[1:] == info.shape[1:]:
            found[info.key] = shape
            log.info(
                "%s: %s lacks the last %d of %d rows, which no word has; they are 0",
                info.file,
                info.key,
                num_missing,
                shape[0],
            )
    return found


def add_cut_rows(tensor: Tensor, info: TensorInfo, shape: Shape) -> Tensor:
    """Add the rows that a table lacks.

    Args:
        tensor: as the file has it.
        info: where it is.
        shape: that the model needs, as `find_cut_shapes` gives it, or the file's own.
    """
    if not may_lack_rows(info) or tensor.shape == shape:
        return tensor
    missing = tensor.new_zeros(shape[0] - tensor.shape[0], *shape[1:])
    return torch.cat([tensor, missing])
