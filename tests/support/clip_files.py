"""Text encoders of the random pipeline as quantized files, written by the tests' own makers, and what they
answer.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from text_encoders.files import FORMATS, File
from torch import Tensor, nn

TOKENS = torch.tensor([[0, 2, 3, 2, 1]])


def own_name(module: nn.Module, name: str) -> str:
    """A parameter's name in ComfyUI's file."""
    return name if "T5" in type(module).__name__ or name.startswith("text_") else f"text_model.{name}"


def linears(module: nn.Module) -> list[str]:
    """Names of all Linears."""
    return [name for name, part in module.named_modules() if isinstance(part, nn.Linear)]


def file_of(module: nn.Module, words: str | Sequence[str], tables: Sequence[str] = ()) -> File:
    """An encoder's file.

    Args:
        words: formats of its Linears, in turn; none: floats.
        tables: names of embeddings that are quantized too.
    """
    file, turn = File(metadata={"format": "pt"}), 0
    words = [words] if isinstance(words, str) else words
    for key, tensor in module.state_dict().items():
        if key == "encoder.embed_tokens.weight":  # once more what `shared` is
            continue
        name, values = own_name(module, key).removesuffix(".weight"), tensor.double().numpy().copy()
        if words and key.removesuffix(".weight") in [*linears(module), *tables]:
            word = words[turn % len(words)]
            turn += 1
            file.real[name], marker = FORMATS[word](file, name, values)
            file.words[name] = word
            if marker is not None:
                file.text(f"{name}.comfy_quant", marker)
        else:
            file.put(own_name(module, key), "F32", values)
    return file


def changed(module: nn.Module, weights: Mapping[str, np.ndarray | Tensor]) -> nn.Module:
    """A copy with other weights. weights: by module name, or by its name in ComfyUI's file."""
    copied = copy.deepcopy(module)
    for name, part in copied.named_modules():
        found = weights.get(name, weights.get(own_name(module, name)))
        if found is not None:
            part.weight.data = torch.as_tensor(found).to(part.weight.dtype)
    return copied


@torch.inference_mode()
def answer(module: nn.Module) -> Tensor:
    """Embeddings of a few tokens."""
    return module(TOKENS).last_hidden_state
