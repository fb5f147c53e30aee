"""RMSNorms of an INT8 model in one pass over memory, where its backend has a kernel for them.

`assemble` installs them: the norm of queries and keys stands in nearly every block of every family, and
torch's own takes six passes on a CPU. Results differ from torch's by the order of a float32 sum, and in half
precision by being rounded once. Compiled code computes the norms as before: the compiler joins them with what
is around.
"""

from typing import Any

import torch
from torch import Tensor, nn

from int8run.backends.base import ComputesNorms
from int8run.kernels.cpu.linear import DTYPES
from int8run.layers.derived_class import Forward, wrap_forward_of
from int8run.layers.int8_linear import Int8Linear

# classes with the formula x / sqrt(mean(x²) + eps) * weight, as module and name
RMS_NORMS = ("torch.nn.modules.normalization.RMSNorm", "diffusers.models.normalization.RMSNorm")


class FusedNorm:
    """Mixed into the class of a norm: its forward is that of the backend."""

    norm_backend: ComputesNorms


def install_norms(model: nn.Module) -> int:
    """Let the backend of the INT8 layers compute the RMSNorms beside them.

    Args:
        model: changed in place: the norms keep their tensors and get another class.

    Returns:
        The number of norms.
    """
    backend = find_norm_backend(model)
    if backend is None:
        return 0
    n_installed = 0
    for norm in model.modules():
        if is_rms_norm(norm):
            wrap_forward_of(norm, FusedNorm, normalize_in_backend)
            assert isinstance(norm, FusedNorm)
            norm.norm_backend = backend
            n_installed += 1
    return n_installed


def find_norm_backend(model: nn.Module) -> ComputesNorms | None:
    """The first backend of an INT8 layer that computes norms."""
    for layer in model.modules():
        if isinstance(layer, Int8Linear) and isinstance(layer.backend, ComputesNorms):
            return layer.backend
    return None


def is_rms_norm(module: Any) -> bool:
    """Whether a module is an RMSNorm over the last dimension, without a bias, and computed by its class."""
    if isinstance(module, FusedNorm):
        return False
    module_class = type(module)
    if f"{module_class.__module__}.{module_class.__qualname__}" not in RMS_NORMS or module.eps is None:
        return False
    # torch's class calls it `normalized_shape`, diffusers' `dim`
    shape = getattr(module, "normalized_shape", None) or module.dim
    return getattr(module, "bias", None) is None and len(shape) == 1


def normalize_in_backend(own_forward: Forward) -> Forward:
    """The backend's kernel, and where it cannot take an input, the forward of the norm's class."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not can_take(x, self.weight):
            plain: Tensor = own_forward(self, x)
            return plain
        y: Tensor = self.norm_backend.normalize(x, self.weight, self.eps)
        return y

    return forward


def can_take(x: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernel takes an input as it is."""
    if x.device.type != "cpu" or x.dtype not in DTYPES or not x.is_contiguous():
        return False
    return weight is None or (weight.dtype == x.dtype and weight.shape == x.shape[-1:])
