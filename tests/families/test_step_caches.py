"""Which step caches the denoisers of each family cannot have: each is tried, see `step_cache_fit`."""

from typing import Any

import pytest
from families.instance_sets import DAILY, INSTANCES
from support.tiers import slow_except
from torch import nn

from int8run.cache_steps.registry import list_cache_names, make_cache
from int8run.generate.capture import capture_step
from int8run.generate.prompts import Sample
from int8run.models.dual_denoisers import DualDenoiser
from int8run.pipeline.step_cache_fit import describe_calls, find_wrong_output, iterate_calls

pytestmark = pytest.mark.usefixtures("one_thread")
# a family that stands nowhere here can have all
REFUSED = {
    ("first_block", "seacache"): [
        "flux2",
        "flux2_klein",
        "chroma",
        "flux2_edit",
        "flux2_klein_edit",
        "fibo",
        "fibo_edit",
    ],
    ("fastercache",): [
        "z_image",
        "ernie_image",
        "lumina2",
        "z_image_img2img",
        "z_image_inpaint",
        "kandinsky5_t2i",
        "kandinsky5_i2i",
        "kandinsky5_t2v",
        "kandinsky5_i2v",
        "prx",
    ],
    ("seacache",): ["krea2", "minimax_h3", "minimax_h3_pruned", "minimax_h3_fl2va"],
    ("fastercache", "first_block", "magcache", "seacache"): [
        "sd15",
        "sdxl",
        "hidream",
        "fibo2",
        "fibo2_edit",
        "kandinsky6",
        "kandinsky6_i2v",
        "kandinsky6_sr",
        "joyimage_edit",
        "joyimage_edit_plus",
    ],
    ("fastercache", "first_block", "seacache"): ["sd3"],
    ("fastercache", "seacache"): ["z_image_omni", "ideogram4"],
    ("first_block", "magcache", "seacache"): ["wan_vace", "wan_animate", "wan_animate_2"],
}
NAMES = slow_except(DAILY, INSTANCES)


def list_refused(name: str) -> set[str]:
    """The caches that a family cannot have."""
    return {cache for caches, names in REFUSED.items() if name in names for cache in caches}


@pytest.mark.parametrize("name", NAMES)
def test_caches_fit_as_the_table_says(name: str) -> None:
    instance = INSTANCES[name]
    pipe: Any = instance.build()
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.eval()
    component = "transformer" if pipe.components.get("transformer") is not None else "unet"
    denoiser = getattr(pipe, component)
    if pipe.components.get("transformer_2") is not None:
        parts = {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
        denoiser = DualDenoiser(parts)
    batch = [Sample(instance.prompt, 1, "a")]
    calls = capture_step(pipe, component, denoiser, batch, instance.sampling)
    described = describe_calls(denoiser, calls, len(batch))
    part, call = next(iterate_calls(denoiser, calls))

    refused = set()
    for cache in list_cache_names():
        if find_wrong_output(make_cache(cache), part, call, described) is not None:
            refused.add(cache)

    assert refused == list_refused(name)
    assert [name for name, module in part.named_modules() if "forward" in module.__dict__] == []
