"""Denoisers that share the steps of one call."""

from types import SimpleNamespace
from typing import Any

from torch import nn

from int8run.generate.step_denoisers import StepDenoisers
from int8run.models.dual_denoisers import DualDenoiser

SCHEDULE = ((0.0, "float"), (0.5, "int8"))


def make_pipe(**components: nn.Module) -> Any:
    """Remembers which components it was given."""
    pipe = SimpleNamespace(given=[], **components)

    def register_modules(**named: nn.Module) -> None:
        pipe.given += list(named)
        pipe.__dict__.update(named)

    pipe.register_modules = register_modules
    return pipe


def test_each_step_has_the_denoiser_of_its_fraction() -> None:
    exact, int8 = nn.Identity(), nn.Identity()
    pipe = make_pipe(transformer=int8)
    steps = StepDenoisers(SCHEDULE, {"float": exact, "int8": int8})

    names, used = [], []
    for fraction in (0.0, 0.25, 0.5, 0.75):
        names.append(steps.install(pipe, "transformer", fraction))
        used.append(pipe.transformer)

    assert names == ["float", "float", "int8", "int8"]
    assert used == [exact, exact, int8, int8]
    assert pipe.given == ["transformer"] * 2, "a denoiser that stays is not given again"


def test_after_the_last_step_nothing_changes() -> None:
    exact, int8 = nn.Identity(), nn.Identity()
    pipe = make_pipe(transformer=int8)
    steps = StepDenoisers(((0.0, "int8"), (1.0, "float")), {"float": exact, "int8": int8})

    steps.install(pipe, "transformer", 1.0)

    assert pipe.transformer is int8


def test_who_left_is_told_once_the_other_one_is_there() -> None:
    exact, int8 = nn.Identity(), nn.Identity()
    pipe = make_pipe(transformer=exact)
    told = []

    def note(left: nn.Module) -> None:
        told.append((left, pipe.transformer))

    steps = StepDenoisers(SCHEDULE, {"float": exact, "int8": int8}, on_change=note)
    for fraction in (0.0, 0.5, 0.75):
        steps.install(pipe, "transformer", fraction)

    assert told == [(exact, int8)]


def test_two_experts_and_further_components_change_together() -> None:
    high, low, int8_high, int8_low, control, int8_control = (nn.Identity() for _ in range(6))
    pipe = make_pipe(transformer=int8_high, transformer_2=int8_low, controlnet=int8_control)
    exact = DualDenoiser({"transformer": high, "transformer_2": low})
    int8 = DualDenoiser({"transformer": int8_high, "transformer_2": int8_low})
    components = {"float": {"controlnet": control}, "int8": {"controlnet": int8_control}}
    steps = StepDenoisers(SCHEDULE, {"float": exact, "int8": int8}, components)

    steps.install(pipe, "transformer", 0.0)
    assert (pipe.transformer, pipe.transformer_2, pipe.controlnet) == (high, low, control)
    steps.install(pipe, "transformer", 0.5)
    assert (pipe.transformer, pipe.transformer_2, pipe.controlnet) == (int8_high, int8_low, int8_control)
