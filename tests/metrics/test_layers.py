"""Facts about the layers of a denoiser, from calls of it."""

import torch
from torch import nn

from int8run.metrics.layers import count_macs


class TwoLayers(nn.Module):
    """A Linear on tokens and a convolution on an image."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.convolution = nn.Conv2d(3, 5, kernel_size=2)

    def forward(self, tokens: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        return self.linear(tokens).sum() + self.convolution(image).sum()


def test_multiply_adds_are_those_of_all_calls():
    calls = [{"tokens": torch.zeros(1, rows, 4), "image": torch.zeros(1, 3, 3, 3)} for rows in (7, 2)]

    macs = count_macs(TwoLayers(), calls)

    # 2 x 2 output pixels of 5 channels, each from 3 channels of 2 x 2, in both calls
    assert macs == {"linear": (7 + 2) * 4 * 6, "convolution": 2 * (2 * 2 * 5) * (3 * 2 * 2)}
