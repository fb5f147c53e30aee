"""Metrics of quantized text encoders: their layers, and their embeddings beside the float ones."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from int8run.layers.plan import LayerPlan
from int8run.utils.tensors import iter_tensors

# So narrow tensors are coordinates of tokens; embeddings are wider.
MAX_COORDINATES = 4


def compute_encoder_metrics(plans: Sequence[LayerPlan], pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """How many layers are quantized, and how far the embeddings are from the float encoders'.

    Args:
        plans: of all Linears and embeddings of the encoders.
        pairs: what the pipeline's `encode_prompt` returned with the float encoders, and with these.
    """
    quantized = [plan for plan in plans if plan.skip_reason is None]
    metrics: dict[str, float] = {
        "clip/layers_quantized": len(quantized),
        "clip/layers_float": len(plans) - len(quantized),
    }
    sqnr = [plan.measured["weight_sqnr_db"] for plan in quantized if "weight_sqnr_db" in plan.measured]
    if sqnr:
        metrics["clip/weight_sqnr_db_mean"] = sum(sqnr) / len(sqnr)
        metrics["clip/weight_sqnr_db_min"] = min(sqnr)
    cosines: list[float] = []
    errors: list[float] = []
    for reference, actual in pairs:
        for cosine, error in compare_embeddings(reference, actual):
            cosines.append(cosine)
            errors.append(error)
    if cosines:
        metrics["clip/cosine_mean"] = sum(cosines) / len(cosines)
        metrics["clip/cosine_min"] = min(cosines)
        metrics["clip/rel_err"] = sum(errors) / len(errors)
    return metrics


def compare_embeddings(reference: Any, actual: Any) -> Iterator[tuple[float, float]]:
    """Cosine and relative error of each embedding in two results of `encode_prompt`.

    Tensors that are not embeddings are skipped: integers, coordinates, and empty negative prompts (all
    zeros).
    """
    for a, b in zip(iter_tensors(reference), iter_tensors(actual), strict=True):
        is_embedding = a.is_floating_point() and a.shape[-1] > MAX_COORDINATES
        if is_embedding and a.shape == b.shape and bool(a.any()):
            yield compute_embedding_cosine(a, b), compute_relative_error(a, b)


def compute_embedding_cosine(a: Tensor, b: Tensor) -> float:
    """The cosine between the embeddings of each token, mean over tokens.

    The mean over tokens keeps a few tokens with huge embeddings from hiding the others.

    Args:
        a: embeddings of a prompt, [..., tokens, K].
        b: others of the same prompt, [..., tokens, K].
    """
    cosines = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1)  # [..., tokens]
    return cosines.mean().item()


def compute_relative_error(reference: Tensor, actual: Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    reference, actual = reference.double(), actual.double()
    ratio: Tensor = (actual - reference).norm() / reference.norm()
    return ratio.item()
