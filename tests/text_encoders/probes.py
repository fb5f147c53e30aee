"""What the layers of a built text encoder really multiply by, found out by asking them."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from int8run.text_encoders.load import build_text_encoder, load_text_encoder

OUTER = ("text_model.", "model.language_model.", "language_model.", "model.", "encoder.embed_tokens")


def strip_root(name: str) -> str:
    """A layer's name without what classes and files put before it."""
    if name == "encoder.embed_tokens":
        return "shared"
    for outer in OUTER:
        if name.startswith(outer):
            return strip_root(name.removeprefix(outer))
    return name


def probe_weight(module: nn.Module) -> np.ndarray | None:
    """The weight that a module acts by; None for one that is neither a Linear nor an embedding."""
    with torch.inference_mode():
        if hasattr(module, "in_features"):
            bias, module.bias = module.bias, None  # type: ignore[assignment]
            found = module(torch.eye(module.in_features)).T.numpy()
            module.bias = bias
            return found
        if hasattr(module, "num_embeddings"):
            factor = getattr(module, "embed_scale", 1.0)  # Gemma's tables multiply what they find
            return (module(torch.arange(module.num_embeddings)) / factor).numpy()
    return None


def load_weights(path: Path, kernel_backend: str = "dequantize", **options: Any) -> dict[str, np.ndarray]:
    """Load a file, build its model, ask every layer. By name without outer parts."""
    state, metadata = load_text_encoder(path, kernel_backend=kernel_backend, **options)
    return probe_weights(build_text_encoder(state, metadata, dtype=torch.float32))


def probe_weights(model: nn.Module) -> dict[str, np.ndarray]:
    """The same of a model."""
    found = {name: probe_weight(module) for name, module in model.named_modules()}
    return {strip_root(name): weight for name, weight in found.items() if weight is not None}
