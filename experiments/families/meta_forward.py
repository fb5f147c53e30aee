"""One forward of a denoiser on torch's meta device, where nothing is computed or stored.

`table.py` calls it. What a forward decides by the values of its tensors, which meta tensors do not have, is
told here: by a rule for masks, and by formulas for the rest.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.transformers import transformer_cosmos, transformer_hidream_image, transformer_lumina2
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class EveryRowCounts(TorchFunctionMode):
    """Lets forwards choose rows by masks: a mask counts as true everywhere, what `~` makes of it as false.

    A tensor that is asked whether it is true says no: the forwards here ask whether an image is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        # false masks are kept, so that no other tensor has the identity of one
        self.false_masks: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do what `func` does, but for the four that read a mask."""
        if func is Tensor.__bool__:
            return False
        if func is Tensor.__invert__:
            self.false_masks.append(torch.empty_like(args[0]))
            return self.false_masks[-1]
        if func is Tensor.__getitem__ and is_mask(args[1]):
            return self.select_rows(args[0], args[1])
        if func is Tensor.__setitem__ and is_mask(args[1]):
            return None
        return func(*args, **(kwargs or {}))

    def select_rows(self, values: Tensor, mask: Tensor) -> Tensor:
        """All rows of a tensor, or none of them. values: [*mask, ...] -> [rows, ...]"""
        is_false = any(mask is other for other in self.false_masks)
        num_rows = 0 if is_false else math.prod(mask.shape)
        return values.new_empty(num_rows, *values.shape[mask.dim() :])


def is_mask(index: object) -> bool:
    """Whether something that a tensor is indexed by is a mask on the meta device."""
    return isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool


def even_experts(moe: nn.Module, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Replace HiDream's choice by value: experts get as many tokens each."""
    tokens = len(indices) // len(moe.experts)
    for expert in moe.experts:
        expert(x[:tokens])
    return torch.empty_like(x)


def lumina_positions(rope: nn.Module, hidden_states: Tensor, attention_mask: Tensor) -> tuple[Any, ...]:
    """In place of Lumina 2's positions, which it finds by the values of the mask: every text token counts."""
    batch, channels, height, width = hidden_states.shape
    text, image = attention_mask.shape[1], height * width // rope.patch_size**2

    def angles(tokens: int) -> Tensor:
        return torch.empty(batch, tokens, sum(rope.axes_dim) // 2, dtype=torch.complex64, device="meta")

    patches = hidden_states.reshape(batch, image, channels * rope.patch_size**2)
    return patches, angles(text), angles(image), angles(text + image), [text] * batch, [text + image] * batch


def qwen_image_21_forward(
    model: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    timestep: Tensor,
    return_dict: bool,
) -> Tensor:
    """In place of Qwen-Image 2.1's forward, which cuts the sequence by values: all text, then one image."""
    text = model.txt_in(encoder_hidden_states)
    joint = torch.cat([text, model.img_in(hidden_states)], dim=1)
    num_rows, num_text_rows = joint.shape[1], text.shape[1]
    # texts are modulated as of time 0
    embedded = model.time_text_embed(torch.cat([timestep, torch.zeros_like(timestep)]), joint)
    modulation = model.modulation(embedded)
    is_image = torch.empty(num_rows, dtype=torch.bool, device="meta")
    angles = torch.empty(num_rows, model.config.attention_head_dim // 2, dtype=torch.complex64, device="meta")
    for block in model.transformer_blocks:
        joint = block(
            hidden_states=joint,
            modulation=modulation,
            rotary_emb=angles,
            target_token_mask=is_image,
            segments=[(0, num_text_rows, True)],
        )
    return model.proj_out(model.norm_out(joint, embedded, is_image))


def cosmos_mask(mask: Tensor, size: list[int], interpolation: object) -> Tensor:
    """In place of torchvision's resize, which need not be installed."""
    return torch.empty(*mask.shape[:-2], *size, device="meta")


def no_autocast(device_type: str, **settings: object) -> nullcontext[None]:
    """In place of `torch.autocast`, which the meta device does not have; it is only ever switched off."""
    return nullcontext()


TORCHVISION = SimpleNamespace(
    functional=SimpleNamespace(resize=cosmos_mask), InterpolationMode=SimpleNamespace(NEAREST="nearest")
)
# where a forward cannot run on meta: who does it there, under which name, and the same by formula
BY_FORMULA: Sequence[tuple[Any, str, Any]] = (
    (transformer_hidream_image.MOEFeedForwardSwiGLU, "moe_infer", even_experts),
    # puts the output together by sizes that it has as tensors
    (diffusers.HiDreamImageTransformer2DModel, "unpatchify", lambda model, x, sizes, training: x),
    (transformer_lumina2.Lumina2RotaryPosEmbed, "forward", lumina_positions),
    (diffusers.QwenImage21Transformer2DModel, "forward", qwen_image_21_forward),
    (transformer_cosmos, "transforms", TORCHVISION),
    (torch, "autocast", no_autocast),
)


@contextmanager
def run_on_meta() -> Iterator[None]:
    """Let the forwards of diffusers' denoisers run on the meta device."""
    with ExitStack() as stack:
        for owner, name, formula in BY_FORMULA:
            stack.enter_context(mock.patch.object(owner, name, formula, create=True))
        stack.enter_context(EveryRowCounts())
        yield
