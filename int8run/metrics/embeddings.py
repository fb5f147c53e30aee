"""Text encoders against the float ones: the embeddings of the same prompts, and what became of the layers."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from int8run.layers.plan import LayerPlan

# embeddings are wider; so narrow are coordinates of tokens
MAX_COORDINATES = 4


def compute_encoder_metrics(plans: Sequence[LayerPlan], pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
    """How many layers are quantized, and how far their embeddings are from the float encoders'.

    Args:
        plans: of all Linears and embeddings of the encoders.
        pairs: what the pipeline's `encode_prompt` gave with the float encoders, and with these.
    """
    quantized = [plan for plan in plans if plan.skip_reason is None]
    sqnr = [plan.measured["weight_sqnr_db"] for plan in quantized if "weight_sqnr_db" in plan.measured]
    metrics: dict[str, float] = {
        "clip/layers_quantized": len(quantized),
        "clip/layers_float": len(plans) - len(quantized),
    }
    if sqnr:
        metrics |= {"clip/weight_sqnr_db_mean": sum(sqnr) / len(sqnr), "clip/weight_sqnr_db_min": min(sqnr)}
    found = [compared for one, other in pairs for compared in compare_embeddings(one, other)]
    if found:
        cosines, errors = zip(*found, strict=True)
        metrics |= {
            "clip/cosine_mean": sum(cosines) / len(cosines),
            "clip/cosine_min": min(cosines),
            "clip/rel_err": sum(errors) / len(errors),
        }
    return metrics


def compare_embeddings(ours: Any, theirs: Any) -> Iterator[tuple[float, float]]:
    """Cosine and relative error of each embedding tensor in two answers of `encode_prompt`."""
    for a, b in zip(iter_tensors(ours), iter_tensors(theirs), strict=True):
        if a.is_floating_point() and a.shape[-1] > MAX_COORDINATES and a.shape == b.shape and bool(a.any()):
            yield compute_embedding_cosine(a, b), compute_relative_error(a, b)


def iter_tensors(answer: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists and mappings."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, dict):
        yield from iter_tensors(list(answer.values()))
    elif isinstance(answer, list | tuple):
        for part in answer:
            yield from iter_tensors(part)


def compute_embedding_cosine(a: Tensor, b: Tensor) -> float:
    """Mean over tokens of the cosine between the two embeddings of each: a few tokens with huge ones do not hide the others.

    a, b: [..., K].
    """
    return torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=-1).mean().item()


def compute_relative_error(a: Tensor, b: Tensor) -> float:
    """Norm of the difference over the norm of `a`."""
    a, b = a.double(), b.double()
    return ((b - a).norm() / a.norm()).item()
