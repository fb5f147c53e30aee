"""What a run says in the terminal about the model that it built, and which files it names."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from support.run_job import make_spec
from torch import nn

from int8run.layers.plan import CONV, LayerPlan
from int8run.pipeline.controlnets import BuiltControlnet
from int8run.tasks.build_description import describe_build
from int8run.tasks.run_logs import list_result_files


def build_plan(name: str, backend: str, *, kind: str = "linear") -> LayerPlan:
    """The plan of a layer that is INT8 by a backend; without one it stays float."""
    plan = LayerPlan(name, 4, 4, None if backend else "first layer", kind=kind)
    plan.backend_used = backend
    return plan


def build_model(vae: object, controlnets: Sequence[BuiltControlnet] = ()) -> Any:
    """A model that was built, as far as its description reads it."""
    return SimpleNamespace(
        family=SimpleNamespace(name="flux"),
        device="cpu",
        plans=[build_plan("a", "cpu")],
        num_params=16,
        vae=vae,
        controlnets=controlnets,
        encoders=SimpleNamespace(built={}),
        loras=None,
    )


def test_the_line_about_the_build_names_an_int8_vae() -> None:
    plans = [build_plan("in", ""), build_plan("q", "cpu"), build_plan("conv", "reference", kind=CONV)]

    built = build_model(SimpleNamespace(plans=plans))
    facts = dict(describe_build(make_spec(["int8.vae=int8"]), built, is_reused=False))

    assert facts["vae"] == "int8 2 of 3 layers on cpu+reference"
    assert "vae" not in dict(describe_build(make_spec([]), build_model(None), is_reused=False))


def test_the_line_about_the_build_names_controlnets_and_why_one_is_float() -> None:
    linear = nn.Linear(500, 500)
    plans = [build_plan("in", ""), build_plan("q", "cpu")]
    plans[1].macs_share = 0.875
    kinds = [
        BuiltControlnet("controlnet", linear, linear, 0, plans),
        BuiltControlnet("controlnet_2", linear, linear, 0, plans[:1]),
    ]

    facts = dict(describe_build(make_spec([]), build_model(None, kinds), is_reused=False))

    assert facts["controlnet"] == "int8 1 of 2 layers on cpu, 87.5% of its multiply-adds, 1.0 MB"
    assert facts["controlnet_2"] == "float, 1.0 MB (first layer)"


def test_the_tables_of_all_that_can_be_int8_are_named() -> None:
    assert list(list_result_files(make_spec([])).values()) == ["grid.png", "layers.csv", "metrics.json"]
    assert list(list_result_files(make_spec(["int8.vae=int8", "clip=int8_convrot"])).values()) == [
        "grid.png",
        "layers.csv",
        "text_encoders.csv",
        "vae.csv",
        "metrics.json",
    ]
