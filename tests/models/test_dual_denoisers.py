"""Two denoisers as one module, and how they get into a pipeline."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from int8run.models.dual_denoisers import DualDenoiser, set_denoiser, split_denoiser


class Part(nn.Module):
    """Adds its number."""

    def __init__(self, number: float):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number))

    def forward(self, x: Tensor, double: bool = False) -> Tensor:
        return (x + self.number) * (2 if double else 1)


def make_pipeline(**modules: nn.Module) -> Any:
    """Remembers what it was given."""
    pipe = SimpleNamespace(given=[], **modules)

    def register_modules(**named: nn.Module) -> None:
        pipe.given += list(named)
        pipe.__dict__.update(named)

    pipe.register_modules = register_modules
    return pipe


HIGH, LOW = Part(1.0), Part(10.0)


def test_forward_calls_the_named_expert() -> None:
    both = DualDenoiser({"transformer": HIGH, "transformer_2": LOW})
    x = torch.zeros(2)

    assert both(expert="transformer", x=x).tolist() == [1, 1]
    assert both(expert="transformer_2", x=x, double=True).tolist() == [20, 20]
    assert [name for name, _ in both.named_parameters()] == ["transformer.number", "transformer_2.number"]


def test_parts_are_keyed_by_the_prefix_of_their_layers() -> None:
    both = DualDenoiser({"transformer": HIGH, "transformer_2": LOW})

    assert split_denoiser(both) == {"transformer.": HIGH, "transformer_2.": LOW}
    assert split_denoiser(HIGH) == {"": HIGH}
    assert split_denoiser(nn.Sequential(HIGH, LOW)).keys() == {""}, "children alone make no experts"


def test_set_denoiser_registers_each_part_under_its_component() -> None:
    pipe = make_pipeline(transformer=Part(0.0), transformer_2=Part(0.0))
    set_denoiser(pipe, DualDenoiser({"transformer": HIGH, "transformer_2": LOW}), "transformer")

    assert (pipe.transformer, pipe.transformer_2) == (HIGH, LOW)
    assert pipe.given == [
        "transformer",
        "transformer_2",
    ]

    pipe = make_pipeline(unet=Part(0.0))
    set_denoiser(pipe, HIGH, "unet")

    assert pipe.unet is HIGH
    assert pipe.given == ["unet"]


def test_set_denoiser_leaves_a_registered_part_alone() -> None:
    pipe = make_pipeline(transformer=HIGH, transformer_2=LOW)
    set_denoiser(pipe, DualDenoiser({"transformer": HIGH, "transformer_2": LOW}), "transformer")

    assert pipe.given == [], "its hooks for offloading would be asked for anew"

    set_denoiser(pipe, DualDenoiser({"transformer": HIGH, "transformer_2": Part(3.0)}), "transformer")

    assert pipe.given == ["transformer_2"]
