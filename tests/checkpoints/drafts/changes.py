"""Changes to a checkpoint that is to be written, most of which make it one that must be refused."""

import json
from collections.abc import Callable

import numpy as np
from checkpoints.drafts.draft import LAYER, CheckpointDraft, K, N
from checkpoints.drafts.int8 import draft_rowwise


def drop_tensors(draft: CheckpointDraft, *suffixes: str) -> CheckpointDraft:
    for suffix in suffixes:
        del draft.tensors[f"{LAYER}.{suffix}"]
    return draft


def put_zeros(draft: CheckpointDraft, key: str, dtype: str, *shape: int) -> CheckpointDraft:
    """A tensor of zeros with any dtype of a byte."""
    draft.tensors[key] = dtype, shape, bytes(int(np.prod(shape)))
    return draft


def put_ones(draft: CheckpointDraft, key: str, *shape: int) -> CheckpointDraft:
    draft.put(key, "F32", np.ones(shape))
    return draft


def apply_change(draft: CheckpointDraft, change: Callable[[CheckpointDraft], object]) -> CheckpointDraft:
    change(draft)
    return draft


def replace_scale(draft: CheckpointDraft, *shape: int) -> CheckpointDraft:
    """The file with scales of another shape."""
    draft.put_scale(f"{LAYER}.weight_scale", *shape)
    return draft


def replace_part(draft: CheckpointDraft, suffix: str, values: object, dtype: str = "F32") -> CheckpointDraft:
    """The file with other numbers in a tensor of its layer."""
    draft.put(f"{LAYER}.{suffix}", dtype, values)
    return draft


def draft_with_scales(*values: float) -> CheckpointDraft:
    draft = draft_rowwise()
    draft.put(f"{LAYER}.weight_scale", "F32", np.resize(values, (N, 1)))
    return draft


def draft_with_marker(marker: object, draft: CheckpointDraft | None = None) -> CheckpointDraft:
    draft = draft or draft_rowwise()
    draft.put_marker(f"{LAYER}.comfy_quant", marker)
    return draft


def draft_with_tensor(
    suffix: str, dtype: str = "F32", draft: CheckpointDraft | None = None
) -> CheckpointDraft:
    """A file with one more tensor beside the weight."""
    draft = draft or draft_rowwise()
    draft.put(f"{LAYER}.{suffix}", dtype, np.ones(K))
    return draft


def draft_with_tensors(*suffixes: str) -> CheckpointDraft:
    """A layer of floats alone, by names that another program gives them."""
    draft = CheckpointDraft()
    for suffix in suffixes:
        draft.put(f"{LAYER}.{suffix}", "F32", np.ones((2, 2)))
    return draft


def draft_with_header(layers: object, draft: CheckpointDraft | None = None) -> CheckpointDraft:
    draft = draft or draft_rowwise()
    text = layers if isinstance(layers, str) else json.dumps({"layers": layers})
    draft.metadata["_quantization_metadata"] = text
    return draft


def merge_layers(first: CheckpointDraft, second: CheckpointDraft) -> CheckpointDraft:
    """Both in one file: the second as blocks.1."""
    for key, tensor in second.tensors.items():
        first.tensors[key.replace("blocks.0", "blocks.1")] = tensor
    return first
