"""Parts that several layouts share."""

from dataclasses import dataclass

import torch
from lora.layouts.names import CLIP_LAYERS
from lora.layouts.sample import ALPHA, RANK, SCALE, Sample
from torch import Tensor


@dataclass(frozen=True)
class PairKeys:
    """How a layout writes the keys of a low-rank pair.

    Args:
        prefix: before the name of the module.
        down: what follows the name in the key of A, [rank, in].
        up: the same of B, [out, rank].
        joined: the name has underscores in place of dots.
    """

    prefix: str
    down: str = "lora_A.weight"
    up: str = "lora_B.weight"
    joined: bool = False

    def add(self, s: Sample, name: str, a: Tensor, b: Tensor, alpha: float | None = None) -> None:
        """Put a pair into a file, with its alpha where it has one."""
        module = self.prefix + (name.replace(".", "_") if self.joined else name)
        s.put(f"{module}.{self.down}", a)
        s.put(f"{module}.{self.up}", b)
        if alpha is not None:
            s.put(f"{module}.alpha", torch.tensor(alpha))


DOWN_UP = ("lora_down.weight", "lora_up.weight")
KOHYA = PairKeys("lora_unet_", *DOWN_UP, joined=True)
DEFAULT_ADAPTER = ("lora_A.default.weight", "lora_B.default.weight")  # PEFT's keys before they are saved


def add_clip_pairs(s: Sample, prefix: str, component: str, level: str) -> None:
    """kohya's names for a CLIP text encoder; `level`: where the model has its layers."""
    for name in CLIP_LAYERS:
        module = f"{level}encoder.layers.1.{name}"
        a, b = s.pair(*s.weight(module, component).shape)
        s.add(
            f"{prefix}text_model_encoder_layers_1_{name.replace('.', '_')}",
            lora_down__weight=a,
            lora_up__weight=b,
            alpha=torch.tensor(1.0),
        )
        s.expect(module, b @ a / RANK, component=component)


def add_hadamard_pairs(s: Sample, prefix: str, out: int, columns: int) -> Tensor:
    """A LoHa's parts, and its dense change."""
    w1_b, w1_a = s.pair(out, columns)
    w2_b, w2_a = s.pair(out, columns)
    s.add(prefix, hada_w1_a=w1_a, hada_w1_b=w1_b, hada_w2_a=w2_a, hada_w2_b=w2_b, alpha=torch.tensor(ALPHA))
    return SCALE * (w1_a @ w1_b) * (w2_a @ w2_b)
