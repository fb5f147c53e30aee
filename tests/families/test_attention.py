"""INT8 attention in every family: found by what is called, and sampled through the real pipeline."""

import pytest
import torch
from families.instance_sets import INSTANCES
from families.test_families import FAMILIES, build_instance, generate_latents

from int8run.backends.attention import ReferenceAttention
from int8run.generate.capture import capture_step
from int8run.generate.capture_attention import watch_attention
from int8run.generate.prompts import Sample
from int8run.layers.assemble import assemble_int8_model
from int8run.ptq.attention import TracedAttentions, give_backend, plan_traced

FAST = ("flux",)
NAMES = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in INSTANCES]


@torch.no_grad()
def plan_instance(name):
    """A plan for each attention that one step of a tiny pipeline computes."""
    pipe, component, denoiser = build_instance(name)
    instance = INSTANCES[name]
    calls = capture_step(pipe, component, denoiser, [Sample(instance.prompt, 7, "0")], instance.sampling)
    traced = TracedAttentions()
    with watch_attention(denoiser, traced.note_call, traced.note_softmax):
        for call in calls:
            denoiser(**call)
    planned = plan_traced(traced, FAMILIES[instance.family].find_skip_reason)
    give_backend(planned, ReferenceAttention(), asked="auto")
    return planned


SPARSE = "kandinsky6_sr"  # leaves out blocks of tokens, by torch's flex_attention
DENSE = [name for name in NAMES if name != pytest.param(SPARSE, marks=pytest.mark.slow)]


@pytest.mark.slow
def test_sparse_attention_stays_float_with_the_reason():
    reasons = {one.plan.skip_reason for one in plan_instance(SPARSE)}
    assert reasons == {"multiplies its matrices itself, not by torch's scaled_dot_product_attention"}


@pytest.mark.parametrize("name", DENSE)
def test_two_steps_with_int8_attention_are_close_to_float(name):
    """Every attention is INT8, unless a rule of the family keeps its block float."""
    _, _, denoiser = build_instance(name)
    family = FAMILIES[INSTANCES[name].family]
    planned = plan_instance(name)
    layers = {one.plan.name: one.layer for one in planned if one.layer is not None}

    int8 = assemble_int8_model(denoiser, {}, family, layers)
    (expected,), (latents,) = (
        generate_latents(name, {kind: model})[kind].trajectories
        for kind, model in (("float", denoiser), ("int8", int8))
    )

    by_rule = [one for one in planned if one.plan.skip_reason is not None]
    assert all(one.plan.skip_reason == family.find_skip_reason(one.plan.name) for one in by_rule)
    assert layers and len(layers) + len(by_rule) == len(planned)
    error = (latents - expected).float().norm() / expected.float().norm()
    assert 0 < error < 0.02
